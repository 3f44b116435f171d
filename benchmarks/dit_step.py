"""One training step (forward, backward, MSE loss) of a small video DiT, against diffusers' WanTransformer3DModel.

    python benchmarks/dit_step.py [--rounds 12]

Same sizes, same cores, fp32, steps interleaved; medians. Aim: a ratio of at most 1.1.
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

HEADS, HEAD_WIDTH, MLP_WIDTH, DEPTH = 4, 64, 1024, 6
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
    """-> (function that runs one step and waits for it, number of parameters)"""
    module = DiT(
        channels=CHANNELS,
        d_ctx=D_CTX,
        width=HEADS * HEAD_WIDTH,
        mlp_width=MLP_WIDTH,
        heads=HEADS,
        depth=DEPTH,
        patch=PATCH,
        text_len=TEXT_LEN,
        rngs=nnx.Rngs(params=jax.random.key(0)),
    )
    graph, params = nnx.split(module)
    arrays = jax.device_put((latents, context, target, t))

    @jax.jit
    def step(params, latents, context, target, t):
        def loss(params):
            dit = nnx.merge(graph, params)
            return jnp.mean((dit(latents, t, dit.kv(context)) - target) ** 2)

        return jax.value_and_grad(loss)(params)

    return lambda: jax.block_until_ready(step(params, *arrays)), sum(x.size for x in jax.tree.leaves(params))


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

    def step():
        model.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(model(latents, t, context, return_dict=False)[0], target).backward()

    return step, sum(p.numel() for p in model.parameters())


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
    for step in (ours, theirs) * 2:  # compile, warm up
        step()
    times = np.array([(seconds(ours), seconds(theirs)) for _ in range(rounds)])
    medians, fastest = np.median(times, axis=0), times.min(axis=0)

    tokens = int(np.prod(LATENTS)) // int(np.prod(PATCH))
    print(f"{our_size / 1e6:.1f} M parameters, batch {BATCH}, {tokens} tokens each, fp32, {jax.default_backend()}")
    print(f"jax {jax.__version__}, torch {torch.__version__} ({torch.get_num_threads()} threads), {rounds} rounds")
    print(f"{'':12}{'median s':>10}{'fastest s':>11}{'tokens/s':>10}")
    for name, median, best in zip(("rise_jax", "diffusers"), medians, fastest):
        print(f"{name:12}{median:10.3f}{best:11.3f}{BATCH * tokens / median:10.0f}")
    print(f"ratio of medians, rise_jax / diffusers: {medians[0] / medians[1]:.2f} (aim: <= 1.1)")


if __name__ == "__main__":
    main()
