"""The Rephrasing Adapter: states of a frozen LLM, at the tokens of the rephrasing, -> the condition of a video model.

refiner    RMSNorm with bias -> Dense -> blocks {bidirectional attention; GELU MLP} -> LayerNorm -> Dense -> affine LayerNorm.
           One context vector per token. Undoes what the LLM's causal mask left one-sided (LI-DiT 2406.11831).
resampler  learned latents read the states through blocks {attention over [latents, states]; squared-ReLU MLP}: a fixed
           number of context vectors (ELLA 2403.05135). `**ELLA` gives exactly its connector, plus a key mask.
mlp        {LayerNorm -> GEGLU MLP} twice, each token alone (LaVi-Bridge 2403.07860).
identity   no adapter: states of the video model's own text encoder go in as they are (the baseline `native`).

In the first three: states are normalised first (LLM features reach tens of thousands); learned register tokens come first in
the context and are never masked, so no row is ever empty; the last LayerNorm's scale and bias start at `std` and `mean`
of the text space the video model expects; masked tokens take no part and their context vectors are exactly zero; `null`
is the learned condition of "no prompt". `dtype` is that of the matrix products; everything else is fp32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from rise_jax.axes import Array, Bool, Float, typed
from rise_jax.models.adapter_blocks import GEGLU, Norm, RefinerBlock, ResamplerBlock, TimeEmbedding, layer_norm
from rise_jax.models.attention import XLA, Backend
from rise_jax.models.layers import scan_blocks, stack

TIME_CONDS = ("off", "adaln")

# The options under which `resampler` is ELLA's connector: 66,820,608 parameters at d_llm 2048, d_ctx 768.
ELLA = dict(
    width=768,
    depth=6,
    heads=8,
    latents=64,
    time_cond="adaln",
    input_norm=False,
    registers=0,
    output_norm=False,
    learned_null=False,
)


def make_adapter(kind: str, *, d_llm: int, d_ctx: int, rngs: nnx.Rngs, **options) -> "Adapter":
    """The adapter `kind` ('refiner', 'resampler', 'mlp' or 'identity') from width `d_llm` to `d_ctx`; `options`: see its class.

    Raises:
      ValueError: unknown kind or time_cond; width not a multiple of heads; no output projection where widths differ.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown adapter kind {kind!r}; valid: {', '.join(KINDS)}")
    return KINDS[kind](d_llm=d_llm, d_ctx=d_ctx, rngs=rngs, **options)


def calibrate(params: dict, states: Array, mask: Array) -> dict:
    """An adapter's parameters with the input norm's scale and bias set to standardise given states [n, L, d_llm], mask [n, L].

    Final LLM states share most of their length: of the mean state of a prompt, 4 % of the square differs between
    prompts (SmolLM2-135M, 160 captions of scenes), and training from scratch hardly hears it. An adapter without
    input norm is returned as it is.
    """
    if "input_norm" not in params:
        return params
    states = states / jnp.sqrt(jnp.mean(jnp.square(states), axis=-1, keepdims=True) + 1e-6)
    weight = mask[..., None] / mask.sum()
    mean = jnp.sum(states * weight, axis=(0, 1))
    scale = 1 / jnp.sqrt(jnp.sum(jnp.square(states - mean) * weight, axis=(0, 1)) + 1e-6)
    return params | {"input_norm": {"scale": scale}, "input_bias": -mean * scale}


def calibrate_output(params: dict, mean: Array, std: Array) -> dict:
    """An adapter's parameters whose closing norm starts with this mean and spread, [d_ctx] each, of the text space it writes into.

    Raises:
      ValueError: the adapter has no closing norm.
    """
    if "output_norm" not in params:
        raise ValueError("this adapter has no closing norm (output_norm=False, or kind 'identity') to calibrate")
    return params | {"output_norm": {"scale": jnp.asarray(std), "bias": jnp.asarray(mean)}}


class Adapter(nnx.Module):
    """What the kinds share: both ends, the time embedding and the null condition. A kind adds `tokens` and `dtype`.

    Options:
      width: of the tokens inside (mlp: between the two layers).
      registers: number of register tokens.
      time_cond: 'off', or 'adaln' (every inner norm is modulated by the time; the context then depends on t).
      input_norm, output_norm: with or without the RMSNorm of the states, the closing LayerNorm.
      mean, std: start of the closing LayerNorm's bias and scale, each a number or [d_ctx].
      learned_null: with or without the parameter `null` [1, null_tokens, d_ctx].
      null_tokens: registers + 1 by default.
      backend: of attention (attention.py).
    """

    def __init__(
        self,
        *,
        d_llm: int,
        d_ctx: int,
        width: int,
        registers: int = 4,
        register_width: int,
        time_cond: str = "off",
        input_norm: bool = True,
        output_norm: bool = True,
        mean: float | Array = 0.0,
        std: float | Array = 1.0,
        learned_null: bool = True,
        null_tokens: int | None = None,
        rngs: nnx.Rngs,
    ):
        if time_cond not in TIME_CONDS:
            raise ValueError(f"unknown time_cond {time_cond!r}; valid: {', '.join(TIME_CONDS)}")
        self.input_norm = nnx.RMSNorm(d_llm, dtype=jnp.float32, rngs=rngs) if input_norm else None
        self.input_bias = nnx.Param(jnp.zeros(d_llm)) if input_norm else None
        self.time_embedding = TimeEmbedding(width, rngs=rngs) if time_cond == "adaln" else None
        self.registers = learned_tokens(registers, register_width, rngs) if registers else None
        self.output_norm = layer_norm(d_ctx, rngs=rngs) if output_norm else None
        if output_norm:
            self.output_norm.scale = nnx.Param(jnp.broadcast_to(jnp.asarray(std, jnp.float32), (d_ctx,)))
            self.output_norm.bias = nnx.Param(jnp.broadcast_to(jnp.asarray(mean, jnp.float32), (d_ctx,)))
        if learned_null:
            null_tokens = registers + 1 if null_tokens is None else null_tokens
            self.null = nnx.Param(mean + std * jax.random.normal(rngs.params(), (1, null_tokens, d_ctx)))

    @typed
    def __call__(
        self, states: Float[Array, "B L d_llm"], mask: Bool[Array, "B L"], t: Float[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B M d_ctx"], Bool[Array, "B M"]]:
        """(context, its mask): M = registers + L, or registers + latents for `resampler`. Only 'adaln' reads `t`.

        Raises:
          ValueError: time_cond is 'adaln' and t is missing.
        """
        states = jnp.where(mask[..., None], states, 0)  # a NaN in the padding would otherwise survive its zero weight
        states = self.input_norm(states) + self.input_bias[...] if self.input_norm else states
        context, mask = self.tokens(states, mask, self._embed(t))
        context = self.output_norm(context) if self.output_norm else context
        return jnp.where(mask[..., None], context, 0), mask

    def tokens(self, states, mask, time):
        """(states [B, L, d_llm], mask [B, L], time [B, width] | None) -> (context [B, M, d_ctx], mask [B, M])."""
        raise NotImplementedError(f"{type(self).__name__} must say how it makes tokens")

    def _embed(self, t):
        if self.time_embedding is None:
            return None
        if t is None:
            raise ValueError("an adapter with time_cond 'adaln' needs the diffusion time t [B]; with 'off' it does not")
        return self.time_embedding(t)


class Refiner(Adapter):
    """One vector per token: context [registers, tokens]. Blocks start as the identity: their last projections at 0."""

    def __init__(
        self,
        *,
        d_llm,
        d_ctx,
        width: int = 1024,
        depth: int = 4,
        heads: int = 16,
        dtype=jnp.float32,
        backend: Backend = XLA,
        rngs,
        **options,
    ):
        super().__init__(d_llm=d_llm, d_ctx=d_ctx, width=width, register_width=width, rngs=rngs, **options)
        time_width = width if self.time_embedding else None
        self.project_in = nnx.Linear(d_llm, width, dtype=dtype, rngs=rngs)
        sizes = dict(width=width, heads=heads, time_width=time_width, backend=backend)
        self.blocks = stack(lambda *, rngs: RefinerBlock(**sizes, dtype=dtype, rngs=rngs), depth, rngs)
        self.norm = Norm(width, time_width, rngs=rngs)
        self.project_out = nnx.Linear(width, d_ctx, dtype=dtype, rngs=rngs)

    def tokens(self, states, mask, time):
        x, mask = prepend(self.registers, self.project_in(states), mask)
        x, _ = scan_blocks(self.blocks, lambda block, x, _: (block(x, mask, time), None), x.astype(jnp.float32))
        return self.project_out(self.norm(x, time)), mask


class Resampler(Adapter):
    """A fixed number of vectors, whatever the prompt's length: context [registers, latents], never masked.

    Without the closing norm there is no output projection either (as ELLA), and `d_ctx` must be `width`.
    """

    def __init__(
        self,
        *,
        d_llm,
        d_ctx,
        width: int = 768,
        depth: int = 6,
        heads: int = 8,
        latents: int = 64,
        output_norm: bool = True,
        dtype=jnp.float32,
        backend: Backend = XLA,
        rngs,
        **options,
    ):
        if not output_norm and width != d_ctx:
            raise ValueError(f"a resampler without output_norm has no output projection: width {width} must be {d_ctx}")
        shared = dict(d_llm=d_llm, d_ctx=d_ctx, width=width, register_width=width, output_norm=output_norm)
        super().__init__(**shared, rngs=rngs, **options)
        time_width = width if self.time_embedding else None
        self.project_in = nnx.Linear(d_llm, width, dtype=dtype, rngs=rngs)
        self.latents = learned_tokens(latents, width, rngs)
        self.latents_time = nnx.Linear(width, width, dtype=dtype, rngs=rngs) if time_width else None
        sizes = dict(width=width, heads=heads, time_width=time_width, backend=backend)
        self.blocks = stack(lambda *, rngs: ResamplerBlock(**sizes, dtype=dtype, rngs=rngs), depth, rngs)
        self.norm = Norm(width, time_width, rngs=rngs) if output_norm else None
        self.project_out = nnx.Linear(width, d_ctx, dtype=dtype, rngs=rngs) if output_norm else None

    def tokens(self, states, mask, time):
        batch = states.shape[0]
        latents = jnp.broadcast_to(self.latents[...], (batch, *self.latents[...].shape))
        latents, visible = prepend(self.registers, latents, jnp.ones(latents.shape[:2], bool))
        if time is not None:
            latents = latents + self.latents_time(nnx.silu(time))[:, None]
        keys_mask = jnp.concatenate([visible, mask], axis=1)
        x = self.project_in(states)

        def call(block, latents, _):
            return block(latents, x, keys_mask, time), None

        latents, _ = scan_blocks(self.blocks, call, latents.astype(jnp.float32))
        return self.project_out(self.norm(latents, time)) if self.project_out else latents, visible


class PerToken(Adapter):
    """No token sees another: context [registers, tokens]. `width`: the mean of d_llm and d_ctx by default.

    `depth`, `heads` and `backend` are accepted because one row of sizes serves every kind; there is nothing here for them to set.
    """

    def __init__(
        self,
        *,
        d_llm,
        d_ctx,
        width: int | None = None,
        depth=None,
        heads=None,
        dtype=jnp.float32,
        backend=XLA,
        rngs,
        **options,
    ):
        width = (d_llm + d_ctx) // 2 if width is None else width
        super().__init__(d_llm=d_llm, d_ctx=d_ctx, width=width, register_width=d_ctx, rngs=rngs, **options)
        time_width = width if self.time_embedding else None
        self.norm_1 = Norm(d_llm, time_width, rngs=rngs)
        self.mlp_1 = GEGLU(d_llm, width, dtype=dtype, rngs=rngs)
        self.norm_2 = Norm(width, time_width, rngs=rngs)
        self.mlp_2 = GEGLU(width, d_ctx, dtype=dtype, rngs=rngs)

    def tokens(self, states, mask, time):
        x = self.mlp_1(self.norm_1(states, time))
        return prepend(self.registers, self.mlp_2(self.norm_2(x, time)), mask)


class Identity(Adapter):
    """The states themselves. No parameters but the null condition; other options than `registers=0` have no meaning here.

    Raises:
      ValueError: d_llm is not d_ctx, or registers are asked for.
    """

    def __init__(self, *, d_llm, d_ctx, registers: int = 0, learned_null: bool = True, dtype=jnp.float32, rngs, **_):
        if d_llm != d_ctx:
            raise ValueError(f"the adapter 'identity' changes no width: states are {d_llm} wide, d_ctx is {d_ctx}")
        if registers:
            raise ValueError(f"the adapter 'identity' adds no registers: registers={registers}, nearest: 0")
        ends = dict(registers=0, register_width=d_ctx, input_norm=False, output_norm=False)
        super().__init__(d_llm=d_llm, d_ctx=d_ctx, width=d_ctx, learned_null=learned_null, rngs=rngs, **ends)

    def tokens(self, states, mask, time):
        return states, mask


KINDS = dict(refiner=Refiner, resampler=Resampler, mlp=PerToken, identity=Identity)


def learned_tokens(count, width, rngs):
    """[count, width], standard deviation width^-0.5 (ELLA's latents)."""
    return nnx.Param(jax.random.normal(rngs.params(), (count, width)) / width**0.5)


def prepend(registers, x, mask):
    """(registers [R, D] | None, x [B, L, D], mask [B, L]) -> ([B, R + L, D], [B, R + L]); registers are visible."""
    if registers is None:
        return x, mask
    batch, count = x.shape[0], registers[...].shape[0]
    rows = jnp.broadcast_to(registers[...].astype(x.dtype), (batch, *registers[...].shape))
    return jnp.concatenate([rows, x], axis=1), jnp.concatenate([jnp.ones((batch, count), bool), mask], axis=1)
