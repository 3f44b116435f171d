"""A video DiT of 20 M parameters against diffusers' WanTransformer3DModel: forward, and a step (forward, MSE loss, backward), the step
with the blocks in a scan and unrolled, as `model.dit.unroll` of preset tiny asks on a CPU.

    python -m benchmarks.dit_step [--rounds 12]

Same sizes, same cores, fp32, runs interleaved; medians. Aim: ratios of at most 1.1.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from rise_jax.models.dit import DiT

HEADS, HEAD_WIDTH, MLP_WIDTH, DEPTH = 6, 64, 1536, 8
CHANNELS, D_CTX, TEXT_LEN = 12, 128, 64
PATCH, LATENTS = (1, 2, 2), (4, 16, 16)  # latent frames, height, width: 256 tokens
BATCH = 4


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


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each, interleaved (default: 12)")
    rounds = parser.parse_args().rounds
    data = make_inputs()
    ours, our_size = make_ours(*data)
    theirs, their_size = make_theirs(*data)
    assert our_size == their_size, f"not the same model: {our_size} and {their_size} parameters"
    compiling = {name: seconds(ours[name]) for name in ours}
    tokens = int(np.prod(LATENTS)) // int(np.prod(PATCH))
    print(f"{our_size / 1e6:.1f} M parameters, batch {BATCH}, {tokens} tokens each, fp32, {jax.default_backend()}")
    print(f"jax {jax.__version__}, torch {torch.__version__} ({torch.get_num_threads()} threads), {rounds} rounds")
    print(f"{'seconds':15}{'rise_jax':>10}{'diffusers':>11}{'ratio':>8}{'first call':>12}")
    for name in ours:
        for run in (ours[name], theirs[name]) * 2:  # warm up
            run()
        times = [(seconds(ours[name]), seconds(theirs[name])) for _ in range(rounds)]
        mine, other = np.median(times, axis=0)
        print(f"{name:15}{mine:10.3f}{other:11.3f}{mine / other:8.2f}{compiling[name]:12.1f}")


if __name__ == "__main__":
    main()
