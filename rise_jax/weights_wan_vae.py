"""Published weights of Wan's video autoencoder <-> parameter tree: diffusers' layout both ways, the original layout in."""

from pathlib import Path
from typing import Any, NamedTuple

from rise_jax.models.wan_vae import COLOURS, WAN_2_1, WanVAE, WanVAEConfig
from rise_jax.placement import Place, check, save, stream
from rise_jax.settings import ABOVE_0, FLAG, NUMBER, check_settings, list_of, only, raise_faults, whole
from rise_jax.tensor_folder import RUNS_CODE, TensorFile, TensorFolder, not_default, refuse_pickle, sha256_of
from rise_jax.trees import named_leaves

STEM = "diffusion_pytorch_model"
CLASS = "AutoencoderKLWan"
ORIGINAL = (
    f"the VAE of Wan's original repository is Wan2.1_VAE.pth, a pickle, {RUNS_CODE}: save its tensors as .safetensors and give that "
    "file, or take the repository whose name ends in -Diffusers"
)

# Module of the tree -> (diffusers' name, original name). Those that stand in numbered layers are in LAYERS.
MODULES = {
    "quant": ("quant_conv", "conv1"),
    "post_quant": ("post_quant_conv", "conv2"),
    "encoder/conv_in": ("encoder.conv_in", "encoder.conv1"),
    "encoder/norm_out": ("encoder.norm_out", "encoder.head.0"),
    "encoder/conv_out": ("encoder.conv_out", "encoder.head.2"),
    "decoder/conv_in": ("decoder.conv_in", "decoder.conv1"),
    "decoder/norm_out": ("decoder.norm_out", "decoder.head.0"),
    "decoder/conv_out": ("decoder.conv_out", "decoder.head.2"),
}
LAYERS = {
    "norm1": ("norm1", "residual.0"),
    "conv1": ("conv1", "residual.2"),
    "norm2": ("norm2", "residual.3"),
    "conv2": ("conv2", "residual.6"),
    "shortcut": ("conv_shortcut", "shortcut"),
    "norm": ("norm", "norm"),
    "qkv": ("to_qkv", "to_qkv"),
    "out": ("proj", "proj"),
    "conv": ("resample.1", "resample.1"),
    "time": ("time_conv", "time_conv"),
}
LEAVES = {"kernel": ("weight", "kernel"), "bias": ("bias", "plain"), "scale": ("gamma", "matrix")}  # name, form

# Key of config.json -> size here.
SIZES = dict(
    base_dim="width",
    dim_mult="multipliers",
    num_res_blocks="blocks",
    z_dim="channels",
    temperal_downsample="temporal",
    latents_mean="mean",
    latents_std="std",
)
# Options of which this VAE has one value.
ONLY = dict(attn_scales=[], is_residual=False, patch_size=None, in_channels=COLOURS, out_channels=COLOURS)
FREE = ("dropout", "scale_factor_temporal", "scale_factor_spatial")  # of training, and what follows from the sizes
KINDS = dict(
    base_dim=whole(),
    dim_mult=list_of(whole(), "whole numbers >= 1"),
    num_res_blocks=whole(),
    z_dim=whole(),
    temperal_downsample=list_of(FLAG, "true or false"),
    latents_mean=list_of(NUMBER, "numbers"),
    latents_std=list_of(ABOVE_0, "numbers > 0"),
    **{key: only(value, nullable=False) for key, value in ONLY.items()},
)


class WanVAEFolder(TensorFolder):
    """A VAE as diffusers writes it: config.json has a say in the latents."""

    def sha256(self) -> str:
        """Over the weight files, and what sizes and statistics of latents have another value than Wan 2.1's."""
        return sha256_of(self.files, not_default(wan_vae_config(self)))


class LoadedWanVAE(NamedTuple):
    """`params` is a nested dict of fp32 arrays, `source` the folder or file it came from."""

    config: WanVAEConfig
    params: dict
    source: TensorFolder


def load_wan_vae(path: Path | str, config: WanVAEConfig = WAN_2_1, *, place: Any = None) -> LoadedWanVAE:
    """Loads a VAE in fp32: a diffusers folder (the VAE's own, or a pipeline's that has it in vae/), or one .safetensors file.

    Args:
      config: sizes of a file by itself, whose names are diffusers' or the original ones; a folder's config.json says them.
      place: tree of abstract leaves -> tree of Shardings, e.g. `sharding.shardings` of a mesh; None: the default device.

    Raises:
      FileNotFoundError: naming the files that are missing. ValueError: an option that the VAE does not have, by its name;
        or all tensors that are missing, left over, mis-shaped or of an unreadable dtype.
    """
    config, abstract, table, source = checked_wan_vae(path, config)
    return LoadedWanVAE(config, stream(abstract, table, source, place and place(abstract)), source)


def checked_wan_vae(
    path: Path | str, config: WanVAEConfig = WAN_2_1
) -> tuple[WanVAEConfig, dict, dict, TensorFile | TensorFolder]:
    """(sizes, abstract leaves, table, weights still on disk) of what `load_wan_vae` loads, with the same arguments and errors."""
    config, source = open_wan_vae(path, config)
    abstract = WanVAE(config).abstract
    layout = "original" if "encoder.conv1.weight" in source.tensors else "diffusers"
    table = wan_vae_table(config, layout)
    check(abstract, table, source)
    return config, abstract, table, source


def open_wan_vae(path: Path | str, config: WanVAEConfig = WAN_2_1) -> tuple[WanVAEConfig, TensorFile | TensorFolder]:
    """(sizes, weights still on disk) of what `load_wan_vae` loads, with the same arguments and errors, those of tensors aside."""
    path = Path(path)
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        return config, TensorFile(path)
    source = WanVAEFolder(path, STEM, "vae")
    return wan_vae_config(source), source


def save_wan_vae(params: dict, config: WanVAEConfig, folder: Path | str) -> None:
    """Writes a VAE so that `AutoencoderKLWan.from_pretrained(folder)` loads it."""
    sizes = {key: getattr(config, size) for key, size in SIZES.items()}
    save(params, wan_vae_table(config, "diffusers"), Path(folder), STEM, {"_class_name": CLASS, **ONLY, **sizes})


def wan_vae_config(folder: TensorFolder) -> WanVAEConfig:
    """Sizes from config.json; ValueError names every setting that this VAE does not have or know."""
    settings, where = folder.settings, f"{folder.path}/config.json"
    if (found := settings.get("_class_name")) != CLASS:
        other = f"; {ORIGINAL}" if found == "WanModel" else ""
        raise ValueError(f"{where}: _class_name={found!r} is not supported; known: {CLASS}{other}")
    kinds = KINDS | {"decoder_base_dim": only(settings.get("base_dim"))}
    check_settings(settings, kinds, where, free=FREE, needed=SIZES)
    stages, channels = len(settings["dim_mult"]), settings["z_dim"]
    lengths = {"temperal_downsample": stages - 1, "latents_mean": channels, "latents_std": channels}
    misfits = [
        f"not supported: len({key})={len(settings[key])} (must be {length}: "
        f"{f'len(dim_mult)={stages}' if key == 'temperal_downsample' else f'z_dim={channels}'})"
        for key, length in lengths.items()
        if len(settings[key]) != length
    ]
    raise_faults(misfits, where)
    sizes = {size: settings[key] for key, size in SIZES.items()}
    return WanVAEConfig(**{size: tuple(value) if isinstance(value, list) else value for size, value in sizes.items()})


def wan_vae_table(config: WanVAEConfig, layout: str) -> dict[str, Place]:
    """Published name -> Place, for every leaf of a VAE's tree; layout "diffusers" or "original"."""
    table = {}
    for path in named_leaves(WanVAE(config).abstract):
        name = published_name(path, config.blocks)[layout == "original"]
        table[name] = Place(path, form=LEAVES[path.rpartition("/")[2]][1])
    return table


def published_name(path: str, blocks: int) -> tuple[str, str]:
    """(diffusers' name, original name) of a leaf, in a VAE with `blocks` residual blocks per stage.

    The original file calls its layers by their place in one list; diffusers nests those of the decoder by stage
    (`scripts/convert_wan_to_diffusers.py` of diffusers).
    """
    module, _, leaf = path.rpartition("/")
    if module in MODULES:
        places = MODULES[module]
    else:
        side, group, number, inner = module.split("/")
        layer = _layer_names(group, int(number), blocks)
        places = tuple(f"{side}.{whole}.{part}" for whole, part in zip(layer, LAYERS[inner]))
    return tuple(f"{name}.{LEAVES[leaf][0]}" for name in places)


def _layer_names(group: str, number: int, blocks: int) -> tuple[str, str]:
    if group == "middle":
        return f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[number]}", f"middle.{number}"
    if group == "down":
        return f"down_blocks.{number}", f"downsamples.{number}"
    stage, place = divmod(number, blocks + 2)
    return f"up_blocks.{stage}.{f'resnets.{place}' if place <= blocks else 'upsamplers.0'}", f"upsamples.{number}"
