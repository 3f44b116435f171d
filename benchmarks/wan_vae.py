"""Encoding and decoding of a clip by Wan's autoencoder, against diffusers' AutoencoderKLWan.

    python -m benchmarks.wan_vae [--rounds 12] [--width 32] [--size 64] [--frames 17]

Same weights, same cores, fp32, one clip, runs interleaved; medians. Aim: ratios of at most 1.1. Wan 2.1's width is 96.
"""

import argparse
import tempfile
import time

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from rise_jax.models.wan_vae import WanVAE
from rise_jax.weights_wan_vae import load_wan_vae


def make_runs(width: int, size: int, frames: int) -> tuple[dict, dict, int]:
    """({"encode", "decode"} -> (ours, theirs), functions that run once and wait), {name: seconds to compile}, parameters"""
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=width).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load_wan_vae(folder)
    vae, params = WanVAE(loaded.config), loaded.params
    video = np.random.default_rng(0).uniform(-1, 1, (1, frames, size, size, 3)).astype("f4")
    pixels = torch.from_numpy(video).movedim(-1, 1).contiguous()
    mean, std = (torch.tensor(row).view(1, -1, 1, 1, 1) for row in (loaded.config.mean, loaded.config.std))
    with torch.no_grad():
        raw = model.encode(pixels).latent_dist.mode()
    latents = jax.device_put(((raw - mean) / std).movedim(1, -1).contiguous().numpy())
    video = jax.device_put(video)

    compiled, compile_seconds = {}, {}
    for name, value in (("encode", video), ("decode", latents)):
        start = time.perf_counter()
        compiled[name] = jax.jit(getattr(vae, name)).lower(params, value).compile()
        compile_seconds[name] = time.perf_counter() - start
    np.testing.assert_allclose(compiled["encode"](params, video), latents, atol=1e-3)

    def ours(name, value):
        return lambda: jax.block_until_ready(compiled[name](params, value))

    @torch.no_grad()
    def their_encode():
        return (model.encode(pixels).latent_dist.mode() - mean) / std

    @torch.no_grad()
    def their_decode():
        return model.decode(raw).sample

    runs = {"encode": (ours("encode", video), their_encode), "decode": (ours("decode", latents), their_decode)}
    return runs, compile_seconds, sum(leaf.size for leaf in jax.tree.leaves(params))


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="timed runs of each, interleaved (default: 12)")
    parser.add_argument("--width", type=int, default=32, help="base width (default: 32)")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (default: 64)")
    parser.add_argument("--frames", type=int, default=17)
    args = parser.parse_args()
    runs, compile_seconds, count = make_runs(args.width, args.size, args.frames)
    for pair in runs.values():  # warm up
        for run in pair:
            run()
    times = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, pair in runs.items():
            times[name].append([seconds(run) for run in pair])

    print(
        f"{count / 1e6:.1f} M parameters, {args.frames} frames of {args.size}x{args.size}, fp32, {jax.default_backend()}"
    )
    print(f"jax {jax.__version__}, torch {torch.__version__} ({torch.get_num_threads()} threads), {args.rounds} rounds")
    print(f"{'':8}{'rise_jax s':>12}{'diffusers s':>13}{'ratio':>7}{'fastest':>17}{'compile s':>11}")
    for name, pairs in times.items():
        (ours, theirs), best = np.median(pairs, axis=0), np.min(pairs, axis=0)
        fastest = f"{best[0]:.3f} / {best[1]:.3f}"
        print(f"{name:8}{ours:12.3f}{theirs:13.3f}{ours / theirs:7.2f}{fastest:>17}{compile_seconds[name]:11.1f}")


if __name__ == "__main__":
    main()
