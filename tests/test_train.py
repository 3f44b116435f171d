"""Where a run starts from, what its steps are, and that one which has gone wrong stops and names its batch."""

import json
import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from folders import write_clip, write_metadata
from tiny import on_one_device, tiny_config, write_llm

from rise_jax.build import model_from
from rise_jax.conditions import complete
from rise_jax.data.loader import make_loader
from rise_jax.data.scenes import ScenesSource
from rise_jax.language import Language, states_in_batch
from rise_jax.loop import NonFiniteError, run_steps
from rise_jax.optim import make_optimizer
from rise_jax.origin import find_start
from rise_jax.runs import initial_parameters, read_run
from rise_jax.step import make_train_step, new_state
from rise_jax.train import train
from rise_jax.trees import named_leaves
from rise_jax.workdir import write_config

pytestmark = pytest.mark.slow

VOCAB = 259  # of tests/tiny.py's LLM
# None of the usual values, and each felt within four steps.
OTHERS = dict(learning_rate=0.05, warmup=2, decay_from=2, decay_until=4, weight_decay=1.0, clip=0.05)
OTHERS |= dict(b2=0.9, ema=0.5, drop=0.5, time_mean=0.7, time_std=0.5)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to start from; default workdirs lie in its runs/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(workdir):
    """A folder that looks like a run with a checkpoint."""
    for item in ("state", "meta"):
        (workdir / "checkpoints" / "2" / item).mkdir(parents=True)
    write_config(workdir, {group: {} for group in ("model", "data", "optim", "sample", "run")})


def test_no_name_starts_from_nothing(here, caplog):
    assert find_start("", "tiny") is None and not caplog.records


def test_a_folder_is_meant_itself(here):
    begun(here / "mine")
    begun(here / "runs" / "mine-tiny")
    assert find_start("mine", "tiny") == Path("mine")
    assert find_start(str(here / "mine"), "tiny") == here / "mine"


def test_a_stage_means_its_default_workdir(here, caplog):
    begun(here / "runs" / "stage1-small")
    assert find_start("stage1", "small") == Path("runs/stage1-small")
    assert "no stage1 run" not in caplog.text


def test_a_stage_that_has_not_been_run_is_warned_of(here, caplog):
    (here / "runs" / "stage1-tiny").mkdir(parents=True)  # without a checkpoint
    (here / "runs" / "stage1-small" / "checkpoints").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert find_start("stage1", "tiny") is None
    assert "no stage1 run at runs/stage1-tiny: starting from random parameters" in caplog.text


@pytest.mark.parametrize("name", ["/nowhere", "runs/stage1-tiny", "stages/1", "mine", "stage1-tiny", "stage_1"])
def test_a_name_that_is_neither_is_refused(here, name):
    with pytest.raises(FileNotFoundError, match=f"run.init_from='{name}' is no folder with a run"):
        find_start(name, "tiny")


def lines(workdir, name):
    return [json.loads(line)[name] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_one_step_after_another_on_clips_with_the_states_of_their_own_texts(tmp_path, capsys, monkeypatch):
    """Its losses are those of these lines, which know no mesh, no kept states and no checkpoint."""
    held = {}

    def watched(*args):
        held["with the LLM's tokens"] = [leaf.shape for leaf in jax.live_arrays() if VOCAB in leaf.shape]
        return run_steps(*args)

    monkeypatch.setattr("rise_jax.train.run_steps", watched)
    config = tiny_config(1, write_llm(tmp_path / "llm"), run__batch_size=8, run__steps=4, run__seed=3)
    config.optim.update(OTHERS)
    assert train(config, tmp_path / "run") == 0
    assert held == {"with the LLM's tokens": []}  # its states are kept: the devices are free of it
    assert re.search(r"^compiled the step in \d+\.\d s$", capsys.readouterr().out, re.MULTILINE)
    assert_rates_of_eight_images_of_four_tokens(tmp_path / "run")
    optim, language = config.optim, Language(**config.model.llm)
    assert any(VOCAB in leaf.shape for leaf in jax.tree.leaves(language.params))
    source = ScenesSource(num_texts=6, frames=1, height=16, width=16, seed=3)
    states, mask = language.teach(complete(source.texts, language, tmp_path / "run" / "captions.jsonl"))
    model = model_from(config.model, language.width, states_in_batch)
    params = initial_parameters(model, config, None, {}, (states, mask), on_one_device).tree
    named = {name: optim[name] for name in ("kind", "b2", "decay_from", "decay_until")}
    optimizer = make_optimizer(optim.learning_rate, optim.warmup, optim.weight_decay, optim.clip, **named)
    rates = {name: optim[name] for name in ("drop", "ema", "time_mean", "time_std")}
    step_fn = jax.jit(make_train_step(model, optimizer, **rates))
    state, losses = new_state(params, optimizer), []
    batches = make_loader(source, batch_size=8, seed=3, quarantine_file=tmp_path / "quarantine.jsonl")
    for step, batch in zip(range(4), batches):
        text = batch.pop("text")
        batch |= dict(states=states[text], states_mask=mask[text], index=batch["index"].astype("int32"), step=step)
        state, metrics = step_fn(state, {"params": {}, "vae": {}}, batch, jax.random.key(3))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(lines(tmp_path / "run", "loss"), losses, rtol=1e-4)
    averaged = named_leaves(read_run(tmp_path / "run", language.width).params)
    for name, leaf in named_leaves(state.ema).items():
        np.testing.assert_allclose(averaged[name], leaf, atol=1e-3 * np.abs(leaf).max() + 1e-5)


def assert_rates_of_eight_images_of_four_tokens(workdir):
    seconds = np.array(lines(workdir, "step_seconds"))
    for name, amount in (("samples", 8), ("frames", 8), ("tokens", 32)):
        np.testing.assert_allclose(seconds * lines(workdir, f"{name}_per_second"), amount)
    flops = seconds * lines(workdir, "tflops_per_device") * jax.device_count() * 1e12
    np.testing.assert_allclose(flops, flops[0])
    assert flops[0] > 3 * 8 * 2 * 4 * 2 * (
        6 * 24**2 + 2 * 24 * 32
    )  # two blocks' products of video tokens with weights, thrice
    assert min(lines(workdir, "host_memory_gib")) > 0 and min(lines(workdir, "data_seconds")) >= 0
    assert "mfu" not in (workdir / "metrics.jsonl").read_text()


def test_a_run_that_diverges_stops_and_names_the_batch(tmp_path):
    """The first update throws the parameters out of range; the second step sees it, and is found out while the third runs."""
    config = tiny_config(1, write_llm(tmp_path / "llm"), run__batch_size=8, optim__learning_rate=1e30)
    config.run.save_every = 1000
    with pytest.raises(NonFiniteError, match="at step 2: stopped before the update"):
        train(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert record["step"] == 2 and record["samples"] == list(range(8, 16))
    assert lines(tmp_path / "run", "step")[:2] == [1, 2]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_goes_on_without_a_clip_that_cannot_be_read_and_its_checkpoints_say_so(tmp_path):
    write_metadata(
        tmp_path / "clips", [{"file_name": f"{n}.mp4", "prompt": f"clip {n}", "split": "train"} for n in range(4)]
    )
    for n in range(3):
        write_clip(tmp_path / "clips" / f"{n}.mp4")
    bad = tmp_path / "clips" / "3.mp4"
    bad.write_bytes(b"nothing")
    data = dict(data__source="folder", data__path=str(tmp_path / "clips"), data__max_bad=0.25)
    config = tiny_config(1, write_llm(tmp_path / "llm"), run__batch_size=8, run__steps=2, **data)
    assert train(config, tmp_path / "run") == 0
    assert np.isfinite(lines(tmp_path / "run", "loss")).all()
    meta = read_run(tmp_path / "run", 16).meta
    assert list(meta["quarantine"]) == [str(bad)] and "InvalidDataError" in meta["quarantine"][str(bad)]
    assert meta["config"] == json.loads(json.dumps(config.to_dict())) and meta["versions"]["jax"] == jax.__version__
    config.data.max_bad, config.run.steps = 0.0, 3
    with pytest.raises(RuntimeError, match="1 of 4 clips cannot be read, more than data.max_bad=0 allows"):
        train(config, tmp_path / "run")
    config.data.max_bad = 0.25
    assert train(config, tmp_path / "run") == 0
