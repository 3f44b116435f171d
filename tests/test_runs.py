"""A run that trains a part: the rest comes from another run, stays byte for byte, and is kept beside it."""

import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from tiny import tiny_config, write_llm

from rise_jax import Pipeline
from rise_jax.train import train
from rise_jax.trees import named_leaves

TRAINED = "^adapter/"


class Left(NamedTuple):
    """What the first run ended with, read before its folder went, and the second run's folder."""

    params: dict  # {path: array}
    summary: dict
    workdir: object
    config: object


def small(stage, llm, **overrides):
    return tiny_config(stage, llm, run__batch_size=8, run__steps=2, **overrides)


def params_of(workdir):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(Pipeline.from_run(workdir).params).items()}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """Stage 1 trains all, stage 2 the adapter alone for 2 steps; then stage 1's folder is deleted."""
    folder = tmp_path_factory.mktemp("runs")
    llm = write_llm(folder / "llm")
    assert train(small(1, llm), folder / "first") == 0
    before, summary = params_of(folder / "first"), json.loads((folder / "first" / "summary.json").read_text())
    config = small(2, llm, run__init_from=str(folder / "first"), model__trainable=(TRAINED,), data__frames=5)
    config.sample.frames = 5
    assert train(config, folder / "second") == 0
    shutil.rmtree(folder / "first")
    return Left(before, summary, folder / "second", config)


def test_it(left):
    pass
