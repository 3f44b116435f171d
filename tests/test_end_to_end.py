"""The whole program through its command line: train in two stages, be killed, resume, generate, evaluate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from faults import environment
from PIL import Image
from tiny import tiny_config, tiny_flags, write_llm

import main
from rise_jax.generate import generate
from rise_jax.train import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BATCH = 8  # that of a run in a process of its own on one device, and of one here on eight


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_llm(tmp_path_factory.mktemp("llm"))


def command(stage: int, llm: Path, workdir: Path, *extra: str, mode: str = "train") -> list[str]:
    """main.py with the config of tests/tiny.py, and in stage 2 the preset's own optimizer."""
    flags = tiny_flags(stage, llm, run__batch_size=BATCH, **({"optim__kind": "muon"} if stage == 2 else {}))
    return [sys.executable, "main.py", *flags, f"--workdir={workdir}", f"--mode={mode}", *extra]


def run(*args, expect: int = 0, **kwargs) -> str:
    done = subprocess.run(
        command(*args, **kwargs), cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def train_here(llm: Path, workdir: Path, **overrides) -> Path:
    """Stage 1 in this process: what starting another one shows, the others do."""
    assert train(tiny_config(1, llm, run__batch_size=BATCH, **overrides), workdir) == 0
    return workdir


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def stage1_run(llm, tmp_path_factory):
    return train_here(llm, tmp_path_factory.mktemp("runs") / "stage1")


@pytest.fixture(scope="module")
def stage2_run(llm, stage1_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "stage2"
    run(2, llm, workdir, f"--config.run.init_from={stage1_run}")
    return workdir


def test_a_run_leaves_what_it_promises(stage1_run):
    lines = [json.loads(line) for line in (stage1_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines)
    left = summary(stage1_run)
    assert left["steps"] == 4 and len(left["params_sha256"]) == len(left["ema_sha256"]) == 64
    assert left["params_sha256"] != left["ema_sha256"]
    assert list((stage1_run / "tensorboard").iterdir())


def test_stage_2_starts_from_stage_1(stage2_run):
    meta = json.loads(next((stage2_run / "checkpoints" / "4" / "meta").glob("metadata")).read_text())["meta"]
    assert {origin.split()[0] for origin in meta["provenance"].values()} == {"run"}


def test_a_finished_run_says_so_and_changes_nothing(llm, stage1_run, capsys):
    before = summary(stage1_run)
    assert train(tiny_config(1, llm, run__batch_size=BATCH), stage1_run) == 0
    assert "is finished: 4 steps, run.steps=4" in capsys.readouterr().out
    assert train(tiny_config(1, llm, run__batch_size=BATCH, run__steps=2), stage1_run) == 0
    assert "is finished: 4 steps, run.steps=2" in capsys.readouterr().out
    assert summary(stage1_run) == before


def test_a_damaged_summary_is_named(llm, stage1_run, tmp_path):
    copy = shutil.copytree(stage1_run, tmp_path / "copy")
    for text in ('{"steps": ', "[]", '{"steps": "four"}'):
        (copy / "summary.json").write_text(text)
        with pytest.raises(ValueError, match=r"copy/summary.json is damaged .*: remove it"):
            train(tiny_config(1, llm, run__batch_size=BATCH), copy)


def test_a_killed_stage_2_continues_bit_for_bit(llm, stage1_run, stage2_run, tmp_path):
    """kill -9 after the first checkpoint, the same command again: the end is that of an undisturbed run (stage 1: test_survive.py)."""
    extra = [f"--config.run.init_from={stage1_run}"]
    process = subprocess.Popen(
        command(2, llm, tmp_path / "run", *extra), cwd=ROOT, env=environment(1), start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoints" / "2").is_dir():
        assert time.monotonic() < deadline and process.poll() in (None, 0)
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(2, llm, tmp_path / "run", *extra)
    for name in ("params_sha256", "ema_sha256", "steps"):
        assert summary(tmp_path / "run")[name] == summary(stage2_run)[name]


def test_longer_repeats_shorter_and_goes_on(llm, stage1_run, tmp_path):
    """2 steps, then 4 in the same workdir, equal 4 at once: nothing depends on run.steps."""
    train_here(llm, tmp_path / "run", run__steps=2)
    assert summary(tmp_path / "run")["steps"] == 2
    train_here(llm, tmp_path / "run")
    assert summary(tmp_path / "run")["params_sha256"] == summary(stage1_run)["params_sha256"]


def test_states_computed_in_the_step_give_the_same_training(llm, stage1_run, tmp_path):
    train_here(llm, tmp_path / "run", data__states="in_step")
    losses = [
        [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (stage1_run, tmp_path / "run")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_generate_writes_videos_texts_and_a_sheet(llm, stage2_run):
    config = tiny_config(2, llm, sample__prompts="a red circle||un cuadrado azul")
    assert generate(config, stage2_run) == 0
    folder = stage2_run / "samples"
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["a red circle", "un cuadrado azul"]
    assert [record["seed"] for record in records] == [0, 1] and all("rephrased" in record for record in records)
    with av.open(str(folder / "000.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == config.data.frames == 9
    assert Image.open(folder / "contact_sheet.png").width > 300


def test_evaluate_scores_held_out_prompts(llm, stage2_run):
    run(2, llm, stage2_run, mode="evaluate")
    result = json.loads((stage2_run / "evaluation.json").read_text())
    assert result["prompts"] == 4
    for name in ("attribute_accuracy", "shuffled", "zeroed", "kept_by_rephrasing"):
        assert {"colour", "shape", "direction", "count", "all"} <= set(result[name])
    assert sum(part["prompts"] for part in result["by_language"].values()) == 4
    assert len(result["heldout_loss"]["true"]) == len(result["heldout_loss"]["times"])
    assert (stage2_run / "evaluation.png").exists()
    assert result["step"] == 4 and result["ema_sha256"] == summary(stage2_run)["ema_sha256"]


def test_another_config_in_the_same_workdir_is_refused(llm, stage1_run):
    with pytest.raises(ValueError, match="optim.drop: 0.1 -> 0.2"):
        train(tiny_config(1, llm, run__batch_size=BATCH, optim__drop=0.2), stage1_run)


def test_a_mistake_is_answered_with_words(llm, tmp_path):
    output = run(1, llm, tmp_path / "run", "--config.run.stpes=3", expect=1)
    assert "no such config key: run.stpes; nearest: run.steps; run has accumulate, " in output
    assert output.startswith("error: ") and "Traceback" not in output
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("mode", main.MODES)
def test_every_mode_has_its_function(mode):
    assert main.mode_function(mode).__name__ == mode


def test_a_mistake_in_the_config_file_is_told_in_a_line(monkeypatch):
    words = ["main.py", f"--config={ROOT}/configs/stage1.py:tinyy"]
    monkeypatch.setattr(sys, "argv", words)  # where ml_collections looks for the keys
    with pytest.raises(SystemExit, match="^error: .*unknown preset 'tinyy': did you mean 'tiny'?") as told:
        main.parse(words)
    assert "Traceback" not in told.value.code


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate"], "'evaluate' belongs to no flag; nearest: --mode=evaluate"),
        (["mode=export"], "'mode=export' belongs to no flag; nearest: --mode=export"),
        (["--config.sample.prompts=a", "red", "circle"], "'red' belongs to no flag; nearest: quotes around a value"),
    ],
)
def test_words_that_belong_to_no_flag_are_refused(monkeypatch, words, told):
    words = ["main.py", f"--config={ROOT}/configs/stage1.py:tiny", *words]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=f"^error: {told}"):
        main.parse(words)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("optim.lr=1", r"optim.lr; nearest: optim\.\w+; optim has b2, clip, decay_from, .*, learning_rate, "),
        ("optimizer.lr=1", "optimizer; nearest: optim; there has data, mesh, model, optim, run, sample"),
        ("model.dit.width.x=1", "model.dit.width.x; nothing is below model.dit.width"),
    ],
)
@pytest.mark.parametrize("joint", ["=", " "])
def test_a_key_that_is_not_there_is_answered_with_what_is(monkeypatch, key, told, joint):
    words = ["main.py", *f"--config{joint}{ROOT}/configs/stage1.py:tiny".split(), f"--config.{key}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=f"^error: no such config key: {told}"):
        main.parse(words)


@pytest.mark.parametrize("key", ["run.preset", "run.stage"])
def test_what_names_a_run_comes_from_the_config_file(key):
    with pytest.raises(
        ValueError, match=f"config.{key}=small would rename the run .* --config=configs/STAGE.py:PRESET"
    ):
        main.refuse_labels({"run.steps": 3, key: "small"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data__source", "foldr", "nearest: folder"),
        ("data__frames", 4, "nearest: 5"),
        ("model__trainable", ("^adaptor/",), r"'\^adaptor/' matches no parameter"),
        ("model__trainable", ("^adapter/",), "frozen parameters come from random initialisation"),
        ("model__llm__path", "/nowhere", "/nowhere"),
        ("run__init_from", "/nowhere", "/nowhere"),
    ],
)
def test_mistakes_are_refused_before_they_bind_the_next_start(key, value, message, llm, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        train(tiny_config(1, llm, run__batch_size=BATCH, **{key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_summary_of_fewer_steps_does_not_make_a_run_finished(llm, stage1_run, tmp_path):
    """As after run.steps was raised and the run was killed between its last checkpoint and its summary; and the other way round."""
    before = summary(stage1_run)
    shutil.copytree(stage1_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(before | {"steps": 1, "params_sha256": "old"}))
    with pytest.raises(ValueError, match=f"is at step {before['steps']} already; nearest: {before['steps']}"):
        train(tiny_config(1, llm, run__batch_size=BATCH, run__steps=2), tmp_path / "run")
    assert train(tiny_config(1, llm, run__batch_size=BATCH), tmp_path / "run") == 0
    after = summary(tmp_path / "run")
    assert all(after[name] == before[name] for name in ("steps", "params_sha256", "ema_sha256", "final_loss"))


def test_an_unwritable_workdir_is_named(llm):
    with pytest.raises(OSError, match="/sys/rise"):
        train(tiny_config(1, llm), Path("/sys/rise"))


def test_an_empty_prompt_and_a_long_one_are_refused(llm, stage1_run):
    config = tiny_config(1, llm)
    with pytest.raises(ValueError, match="no prompt given"):
        generate(config, stage1_run)
    config.sample.prompts = "word " * 100
    with pytest.raises(ValueError, match="at most 160"):
        generate(config, stage1_run)
