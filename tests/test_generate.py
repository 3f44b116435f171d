"""Prompts as they are given, and what --mode=generate and --mode=evaluate refuse before anything is made."""

import json
import shutil

import numpy as np
import pytest
from encoders import write_umt5
from tiny import tiny_config, write_llm
from written import write_run

from rise_jax import Pipeline
from rise_jax.condition_kinds import check_prompts
from rise_jax.evaluate import evaluate
from rise_jax.generate import Made, generate, read_prompts, sheet_of
from rise_jax.pipeline import Output
from rise_jax.sheets import comparison_sheet, contact_sheet


def test_prompts_are_a_text_several_or_a_file(tmp_path):
    assert read_prompts("a cat") == ["a cat"]
    assert read_prompts("a cat || ein Hund") == ["a cat", "ein Hund"]
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  ein Hund \n", encoding="utf-8")
    assert read_prompts(str(file)) == ["a cat", "ein Hund"]


@pytest.mark.parametrize(
    ("prompts", "message"), [("", "no prompt given"), ("  ", "no prompt given"), ("a||", "prompt 2 of 2 is empty")]
)
def test_empty_prompts_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(prompts)


def test_a_text_longer_than_any_file_name_is_a_text():
    assert read_prompts("a cat " * 100) == [("a cat " * 100).strip()]


def test_a_name_of_a_file_that_is_not_there_is_no_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(FileNotFoundError, match=r"promts.txt' is no file \(nearest: prompts.txt\)"):
        read_prompts(str(tmp_path / "promts.txt"))
    assert read_prompts("a page that says prompts.txt") == ["a page that says prompts.txt"]


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompt given"):
        read_prompts(str(tmp_path / "prompts.txt"))


def test_a_sheet_shows_no_more_prompts_than_a_viewer_takes():
    videos = np.random.default_rng(0).integers(256, size=(70, 1, 8, 8, 3), dtype=np.uint8)
    prompts, rephrased = [[f"{what} {number}" for number in range(70)] for what in ("prompt", "rephrased")]
    made = Made("a", "", "rephrase", Output(videos, rephrased, list(range(70))), 8.0)
    beside = made._replace(name="b", folder="1-b")
    np.testing.assert_array_equal(sheet_of([made], prompts), contact_sheet(videos[:64], prompts[:64], rephrased[:64]))
    expected = comparison_sheet([videos[:64]] * 2, [made.title, beside.title], prompts[:64], [rephrased[:64]] * 2)
    np.testing.assert_array_equal(sheet_of([made, beside], prompts), expected)


def changed(workdir, part, path):
    """The run's config names another file for a part of the model."""
    config = json.loads((workdir / "config.json").read_text())
    config["model"][part]["path"] = str(path)
    (workdir / "config.json").write_text(json.dumps(config))


def elsewhere(workdir):
    """The run's LLM is gone: whoever loads it says so."""
    changed(workdir, "llm", "/nowhere")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Without its LLM: a run. With it: one that reads prompts of 4 tokens at most, one on patches of 16 pixels, one whose LLM was
    replaced, one on another VAE, one whose instruction was saved in another encoding."""
    folder = tmp_path_factory.mktemp("runs")
    config = lambda **changes: tiny_config(1, llm, **changes)
    llm = write_llm(folder / "llm")
    shutil.copy(llm / "instruction.txt", llm / "odd.txt")
    write_run(config(), folder / "first")
    elsewhere(folder / "first")
    write_run(config(model__llm__max_prompt=4), folder / "terse")
    write_run(config(model__dit__patch=(1, 16, 16)), folder / "coarse")
    write_run(config(), folder / "swapped")
    changed(folder / "swapped", "llm", write_llm(folder / "second", seed=1))
    meta = write_run(config(), folder / "recoded") / "checkpoints" / "1" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"vae": {}', '"vae": {"sha256": "c0de"}'))
    write_run(config(model__llm__instruction=str(llm / "odd.txt")), folder / "odd")
    (llm / "odd.txt").write_bytes("Sag mehr über es.".encode("latin-1"))
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text((llm / "config.json").read_text())
    return folder


BESIDE = [
    ("terse", {}, "terse: the prompt has 12 tokens, at most 4 are allowed"),
    ("coarse", dict(height=24), "coarse: sample.height=24 is not a multiple of .* 16 x 1; nearest: 32"),
    ("swapped", {}, "swapped: it was trained on the states of another LLM or condition: sha256 differ"),
    ("recoded", {}, "recoded: it was trained on another VAE: {'sha256': 'c0de'} then, {} now"),
    ("odd", {}, "odd: .*odd.txt, line 1: byte 0xfc is not UTF-8; save the file as UTF-8"),
    ("other", {}, "other holds no run: its config.json is that of something else"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes", "told"), BESIDE)
def test_what_is_wrong_with_a_run_beside_is_said_before_the_first_is_loaded(runs, name, sizes, told):
    config = tiny_config(1, runs / "llm", sample__prompts="a red circle", sample__beside=str(runs / name))
    config.sample.update(sizes)
    with pytest.raises(ValueError, match=told):
        generate(config, runs / "first")


@pytest.mark.slow
@pytest.mark.parametrize("mode", [generate, evaluate])
def test_a_size_that_the_runs_own_model_cannot_have_is_refused_before_its_llm_is_loaded(runs, mode, tmp_path):
    """That of the config can."""
    shutil.copytree(runs / "coarse", tmp_path / "run")
    elsewhere(tmp_path / "run")
    config = tiny_config(1, runs / "llm", sample__prompts="a", sample__height=24)
    with pytest.raises(ValueError, match="sample.height=24 is not a multiple of .* 16 x 1; nearest: 32"):
        mode(config, tmp_path / "run")


@pytest.mark.slow
def test_a_size_is_looked_at_before_the_prompts_are_rephrased(runs):
    pipe = Pipeline.from_run(runs / "coarse")
    with pytest.raises(ValueError, match="sample.width=24 is not a multiple"):
        pipe("", width=24)


def test_prompts_of_the_native_condition_are_counted_by_its_tokenizer(tmp_path):
    settings = dict(path=str(write_umt5(tmp_path / "t5", width=16)), length=3, dtype="float32")
    check_prompts("native", ["red red"], settings)
    with pytest.raises(ValueError, match="a text has 4 tokens with its end token, at most 3 are allowed"):
        check_prompts("native", ["red", "red red red"], settings)
