"""Text encoder of T5 v1.1 and umT5 (Raffel et al. 1910.10683; umT5: Chung et al. 2304.09151): what Wan 2.1 reads its prompts with.

Pre-norm blocks of bidirectional attention and a gated MLP; RMS norms, no linear biases. Positions enter as a learned bias on attention
scores, one row per bucket of distances: umT5 learns a table per layer, T5 one for all layers. Scores are not divided by sqrt(d).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rise_jax.axes import Array, Bool, Float, Int, typed
from rise_jax.models.layers import merge_heads, scan_blocks, split_heads, stack


@dataclass(frozen=True)
class T5Config:
    """Sizes; `shared_bias` says that all layers use one table of position biases (T5) instead of one each (umT5)."""

    vocab: int
    width: int
    mlp_width: int
    depth: int
    heads: int
    head_width: int
    shared_bias: bool
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6


def distance_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """int32 [length, length]: the bucket of (key position - query position).

    Keys behind the query use the first half of the buckets, keys ahead the second. In each half, the first half of it are single
    distances, the rest grow geometrically up to `max_distance`, from where on all distances share the last.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    near = np.abs(distance)
    # In fp32 as the published models compute it: 8 buckets from 8 to 128 put 16, 32 and 64 on a border.
    far = np.log(np.maximum(near, exact).astype(np.float32) / exact) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (far * (half - exact)).astype(np.int32), half - 1)
    return (np.where(near < exact, near, far) + half * (distance > 0)).astype(np.int32)


class Attention(nnx.Module):
    """Unscaled attention of every token to every unmasked one."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.query, self.key, self.value = (linear(config.width, inner) for _ in range(3))
        self.out = linear(inner, config.width)
        if not config.shared_bias:
            self.position_bias = _position_bias(config, rngs)

    def __call__(self, x, mask, bias):
        """x [B, L, D]; mask bool [B, 1, 1, L]; bias: fp32 [1, N, L, L]."""
        query, key, value = (split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        return self.out(merge_heads(jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=1.0)))


class Block(nnx.Module):
    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.attn_norm = _norm(config, dtype, rngs)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width)

    def __call__(self, x, mask, bias):
        x = x + self.self_attn(self.attn_norm(x), mask, bias)
        h = self.mlp_norm(x)
        return x + self.down(nnx.gelu(self.gate(h)) * self.up(h))


class T5(nnx.Module):
    def __init__(self, config: T5Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.blocks = stack(partial(Block, config, dtype=dtype), config.depth, rngs)
        self.final_norm = _norm(config, dtype, rngs)
        if config.shared_bias:
            self.position_bias = _position_bias(config, rngs)

    @typed
    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        """Final-normed states, zero where `mask` is False: what Wan's text rule makes of padding (dit.py, `fit_context`)."""
        table = distance_buckets(ids.shape[1], self.config.buckets, self.config.max_distance)
        spread = lambda bias: bias[...][table].transpose(2, 0, 1)[None]
        shared = spread(self.position_bias) if self.config.shared_bias else None

        def call(block, x, _):
            bias = shared if self.config.shared_bias else spread(block.self_attn.position_bias)
            return block(x, mask[:, None, None], bias), None

        x, _ = scan_blocks(self.blocks, call, self.embed(ids))
        return jnp.where(mask[..., None], self.final_norm(x), 0)


def make_t5(config: T5Config, dtype=jnp.float32) -> tuple[Callable[[dict], T5], dict]:
    """(t5, abstract): `t5(params)` is the module, to be called inside a trace; `abstract` the nested dict of its shapes.

    Kernels and embeddings have `dtype`; norm scales and position biases are fp32.
    """
    model = nnx.eval_shape(lambda: T5(config, dtype=dtype, rngs=nnx.Rngs(params=jax.random.key(0))))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "only Params may be leaves of the encoder"
    return partial(nnx.merge, graph), nnx.to_pure_dict(params)


def _norm(config: T5Config, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=config.norm_eps, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def _position_bias(config: T5Config, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (config.buckets, config.heads)) / config.width**0.5)
