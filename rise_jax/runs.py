"""A run's folder and what training reads from and writes to it: parameters with their provenance, split into trainable and frozen.

Layout: config.json, checkpoints/STEP (state and meta), frozen/0 (leaves that came from another run and are not trained here),
states.npz and captions.jsonl (conditions.py), metrics.jsonl, summary.json.
"""

import logging
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from rise_jax import published
from rise_jax.build import Model, model_from
from rise_jax.checkpoint import Checkpoints
from rise_jax.language import differing, states_in_batch
from rise_jax.models.adapter import calibrate_output
from rise_jax.models.attention import XLA, Backend
from rise_jax.optim import make_optimizer
from rise_jax.processes import is_first, meet
from rise_jax.run_config import config_at, read_config
from rise_jax.sharding import put
from rise_jax.step import TrainState, new_state
from rise_jax.trees import combine, named_leaves, nested, partition, tree_sha256

LOG = logging.getLogger(__name__)
RANDOM, FILE = "random", "file "
NO_STEP = 2**32 - 1  # what random parameters fold into the key of their run, as each step folds its number
NULL = "null/embedding"  # the leaf of a null condition that is not learned


class Parameters(NamedTuple):
    """All leaves of a model and where each came from, by path: 'random', 'run SHA step N' (the start of its ema_sha256) or
    'file SHA'."""

    tree: dict
    provenance: dict[str, str]


class Run(NamedTuple):
    """What a run left: its config, the model that means, meta of the checkpoint read, and all parameters, the trained ones from
    the EMA. `trained` names these."""

    config: ConfigDict
    model: Model
    meta: dict
    step: int
    params: dict
    trained: set[str]


def has_begun(workdir: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    if not (Path(workdir) / "checkpoints").is_dir():
        return False
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    return bool(steps)


def check_run(workdir: Path) -> None:
    """Raises FileNotFoundError for a folder that holds no run, or none with a checkpoint."""
    read_config(workdir)
    if not has_begun(workdir):
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet")


def read_run(
    workdir: Path,
    d_llm: int,
    place: Callable | None = None,
    backend: Backend = XLA,
    paths: Mapping[str, str] = MappingProxyType({}),
    published_too: bool = True,
) -> Run:
    """The newest good checkpoint of a run, which stays as it is; `d_llm` is the width of the LLM it was trained on.

    `place(tree)` gives the shardings of its leaves, None: one device; `backend` is that of the model's attention; `paths` as in
    `config_at`. Without `published_too`, frozen leaves that came from published files are left out: a DiT of 14 B fills a device.
    Raises FileNotFoundError when there is no checkpoint, ValueError naming every leaf that does not fit.
    """
    config = config_at(workdir, paths)
    place = place or _one_device
    model = model_from(config.model, d_llm, states_in_batch, backend=backend)
    trainable, rest = partition(model.abstract, list(config.model.trainable))
    optimizer = make_optimizer(1.0, kind=config.optim.kind)  # for the shapes of its state alone
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    found = checkpoints.restore(abstract_state(trainable, optimizer, place))
    checkpoints.close()
    if found is None:
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet")
    step, state, meta = found
    left_out = lambda name: not published_too and meta["provenance"][name].startswith(FILE)
    rest = nested({name: leaf for name, leaf in named_leaves(rest).items() if not left_out(name)})
    frozen = read_frozen(Path(workdir), config.model, rest, model.abstract, meta["provenance"], place)
    return Run(config, model, meta, step, combine(state.ema, frozen), set(named_leaves(state.ema)))


def read_frozen(
    workdir: Path, model: ConfigDict, frozen: dict, abstract: dict, provenance: dict[str, str], place: Callable
) -> dict:
    """The leaves of `frozen` (a part of `abstract`): from the published files they came from, else as kept in the workdir.

    `place(tree)` gives the shardings. Raises ValueError when a file is not the one that training began with.
    """
    names = named_leaves(frozen)
    filed = [name for name in names if provenance[name].startswith(FILE)]
    leaves, origins = published.load_leaves(model, abstract, filed, place)
    changed = sorted({name.split("/")[0] for name in filed if origins.get(name) != provenance[name]})
    if changed:
        raise ValueError(f"{workdir} was trained with other files: {', '.join(changed)} changed since")
    kept = nested({name: leaf for name, leaf in names.items() if name not in leaves})
    if not kept:
        return nested(leaves)
    checkpoints = Checkpoints(workdir / "frozen", read_only=True)
    found = checkpoints.restore(_placed(kept, place))
    checkpoints.close()
    if found is None:
        raise FileNotFoundError(f"{workdir / 'frozen'} is missing: this run's frozen parameters were kept there")
    return combine(nested(leaves), found[1])


def write_frozen(workdir: Path, frozen: dict, provenance: dict[str, str]) -> None:
    """Keeps the frozen leaves that came from another run, once, so that this one does not depend on its folder.

    Published files are large, and where they are is said by the config: their leaves are read from there again.
    """
    kept = {name: leaf for name, leaf in named_leaves(frozen).items() if not provenance[name].startswith(FILE)}
    if not kept:
        return
    folder = workdir / "frozen"
    if is_first():  # of a start that was cut short, perhaps from an earlier state of that other run
        shutil.rmtree(folder, ignore_errors=True)
    meet("frozen leaves")
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(0, nested(kept), {"provenance": {name: provenance[name] for name in kept}})
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
    model: Model, config: ConfigDict, source: Run | None, llm: dict, heard: tuple, place: Callable
) -> Parameters:
    """Every leaf from the first that has it: the run `source`, the config's published files, random initialisation.

    A random adapter is calibrated on `heard` (states, mask) of some texts, and its output on the native encoder's states of the
    captions in `model.calibrate`. Raises ValueError when the run heard another LLM or
    instruction, or when its leaves are not those of this model (low-rank corrections may be new).
    """
    names = named_leaves(model.abstract)
    targets = named_leaves(place(model.abstract))
    leaves, origins = _from_run(source, config, llm, names) if source else ({}, {})
    leaves = {name: put(leaf, targets[name]) for name, leaf in leaves.items()}
    filed, filed_origins = published.load_leaves(config.model, model.abstract, names.keys() - leaves.keys(), place)
    if source:
        _compare_files(source, config.model, filed_origins)
    leaves, origins = leaves | filed, origins | filed_origins
    new = [name for name in names if name not in leaves]
    if new:
        chosen = lambda key: {name: leaf for name, leaf in named_leaves(model.init(key)).items() if name in new}
        key = jax.random.fold_in(jax.random.key(config.run.seed), NO_STEP)
        made = jax.jit(chosen, out_shardings={name: targets[name] for name in new})(key)
        leaves, origins = leaves | made, origins | dict.fromkeys(new, RANDOM)
    tree = nested({name: leaves[name] for name in names})
    if not source and "adapter" in tree:
        part = {"adapter": tree["adapter"]}
        tree |= jax.jit(model.calibrate, out_shardings=place(part))(part, *heard)
        if config.model.calibrate:
            adapter = calibrate_output(tree["adapter"], *published.native_statistics(config.model, place))
            tree["adapter"] = put(adapter, place({"adapter": adapter})["adapter"])
    return Parameters(tree, {name: origins[name] for name in names})


def _compare_files(source: Run, model: ConfigDict, origins: dict[str, str]) -> None:
    """Warns where published leaves, by {path: origin}, are from other files than in the run `source`.

    ValueError where both name the same path: the file changed since.
    """
    before = source.meta["provenance"]
    other = sorted({name.split("/")[0] for name, origin in origins.items() if before.get(name, origin) != origin})
    paths = lambda of: {"dit": of.dit.path, "null": of.null}
    if changed := [part for part in other if paths(source.config.model)[part] == paths(model)[part]]:
        raise ValueError(f"run.init_from was trained with other files: {', '.join(changed)} changed since")
    if other:
        LOG.warning("run.init_from was trained on other files of: %s", ", ".join(other))


def _from_run(source: Run, config: ConfigDict, llm: dict, names: dict) -> tuple[dict, dict]:
    """({path: leaf}, {path: origin}) of the leaves of a run that this one does not have from published files itself."""
    check_heard("run.init_from", source.meta["llm"], llm)
    own = named_leaves(source.params)
    if replaces_null(source.config.model, config.model):
        own.pop(NULL, None)
    check_fit(own, names, published.held(config.model, names))
    ema = nested({name: leaf for name, leaf in named_leaves(source.params).items() if name in source.trained})
    return own, dict.fromkeys(own, f"run {tree_sha256(ema)[:12]} step {source.step}")


def replaces_null(theirs: ConfigDict, ours: ConfigDict) -> bool:
    """Whether the fixed null condition of a run with the `model` group `theirs` gives way to what `ours` says."""
    return theirs.null != ours.null and not any(re.search(pattern, NULL) for pattern in theirs.trainable)


def check_fit(own: dict, names: dict, filed: Collection[str] = ()) -> None:
    """Raises ValueError unless the leaves `own` of a run, by path, are those of this model, `names`: low-rank corrections may be new,
    and what is `filed` comes from a file."""
    wrong = [name for name in own if name not in names]
    wrong += [name for name in own if name in names and own[name].shape != names[name].shape]
    if wrong:
        raise ValueError(f"run.init_from has {len(wrong)} parameters that do not fit this model, the first: {wrong[0]}")
    lacking = [name for name in names if not (name in own or name in filed or "/low_rank_" in name)]
    if lacking:
        raise ValueError(f"run.init_from lacks {len(lacking)} parameters of this model, the first: {lacking[0]}")


def check_heard(who: str, theirs: dict, ours: dict) -> None:
    """Raises ValueError, naming what differs, when a run's states came from another LLM, instruction, layer or condition."""
    names = differing(theirs, ours)
    if names:
        values = "; ".join(f"{name}: {theirs.get(name)} then, {ours.get(name)} now" for name in names)
        raise ValueError(
            f"{who} was trained on the states of another LLM or condition: {', '.join(names)} differ ({values})"
        )


def check_vae(who: str, theirs: dict, ours: dict) -> None:
    """Raises ValueError when a run's latents came from another VAE."""
    if theirs != ours:
        raise ValueError(f"{who} was trained on another VAE: {theirs} then, {ours} now")


def born_state(trained: dict, optimizer, place: Callable) -> TrainState:
    """The state of step 0 from trained leaves, which it takes over: no leaf is ever whole on one device that is to hold a part."""
    make = lambda leaves: new_state(leaves, optimizer)
    return jax.jit(make, donate_argnums=0, out_shardings=place(jax.eval_shape(make, trained)))(trained)


def abstract_state(trainable: dict, optimizer, sharding_of) -> TrainState:
    """ShapeDtypeStructs of a TrainState with the shardings that `sharding_of(tree)` gives."""
    return _placed(jax.eval_shape(lambda leaves: new_state(leaves, optimizer), trainable), sharding_of)


def _one_device(tree):
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), tree)


def _placed(tree, place):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, place(tree)
    )
