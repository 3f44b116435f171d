"""A run's folder and what training reads from and writes to it: parameters with their provenance, split into trainable and frozen.

Layout: config.json, checkpoints/STEP (state and meta), frozen/0 (leaves that came from another run and are not trained here),
states.npz and captions.jsonl (conditions.py), metrics.jsonl, summary.json.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rise_jax.build import Model
from rise_jax.checkpoint import Checkpoints
from rise_jax.language import differing
from rise_jax.optim import make_optimizer
from rise_jax.step import TrainState, new_state
from rise_jax.trees import combine, named_leaves, partition, tree_sha256

LOG = logging.getLogger(__name__)
RANDOM = "random"


class Parameters(NamedTuple):
    """All leaves of a model and where each came from: 'random' or 'run SHA step N', by path."""

    tree: dict
    provenance: dict[str, str]


class Run(NamedTuple):
    """What a run left: its config, meta of the checkpoint read, and all parameters, the trained ones from the EMA."""

    config: dict
    meta: dict
    step: int
    params: dict


def read_config(workdir: Path) -> dict:
    """The config a workdir was made with. Raises FileNotFoundError for a folder that holds no run."""
    file = Path(workdir) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{workdir} holds no run: there is no {file.name} in it")
    return json.loads(file.read_text())


def check_run(workdir: Path) -> None:
    """Raises FileNotFoundError for a folder that holds no run, or none with a checkpoint."""
    read_config(workdir)
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    if not steps:
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet")


def read_run(workdir: Path, model: Model) -> Run:
    """The newest good checkpoint of another run, which stays as it is. Every leaf has to fit `model`.

    Raises FileNotFoundError when there is no checkpoint, ValueError naming every leaf that does not fit.
    """
    config = read_config(workdir)
    trainable, rest = partition(model.abstract, config["model"]["trainable"])
    optimizer = make_optimizer(1.0, kind=config["optim"]["kind"])  # for the shapes of its state alone
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    found = checkpoints.restore(_on_one_device(jax.eval_shape(lambda leaves: new_state(leaves, optimizer), trainable)))
    checkpoints.close()
    if found is None:
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet")
    step, state, meta = found
    return Run(config, meta, step, combine(state.ema, read_frozen(Path(workdir), _on_one_device(rest))))


def read_frozen(workdir: Path, abstract: dict) -> dict:
    """The frozen leaves kept in a workdir ({} where everything is trained)."""
    if not jax.tree.leaves(abstract):
        return {}
    checkpoints = Checkpoints(workdir / "frozen", read_only=True)
    found = checkpoints.restore(abstract)
    checkpoints.close()
    if found is None:
        raise FileNotFoundError(f"{workdir / 'frozen'} is missing: this run's frozen parameters were kept there")
    return found[1]


def write_frozen(workdir: Path, frozen: dict, provenance: dict[str, str]) -> None:
    """Keeps the frozen leaves beside the run, once, so that it depends on no other folder."""
    if not jax.tree.leaves(frozen):
        return
    checkpoints = Checkpoints(workdir / "frozen", keep=1)
    checkpoints.save(0, frozen, {"provenance": {name: provenance[name] for name in named_leaves(frozen)}})
    checkpoints.close()


def refuse_random(frozen: dict, provenance: dict[str, str]) -> None:
    """Raises ValueError when a frozen leaf is random: that would look like training and learn nothing."""
    random = [name for name in named_leaves(frozen) if provenance[name] == RANDOM]
    if random:
        raise ValueError(
            f"{len(random)} frozen parameters come from random initialisation, the first: {random[0]}. "
            "Train them (model.trainable), or start from a run that has (run.init_from)."
        )


def initial_parameters(
    model: Model, seed: int, source: Run | None, llm: dict, heard: tuple, shardings: Any
) -> Parameters:
    """Random parameters, calibrated on `heard` (states, mask) of some texts, or those of another run.

    Raises ValueError when that run heard other states.
    """
    if source is None:
        tree = jax.jit(model.init, out_shardings=shardings)(jax.random.key(seed))
        tree = jax.jit(model.calibrate, out_shardings=shardings)(tree, *heard)
        return Parameters(tree, dict.fromkeys(named_leaves(tree), RANDOM))
    check_heard("run.init_from", source.meta["llm"], llm)
    origin = f"run {tree_sha256(source.params)[:12]} step {source.step}"
    return Parameters(jax.device_put(source.params, shardings), dict.fromkeys(named_leaves(source.params), origin))


def check_heard(who: str, theirs: dict, ours: dict) -> None:
    """Raises ValueError, naming what differs, when a run's states came from another LLM, instruction, layer or condition."""
    names = differing(theirs, ours)
    if names:
        values = "; ".join(f"{name}: {theirs.get(name)} then, {ours.get(name)} now" for name in names)
        raise ValueError(
            f"{who} was trained on the states of another LLM or condition: {', '.join(names)} differ ({values})"
        )


def abstract_state(trainable: dict, optimizer, sharding_of) -> TrainState:
    """ShapeDtypeStructs of a TrainState with the shardings that `sharding_of(tree)` gives."""
    abstract = jax.eval_shape(lambda leaves: new_state(leaves, optimizer), trainable)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        sharding_of(abstract),
    )


def _on_one_device(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
