"""A run that trains a part: the rest comes from another run, stays byte for byte, and is kept beside it."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import WIDTH, on_one_device, tiny_config, write_llm

from rise_jax import Pipeline, runs
from rise_jax.build import model_from
from rise_jax.language import states_in_batch
from rise_jax.train import train
from rise_jax.trees import named_leaves

pytestmark = pytest.mark.slow


class Left(NamedTuple):
    """What the first run ended with, read before its folder was deleted, and the second run."""

    first: dict[str, np.ndarray]
    ema_sha256: str
    config: ConfigDict
    workdir: Path


def small(stage, llm, **overrides):
    return tiny_config(stage, llm, run__batch_size=8, run__steps=2, data__texts=3, **overrides)


def params_of(workdir):
    """{path: array} of what a run's videos are made with."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(Pipeline.from_run(workdir).params).items()}


def document(checkpoint):
    """The JSON saved with a checkpoint: its meta, and its leaves by path."""
    return json.loads((checkpoint / "meta" / "metadata").read_text())


def check_parts(workdir, first):
    """The DiT is the first run's, byte for byte; the adapter is not."""
    now = params_of(workdir)
    assert now.keys() == first.keys()
    frozen = [name for name in now if not name.startswith("adapter/")]
    assert frozen and len(frozen) < len(now)
    assert [name for name in frozen if now[name].tobytes() != first[name].tobytes()] == []
    assert any((now[name] != first[name]).any() for name in now.keys() - set(frozen))


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Stage 1 trains everything; stage 2 trains the adapter alone, for 2 steps; then stage 1 is gone."""
    folder = tmp_path_factory.mktemp("runs")
    llm = write_llm(folder / "llm")
    assert train(small(1, llm), folder / "first") == 0
    first, summary = params_of(folder / "first"), json.loads((folder / "first" / "summary.json").read_text())
    config = small(2, llm, run__init_from=str(folder / "first"), model__trainable=("^adapter/",), data__frames=5)
    config.sample.frames = 5
    assert train(config, folder / "second") == 0
    shutil.rmtree(folder / "first")
    return Left(first, summary["ema_sha256"], config, folder / "second")


def test_what_is_frozen_stays_and_the_run_needs_no_other_folder(left):
    check_parts(left.workdir, left.first)
    assert Pipeline.from_run(left.workdir)("a red circle").videos.shape == (1, 5, 16, 16, 3)


def test_frozen_parameters_are_kept_once_and_their_origin_is_said(left):
    """As 'run SHA step N', where SHA is that of the EMA in the first run's summary."""
    origin = dict.fromkeys(left.first, f"run {left.ema_sha256[:12]} step 2")
    kept, saved = document(left.workdir / "frozen" / "0"), document(left.workdir / "checkpoints" / "2")
    assert kept["meta"]["provenance"] == {name: origin[name] for name in origin if name.startswith("dit/")}
    assert set(kept["leaves"]) == set(kept["meta"]["provenance"])
    assert saved["meta"]["provenance"] == origin
    assert not [name for name in saved["leaves"] if "dit/" in name]  # neither in the EMA nor in the optimizer


def test_it_resumes_from_its_own_folder(left):
    moved = left.workdir.with_name("moved")
    shutil.copytree(left.workdir, moved)
    left.config.run.steps = 4
    try:
        assert train(left.config, moved) == 0
    finally:
        left.config.run.steps = 2
    check_parts(moved, left.first)
    before, after = params_of(left.workdir), params_of(moved)
    assert any((after[name] != before[name]).any() for name in after)


def test_missing_frozen_parameters_are_named(left):
    broken = left.workdir.with_name("broken")
    shutil.copytree(left.workdir, broken, ignore=shutil.ignore_patterns("frozen"))
    with pytest.raises(FileNotFoundError, match=r"broken/frozen is missing: \d+ frozen parameters of that run"):
        Pipeline.from_run(broken)


def test_a_run_on_another_llm_cannot_be_started_from(left, tmp_path):
    config = small(2, write_llm(tmp_path / "llm", seed=1), run__init_from=str(left.workdir))
    with pytest.raises(
        ValueError, match="run.init_from was trained on the states of another LLM or condition: sha256 differ"
    ):
        train(config, tmp_path / "run")


def test_another_llm_in_the_same_place_is_noticed(left):
    """What a run was trained on is told by content, not by path, and by the checkpoint when the caches are gone."""
    moved, llm = left.workdir.with_name("other"), Path(left.config.model.llm.path)
    shutil.copytree(left.workdir, moved, ignore=shutil.ignore_patterns("states.npz", "captions.jsonl"))
    write_llm(llm, seed=1)
    left.config.run.steps = 4
    try:
        with pytest.raises(
            ValueError, match="other was trained on the states of another LLM or condition: sha256 differ"
        ):
            Pipeline.from_run(moved)
        with pytest.raises(
            ValueError, match="other was trained on the states of another LLM or condition: sha256 differ"
        ):
            train(left.config, moved)
    finally:
        left.config.run.steps = 2
        write_llm(llm)


def test_new_parameters_are_random_and_calibrated_on_what_is_heard(left):
    """To calibrate them again on the same states changes nothing; states behind the mask are not heard."""
    model = model_from(left.config.model, WIDTH, states_in_batch)
    states = np.random.default_rng(0).normal(3, 5, (4, 6, WIDTH)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 2, 4, 1])[:, None]
    params, provenance = runs.initial_parameters(model, left.config, None, {}, (states, mask), on_one_device)
    assert provenance == dict.fromkeys(named_leaves(params), "random")
    states[~mask] = 1e6
    again, other = (named_leaves(model.calibrate(params, *heard)) for heard in ((states, mask), (states, ~mask)))
    for name, leaf in named_leaves(params).items():
        np.testing.assert_allclose(again[name], leaf, rtol=1e-5, atol=1e-6)
    assert any((other[name] != leaf).any() for name, leaf in named_leaves(params).items())


def test_new_parameters_are_drawn_from_no_key_that_the_run_uses_again(left):
    model = model_from(left.config.model, WIDTH, states_in_batch)
    heard = np.ones((1, 2, WIDTH), np.float32), np.ones((1, 2), bool)
    params = runs.initial_parameters(model, left.config, None, {}, heard, on_one_device).tree
    init, root = jax.jit(model.init), jax.random.key(left.config.run.seed)
    for key in (root, jax.random.fold_in(root, 0), jax.random.fold_in(root, 1)):  # the run's, and those of its steps
        assert (init(key)["dit"]["patch_in"]["kernel"] != params["dit"]["patch_in"]["kernel"]).any()


def test_nothing_is_kept_where_nothing_is_frozen(tmp_path):
    runs.write_frozen(tmp_path, {}, {})
    model = tiny_config(1, write_llm(tmp_path / "llm")).model
    assert runs.read_frozen(tmp_path, model, {}, {}, {}, on_one_device) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_frozen_parameters_must_not_be_random():
    frozen = {"dit": {"head": np.zeros(1), "blocks": np.zeros(1)}}
    runs.refuse_random(frozen, dict.fromkeys(("dit/head", "dit/blocks"), "run abc step 2"))
    with pytest.raises(ValueError, match="1 frozen parameters come from random initialisation, the first: dit/head"):
        runs.refuse_random(frozen, {"dit/head": "random", "dit/blocks": "run abc step 2"})
