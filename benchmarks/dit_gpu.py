"""Wan's DiT in bf16 on one GPU against diffusers' WanTransformer3DModel of the same sizes: one clip of 480x832, random weights.

    python -m benchmarks.dit_gpu [--preset=wan_1_3b] [--frames=17] [--remats=none,dots,attention,blocks] [--trained=stage2,all]

Forward, and gradients of all parameters or of those of stage 2, under every policy of remat. Ours holds what trains in fp32, as in
training, theirs all in bf16. Medians, ours and theirs in turn where both have a row (--no-torch: ours alone); TFLOP/s and MFU by
`rise_jax/flops.py`, what is computed again not counted; GiB: what the compiler asks for beside the arguments.
"""

import argparse
import os
import statistics
import time
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU

import jax
import jax.numpy as jnp
from flax import nnx

from configs.presets import MOTION, PRESETS
from rise_jax.flops import count_flops, gradient_flops
from rise_jax.models.attention import Backend
from rise_jax.models.dit import DiT
from rise_jax.throughput import peak_tflops
from rise_jax.trees import combine, partition

CHANNELS, D_CTX, TEXT_LEN, HEIGHT, WIDTH = 16, 4096, 512, 60, 104  # latents of 480x832
TRAINED = {"all": (".",), "stage2": [name for name in MOTION["trainable"] if "adapter" not in name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="wan_1_3b")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--remats", default="none,dots,attention,blocks")
    parser.add_argument("--trained", default="stage2,all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-torch", action="store_true")
    asked = parser.parse_args()
    shape = 1, (asked.frames - 1) // 4 + 1, HEIGHT, WIDTH, CHANNELS
    print(f"{asked.preset}, {asked.frames} frames of 480x832, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'':34}{'compile s':>10}{'seconds':>9}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}{'diffusers':>11}{'ratio':>7}")
    theirs = {} if asked.no_torch else make_theirs(asked.preset, shape)
    run_row("forward", *forward(asked.preset, shape), theirs.get("forward"), asked.rounds)
    for trained in asked.trained.split(","):
        for remat in asked.remats.split(","):
            other = theirs.get((trained, remat))
            row = gradients(asked.preset, shape, trained, remat)
            run_row(f"gradients, {trained}, {remat}", *row, other, asked.rounds)


def model(preset: str, remat: str):
    """(graph, abstract tree) of the DiT of a preset, with low-rank corrections as in stage 2."""
    row = PRESETS[preset]
    sizes = {**row["model"]["dit"], "remat": remat, "low_rank": row["stage2"]["low_rank"]}
    sizes.pop("path")
    make = partial(DiT, channels=CHANNELS, d_ctx=D_CTX, dtype=jnp.bfloat16, backend=Backend.here(), **sizes)
    graph, params = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(params=jax.random.key(0)))), nnx.Param)
    return graph, nnx.to_pure_dict(params)


def inputs(shape: tuple[int, ...]):
    """(latents, context, t)"""
    latents, context = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((shape, (1, TEXT_LEN, D_CTX))))
    return latents, context, jnp.full(1, 0.5)


def drawn(tree, dtype):
    key = jax.random.key(0, impl="unsafe_rbg")  # threefry for hundreds of leaves takes longer to compile than the model
    draw = lambda leaf: (0.02 * jax.random.normal(key, leaf.shape)).astype(dtype)
    return jax.jit(lambda: jax.tree.map(draw, tree))()


def forward(preset: str, shape: tuple[int, ...]):
    graph, abstract = model(preset, "none")
    params, arrays = drawn(abstract, jnp.bfloat16), inputs(shape)

    def run(params, latents, context, t):
        dit = nnx.merge(graph, params)
        return dit(latents, t, dit.kv(context))

    return run, (params, *arrays), count_flops(run, params, *arrays)


def gradients(preset: str, shape: tuple[int, ...], trained: str, remat: str):
    graph, abstract = model(preset, remat)
    trains, rest = partition({"dit": abstract}, list(TRAINED[trained]))
    trains, rest = drawn(trains, jnp.float32), drawn(rest, jnp.bfloat16)
    latents, context, t = inputs(shape)

    def loss(trained, rest, latents, t):
        trains, context = trained
        dit = nnx.merge(graph, combine(trains, rest)["dit"])
        return jnp.mean(dit(latents, t, dit.kv(context)) ** 2)

    arguments = (trains, context), rest, latents, t
    return jax.value_and_grad(loss), arguments, gradient_flops(loss, *arguments)


def make_theirs(preset: str, shape: tuple[int, ...]) -> dict:
    """Rows that diffusers has too -> a function that runs once and waits."""
    import torch
    from diffusers import WanTransformer3DModel

    sizes = PRESETS[preset]["model"]["dit"]
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        dit = WanTransformer3DModel(
            num_attention_heads=sizes["heads"],
            attention_head_dim=sizes["width"] // sizes["heads"],
            ffn_dim=sizes["mlp_width"],
            num_layers=sizes["depth"],
        ).to(torch.bfloat16)
        latents = torch.randn(1, CHANNELS, *shape[1:4], dtype=torch.bfloat16)
        context = torch.randn(1, TEXT_LEN, D_CTX, dtype=torch.bfloat16)
        t = torch.full((1,), 500.0)

    def forward():
        with torch.no_grad():
            dit(latents, t, context, return_dict=False)
        torch.cuda.synchronize()

    def backward(checkpointing):
        (dit.enable_gradient_checkpointing if checkpointing else dit.disable_gradient_checkpointing)()
        dit.train()
        dit.zero_grad(set_to_none=True)
        dit(latents, t, context, return_dict=False)[0].float().square().mean().backward()
        torch.cuda.synchronize()

    again, kept = partial(backward, True), partial(backward, False)
    return {"forward": forward, ("all", "none"): kept, ("all", "blocks"): again}


def run_row(name: str, function, arguments, flops: int, other, rounds: int) -> None:
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compiling = time.perf_counter() - began
    runs = [lambda: jax.block_until_ready(compiled(*arguments))] + ([other] if other else [])
    for run in runs * 2:  # warm up
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    mine, *their = (statistics.median(column) for column in zip(*times))
    tflops, peak = flops / mine / 1e12, peak_tflops(jax.devices()[0].device_kind)
    mfu = f"{tflops / peak:7.1%}" if peak else f"{'-':>7}"
    memory = compiled.memory_analysis()
    gib = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**30
    ratio = f"{their[0]:11.3f}{mine / their[0]:7.2f}" if their else ""
    print(f"{name:34}{compiling:10.1f}{mine:9.3f}{tflops:9.1f}{mfu}{gib:7.2f}{ratio}", flush=True)


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
