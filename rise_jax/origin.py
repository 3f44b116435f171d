"""What a new run starts from, `run.init_from`, looked at before the LLM works for hours and before anything is written."""

import difflib
import logging
from pathlib import Path

from ml_collections import ConfigDict

from rise_jax import published
from rise_jax.build import model_from
from rise_jax.checkpoint import Checkpoints
from rise_jax.language import states_in_batch
from rise_jax.run_config import config_at, moved_paths, read_config
from rise_jax.runs import FILE, NULL, RANDOM, check_fit, check_heard, check_vae, refuse_random, replaces_null
from rise_jax.trees import named_leaves, partition

LOG = logging.getLogger(__name__)
STAGES = ("stage0_images", "stage0", "stage1", "stage2")  # run.stage of the configs


def find_start(init_from: str, preset: str) -> Path | None:
    """The workdir that `run.init_from` means: a folder, or a stage's default one, which may be missing (None, with a warning).

    Raises as `check_start` does.
    """
    folder = check_start(init_from, preset)
    if init_from and not folder:
        default = _default_workdir(init_from, preset)
        LOG.warning(
            "no %s run at %s: starting from random parameters; train it first for better results", init_from, default
        )
    return folder


def check_start(init_from: str, preset: str) -> Path | None:
    """The folder that `run.init_from` means, None for a stage that has not been run, or for ''.

    Raises FileNotFoundError where it means nothing, or a folder that holds no run, and ValueError where that folder's
    config.json is no run's. Checkpoints are not opened: processes do so together, and each may mean another folder here.
    """
    default = _default_workdir(init_from, preset)
    folders = [Path(init_from)] if init_from and Path(init_from).is_dir() else []
    folders += [default] if init_from and (default / "checkpoints").is_dir() else []
    if folders:
        read_config(folders[0])
        return folders[0]
    if init_from and init_from not in STAGES:
        near = difflib.get_close_matches(init_from, STAGES, n=1, cutoff=0.0)[0]
        raise FileNotFoundError(
            f"run.init_from={init_from!r} is no folder with a run, nor a stage; nearest stage: {near}"
        )
    return None


def parameters_of(origin: Path, d_llm: int, model: ConfigDict) -> dict:
    """The abstract parameters of the run in `origin`, on an LLM of width `d_llm`; where files of its own are no longer there, the
    `model` group of another config says where they lie. Raises as `model_from` does."""
    config = config_at(origin, moved_paths(origin, model))
    return model_from(config.model, d_llm, states_in_batch).abstract


def check_parts(config: ConfigDict, abstract: dict, theirs: dict, origin: Path | None) -> None:
    """Raises ValueError where `theirs`, the abstract parameters of the run in `origin` ({} without one), are not those of `config`,
    which are `abstract`; or where some that are not trained would be random."""
    names, own = named_leaves(abstract), named_leaves(theirs)
    if origin and replaces_null(ConfigDict(read_config(origin)["model"]), config.model):
        own.pop(NULL, None)
    filed = published.held(config.model, names)
    if own:
        check_fit(own, names, filed)
    origins = {name: RANDOM if name not in own and name not in filed else "" for name in names}
    refuse_random(partition(abstract, list(config.model.trainable))[1], origins)


def check_states(origin: Path, llm: dict, who: str = "run.init_from") -> dict:
    """Meta of the run in `origin`, whose states are those of `llm`, an identity, which has no sha256 where its files are not here.

    `who` is what messages call the run. Raises ValueError where it was trained on other states; OSError where none of its checkpoints
    can be read, or its frozen parameters are gone.
    """
    checkpoints = Checkpoints(origin / "checkpoints", read_only=True)
    meta = checkpoints.meta()
    checkpoints.close()
    theirs = {name: value for name, value in meta["llm"].items() if name in llm or name != "sha256"}
    check_heard(who, theirs, llm)
    frozen = partition(meta["provenance"], list(read_config(origin)["model"]["trainable"]))[1]
    kept = [name for name, source in named_leaves(frozen).items() if not source.startswith(FILE)]
    if kept and not (origin / "frozen").is_dir():
        raise FileNotFoundError(
            f"{origin / 'frozen'} is missing: {len(kept)} frozen parameters of that run were kept there"
        )
    return meta


def check_backbone(origin: Path, meta: dict, model: ConfigDict, vae: dict | None) -> None:
    """What else a run with such a `model` group goes on with, of the run in `origin`, whose `meta` this is; `vae`: the identity of its
    VAE, None where its files are not here.

    Raises ValueError for another VAE, or where the output of the DiT meant something else. Warns of a setting that does nothing.
    """
    if vae is not None:
        check_vae("run.init_from", meta["vae"], vae)
    theirs = read_config(origin)["model"]["prediction"]
    if theirs != model.prediction:
        raise ValueError(
            f"model.prediction={model.prediction!r}, but {origin} was trained to predict {theirs!r}; nearest: {theirs}"
        )
    if model.calibrate:
        LOG.warning("model.calibrate=%s is not looked at: the adapter is that of %s", model.calibrate, origin)


def asks_for_null(origin: Path | None, model: ConfigDict) -> bool:
    """Whether a new run's null condition is not that of the run in `origin`."""
    return origin is None or replaces_null(ConfigDict(read_config(origin)["model"]), model)


def _default_workdir(stage: str, preset: str) -> Path:
    return Path("runs") / f"{stage}-{preset}"
