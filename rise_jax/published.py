"""The parts of a model that may come from published files: which file or folder a config names, whether it fits, and its loading.

`model.vae.path` is "pixels" or a Wan VAE (a folder, or one .safetensors file); `model.dit.path` is empty for a DiT trained from
scratch, or the folder of a Wan DiT, whose sizes the config has to say too; `model.native.path` is the folder of a T5 or umT5 encoder.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rise_jax.models.dit import EPS
from rise_jax.models.t5 import make_t5
from rise_jax.models.vae import Pixels
from rise_jax.models.wan_vae import WanVAE
from rise_jax.placement import check, stream
from rise_jax.sharding import place_whole, put
from rise_jax.tensor_folder import AGAIN, DTYPES, TensorFile, TensorFolder
from rise_jax.trees import named_leaves, nested
from rise_jax.utf8 import read_utf8
from rise_jax.weights_t5 import checked_t5, load_t5, text_ids
from rise_jax.weights_wan import checked_wan, transformer_folder, wan_sizes, wan_table
from rise_jax.weights_wan_vae import checked_wan_vae, load_wan_vae, open_wan_vae

PIXELS = "pixels"
LEARNED, NATIVE = "learned", "native"  # values of model.null beside a file's path
CAPTIONS = 32  # encoded at a time
WHERE = (
    "docs/published.md says where to get published weights, docs/export.md how to make one's own; model.vae.path, model.dit.path, "
    "model.native.path and model.llm.path have to say where they lie"
)
RUNTIME = ("path", "unroll", "remat", "low_rank", "text_len")  # of model.dit: no sizes of the weights


@contextmanager
def _named(key: str, path: str) -> Iterator[None]:
    """Names the config's key in what is raised about its file or folder, and what to do where there is none."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}" + ("" if Path(path).exists() else f"; {WHERE}")) from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def open_vae(path: str) -> Pixels | WanVAE:
    """The VAE's functions and sizes; reads no weights. FileNotFoundError or ValueError for a path that holds none."""
    if path == PIXELS:
        return Pixels()
    with _named("model.vae.path", path):
        return WanVAE(open_wan_vae(path)[0])


def vae_identity(path: str) -> dict:
    """What `load_vae` says a VAE is; its files are read, nothing is loaded."""
    return {} if path == PIXELS else {"sha256": open_wan_vae(path)[1].sha256()}


def load_vae(path: str, place: Callable | None = None) -> tuple[dict, dict]:
    """(parameters, identity) of a VAE; both are {} for `pixels`, which has none. `place` as for `load_wan_vae`."""
    if path == PIXELS:
        return {}, {}
    loaded = load_wan_vae(path, place=place)
    return loaded.params, {"sha256": loaded.source.sha256()}


def dit_faults(model: ConfigDict, channels: int) -> list[str]:
    """Where the DiT that `model.dit.path` names differs from the config's sizes, adapter and its VAE's `channels`; none for an
    empty path.

    Raises FileNotFoundError or ValueError for a folder that holds no DiT of this architecture.
    """
    if not model.dit.path:
        return []
    with _named("model.dit.path", model.dit.path):
        sizes = wan_sizes(transformer_folder(model.dit.path))[0]
    sizes |= {"patch": tuple(sizes["patch"])}
    row = {"coordinates": False, "eps": EPS} | model.dit.to_dict()
    asked = {f"model.dit.{name}": (value, sizes[name]) for name, value in row.items() if name not in RUNTIME}
    asked["model.adapter.d_ctx"] = model.adapter.d_ctx, sizes["d_ctx"]
    asked[f"channels of model.vae.path={model.vae.path}"] = channels, sizes["channels"]
    return [
        f"{name}={value}, but {sizes_there} in {model.dit.path}"
        for name, (value, sizes_there) in asked.items()
        if (tuple(value) if name == "model.dit.patch" else value) != sizes_there
    ]


def load_leaves(model: ConfigDict, abstract: dict, wanted: Collection[str], place: Callable) -> tuple[dict, dict]:
    """({path: array}, {path: origin}) of those leaves of `abstract` named in `wanted` that the config's files hold.

    Every leaf comes in its dtype and streams to the sharding that `place(tree)` gives it; the DiT's file is checked as a whole.
    """
    leaves, origins = {}, {}
    names = {name for name in held(model, wanted) if name.startswith("dit/")}
    if names:
        whole, table, folder = _checked_dit(model, abstract)
        part = nested({name: leaf for name, leaf in whole.items() if f"dit/{name}" in names})
        leaves = named_leaves({"dit": stream(part, table, folder, place(part))})
        origins = dict.fromkeys(leaves, f"file {folder.sha256()}")
    if "null/embedding" in wanted:
        value, origin = load_null(model, place)
        leaves["null/embedding"] = put(value, place({"null": {"embedding": value}})["null"]["embedding"])
        origins["null/embedding"] = origin
    return leaves, origins


def held(model: ConfigDict, names: Collection[str]) -> set[str]:
    """Those of a model's leaves `names` that the config's files hold."""
    filed = {name for name in names if model.dit.path and name.startswith("dit/") and "/low_rank_" not in name}
    return filed | {name for name in names if name == "null/embedding"}


def _checked_dit(model: ConfigDict, abstract: dict) -> tuple[dict, dict, TensorFolder]:
    """(abstract leaves, table, folder) of the DiT at `model.dit.path`, whose tensors are all there and fit."""
    whole = {name: leaf for name, leaf in named_leaves(abstract["dit"]).items() if "/low_rank_" not in name}
    folder = transformer_folder(model.dit.path)
    table = wan_table(nested(whole), tuple(model.dit.patch), wan_sizes(folder)[1])
    check(nested(whole), table, folder)
    return whole, table, folder


def check_files(model: ConfigDict, absent: Collection[str] = (), *, null: bool = True, calibrate: bool = True) -> None:
    """What `model` needs of published files at the start, found out from their headers, before the LLM is loaded and works for hours.

    Paths in `absent` are passed over: where a run is only planned, they need not be there. `null`, `calibrate`: whether the run has
    yet to ask the native encoder for what these settings say; later it is kept.

    Raises FileNotFoundError for a native encoder or its tokenizer, a null condition or a file of captions that is not there,
    ValueError for a DiT, a VAE or an encoder whose tensors are not those of the model, all listed, and for a caption over
    `model.native.length`.
    """
    if model.dit.path and model.dit.path not in absent:
        with _named("model.dit.path", model.dit.path):
            checked_wan(model.dit.path)
    if model.vae.path != PIXELS and model.vae.path not in absent:
        with _named("model.vae.path", model.vae.path):
            checked_wan_vae(model.vae.path)
    asks = (null and model.null == NATIVE) or (calibrate and model.calibrate)
    if (asks or model.condition == NATIVE) and model.native.path not in absent:
        _check_native(model, null and model.null == NATIVE, calibrate and model.calibrate)
    if model.null not in (LEARNED, NATIVE, *absent):
        load_null(model)
    if calibrate and model.calibrate:
        _captions(model)


def _check_native(model: ConfigDict, null: bool, calibrate: str) -> None:
    path = model.native.path
    if not path or not Path(path).exists():
        raise FileNotFoundError(f"model.native.path={path!r} is no folder: the native encoder is needed here; {WHERE}")
    with _named("model.native.path", path):
        config, *_, tokenizer = checked_t5(path)
    width = config.width
    if width != model.adapter.d_ctx and (null or calibrate):
        raise ValueError(f"model.adapter.d_ctx={model.adapter.d_ctx}, but {width} in {path}")
    if calibrate:
        text_ids(tokenizer, _captions(model), model.native.length)


def _captions(model: ConfigDict) -> list[str]:
    path = Path(model.calibrate)
    if not path.is_file():
        raise FileNotFoundError(f"model.calibrate={model.calibrate!r} is no file: give one with a caption a line")
    captions = [line for line in read_utf8(path).splitlines() if line.strip()]
    if not captions:
        raise ValueError(f"model.calibrate={model.calibrate} holds no caption: write one a line")
    return captions


def null_shape(model: ConfigDict) -> tuple[int, int, int]:
    """[1, L, d_ctx] of a published null condition; the encoder's own is its end token alone."""
    return (1, 1, model.adapter.d_ctx) if model.null == NATIVE else load_null(model)[0].shape


def load_null(model: ConfigDict, place: Callable | None = None) -> tuple[np.ndarray, str]:
    """(embedding [1, L, d_ctx], origin) of the condition a backbone was trained to take for "no prompt".

    `model.null` is "native": what the native encoder, its parameters placed by `place(tree)`, says of the empty text; or a
    .safetensors file with a tensor `null`.
    FileNotFoundError or ValueError say what is missing or of another width.
    """
    if model.null == NATIVE:
        loaded, encode = _native_encoder(model.native, place)
        value = np.asarray(encode(loaded.params, *text_ids(loaded.tokenizer, [""], 1)), np.float32)
        origin = f"encoder {loaded.source.sha256()}"
        return _checked_null(model.native.path, {"null": value.shape}, model, {"null": value}.get), origin
    if not Path(model.null).is_file():
        raise FileNotFoundError(
            f"model.null={model.null!r} is no file: give {LEARNED}, {NATIVE} or a .safetensors with a tensor `null`"
        )
    file = TensorFile(model.null)
    dtypes = {name: tensor.dtype for name, tensor in file.tensors.items()}
    if dtypes.get("null", "F32") not in DTYPES:
        raise ValueError(f"{model.null}: `null` is {dtypes['null']}, readable: {', '.join(DTYPES)}")
    value = _checked_null(model.null, {name: tensor.shape for name, tensor in file.tensors.items()}, model, file.view)
    return value, f"file {file.sha256()}"


def native_statistics(model: ConfigDict, place: Callable | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation), each [width], of the native encoder's states over all tokens of the captions in `model.calibrate`;
    its parameters are placed by `place(tree)`.

    FileNotFoundError for a missing file; ValueError for an empty one, or a caption longer than `model.native.length`.
    """
    captions = _captions(model)
    loaded, encode = _native_encoder(model.native, place)
    ids, mask = text_ids(loaded.tokenizer, captions, model.native.length)
    total = square = 0.0
    for start in range(0, len(captions), CAPTIONS):
        rows = np.resize(np.arange(start, min(start + CAPTIONS, len(captions))), CAPTIONS)
        keep = mask[rows] & (np.arange(CAPTIONS) < len(captions) - start)[:, None]
        states = np.asarray(encode(loaded.params, ids[rows], mask[rows]), np.float64)[keep]
        total, square = total + states.sum(0), square + (states**2).sum(0)
    mean = total / mask.sum()
    return mean.astype(np.float32), np.sqrt(np.maximum(square / mask.sum() - mean**2, 0)).astype(np.float32)


def _native_encoder(native: ConfigDict, place: Callable | None):
    """(the encoder, jitted (params, ids, mask) -> states, whole on every device); loaded for this call alone."""
    dtype = jnp.dtype(native.dtype)
    loaded = load_t5(native.path, dtype, place)
    make, _ = make_t5(loaded.config, dtype)
    if place is None:  # free to follow any mesh
        loaded = loaded._replace(params=jax.tree.map(np.asarray, loaded.params))
    return loaded, jax.jit(lambda params, ids, mask: place_whole(make(params)(ids, mask)))


def _checked_null(path: str, shapes: dict, model: ConfigDict, read: Callable) -> np.ndarray:
    """The value, fp32, of a file that holds tensors of such shapes; `read(name)` gives one."""
    width, limit, shape = model.adapter.d_ctx, model.dit.text_len, shapes.get("null", ())
    if len(shape) != 3 or shape[0] != 1 or shape[2] != width:
        raise ValueError(f"{path} must give one tensor `null` [1, L, {width}], found {shapes}")
    if not 1 <= shape[1] <= limit:
        raise ValueError(
            f"{path}: `null` has {shape[1]} tokens, model.dit.text_len={limit} takes 1 to {limit}; "
            f"nearest: {min(max(shape[1], 1), limit)}"
        )
    value = np.array(read("null"), np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{path}: `null` holds {np.sum(~np.isfinite(value))} values that are not finite; {AGAIN}")
    return value
