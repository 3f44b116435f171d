"""The frozen language model: a Llama-family decoder (RMSNorm, rotary positions, grouped queries, SwiGLU).

Layers are stacked and run in one scan. The key/value cache is an argument and a result: a call takes the `Past` parts that stand
before its tokens and returns one more `Past`, holding its own tokens. A part of batch 1 (the instruction) is shared by all rows.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rise_jax.axes import Array, Bool, Float, Int, typed
from rise_jax.models.layers import scan_blocks, split_heads, stack


@dataclass(frozen=True)
class LLMConfig:
    """Sizes of a Llama-family decoder; `tied` says that the logits use the embedding matrix."""

    vocab: int
    width: int
    mlp_width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True


class Past(NamedTuple):
    """Keys and values of tokens already read: key, value [depth, b, K, L, d]; mask bool [b, L]. b is B, or 1: shared by all rows.

    False in the mask is padding or a free slot. Heads stand before tokens: attention then needs no transposed copy of the cache.
    For unrolled layers, key and value are tuples over depth.
    """

    key: Array | tuple
    value: Array | tuple
    mask: Array

    def extended(self, length: int) -> "Past":
        """With `length` free slots behind."""
        pad = lambda array: jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, length), (0, 0)])
        return Past(pad(self.key), pad(self.value), jnp.pad(self.mask, [(0, 0), (0, length)]))

    def written(self, new: "Past", slot: Array) -> "Past":
        """With the tokens of `new` in the slots from `slot` on."""
        write = lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, slot, axis=-2)
        mask = jax.lax.dynamic_update_slice_in_dim(self.mask, new.mask, slot, axis=1)
        return Past(jax.tree.map(write, self.key, new.key), jax.tree.map(write, self.value, new.value), mask)

    def unrolled(self) -> "Past":
        """With one array per layer instead of stacked ones."""
        return Past(tuple(self.key), tuple(self.value), self.mask)


class Attention(nnx.Module):
    """Causal grouped-query attention over the past and the tokens at hand."""

    def __init__(self, config: LLMConfig, *, dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.query = linear(config.width, config.heads * config.head_width)
        self.key = linear(config.width, config.kv_heads * config.head_width)
        self.value = linear(config.width, config.kv_heads * config.head_width)
        self.out = linear(config.heads * config.head_width, config.width)

    def __call__(self, x, angles, past, masks):
        query = rotate(split_heads(self.query(x), self.heads), angles)
        key = rotate(split_heads(self.key(x), self.kv_heads), angles).swapaxes(1, 2)
        value = split_heads(self.value(x), self.kv_heads).swapaxes(1, 2)
        mixed = attend(query, [*past, (key, value)], masks)
        return self.out(mixed.reshape(*x.shape[:2], -1)), (key, value)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LLMConfig, *, dtype, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: LLMConfig, *, dtype, rngs: nnx.Rngs):
        self.attn_norm = _norm(config, dtype, rngs)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, angles, past, masks):
        mixed, new = self.self_attn(self.attn_norm(x), angles, past, masks)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), new


class LLM(nnx.Module):
    """Decoder whose result is the final-normed state of every token: what its output head reads."""

    def __init__(self, config: LLMConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.blocks = stack(partial(Block, config, dtype=dtype), config.depth, rngs)
        self.final_norm = _norm(config, dtype, rngs)
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
        all_layers: bool = False,
        layers: tuple[Block, ...] | None = None,
    ) -> tuple[Float[Array, "*layers B L D"], Past]:
        """Reads tokens after `past`: their states [B, L, D] and their own keys and values.

        `mask` is False at padding (either side), `positions` count real tokens from the start of the sequence, past included.
        `all_layers` returns [depth + 1, B, L, D] instead: the embeddings, then each layer's output, the last one normed
        (the convention of transformers' `hidden_states`). `layers` are this model's `unrolled()` layers, to be run one by one.
        """
        angles = rope_angles(positions, self.config.head_width, self.config.rope_base)
        causal = jnp.tril(jnp.ones((ids.shape[1], ids.shape[1]), bool))
        masks = [part.mask[:, None, :] for part in past] + [causal & mask[:, None, :]]

        def call(block, x, layer_past):
            out, new = block(x, angles, layer_past, masks)
            return out, (new, x if all_layers else None)

        run = partial(scan_blocks, self.blocks) if layers is None else partial(_run_blocks, layers)
        x, ((key, value), inputs) = run(call, self.embed(ids), [(part.key, part.value) for part in past])
        states = self.final_norm(x)
        states = jnp.concatenate([inputs, states[None]]) if all_layers else states
        return states, Past(key, value, mask)

    def unrolled(self) -> tuple[Block, ...]:
        """The layers as separate modules."""
        graph, params = nnx.split(self.blocks)
        layer = lambda i: nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], params))
        return tuple(layer(i) for i in range(self.config.depth))

    @typed
    def logits(self, states: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Next-token logits in fp32 of final-normed states."""
        if not self.config.tied:
            return self.head(states).astype(jnp.float32)
        return jnp.einsum("...d,vd->...v", states, self.embed.embedding[...], preferred_element_type=jnp.float32)


def _run_blocks(layers: tuple[Block, ...], call: Callable, x: Array, past: list[tuple[tuple, tuple]]):
    """What `scan_blocks` does, as a Python loop over separate layers."""
    outputs = []
    for i, block in enumerate(layers):
        x, output = call(block, x, [(key[i], value[i]) for key, value in past])
        outputs.append(output)
    return x, jax.tree.map(lambda *leaves: leaves, *outputs)


def _norm(config: LLMConfig, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.width, epsilon=config.norm_eps, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def rope_angles(positions: Array, head_width: int, base: float) -> Array:
    """[B, L] positions -> fp32 angles [B, L, 1, d/2] (RoFormer, arXiv 2104.09864, equation 15)."""
    frequencies = base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    return positions.astype(jnp.float32)[..., None, None] * frequencies


def rotate(x: Array, angles: Array) -> Array:
    """Rotary embedding of [B, L, N, d]; pairs are (i, i + d/2): the rotate-half layout of Llama's published safetensors."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def attend(query: Array, parts: list[tuple[Array, Array]], masks: list[Array]) -> Array:
    """Grouped-query attention of [B, S, N, d] over the joined `parts` (key, value), each [b, K, L, d], b = B or 1, softmax in fp32.

    `masks` are [b, S or 1, L].
    """
    # Scores are joined, never keys: joining (as one call of dot_product_attention needs) copies the cache and repeats the prefix
    # for every token; measured on 2 CPU cores, a decoding step of SmolLM2 took 1.19x the time so at batch 1, 1.07x at batch 8.
    batch, length, heads, width = query.shape
    kv_heads = parts[0][0].shape[1]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width) * width**-0.5
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


def make_llm(config: LLMConfig, dtype=jnp.float32) -> tuple[Callable[[dict], LLM], dict]:
    """(llm, abstract): `llm(params)` is the module, to be called inside a trace; `abstract` the nested dict of its shapes."""
    model = nnx.eval_shape(lambda: LLM(config, dtype=dtype, rngs=nnx.Rngs(params=jax.random.key(0))))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "only Params may be leaves of the LLM"
    return partial(nnx.merge, graph), nnx.to_pure_dict(params)
