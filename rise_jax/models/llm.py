"""The frozen language model: a decoder with RMSNorm, rotary positions, grouped queries and a gated MLP.

The options of `LLMConfig` make it Llama (SmolLM2), Qwen2, Qwen3 or Gemma 3; what differs between the layers of one model goes
through the scan as arrays.

Layers are stacked and run in one scan. The key/value cache is an argument and a result: a call takes the `Past` parts that stand
before its tokens and returns one more `Past`, holding its own tokens. A part of batch 1 (the instruction) is shared by all rows.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rise_jax.axes import Array, Bool, Float, Int, typed
from rise_jax.models.layers import scan_blocks, split_heads, stack
from rise_jax.models.llm_config import LLMConfig

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


class Past(NamedTuple):
    """Tokens already read: key, value [depth, b, K, L, d]; mask bool, positions int [b, L]. b is B, or 1: shared by all rows.

    False in the mask is padding or a free slot. Heads stand before tokens: attention then needs no transposed copy of the cache.
    """

    key: Array
    value: Array
    mask: Array
    positions: Array

    def extended(self, length: int) -> "Past":
        """With `length` free slots behind."""
        pad = lambda array, axis: jnp.pad(array, [(0, length * (i == axis)) for i in range(array.ndim)])
        return Past(pad(self.key, 3), pad(self.value, 3), pad(self.mask, 1), pad(self.positions, 1))

    def written(self, new: "Past", slot: Array) -> "Past":
        """With the tokens of `new` in the slots from `slot` on."""
        write = lambda array, part, axis: jax.lax.dynamic_update_slice_in_dim(array, part, slot, axis)
        return Past(*map(write, self, new, (3, 3, 1, 1)))


class RMSNorm(nnx.RMSNorm):
    """Computed in fp32, scale included; the result has the dtype of `x`."""

    def __init__(self, width: int, config: LLMConfig, rngs: nnx.Rngs):
        super().__init__(width, epsilon=config.norm_eps, param_dtype=jnp.float32, rngs=rngs)

    def __call__(self, x):
        return super().__call__(x).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention over the past and the tokens at hand."""

    def __init__(self, config: LLMConfig, *, dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.scale = config.query_scale or config.head_width**-0.5
        self.query = linear(config.width, config.heads * config.head_width, use_bias=config.qkv_bias)
        self.key = linear(config.width, config.kv_heads * config.head_width, use_bias=config.qkv_bias)
        self.value = linear(config.width, config.kv_heads * config.head_width, use_bias=config.qkv_bias)
        self.out = linear(config.heads * config.head_width, config.width, use_bias=False)
        norm = partial(RMSNorm, config.head_width, config, rngs)
        self.query_norm, self.key_norm = (norm(), norm()) if config.qk_norm else (jax.nn.identity, jax.nn.identity)

    def __call__(self, x, angles, masks, past):
        query = rotate(self.query_norm(split_heads(self.query(x), self.heads)), angles)
        key = rotate(self.key_norm(split_heads(self.key(x), self.kv_heads)), angles).swapaxes(1, 2)
        value = split_heads(self.value(x), self.kv_heads).swapaxes(1, 2)
        mixed = attend(query, [*past, (key, value)], masks, self.scale)
        return self.out(mixed.reshape(*x.shape[:2], -1)), (key, value)


class MLP(nnx.Module):
    """Gated: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: LLMConfig, *, dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.activation = ACTIVATIONS[config.activation]
        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width)

    def __call__(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Decoder layer: norms before attention and MLP, and behind them with `config.post_norms`."""

    def __init__(self, config: LLMConfig, *, dtype, rngs: nnx.Rngs):
        norm = partial(RMSNorm, config.width, config, rngs)
        self.attn_norm = norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.attn_post_norm = norm() if config.post_norms else jax.nn.identity
        self.mlp_norm = norm()
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if config.post_norms else jax.nn.identity

    def __call__(self, x, angles, masks, past):
        mixed, new = self.self_attn(self.attn_norm(x), angles, masks, past)
        x = x + self.attn_post_norm(mixed)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), new


class LLM(nnx.Module):
    """Decoder whose result is the final-normed state of every token: what its output head reads."""

    def __init__(self, config: LLMConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.blocks = stack(partial(Block, config, dtype=dtype), config.depth, rngs)
        self.final_norm = RMSNorm(config.width, config, rngs)
        if not config.tied:
            self.head = nnx.Linear(
                config.width, config.vocab, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
            )

    @typed
    def __call__(
        self,
        ids: Int[Array, "B L"],
        mask: Bool[Array, "B L"],
        positions: Int[Array, "B L"],
        past: tuple[Past, ...] = (),
        *,
        keep: Sequence[int] | None = None,
    ) -> tuple[Float[Array, "*layers B L D"], Past]:
        """Reads tokens after `past`: their states [B, L, D] and their own keys and values.

        `mask` is False at padding (either side), `positions` count real tokens from the start of the sequence, past included.
        `keep` returns the states [len(keep), B, L, D] of these layers instead, as `LLMConfig.layer_index` counts them.
        """
        config = self.config
        kept_layers = [config.layer_index(layer) for layer in ([-1] if keep is None else keep)]
        inner = [layer for layer in kept_layers if layer < config.depth]
        views = self._views(mask, positions, past)

        def call(block, carry, layer):
            (x, kept), (layer_past, local, number) = carry, layer
            kept = jnp.where((number == np.array(inner, int))[:, None, None, None], x, kept)
            view = views[0] if len(views) == 1 else jax.tree.map(partial(jnp.where, local), *reversed(views))
            x, new = block(x, *view, layer_past)
            return (x, kept), new

        # The scale is rounded to the weights' dtype, as in transformers: 55.5 for sqrt(3072) in bf16.
        x = self.embed(ids) * jnp.asarray(config.embed_scale, self.embed.dtype)
        flags = jnp.asarray(config.local or [False] * config.depth), jnp.arange(config.depth)
        carry = x, jnp.zeros((len(inner), *x.shape), x.dtype)
        layers = [(part.key, part.value) for part in past], *flags
        (x, kept), (key, value) = scan_blocks(self.blocks, call, carry, layers)
        final = self.final_norm(x)
        kept = self.final_norm(kept) if config.norm_inner else kept
        states = [kept[inner.index(layer)] if layer < config.depth else final for layer in kept_layers]
        return final if keep is None else jnp.stack(states), Past(key, value, mask, positions)

    def _views(self, mask: Array, positions: Array, past: tuple[Past, ...]) -> list[tuple[Array, list[Array]]]:
        """(rotary angles, masks of the past parts and the own tokens) of the global layers, then of the local ones, if any."""
        config = self.config
        causal = jnp.tril(jnp.ones((mask.shape[1], mask.shape[1]), bool))
        masks = [part.mask[:, None, :] for part in past] + [causal & mask[:, None, :]]
        angles = rope_angles(positions, config.head_width, config.rope_base, config.rope_divisors)
        views = [(angles, masks)]
        if any(config.local):
            near = lambda places: positions[:, :, None] - places[:, None, :] < config.window
            places = [*(part.positions for part in past), positions]
            angles = rope_angles(positions, config.head_width, config.local_rope_base)
            views.append((angles, [mask & near(place) for mask, place in zip(masks, places)]))
        return views

    @typed
    def logits(self, states: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Next-token logits in fp32 of final-normed states."""
        if not self.config.tied:
            return self.head(states).astype(jnp.float32)
        return jnp.einsum("...d,vd->...v", states, self.embed.embedding[...], preferred_element_type=jnp.float32)


def rope_angles(positions: Array, head_width: int, base: float, divisors: tuple[float, ...] = ()) -> Array:
    """[B, L] positions -> fp32 angles [B, L, 1, d/2] (RoFormer, arXiv 2104.09864, equation 15).

    `divisors` [d/2] slow the frequencies down, for contexts longer than a model was first trained on.
    """
    frequencies = rope_frequencies(head_width, base) / np.array(divisors or 1)
    return positions.astype(jnp.float32)[..., None, None] * frequencies.astype(np.float32)


def rope_frequencies(head_width: int, base: float) -> np.ndarray:
    """fp64 [d/2]: base ** (-2i / d)."""
    # fp32 powers differ between CPUs, torch's too, and one unit in their last place is 1e-3 rad at position 1e4.
    return base ** (-np.arange(0, head_width, 2, dtype=np.float64) / head_width)


def rotate(x: Array, angles: Array) -> Array:
    """Rotary embedding of [B, L, N, d]; pairs are (i, i + d/2): the rotate-half layout of Llama's published safetensors."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def attend(query: Array, parts: list[tuple[Array, Array]], masks: list[Array], scale: float) -> Array:
    """Grouped-query attention of [B, S, N, d] over the joined `parts` (key, value), each [b, K, L, d], b = B or 1, softmax in fp32.

    `masks` are [b, S or 1, L]; `scale` multiplies the queries.
    """
    # Scores are joined, never keys: joining (as one call of dot_product_attention needs) copies the cache and repeats the prefix
    # for every token; measured on 2 CPU cores, a decoding step of SmolLM2 took 1.19x the time so at batch 1, 1.07x at batch 8.
    batch, length, heads, width = query.shape
    kv_heads = parts[0][0].shape[1]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width) * scale
    lowest = jnp.finfo(jnp.float32).min
    scores = []
    for (key, _), mask in zip(parts, masks, strict=True):
        raw = _shared("bskgd,bkld->bkgsl", grouped, key, preferred_element_type=jnp.float32)
        scores.append(jnp.where(mask[:, None, None], raw, lowest))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    ends = list(itertools.accumulate(score.shape[-1] for score in scores))[:-1]
    mixed = [
        _shared("bkgsl,bkld->bskgd", weight, value)
        for weight, (_, value) in zip(jnp.split(weights, ends, axis=-1), parts)
    ]
    return sum(mixed).reshape(query.shape)


def _shared(equation: str, x: Array, part: Array, **options) -> Array:
    """einsum in which a `part` of batch 1 serves all rows in one product instead of being repeated."""
    if part.shape[0] == 1:
        part, equation = part[0], equation.replace(",b", ",")
    return jnp.einsum(equation, x, part, **options)


@cache
def make_llm(config: LLMConfig, dtype=jnp.float32) -> tuple[Callable[[dict], LLM], dict]:
    """(llm, abstract): `llm(params)` is the module, to be called inside a trace; `abstract` the nested dict of its shapes."""
    model = nnx.eval_shape(lambda: LLM(config, dtype=dtype, rngs=nnx.Rngs(params=jax.random.key(0))))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "only Params may be leaves of the LLM"
    return partial(nnx.merge, graph), nnx.to_pure_dict(params)
