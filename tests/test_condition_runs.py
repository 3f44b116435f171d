"""Runs by what conditions the video: one loss in both modes of states, never mixed up, side by side."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import write_umt5
from noisy import noise
from tiny import tiny_config, write_llm
from written import write_run

from rise_jax import Pipeline
from rise_jax.build import language_from, model_from
from rise_jax.data.sources import Text
from rise_jax.evaluate import evaluate
from rise_jax.generate import generate
from rise_jax.language import states_in_batch
from rise_jax.sharding import make_mesh
from rise_jax.sheets import comparison_sheet
from rise_jax.step import make_eval_step
from rise_jax.train import train
from rise_jax.video import read_video

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle", "ein Kreis auf Weiß, klein und rot, links oben", "7"]
ALONE = ("encode", "rewrite_then_encode")  # the LLM reads some text alone


def small(llm, condition, **overrides):
    return tiny_config(1, llm, model__condition=condition, run__batch_size=8, data__texts=3, **overrides)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def workdirs(llm, tmp_path_factory):
    """A run trained on the states of its step, with steps so large that videos differ; and one as if trained on cached states."""
    folder = tmp_path_factory.mktemp("runs")
    settings = dict(data__states="in_step", run__steps=3, optim__learning_rate=0.03)
    assert train(small(llm, "encode", **settings), folder / "encode") == 0
    write_run(small(llm, "rewrite_then_encode"), folder / "rewrite_then_encode")
    return folder


@pytest.mark.parametrize("name", ALONE)
def test_states_of_the_step_give_the_loss_of_cached_ones(llm, name):
    config = small(llm, name)
    kind = language_from(config.model)
    pairs = [kind.pair(Text(prompt, prompt * 2)) for prompt in PROMPTS]
    states, mask = kind.teach(pairs)
    video = np.random.default_rng(0).integers(0, 256, (3, 1, 16, 16, 3)).astype(np.uint8)
    clips = {"video": video, "index": np.arange(3, dtype=np.int32)}
    model = model_from(config.model, kind.width, states_in_batch)
    params = noise(model.abstract)
    modes = (
        (states_in_batch, {}, {"states": states, "states_mask": mask}),
        (kind.states_in_step, {"llm": kind.params, "prefix": kind.prefix}, kind.tokens(pairs)),
        (states_in_batch, {}, {"states": np.roll(states, 1, axis=0), "states_mask": np.roll(mask, 1, axis=0)}),
    )
    losses = []
    for source, frozen, rows in modes:
        step = make_eval_step(model_from(config.model, kind.width, source))
        losses.append(
            jax.jit(step)(params, frozen | {"vae": {}}, clips | rows, jnp.array([0.5, 0.99]), jax.random.key(0))
        )
    assert losses[0].shape == (3, 2), "clips by times"
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert np.abs(losses[2] / losses[0] - 1).max() > 1e-3


def test_a_run_of_another_condition_cannot_be_started_from(llm, workdirs, tmp_path):
    config = small(llm, "encode", run__init_from=str(workdirs / "rewrite_then_encode"))
    with pytest.raises(ValueError, match="run.init_from was trained on .* condition: condition, instruction differ"):
        train(config, tmp_path / "run")


def test_a_run_is_not_read_as_one_of_another_condition(workdirs, tmp_path):
    shutil.copytree(workdirs / "encode", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["condition"] = "rewrite_then_encode"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="run was trained on the states of .*: condition, instruction differ"):
        Pipeline.from_run(tmp_path / "run")


def test_evaluate_says_nothing_of_rephrasings_where_there_are_none(llm, workdirs, capsys):
    config = small(llm, "encode", sample__count=3, sample__batch_size=3)
    assert evaluate(config, workdirs / "encode") == 0
    result = json.loads((workdirs / "encode" / "evaluation.json").read_text())
    assert (
        result["condition"] == "encode" and result["prompts"] == 3 and np.isfinite(result["heldout_loss"]["true"]).all()
    )
    assert {"shuffled", "zeroed", "attribute_accuracy"} <= set(result)
    assert "kept_by" not in json.dumps(result) and "rephrasing" not in capsys.readouterr().out


@pytest.mark.parametrize(("frames", "columns"), [(1, (8, 160)), (5, (8, 310))])
def test_runs_stand_side_by_side_with_the_same_prompts_and_seeds(llm, workdirs, frames, columns):
    """Columns begin behind a margin of 8 and the column before, which is as wide as its title (144) or its frames of 96, 2 between."""
    prompts = PROMPTS[:2]
    pipes = {
        name: Pipeline.from_run(workdirs / name, mesh=make_mesh()) for name in ALONE
    }  # as generate does: bit for bit
    made = {name: pipe(prompts, seed=4, frames=frames) for name, pipe in pipes.items()}
    config = small(llm, "rephrase", sample__frames=frames, sample__seed=4, sample__prompts="||".join(prompts))
    config.sample.beside = str(workdirs / "encode")
    samples = workdirs / "rewrite_then_encode" / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    assert generate(config, workdirs / "rewrite_then_encode") == 0
    records = [json.loads(line) for line in (samples / "samples.jsonl").read_bytes().splitlines()]
    suffix = "png" if frames == 1 else "mp4"
    expected = [
        dict(file_name=f"{folder}{i:03d}.{suffix}", run=name, condition=name, prompt=prompt, rephrased=text, seed=4 + i)
        for name, folder in (("rewrite_then_encode", ""), ("encode", "1-encode/"))
        for i, (prompt, text) in enumerate(zip(prompts, made[name].rephrased))
    ]
    assert records == expected and made["encode"].rephrased == [None, None] and all(made[ALONE[1]].rephrased)
    videos = np.stack([made[record["run"]].videos[record["seed"] - 4] for record in records])
    for n, record in enumerate(records):
        kept = read_video(samples / record["file_name"])[0]
        distances = [np.abs(kept.astype(int) - video).mean() for video in videos]
        assert np.argmin(distances) == n and (frames > 1 or distances[n] == 0)  # mp4 is lossy
    sheet = read_video(samples / "contact_sheet.png")[0][0]
    tops = [places_of(video, sheet, columns[n // 2]) for n, video in enumerate(videos)]
    assert [len(found) for found in tops] == [1] * 4
    assert tops[0] == tops[2] and tops[1] == tops[3] and tops[1][0] >= tops[0][0] + 96 + 8
    titles = [sheet[8 : tops[0][0] - 8, left : left + 136] for left in columns]
    assert all(title.min() < 100 for title in titles) and (titles[0] != titles[1]).any()


def places_of(video, sheet, left):
    """Rows of the sheet at which the first frame and the last shown one stand, enlarged to 96 pixels, from column `left` on."""
    shown = video[[0, 2, 4]] if len(video) == 5 else video
    strip = np.concatenate([frame.repeat(6, 0).repeat(6, 1) for frame in shown], axis=1)
    gaps = np.concatenate([np.arange(96) + n * 98 for n in range(len(shown))]) + left
    return [top for top in range(len(sheet) - 95) if (sheet[top : top + 96, gaps] == strip).all()]


@pytest.mark.parametrize(
    ("beside", "error", "message"),
    [
        ("{0}/encode||{0}/nowhere", FileNotFoundError, "nowhere holds no run"),
        ("{0}/empty", FileNotFoundError, "empty holds no checkpoint yet"),
        ("{0}/encode|| ", ValueError, "workdir 2 of 2 in sample.beside is empty"),
        ("{0}/encode||{0}/encode/", ValueError, "names .*encode twice"),
        ("{0}/rewrite_then_encode", ValueError, "or names the --workdir"),
    ],
)
def test_workdirs_that_cannot_stand_beside_are_refused_before_anything_is_made(llm, workdirs, beside, error, message):
    samples = workdirs / "rewrite_then_encode" / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    (workdirs / "empty").mkdir(exist_ok=True)
    shutil.copy(workdirs / "encode" / "config.json", workdirs / "empty")
    config = small(llm, "encode", sample__prompts="a", sample__beside=beside.format(workdirs))
    with pytest.raises(error, match=message):
        generate(config, workdirs / "rewrite_then_encode")
    assert not samples.exists()


def test_a_comparison_needs_one_video_and_text_per_run_and_prompt():
    video = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(
        ValueError, match=r"2 titles, 1 prompts, \[1, 2\] videos, \[1, 1\] rephrasings: not one for one"
    ):
        comparison_sheet([[video], [video, video]], ["a", "b"], ["p"], [[None], [None]])
    with pytest.raises(ValueError, match="0 titles, 0 prompts"):
        comparison_sheet([], [], [], [])


def test_a_run_on_native_states_needs_no_adapter(tmp_path):
    config = tiny_config(1, tmp_path / "none", run__steps=2, run__batch_size=8, data__texts=3)
    config.model.native.update(path=str(write_umt5(tmp_path / "t5", width=16)), length=100, dtype="float32")
    config.model.update(condition="native", adapter=dict(kind="identity", d_ctx=16, registers=0, time_cond="off"))
    assert train(config, tmp_path / "run") == 0
    pipe = Pipeline.from_run(tmp_path / "run")
    assert [*pipe.params["adapter"]] == ["null"] and pipe("red").rephrased == [None]
    config.model.adapter.registers = 4
    with pytest.raises(ValueError, match="model.adapter.registers=4: the adapter 'identity' adds none; nearest: 0"):
        train(config, tmp_path / "other")
