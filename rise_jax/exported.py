"""What a run hands on: one folder that needs nothing but the LLM, in layouts that others read too.

adapter/adapter.json         what it takes to use the adapter: the config's model group, the LLM's identity and width, the
                             instruction's text, the kind of null condition, sample defaults, where every leaf came from
adapter/adapter.safetensors  its leaves by their paths: kernels (in, out), blocks stacked on the first axis
null.safetensors             `null` [1, L, d_ctx], the condition of "no prompt": a value of model.null
transformer/                 the DiT as diffusers writes it, low-rank corrections merged: the folder is a value of model.dit.path
adapter/low_rank.safetensors the corrections by themselves, where there are any
vae/                         the VAE as diffusers writes it, unless it is `pixels`: the folder is a value of model.vae.path
params/STEP                  all leaves by Orbax, as they were trained: low-rank corrections apart
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rise_jax.build import Model, language_from, model_from
from rise_jax.checkpoint import Checkpoints
from rise_jax.condition_kinds import CONDITIONS, Condition
from rise_jax.export_card import CARD, FORMAT, SAMPLE, SIZE, read_card
from rise_jax.language import differing, states_in_batch
from rise_jax.models.attention import XLA, Backend
from rise_jax.placement import Place, check, stream
from rise_jax.published import LEARNED, NATIVE, PIXELS, RUNTIME, dit_faults, load_null, load_vae, open_vae
from rise_jax.runs import Run
from rise_jax.sharding import shardings
from rise_jax.tensor_folder import TensorFile
from rise_jax.trees import named_leaves, nested
from rise_jax.validate import clip_size, tile_faults
from rise_jax.version import VERSION
from rise_jax.weights_wan import load_wan, low_rank_leaves, merge_low_rank, part_low_rank, save_wan
from rise_jax.weights_wan_vae import open_wan_vae, save_wan_vae
from rise_jax.workdir import write_json

ADAPTER, LOW_RANK, NULL = "adapter/adapter.safetensors", "adapter/low_rank.safetensors", "null.safetensors"


class Export(NamedTuple):
    """What a Pipeline is made of. `config` has the groups model and sample; the paths in it are those of this folder."""

    model: Model
    params: dict
    vae: dict
    language: Condition
    config: ConfigDict


def write_export(folder: Path, run: Run, language: Condition, vae: dict) -> None:
    """Writes all of a run into a folder that is not there yet; it appears when it is complete.

    `language` and `vae` (parameters) are those that the run was trained with.
    """
    model, params = run.config.model, run.params
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / CARD).parent.mkdir(parents=True)
    adapter = named_leaves(params.get("adapter", {}))  # kind `identity` has no leaves
    kept = {name: np.asarray(leaf) for name, leaf in adapter.items() if name != "null"}
    safetensors.numpy.save_file(kept, scratch / ADAPTER)
    null = adapter["null"] if model.null == LEARNED else params["null"]["embedding"]
    safetensors.numpy.save_file({"null": np.asarray(null)}, scratch / NULL)
    if corrections := low_rank_leaves(params["dit"]):
        safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in corrections.items()}, scratch / LOW_RANK)
    save_wan(merge_low_rank(params["dit"]), _dit_sizes(model), scratch / "transformer")
    if model.vae.path != PIXELS:
        save_wan_vae(vae, open_wan_vae(model.vae.path)[0], scratch / "vae")
    checkpoints = Checkpoints(scratch / "params", keep=1)
    checkpoints.save(run.step, params, {"provenance": run.meta["provenance"]})
    checkpoints.close()
    write_json(scratch / CARD, _card(run, language))
    scratch.rename(folder)


def read_export(folder: Path, llm: str | None = None, mesh: Mesh | None = None, backend: Backend = XLA) -> Export:
    """What `write_export` wrote; `llm` is the LLM's path where it is not the one of training.

    All parameters lie over the mesh; without one, on the default device. `backend` is that of the model's attention.

    Raises FileNotFoundError naming every file that is missing, and ValueError where the parts do not belong together: an LLM
    of another hash, width, layer or alignment, a DiT of other sizes than the adapter or the VAE expect, tensors that do not fit;
    or for a card with keys that are missing, unknown or of an impossible value.
    """
    card = read_card(folder)
    config = _config(card, folder)
    _refuse_missing(folder, config.model)
    vae = open_vae(config.model.vae.path)
    if faults := [*dit_faults(config.model, vae.channels), *tile_faults(config.model.vae.get("tile", 0), vae)]:
        raise ValueError(f"the parts of {folder} do not belong together:\n" + "\n".join(f"  {x}" for x in faults))
    settings = config.model[CONDITIONS[config.model.condition].group]
    settings.path = llm or settings.path
    language = language_from(config.model, rules=card["llm"]["instruction"], mesh=mesh)
    _check_language(card["llm"], language, folder)
    place = mesh and partial(shardings, mesh=mesh)
    model = model_from(config.model, language.width, states_in_batch, backend=backend)
    params = {
        "adapter": _load(folder / ADAPTER, model.abstract.get("adapter", {}), place),
        "dit": _load_dit(folder, config.model, model.abstract["dit"], place),
        "null": {"embedding": load_null(config.model)[0]},
    }
    return Export(model, params, load_vae(config.model.vae.path, place)[0], language, config)


def _dit_sizes(model: ConfigDict) -> dict:
    own = {name: value for name, value in model.dit.to_dict().items() if name not in RUNTIME}
    return own | dict(channels=open_vae(model.vae.path).channels, d_ctx=model.adapter.d_ctx)


def _card(run: Run, language: Condition) -> dict:
    model, sample = run.config.model, {name: run.config.sample[name] for name in SAMPLE}
    return {
        "format": FORMAT,
        "rise_jax": VERSION,
        "step": run.step,
        "model": model.to_dict(),
        "llm": {"identity": language.identity, "width": language.width, "instruction": language.rules},
        "null": model.null if model.null in (LEARNED, NATIVE) else "file",
        "sample": sample | dict(zip(SIZE, clip_size(run.config.sample, run.config.data))),
        "fps": run.config.data.fps,
        "provenance": run.meta["provenance"],
    }


def _config(card: dict, folder: Path) -> ConfigDict:
    """The run's config with the folder's own files for its parts."""
    sample = {"seed": 0} | card["sample"]
    sample |= {name: float(sample[name]) for name in ("guidance", "temperature")}  # a hand may have written 2
    data = {name: sample[name] for name in SIZE} | {"fps": card["fps"]}
    config = ConfigDict({"model": card["model"], "sample": sample, "data": data})
    config.model.dit.path = str(folder)
    config.model.update(null=str(folder / NULL), trainable=["."])
    if config.model.vae.path != PIXELS:
        config.model.vae.path = str(folder)
    return config


def _refuse_missing(folder: Path, model: ConfigDict) -> None:
    needed = [ADAPTER, NULL, "transformer/config.json", *(["vae/config.json"] if model.vae.path != PIXELS else [])]
    needed += [LOW_RANK] if model.dit.get("low_rank", 0) else []
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: the export is incomplete")


def _check_language(expected: dict, language: Condition, folder: Path) -> None:
    there = expected["identity"] | {"width": expected["width"]}
    here = language.identity | {"width": language.width}
    if names := differing(there, here):
        values = "; ".join(f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names)
        raise ValueError(f"the adapter in {folder} belongs to another LLM or condition than this one: {values}")


def _load_dit(folder: Path, model: ConfigDict, abstract: dict, place: Callable | None) -> dict:
    """With its corrections apart again: a kernel in bfloat16 would lose what is below half a unit of its last place."""
    merged = load_wan(folder, text_len=model.dit.text_len, dtype=None, place=place).params
    if not (corrections := low_rank_leaves(abstract)):
        return merged
    return part_low_rank(merged, _load(folder / LOW_RANK, nested(corrections), place), model.dtype)


def _load(path: Path, abstract: dict, place: Callable | None) -> dict:
    table = {name: Place(name) for name in named_leaves(abstract)}
    file = TensorFile(path)
    check(abstract, table, file)
    return stream(abstract, table, file, place and place(abstract))
