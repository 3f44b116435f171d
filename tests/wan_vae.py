"""Small random autoencoders of diffusers, and this project's functions with their weights."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from rise_jax.models.wan_vae import WanVAE, WanVAEConfig
from rise_jax.weights_wan_vae import LoadedWanVAE, load_wan_vae

# The published stages, narrow; with fewer blocks; and two others, cheaper to compile.
PUBLISHED = dict(base_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2, z_dim=16, temperal_downsample=[False, True, True])
FEWER = {**PUBLISHED, "num_res_blocks": 1, "z_dim": 7}
SMALL = dict(base_dim=6, dim_mult=[1, 2], num_res_blocks=1, z_dim=5, temperal_downsample=[True])
EARLY = dict(base_dim=4, dim_mult=[1, 1, 3], num_res_blocks=1, z_dim=3, temperal_downsample=[True, False])


def reference(sizes: dict) -> AutoencoderKLWan:
    """Weights large enough that attention is not flat and every layer matters; videos stay within [-1, 1]."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=sizes["z_dim"]), rng.uniform(0.5, 2, sizes["z_dim"])
    model = AutoencoderKLWan(**sizes, latents_mean=mean.tolist(), latents_std=std.tolist()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.normal_(1.0, 0.4)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, (4 if "qkv" in name else 1.2) / parameter[0].numel() ** 0.5)
        model.decoder.conv_out.weight.mul_(0.2)
    return model


def loaded(sizes: dict, folder: Path) -> LoadedWanVAE:
    """Saved by diffusers, loaded by us."""
    reference(sizes).save_pretrained(folder)
    return load_wan_vae(folder)


def video(*shape: int) -> np.ndarray:
    """[B, T, H, W, 3]"""
    return np.random.default_rng(1).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def standardised(model: AutoencoderKLWan, pixels: np.ndarray) -> np.ndarray:
    """diffusers' latents of a video, as its pipelines hand them to a DiT."""
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(pixels).movedim(-1, 1)).latent_dist.mode().movedim(1, -1).numpy()
    return (latents - np.float32(model.config.latents_mean)) / np.float32(model.config.latents_std)


def decoded(model: AutoencoderKLWan, latents: np.ndarray) -> np.ndarray:
    raw = latents * np.float32(model.config.latents_std) + np.float32(model.config.latents_mean)
    with torch.no_grad():
        return model.decode(torch.from_numpy(raw).movedim(-1, 1)).sample.movedim(1, -1).numpy()


@cache
def compiled(vae: WanVAE, name: str, **pieces) -> Callable:
    """`encode` or `decode` of `vae`; one program for all tests that use it."""
    return jax.jit(partial(getattr(vae, name), **pieces))


def difference(ours, theirs) -> float:
    """max|a - b| / max|b|"""
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def config(sizes: dict) -> WanVAEConfig:
    return WanVAEConfig(
        width=sizes["base_dim"],
        multipliers=tuple(sizes["dim_mult"]),
        blocks=sizes["num_res_blocks"],
        channels=sizes["z_dim"],
        temporal=tuple(sizes["temperal_downsample"]),
        mean=(0.0,) * sizes["z_dim"],
        std=(1.0,) * sizes["z_dim"],
    )
