"""A run in use is the run as it was trained, whatever config the command names: its clips' size and rate, its data, its files."""

import json
import shutil

import numpy as np
import pytest
from folders import write_clip, write_metadata
from PIL import Image
from tiny import WIDTH, tiny_config, write_llm
from written import write_run

from rise_jax import Pipeline, run_config
from rise_jax.evaluate import evaluate
from rise_jax.export import export
from rise_jax.generate import generate
from rise_jax.validate import check_use
from rise_jax.video import read_video

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on clips of 5 frames, 16 x 24 pixels, 16 a second, in a folder; and its language model."""
    folder = tmp_path_factory.mktemp("use")
    write_llm(folder / "llm")
    names = [f"{number}.mp4" for number in range(4)]
    rows = [{"file_name": name, "prompt": f"clip {name[0]}", "split": "heldout"} for name in names]
    write_metadata(folder / "clips", rows)
    for name in names:
        write_clip(folder / "clips" / name)
    write_run(trained(folder), folder / "run")
    return folder


def trained(folder, **changes):
    data = dict(data__source="folder", data__path=str(folder / "clips"), data__width=24, data__frames=5, data__fps=16.0)
    return tiny_config(2, folder / "llm", **data | changes)


def typed(folder, **sample):
    """What a command makes that names another clip size, rate and source: the preset's."""
    return tiny_config(2, folder / "llm", data__fps=8.0, **{f"sample__{name}": value for name, value in sample.items()})


def test_videos_have_the_size_and_the_rate_of_the_runs_own_clips(folder):
    assert generate(typed(folder, prompts="a"), folder / "run") == 0
    video, fps = read_video(folder / "run" / "samples" / "000.mp4")
    assert video.shape == (5, 16, 24, 3) and fps == 16
    assert Pipeline.from_run(folder / "run")("a").videos.shape == (1, 5, 16, 24, 3)


def test_a_size_that_the_run_was_given_for_its_own_samples_is_not_the_commands(folder, tmp_path):
    """As with evaluate; in Python it is the default."""
    write_run(trained(folder, sample__height=32), tmp_path / "run")
    assert generate(typed(folder, prompts="a"), tmp_path / "run") == 0
    assert read_video(tmp_path / "run" / "samples" / "000.mp4")[0].shape == (5, 16, 24, 3)
    assert Pipeline.from_run(tmp_path / "run")("a").videos.shape == (1, 5, 32, 24, 3)


def test_videos_have_the_size_that_is_asked_for(folder):
    assert generate(typed(folder, prompts="a", frames=1, width=16), folder / "run") == 0
    assert Image.open(folder / "run" / "samples" / "000.png").size == (16, 16)
    out = Pipeline.from_run(folder / "run")("a", frames=1, width=16)
    assert out.videos.shape == (1, 1, 16, 16, 3)


def test_the_samples_of_an_earlier_call_are_kept_apart(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("samples*"))
    assert generate(typed(folder, prompts="a||b||c"), tmp_path / "run") == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "run" / "samples").iterdir()}
    assert first.keys() == {"000.mp4", "001.mp4", "002.mp4", "samples.jsonl", "contact_sheet.png"}
    assert generate(typed(folder, prompts="a", frames=1, width=16), tmp_path / "run") == 0
    left = {path.name for path in (tmp_path / "run" / "samples").iterdir()}
    assert left == {"000.png", "samples.jsonl", "contact_sheet.png"}
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "samples-1").iterdir()} == first


def test_a_run_on_a_folder_is_evaluated_on_it(folder):
    """Clips of a folder have no attributes to score; the command's own source, scenes, is not looked at. What was measured before is
    kept."""
    (folder / "run" / "evaluation.json").write_text("before")
    assert evaluate(typed(folder, count=3), folder / "run") == 0
    assert (folder / "run" / "evaluation-1.json").read_text() == "before"
    result = json.loads((folder / "run" / "evaluation.json").read_text())
    assert "attribute_accuracy" not in result and result["prompts"] == 3
    assert result["sample"]["width"] == 24 and np.isfinite(result["heldout_loss"]["true"]).all()


def test_an_export_keeps_the_size_and_the_rate(folder):
    assert export(typed(folder), folder / "run") == 0
    card = json.loads((folder / "run" / "export" / "adapter" / "adapter.json").read_text())
    assert [card["sample"][name] for name in ("frames", "height", "width")] == [5, 16, 24] and card["fps"] == 16
    assert Pipeline.from_export(folder / "run" / "export")("a").videos.shape == (1, 5, 16, 24, 3)


def test_files_that_were_moved_are_told_by_their_paths(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "llm", tmp_path / "llm")
    write_llm(tmp_path / "other", seed=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["llm"]["path"] = "/nowhere"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="/nowhere"):
        Pipeline.from_run(tmp_path / "run")
    pipe = Pipeline.from_run(tmp_path / "run", paths={"llm": str(tmp_path / "llm")})
    np.testing.assert_array_equal(pipe("a").videos, Pipeline.from_run(folder / "run")("a").videos)
    paths = run_config.typed_paths(tmp_path / "run", {"model.llm.path": str(tmp_path / "llm")})
    assert generate(typed(folder, prompts="a"), tmp_path / "run", paths) == 0
    with pytest.raises(ValueError, match="trained on the states of another LLM or condition: sha256 differ"):
        Pipeline.from_run(tmp_path / "run", paths={"llm": str(tmp_path / "other")})
    with pytest.raises(ValueError, match="paths names 'lm'; files belong to llm, dit, vae, native, null, instruction"):
        Pipeline.from_run(tmp_path / "run", paths={"lm": "/nowhere"})


def test_clips_that_were_moved_are_told_by_their_path(folder, tmp_path):
    """In use alone: a run in training goes on with the clips it began with (test_workdir.py)."""
    shutil.copytree(folder / "clips", tmp_path / "clips")
    write_run(trained(folder, data__path="/nowhere"), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="data.path=/nowhere is no folder"):
        evaluate(typed(folder, count=3), tmp_path / "run")
    paths = run_config.typed_paths(tmp_path / "run", {"data.path": str(tmp_path / "clips")})
    assert evaluate(typed(folder, count=3), tmp_path / "run", paths) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["data"] == {"source": "folder", "path": str(tmp_path / "clips")} and result["prompts"] == 3


def test_scenes_have_no_path_to_be_typed(folder, tmp_path):
    write_run(trained(folder, data__source="scenes", data__path=""), tmp_path / "run")
    with pytest.raises(ValueError, match='data.path: "" -> "clips"'):
        run_config.typed_paths(tmp_path / "run", {"data.path": "clips"})


LONG = {
    "a caption": ({"rephrased": "x" * 161}, "a rephrased caption has 161 tokens, model.llm.max_new=160 is the limit")
}
LONG["a prompt"] = ({"prompt": "x" * 161}, "the prompt has 161 tokens, at most 160 are allowed .model.llm.max_prompt.")


@pytest.mark.parametrize("text", LONG)
def test_a_held_out_text_over_the_budget_is_told_before_anything_is_made(folder, tmp_path, monkeypatch, text):
    """With what can be done about it in use: the budget is the run's."""
    columns, told = LONG[text]
    rows = [{"file_name": f"{number}.mp4", "prompt": f"clip {number}", "split": "heldout"} for number in range(4)]
    rows[2] |= columns
    shutil.copytree(folder / "clips", tmp_path / "clips")
    write_metadata(tmp_path / "clips", rows)
    write_run(trained(folder, data__path=str(tmp_path / "clips")), tmp_path / "run")
    made = []
    monkeypatch.setattr(Pipeline, "render", lambda *given, **settings: made.append(given))
    with pytest.raises(ValueError, match=f"1 of 4 held-out texts .*: {told}. Shorten .*, or leave their rows") as error:
        evaluate(typed(folder), tmp_path / "run")
    assert "raise" not in str(error.value) and not made


def test_another_vae_than_in_training_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("written.load_vae", lambda path: ({}, {"sha256": "c0de"}))
    write_run(trained(folder), tmp_path / "run")
    with pytest.raises(ValueError, match="run was trained on another VAE: {'sha256': 'c0de'} then, {} now"):
        Pipeline.from_run(tmp_path / "run")


def test_what_the_run_has_settled_cannot_be_typed_otherwise(folder):
    own = {"data.width": 24, "model.dit.patch": (1, 8, 8), "model.llm.path": "/elsewhere"}
    free = {"run.steps": 9, "sample.steps": 3, "mesh.data": 2, "model.attention": "xla", "data.max_bad": 0.5}
    assert run_config.typed_paths(folder / "run", own | free) == {"llm": "/elsewhere"}
    with pytest.raises(ValueError, match="run was made with another config:") as told:
        run_config.typed_paths(folder / "run", own | {"data.width": 16, "model.dit.depth": 3, "model.dit.path": "wan"})
    lines = str(told.value).splitlines()[1:]
    assert lines[:3] == ["  data.width: 24 -> 16", "  model.dit.depth: 2 -> 3", '  model.dit.path: "" -> "wan"']
    assert lines[3:] == ["Leave these out: the run's own values are used."]


def test_an_llm_of_another_width_is_called_another_llm(folder, tmp_path):
    """Not parameters that do not fit."""
    wide = write_llm(tmp_path / "wide", width=2 * WIDTH)
    with pytest.raises(ValueError, match="trained on the states of another LLM or condition: sha256 differ"):
        Pipeline.from_run(folder / "run", paths={"llm": str(wide)})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(sample__width=20), "sample.width=20 is not a multiple of .* 8 x 1; nearest: 16"),
        (dict(sample__frames=4), "sample.frames=4 is not 4n.1; nearest: 5"),
        (dict(sample__steps=0), "sample.steps=0 must be at least 1"),
        (dict(data__max_bad=5.0), "data.max_bad=5.0 must be from 0 to 1; nearest: 1"),
        (dict(run__seed=2**32), f"run.seed={2**32} must be at most {2**32 - 1}"),
        (dict(model__attention="cudn"), "model.attention='cudn' is unknown .nearest: cudnn"),
    ],
)
def test_what_the_runs_model_cannot_do_is_told(folder, changes, told):
    config = tiny_config(2, folder / "llm", **changes)
    with pytest.raises(ValueError, match=told):
        check_use(config, trained(folder))


def test_scenes_hold_out_so_many_prompts(folder):
    """A folder has as many as it has: more are no fault."""
    config = typed(folder, count=2000)
    with pytest.raises(ValueError, match="sample.count=2000 must be at most 1000 .*; nearest: 1000"):
        check_use(config, trained(folder, data__source="scenes"))
    check_use(config, trained(folder))
