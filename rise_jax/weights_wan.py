"""Weights of the Wan 2.1 text-to-video DiT, in and out: diffusers' layout both ways, the original one in.

Sources of the names: diffusers `transformer_wan.py` and Wan2.1 `wan/modules/model.py` (both Apache-2.0).
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rise_jax.models.dit import COORDINATES, EPS, FREQUENCIES, abstract_dit
from rise_jax.placement import SHARD_BYTES, Place, check, save, stream
from rise_jax.settings import ABOVE_0, EVEN, check_settings, list_of, only, raise_faults, whole
from rise_jax.tensor_folder import DTYPES, TensorFolder, parsed
from rise_jax.trees import named_leaves, nested, path_name

STEM = "diffusion_pytorch_model"
LAYOUTS = {"WanTransformer3DModel": "diffusers", "WanModel": "original"}  # by config.json's _class_name
TEXT_LEN = 512  # of the published models; diffusers' config does not say it
TEXT_WIDTH = 4096  # of umT5-XXL; the original config does not say it
EXPERTS = (
    "transformer_2",
    "low_noise_model",
)  # the second model of Wan 2.2 A14B: in diffusers' pipeline, in the original one
KEPT_FP32 = r"(^|/)(modulation|time_up|time_down|cross_norm)(/|$)"  # diffusers' _keep_in_fp32_modules

# Module or parameter here -> (diffusers', the original one). {} stands for a layer's number.
NAMES = {
    "modulation": ("scale_shift_table", "head.modulation"),
    "patch_in": ("patch_embedding", "patch_embedding"),
    "patch_out": ("proj_out", "head.head"),
    "time_up": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    "time_down": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    "time_rows": ("condition_embedder.time_proj", "time_projection.1"),
    "text_up": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    "text_down": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    "blocks/modulation": ("blocks.{}.scale_shift_table", "blocks.{}.modulation"),
    "blocks/cross_norm": ("blocks.{}.norm2", "blocks.{}.norm3"),  # diffusers numbers norms in the order of their use
    "blocks/up": ("blocks.{}.ffn.net.0.proj", "blocks.{}.ffn.0"),
    "blocks/down": ("blocks.{}.ffn.net.2", "blocks.{}.ffn.2"),
} | {
    f"blocks/{module}/{part}": (f"blocks.{{}}.{theirs}.{their_part}", f"blocks.{{}}.{module}.{original}")
    for module, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, their_part, original in (
        ("query", "to_q", "q"),
        ("key", "to_k", "k"),
        ("value", "to_v", "v"),
        ("out", "to_out.0", "o"),
        ("query_norm", "norm_q", "norm_q"),
        ("key_norm", "norm_k", "norm_k"),
    )
}
SUFFIXES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias", "modulation": ""}

# Key of config.json -> size here.
SIZES = {
    "diffusers": dict(
        num_attention_heads="heads",
        attention_head_dim="head_width",
        ffn_dim="mlp_width",
        num_layers="depth",
        in_channels="in_channels",
        out_channels="channels",
        text_dim="d_ctx",
        patch_size="patch",
        eps="eps",
    ),
    "original": dict(
        num_heads="heads",
        dim="width",
        ffn_dim="mlp_width",
        num_layers="depth",
        in_dim="in_channels",
        out_dim="channels",
        text_dim="d_ctx",
        patch_size="patch",
        eps="eps",
        text_len="text_len",
    ),
}
DEFAULTS = dict(patch=(1, 2, 2), d_ctx=TEXT_WIDTH, text_len=TEXT_LEN, eps=EPS)  # where the config is silent
# Options of which the DiT has one value.
ONLY = {
    "diffusers": dict(
        freq_dim=FREQUENCIES,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        image_dim=None,
        added_kv_proj_dim=None,
        pos_embed_seq_len=None,
    ),
    "original": dict(freq_dim=FREQUENCIES, model_type="t2v", cross_attn_norm=True, qk_norm=True, window_size=[-1, -1]),
}
FREE = {"rope_max_seq_len": 1024}  # length of a table that is computed here as far as it is used
OTHER_KINDS = {"eps": ABOVE_0, "patch_size": list_of(whole(), "whole numbers >= 1", 3), "attention_head_dim": EVEN}
KINDS = {
    layout: {key: OTHER_KINDS.get(key, whole()) for key in sizes}
    | {key: only(value, nullable=False) for key, value in ONLY[layout].items()}
    for layout, sizes in SIZES.items()
}


class LoadedDiT(NamedTuple):
    """`sizes` are keyword arguments of models.dit.DiT, `params` its nested dict, `source` the folder it came from."""

    sizes: dict
    params: dict
    source: TensorFolder


def load_wan(
    path: Path | str, *, text_len: int | None = None, dtype: Any = jnp.float32, place: Any = None
) -> LoadedDiT:
    """Loads a DiT from a folder of either layout (or a pipeline's folder that has it in transformer/).

    Args:
      text_len: tokens of context, where it is not the file's own (the original layout's) or 512.
      dtype: of the leaves, but for modulations, time embedding and affine norms, which stay fp32 as in diffusers; None: as stored.
      place: tree of abstract leaves -> tree of Shardings, e.g. `sharding.shardings` of a mesh; None: the default device.

    Raises:
      FileNotFoundError: naming the files that are missing. ValueError: an option that the DiT does not have, by its name;
        or all tensors that are missing, left over, mis-shaped or of an unreadable dtype.
    """
    sizes, abstract, table, folder = checked_wan(path, dtype or jnp.float32)
    sizes |= {"text_len": text_len} if text_len else {}
    abstract = abstract if dtype else _as_stored(abstract, table, folder)
    return LoadedDiT(sizes, stream(abstract, table, folder, place and place(abstract)), folder)


def checked_wan(path: Path | str, dtype: Any = jnp.float32) -> tuple[dict, dict, dict[str, Place], TensorFolder]:
    """(sizes, abstract leaves, table, folder) of what `load_wan` loads, from the files' headers, with the same errors."""
    folder = transformer_folder(path)
    sizes, layout = wan_sizes(folder)
    abstract = abstract_wan(sizes, dtype)
    table = wan_table(abstract, sizes["patch"], layout)
    check(abstract, table, folder)
    return sizes, abstract, table, folder


def transformer_folder(path: Path | str) -> TensorFolder:
    """The DiT's folder: `path` itself, or the transformer/ in it. ValueError where it is one of the two of a Wan 2.2 pipeline."""
    path = Path(path)
    _refuse_experts(path if (path / "transformer").is_dir() else path.absolute().parent)
    return TensorFolder(path, STEM, "transformer")


def _refuse_experts(pipeline: Path) -> None:
    """Each of the two has the sizes of Wan 2.1 14B, and has learned its half of the times alone."""
    file = pipeline / "model_index.json"
    index = parsed(file) if file.is_file() else {}
    signs = [f"{name}/" for name in EXPERTS if (pipeline / name).is_dir()]
    keys = [key for key in ("boundary_ratio", "transformer_2") if index.get(key) not in (None, [None, None])]
    signs += [f"{key} in {file.name}" for key in keys]
    if signs:
        raise ValueError(
            f"{pipeline} holds a model of two experts ({', '.join(signs)}), as Wan 2.2 A14B is: these are not supported; "
            "take Wan2.1-T2V-1.3B-Diffusers or Wan2.1-T2V-14B-Diffusers"
        )


def save_wan(params: dict, sizes: dict, folder: Path | str, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a DiT so that `WanTransformer3DModel.from_pretrained(folder)` loads it; leaves keep their dtypes.

    `sizes` as in `LoadedDiT`. With `coordinates` the model expects them behind its latents (models/dit.py).
    """
    save(params, wan_table(params, sizes["patch"], "diffusers"), Path(folder), STEM, _settings(sizes), shard_bytes)


def merge_low_rank(params: dict) -> dict:
    """A DiT's tree without low-rank corrections: each is added to its kernel, W + A B (layers.LowRankLinear), in fp32 on the host."""
    leaves = named_leaves(params)
    kept = {name: leaf for name, leaf in leaves.items() if name not in low_rank_leaves(params)}
    for name, parts in _corrected(leaves).items():
        kernel, inward, outward = (np.asarray(part, np.float32) for part in parts)
        kept[name] = kernel + inward @ outward
    return nested(kept)


def part_low_rank(merged: dict, corrections: dict, dtype) -> dict:
    """What `merge_low_rank` merged: W = (W + A B) - A B, in `dtype`, and `corrections` beside it. A W of bfloat16 comes back bit for
    bit, but for one entry in 10^5 or fewer whose size is a rounding error of A B (1e-7 and below, changed by 1e-9); one of float32 but
    for its last places; every kernel stays where it lies.
    """
    leaves = named_leaves(merged) | named_leaves(corrections)

    def without(kernel, inward, outward):
        return (kernel - jnp.matmul(inward, outward, precision=jax.lax.Precision.HIGHEST)).astype(dtype)

    for name, parts in _corrected(leaves).items():
        leaves[name] = jax.jit(without, out_shardings=parts[0].sharding)(*parts)
    return nested(leaves)


def low_rank_leaves(params: dict) -> dict:
    """Path -> leaf of the corrections in a tree of arrays or of abstract values."""
    return {name: leaf for name, leaf in named_leaves(params).items() if "/low_rank_" in name}


def _corrected(leaves: dict) -> dict[str, tuple]:
    """Path of every kernel that has a correction -> it, A and B."""
    modules = [name.removesuffix("/low_rank_in") for name in leaves if name.endswith("/low_rank_in")]
    parts = ("kernel", "low_rank_in", "low_rank_out")
    return {f"{module}/kernel": tuple(leaves[f"{module}/{part}"] for part in parts) for module in modules}


def wan_table(tree: dict, patch: tuple[int, int, int], layout: str) -> dict[str, Place]:
    """Published name -> Place, for every leaf of a DiT's tree (arrays or abstract); layout "diffusers" or "original"."""
    table = {}
    for path, leaf in named_leaves(tree).items():
        last = path.rpartition("/")[2]
        module = path if last == "modulation" else path.rpartition("/")[0]
        name = NAMES[module][layout == "original"] + SUFFIXES[last]
        form = {"kernel": "conv" if module == "patch_in" else "matrix", "modulation": "row"}.get(last, "plain")
        for layer in range(leaf.shape[0]) if path.startswith("blocks/") else (None,):
            table[name.format(layer)] = Place(path, layer, form, tuple(patch))
    return table


def wan_sizes(folder: TensorFolder) -> tuple[dict, str]:
    """(keyword arguments of DiT, layout) from config.json; ValueError names every setting that the DiT does not have or know."""
    settings, where = folder.settings, f"{folder.path}/config.json"
    name = settings.get("_class_name")
    layout = LAYOUTS.get(name) if isinstance(name, str) else None
    if layout is None:
        raise ValueError(f"{where}: _class_name={name!r} is not supported; known: {', '.join(LAYOUTS)}")
    given = {size: settings[key] for key, size in SIZES[layout].items() if settings.get(key) is not None}
    lacking = [key for key, size in SIZES[layout].items() if size not in given | DEFAULTS | {"channels": 0}]
    check_settings(settings, KINDS[layout], where, free=FREE, needed=lacking)
    sizes = DEFAULTS | {"channels": given["in_channels"]} | given
    inward, head_width = sizes.pop("in_channels"), sizes.pop("head_width", None)
    width, extra = sizes.get("width") or sizes["heads"] * head_width, inward - sizes["channels"]
    misfits = []
    if extra not in (0, COORDINATES):
        misfits.append(
            f"{inward} channels in and {sizes['channels']} out are not supported: "
            f"equal numbers are (Wan), or {COORDINATES} more (coordinates, models/dit.py)"
        )
    if width % (2 * sizes["heads"]):
        misfits.append(f"dim={width} over num_heads={sizes['heads']} gives no even head width")
    raise_faults(misfits, where)
    return sizes | dict(width=width, patch=tuple(sizes["patch"]), coordinates=extra > 0), layout


def abstract_wan(sizes: dict, dtype: Any = jnp.float32) -> dict:
    """The DiT's nested dict of ShapeDtypeStructs, with `dtype` wherever `load_wan` gives it."""
    cast = lambda path, leaf: leaf if re.search(KEPT_FP32, path_name(path)) else jax.ShapeDtypeStruct(leaf.shape, dtype)
    return jax.tree_util.tree_map_with_path(cast, abstract_dit(**sizes))


def _as_stored(abstract: dict, table: dict[str, Place], folder: TensorFolder) -> dict:
    dtypes = {place.path: DTYPES[folder.tensors[name].dtype] for name, place in table.items()}
    leaves = named_leaves(abstract)
    return nested({path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path]) for path, leaf in leaves.items()})


def _settings(sizes: dict) -> dict:
    own = sizes | dict(
        head_width=sizes["width"] // sizes["heads"],
        in_channels=sizes["channels"] + COORDINATES * sizes.get("coordinates", False),
        patch=list(sizes["patch"]),
        eps=sizes.get("eps", DEFAULTS["eps"]),
    )
    named = {key: own[size] for key, size in SIZES["diffusers"].items()}
    return {"_class_name": "WanTransformer3DModel", **ONLY["diffusers"], **FREE, **named}
