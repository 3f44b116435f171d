"""What every model shares: stacked blocks run in one scan, low-rank corrections, heads and sinusoids."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rise_jax.axes import Array
from rise_jax.models.remat import recomputed

# Of a linear layer that stays in fp32 whatever the rest computes in: TPUs round what such a product reads to bf16 by default, GPUs to
# TF32.
EXACT = dict(dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)


def stack(make: Callable[..., nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`make(rngs=...)` vmapped over `depth` keys: one module whose Params carry a leading layer axis."""
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: make(rngs=nnx.Rngs(params=key)))(keys)


def scan_blocks(
    blocks: nnx.Module, call: Callable, carry, per_layer=None, *, remat: str = "none", unroll: bool = False
):
    """Runs stacked `blocks` in order: `call(block, carry, slice_of_per_layer) -> (carry, output)`.

    Returns (carry, outputs stacked over layers). `remat` says what the backward pass computes again (remat.py). `unroll` writes
    the blocks out one after the other: longer to compile, but nothing is copied in and out of stacks (a CPU's bottleneck). With
    remat they stay in the scan: written out, XLA may join what is computed again with what was computed before, and keep all.
    """
    graph, params = nnx.split(blocks)

    def body(carry, layer):
        block_params, extra = layer
        return call(nnx.merge(graph, block_params), carry, extra)

    return jax.lax.scan(recomputed(body, remat), carry, (params, per_layer), unroll=unroll and remat == "none")


class LowRankLinear(nnx.Linear):
    """x W + b + x A B: a correction of rank `rank` beside a kernel that stays as published (LoRA, arXiv 2106.09685, section 4.1).

    A is `low_rank_in` [in, rank], B is `low_rank_out` [rank, out], which starts at zero.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, rngs: nnx.Rngs, **options):
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.low_rank_in = nnx.Param(jax.random.normal(rngs.params(), (in_features, rank)) / in_features**0.5)
        self.low_rank_out = nnx.Param(jnp.zeros((rank, out_features)))

    def __call__(self, x: Array) -> Array:
        dtype = self.dtype or x.dtype
        correction = x.astype(dtype) @ self.low_rank_in[...].astype(dtype) @ self.low_rank_out[...].astype(dtype)
        return super().__call__(x) + correction


def split_heads(x: Array, heads: int) -> Array:
    """[..., L, N*d] -> [..., L, N, d]"""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Array) -> Array:
    """[..., L, N, d] -> [..., L, N*d]"""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def sinusoid(t: Array, width: int, max_period: float = 1e4) -> Array:
    """[B] -> [B, width] fp32: cosines, then sines, of geometrically spaced frequencies (DDPM, Wan's order)."""
    half = width // 2
    # Exponents in fp32, as diffusers has them; powers by NumPy, since fp32 ones differ between compilers, by 1e-4 rad at t = 1000.
    exponents = np.float32(-np.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
