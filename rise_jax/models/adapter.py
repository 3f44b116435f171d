"""The Rephrasing Adapter: states of a frozen LLM, at the tokens of the rephrasing, -> the condition of a video model.

refiner    RMSNorm -> Dense -> blocks {bidirectional attention; GELU MLP} -> LayerNorm -> Dense -> LayerNorm with affine.
           One context vector per token. Undoes what the LLM's causal mask left one-sided (LI-DiT 2406.11831).
resampler  learned latents read the states through blocks {attention over [latents, states]; squared-ReLU MLP}: a fixed number of
           context vectors (ELLA 2403.05135). `**ELLA` gives exactly its Timestep-Aware Semantic Connector, plus a key mask.
mlp        {LayerNorm -> GEGLU MLP} twice, each token alone (LaVi-Bridge 2403.07860).

In all three: states are normalised first (LLM features reach tens of thousands); learned register tokens come first in the context and
are never masked, so no row is ever empty; the last LayerNorm's scale and bias start at `std` and `mean` of the text space the video
model expects; masked tokens take no part and their context vectors are exactly zero; `null` is the learned condition of "no prompt".
Parameters, norms, softmax and the residual stream are fp32; `dtype` is that of the matrix products.
"""
import jax
import jax.numpy as jnp
from flax import nnx

from rise_jax.axes import Array, Bool, Float, typed
from rise_jax.models.layers import attention, merge_heads, scan_blocks, sinusoid, split_heads, stack

TIME_CONDS = ("off", "adaln")
TIME_CHANNELS = 320  # sinusoid of 1000 t, as ELLA and Stable Diffusion

# The options under which `resampler` is ELLA's connector: 66,820,608 parameters at d_llm 2048, d_ctx 768.
ELLA = dict(
    width=768, depth=6, heads=8, latents=64, time_cond="adaln", input_norm=False, registers=0, output_norm=False, learned_null=False
)


def make_adapter(kind: str, *, d_llm: int, d_ctx: int, rngs: nnx.Rngs, **options) -> "Adapter":
    """The adapter `kind` ('refiner', 'resampler' or 'mlp') from width `d_llm` to width `d_ctx`; `options` are those of its class.

    Raises:
      ValueError: unknown kind or time_cond; width not a multiple of heads; no output projection where widths differ.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown adapter kind {kind!r}; valid: {', '.join(KINDS)}")
    return KINDS[kind](d_llm=d_llm, d_ctx=d_ctx, rngs=rngs, **options)


class Adapter(nnx.Module):
    """What the kinds share: both ends, the time embedding and the null condition. A kind adds `tokens`.

    Options:
      width: of the tokens inside (mlp: between the two layers).
      registers: number of register tokens.
      time_cond: 'off', or 'adaln' (every inner norm is modulated by the time; the context then depends on t).
      input_norm, output_norm: with or without the RMSNorm of the states, the closing LayerNorm.
      mean, std: start of the closing LayerNorm's bias and scale, each a number or [d_ctx].
      learned_null, null_tokens: with or without the parameter `null` [1, null_tokens, d_ctx]; null_tokens defaults to registers + 1.
      dtype: of the matrix products.
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
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if time_cond not in TIME_CONDS:
            raise ValueError(f"unknown time_cond {time_cond!r}; valid: {', '.join(TIME_CONDS)}")
        self.input_norm = nnx.RMSNorm(d_llm, dtype=jnp.float32, rngs=rngs) if input_norm else None
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
        """(context, its mask): M = registers + L, or registers + latents for `resampler`. `t` is read by time_cond 'adaln' only.

        Raises:
          ValueError: time_cond is 'adaln' and t is missing.
        """
        states = jnp.where(mask[..., None], states, 0)  # a NaN in the padding would otherwise survive its zero weight
        states = self.input_norm(states) if self.input_norm else states
        context, mask = self.tokens(states, mask, self._embed(t))
        context = self.output_norm(context) if self.output_norm else context
        return jnp.where(mask[..., None], context, 0), mask

    def tokens(self, states, mask, time):
        """(normed states [B, L, d_llm], mask [B, L], time embedding [B, width] | None) -> (tokens [B, M, d_ctx], mask [B, M])."""
        raise NotImplementedError(f"{type(self).__name__} must say how it makes tokens")

    def _embed(self, t):
        if self.time_embedding is None:
            return None
        if t is None:
            raise ValueError("an adapter with time_cond 'adaln' needs the diffusion time t [B]; with 'off' it does not")
        return self.time_embedding(t)


class Refiner(Adapter):
    """Keeps one vector per token: context [registers, tokens]. Blocks start as the identity: their last projections start at zero."""

    def __init__(self, *, d_llm, d_ctx, width: int = 1024, depth: int = 4, heads: int = 16, dtype=jnp.float32, rngs, **options):
        super().__init__(d_llm=d_llm, d_ctx=d_ctx, width=width, register_width=width, dtype=dtype, rngs=rngs, **options)
        time_width = width if self.time_embedding else None
        self.project_in = nnx.Linear(d_llm, width, dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda *, rngs: RefinerBlock(width, heads, time_width, dtype=dtype, rngs=rngs), depth, rngs)
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
        rngs,
        **options,
    ):
        if not output_norm and width != d_ctx:
            raise ValueError(f"a resampler without output_norm has no output projection: width {width} must be d_ctx {d_ctx}")
        super().__init__(
            d_llm=d_llm, d_ctx=d_ctx, width=width, register_width=width, output_norm=output_norm, dtype=dtype, rngs=rngs, **options
        )
        time_width = width if self.time_embedding else None
        self.project_in = nnx.Linear(d_llm, width, dtype=dtype, rngs=rngs)
        self.latents = learned_tokens(latents, width, rngs)
        self.latents_time = nnx.Linear(width, width, dtype=dtype, rngs=rngs) if time_width else None
        self.blocks = stack(lambda *, rngs: ResamplerBlock(width, heads, time_width, dtype=dtype, rngs=rngs), depth, rngs)
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
    """No token sees another: context [registers, tokens]. `width` defaults to the mean of both ends (LaVi-Bridge: 4096, 2432, 768)."""

    def __init__(self, *, d_llm, d_ctx, width: int | None = None, dtype=jnp.float32, rngs, **options):
        width = (d_llm + d_ctx) // 2 if width is None else width
        super().__init__(d_llm=d_llm, d_ctx=d_ctx, width=width, register_width=d_ctx, dtype=dtype, rngs=rngs, **options)
        time_width = width if self.time_embedding else None
        self.norm_1 = Norm(d_llm, time_width, rngs=rngs)
        self.mlp_1 = GEGLU(d_llm, width, dtype=dtype, rngs=rngs)
        self.norm_2 = Norm(width, time_width, rngs=rngs)
        self.mlp_2 = GEGLU(width, d_ctx, dtype=dtype, rngs=rngs)

    def tokens(self, states, mask, time):
        x = self.mlp_1(self.norm_1(states, time))
        return prepend(self.registers, self.mlp_2(self.norm_2(x, time)), mask)


KINDS = dict(refiner=Refiner, resampler=Resampler, mlp=PerToken)


class RefinerBlock(nnx.Module):
    """Pre-norm block over all tokens at once. Every residual branch starts at zero."""

    def __init__(self, width, heads, time_width, *, dtype, rngs):
        zeros = nnx.initializers.zeros_init()
        self.norm_1 = Norm(width, time_width, rngs=rngs)
        self.self_attn = Attention(width, heads, out_init=zeros, dtype=dtype, rngs=rngs)
        self.norm_2 = Norm(width, time_width, rngs=rngs)
        self.mlp = MLP(width, nnx.gelu, out_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, mask, time):
        h = self.norm_1(x, time)
        x = x + self.self_attn(h, h, mask)
        return x + self.mlp(self.norm_2(x, time))


class ResamplerBlock(nnx.Module):
    """Latents attend to themselves and to the states (ELLA's order: latents first)."""

    def __init__(self, width, heads, time_width, *, dtype, rngs):
        self.norm_latents = Norm(width, time_width, rngs=rngs)
        self.norm_states = Norm(width, time_width, rngs=rngs)
        self.cross_attn = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm_mlp = Norm(width, time_width, rngs=rngs)
        self.mlp = MLP(width, lambda x: jnp.square(nnx.relu(x)), dtype=dtype, rngs=rngs)

    def __call__(self, latents, states, mask, time):
        h = self.norm_latents(latents, time)
        latents = latents + self.cross_attn(h, jnp.concatenate([h, self.norm_states(states, time)], axis=1), mask)
        return latents + self.mlp(self.norm_mlp(latents, time))


class Attention(nnx.Module):
    """Multi-head attention of x [B, S, D] over kv [B, L, D]; `mask` [B, L] is True for keys that may be seen."""

    def __init__(self, width, heads, *, out_init=nnx.initializers.lecun_normal(), dtype, rngs):
        if width % heads:
            nearest = max(1, round(width / heads)) * heads
            raise ValueError(f"adapter width {width} is not a multiple of heads {heads}; the nearest valid width is {nearest}")
        self.heads = heads
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=out_init, dtype=dtype, rngs=rngs)

    def __call__(self, x, kv, mask):
        query, key, value = (split_heads(y, self.heads) for y in (self.query(x), self.key(kv), self.value(kv)))
        return self.out(merge_heads(attention(query, key, value, mask[:, None, None, :])))


class MLP(nnx.Module):
    """Four times wider inside."""

    def __init__(self, width, activation, *, out_init=nnx.initializers.lecun_normal(), dtype, rngs):
        self.activation = activation
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=out_init, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(self.activation(self.up(x)))


class GEGLU(nnx.Module):
    """Four times wider inside, half of it through GELU as a gate; changes the width. Source: Shazeer 2002.05202."""

    def __init__(self, width_in, width_out, *, dtype, rngs):
        self.up = nnx.Linear(width_in, 8 * width_in, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width_in, width_out, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        value, gate = jnp.split(self.up(x), 2, axis=-1)
        return self.down(value * nnx.gelu(gate, approximate=False))


class Norm(nnx.Module):
    """LayerNorm in fp32; given `time_width`, its scale and shift come from the time embedding and start at 1 and 0."""

    def __init__(self, width, time_width, *, rngs):
        self.norm = layer_norm(width, affine=time_width is None, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.modulation = nnx.Linear(time_width, 2 * width, kernel_init=zeros, rngs=rngs) if time_width else None

    def __call__(self, x, time):
        x = self.norm(x)
        if self.modulation is None:
            return x
        shift, scale = jnp.split(self.modulation(nnx.silu(time))[:, None], 2, axis=-1)
        return x * (1 + scale) + shift


class TimeEmbedding(nnx.Module):
    """t [B] -> [B, width] in fp32: sinusoid of 1000 t, Linear, SiLU, Linear."""

    def __init__(self, width, *, rngs):
        self.up = nnx.Linear(TIME_CHANNELS, width, rngs=rngs)
        self.down = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, t):
        return self.down(nnx.silu(self.up(sinusoid(1000 * t, TIME_CHANNELS))))


def layer_norm(width, *, affine=True, rngs):
    """In fp32 and by the two-pass variance: the one-pass one cancels where the mean is large against the spread."""
    return nnx.LayerNorm(width, use_scale=affine, use_bias=affine, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


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
