"""The parts of a model that may come from published files: which file or folder a config names, what sizes it has, and its loading.

`model.vae.path` is "pixels" or a Wan VAE (a folder, or one .safetensors file); `model.dit.path` is empty for a DiT trained from
scratch, or the folder of a Wan DiT.
"""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from rise_jax.models.vae import Pixels
from rise_jax.models.wan_vae import WanVAE
from rise_jax.placement import check, stream
from rise_jax.trees import named_leaves, nested
from rise_jax.weights_wan import transformer_folder, wan_sizes, wan_table
from rise_jax.weights_wan_vae import load_wan_vae, open_wan_vae

PIXELS = "pixels"
LEARNED = "learned"
RUNTIME = ("unroll", "remat", "low_rank")  # options of the DiT that are not sizes of its published part


def open_vae(path: str) -> Pixels | WanVAE:
    """The VAE's functions and sizes; reads no weights. FileNotFoundError or ValueError for a path that holds none."""
    return Pixels() if path == PIXELS else WanVAE(open_wan_vae(path)[0])


def load_vae(path: str) -> tuple[dict, dict]:
    """(parameters, identity) of a VAE; both are {} for `pixels`, which has none."""
    if path == PIXELS:
        return {}, {}
    loaded = load_wan_vae(path)
    return loaded.params, {"sha256": loaded.source.sha256()}


def dit_faults(path: str, d_ctx: int, vae: str) -> list[str]:
    """What of a published DiT does not fit an adapter that writes `d_ctx` wide, and the VAE at `vae`; none for an empty path."""
    if not path:
        return []
    sizes, coder = wan_sizes(transformer_folder(path))[0], open_vae(vae)
    faults = []
    if sizes["d_ctx"] != d_ctx:
        faults.append(f"model.adapter.d_ctx={d_ctx}, but the DiT at {path} takes text of width {sizes['d_ctx']}")
    if sizes["channels"] != coder.channels:
        faults.append(f"model.vae.path={vae} has {coder.channels} channels, the DiT at {path} {sizes['channels']}")
    return faults


def dit_options(row: dict) -> dict:
    """Keyword arguments of the DiT from a config's `model.dit`: the row's own, or those of the folder that `path` names.

    Raises ValueError listing every size of the row that the folder contradicts.
    """
    row = dict(row)
    path = row.pop("path", "")
    if not path:
        return row
    sizes, _ = wan_sizes(transformer_folder(path))
    own = {name: tuple(value) if name == "patch" else value for name, value in row.items() if name not in RUNTIME}
    wrong = {name: value for name, value in own.items() if name != "text_len" and value != sizes.get(name, value)}
    if wrong:
        raise ValueError(
            f"{path} has other sizes than the preset: "
            + ", ".join(f"model.dit.{name}={value} there is {sizes[name]}" for name, value in wrong.items())
        )
    options = {name: value for name, value in row.items() if name in (*RUNTIME, "text_len")}
    return {name: value for name, value in sizes.items() if name not in ("channels", "d_ctx")} | options


def load_leaves(model: ConfigDict, abstract: dict, wanted: Collection[str], place: Callable) -> tuple[dict, dict]:
    """({path: array}, {path: origin}) of those leaves of `abstract` named in `wanted` that the config's files hold.

    Every leaf comes in its dtype and streams to the sharding that `place(tree)` gives it; the DiT's file is checked as a whole.
    """
    leaves, origins = {}, {}
    names = {name for name in wanted if name.startswith("dit/") and "/low_rank_" not in name}
    if model.dit.get("path", "") and names:
        whole = {name: leaf for name, leaf in named_leaves(abstract["dit"]).items() if "/low_rank_" not in name}
        folder = transformer_folder(model.dit.path)
        table = wan_table(nested(whole), dit_options(model.dit.to_dict())["patch"], wan_sizes(folder)[1])
        check(nested(whole), table, folder)
        part = nested({name: leaf for name, leaf in whole.items() if f"dit/{name}" in names})
        found = named_leaves({"dit": stream(part, table, folder, place(part))})
        leaves |= found
        origins |= dict.fromkeys(found, f"file {folder.sha256()}")
    if "null/embedding" in wanted:
        value, origin = load_null(model.null, model.adapter.d_ctx)
        leaves["null/embedding"] = jax.device_put(value, place({"null": value})["null"])
        origins["null/embedding"] = origin
    return leaves, origins


def load_null(path: str, width: int) -> tuple[np.ndarray, str]:
    """(embedding [1, L, width], origin) of the condition a backbone was trained to take for "no prompt": tensor `null` of a
    .safetensors file.

    FileNotFoundError or ValueError say what is missing or of another width.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"model.null={path!r} is no file: give 'learned', or a .safetensors with a tensor `null`"
        )
    tensors = safetensors.numpy.load_file(path)
    value = tensors.get("null")
    if value is None or value.ndim != 3 or value.shape[0] != 1 or value.shape[2] != width:
        found = {name: tensor.shape for name, tensor in tensors.items()}
        raise ValueError(f"{path} must hold one tensor `null` [1, L, {width}], found {found}")
    return value.astype(np.float32), f"file {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
