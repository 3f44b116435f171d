"""A video DiT of 20 M parameters against diffusers' WanTransformer3DModel: forward, and a step (forward, MSE loss, backward), the step
with the blocks in a scan and unrolled, as `model.dit.unroll` of preset tiny asks on a CPU.

    python -m benchmarks.dit_step [--rounds 12]

Same sizes, same cores, fp32, runs interleaved; medians. Each side has a process of its own, one works while the other waits: neither
finds its memory where the other's lay, nor the other's threads on its cores. Aim: ratios of at most 1.1.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rise_jax.models.dit import DiT

HEADS, HEAD_WIDTH, MLP_WIDTH, DEPTH = 6, 64, 1536, 8
CHANNELS, D_CTX, TEXT_LEN = 12, 128, 64
PATCH, LATENTS = (1, 2, 2), (4, 16, 16)  # latent frames, height, width: 256 tokens
BATCH = 4
WARM_UP = 4  # runs of each before the first timed one: the heap grows until then
RUNS = {}  # in a worker: name -> function that runs once and waits


def make_inputs() -> tuple[np.ndarray, ...]:
    """latents, context, target, t in [0, 1]"""
    rng = np.random.default_rng(0)
    shape = (BATCH, *LATENTS, CHANNELS)
    latents, context, target = (rng.normal(size=s).astype("f4") for s in (shape, (BATCH, TEXT_LEN, D_CTX), shape))
    return latents, context, target, rng.uniform(size=BATCH).astype("f4")


def make_ours(latents, context, target, t):
    """-> ({"forward", "step", "unrolled step"} -> function that runs once and waits, number of parameters)"""
    sizes = dict(
        channels=CHANNELS, d_ctx=D_CTX, width=HEADS * HEAD_WIDTH, mlp_width=MLP_WIDTH, heads=HEADS, depth=DEPTH
    )
    arrays = jax.device_put((latents, context, target, t))

    def programs(unroll):
        rngs = nnx.Rngs(params=jax.random.key(0))
        graph, params = nnx.split(DiT(**sizes, patch=PATCH, text_len=TEXT_LEN, unroll=unroll, rngs=rngs))

        def forward(params, latents, context, target, t):
            dit = nnx.merge(graph, params)
            return dit(latents, t, dit.kv(context))

        def loss(params, latents, context, target, t):
            return jnp.mean((forward(params, latents, context, target, t) - target) ** 2)

        waiting = lambda run: lambda: jax.block_until_ready(run(params, *arrays))
        return waiting(jax.jit(forward)), waiting(jax.jit(jax.value_and_grad(loss))), params

    (forward, step, params), (_, unrolled, _) = programs(False), programs(True)
    runs = {"forward": forward, "step": step, "unrolled step": unrolled}
    return runs, sum(x.size for x in jax.tree.leaves(params))


def make_theirs(latents, context, target, t):
    import torch
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=D_CTX,
        freq_dim=256,
        ffn_dim=MLP_WIDTH,
        num_layers=DEPTH,
    )
    latents, context, target, t = (torch.from_numpy(x) for x in (latents, context, target, 1000 * t))
    latents, target = latents.movedim(-1, 1).contiguous(), target.movedim(-1, 1).contiguous()

    @torch.no_grad()
    def forward():
        model(latents, t, context, return_dict=False)

    def step():
        model.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(model(latents, t, context, return_dict=False)[0], target).backward()

    return {"forward": forward, "step": step, "unrolled step": step}, sum(p.numel() for p in model.parameters())


def seconds(name: str) -> float:
    start = time.perf_counter()
    RUNS[name]()
    return time.perf_counter() - start


def prepare(make) -> tuple[int, dict[str, float]]:
    """In a worker: (number of parameters, {name: seconds of the first call})"""
    runs, size = make(*make_inputs())
    RUNS.update(runs)
    return size, {name: seconds(name) for name in runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each, interleaved (default: 12)")
    rounds = parser.parse_args().rounds
    workers = [ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) for _ in range(2)]
    prepared = [w.submit(prepare, make).result() for w, make in zip(workers, (make_ours, make_theirs), strict=True)]
    (our_size, first), (their_size, _) = prepared
    assert our_size == their_size, f"not the same model: {our_size} and {their_size} parameters"
    tokens = int(np.prod(LATENTS)) // int(np.prod(PATCH))
    print(f"{our_size / 1e6:.1f} M parameters, batch {BATCH}, {tokens} tokens each, fp32, {jax.default_backend()}")
    print(f"jax {jax.__version__}, torch {version('torch')}, {rounds} rounds")
    print(f"{'seconds':15}{'rise_jax':>10}{'diffusers':>11}{'ratio':>8}{'first call':>12}")
    for name in first:
        turn = lambda name=name: [worker.submit(seconds, name).result() for worker in workers]
        for _ in range(WARM_UP):
            turn()
        ours, theirs = np.median([turn() for _ in range(rounds)], axis=0)
        print(f"{name:15}{ours:10.3f}{theirs:11.3f}{ours / theirs:8.2f}{first[name]:12.1f}")


if __name__ == "__main__":
    main()
