"""Blocks of the Rephrasing Adapter. `dtype` is that of the matrix products; everything else is fp32."""

import jax.numpy as jnp
from flax import nnx

from rise_jax.models.attention import XLA, Backend, attention
from rise_jax.models.layers import EXACT, merge_heads, sinusoid, split_heads

TIME_CHANNELS = 320  # sinusoid of 1000 t, as ELLA and Stable Diffusion


class RefinerBlock(nnx.Module):
    """Pre-norm block over all tokens at once. Every residual branch starts at zero."""

    def __init__(self, width, heads, time_width, *, dtype, backend: Backend = XLA, rngs):
        zeros = nnx.initializers.zeros_init()
        self.norm_1 = Norm(width, time_width, rngs=rngs)
        self.self_attn = Attention(width, heads, out_init=zeros, dtype=dtype, backend=backend, rngs=rngs)
        self.norm_2 = Norm(width, time_width, rngs=rngs)
        self.mlp = MLP(width, nnx.gelu, out_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, mask, time):
        h = self.norm_1(x, time)
        x = x + self.self_attn(h, h, mask)
        return x + self.mlp(self.norm_2(x, time))


class ResamplerBlock(nnx.Module):
    """Latents attend to themselves and to the states (ELLA's order: latents first)."""

    def __init__(self, width, heads, time_width, *, dtype, backend: Backend = XLA, rngs):
        self.norm_latents = Norm(width, time_width, rngs=rngs)
        self.norm_states = Norm(width, time_width, rngs=rngs)
        self.cross_attn = Attention(width, heads, dtype=dtype, backend=backend, rngs=rngs)
        self.norm_mlp = Norm(width, time_width, rngs=rngs)
        self.mlp = MLP(width, lambda x: jnp.square(nnx.relu(x)), dtype=dtype, rngs=rngs)

    def __call__(self, latents, states, mask, time):
        h = self.norm_latents(latents, time)
        latents = latents + self.cross_attn(h, jnp.concatenate([h, self.norm_states(states, time)], axis=1), mask)
        return latents + self.mlp(self.norm_mlp(latents, time))


class Attention(nnx.Module):
    """Multi-head attention of x [B, S, D] over kv [B, L, D]; `mask` [B, L] is True for keys that may be seen."""

    def __init__(self, width, heads, *, out_init=nnx.initializers.lecun_normal(), dtype, backend: Backend = XLA, rngs):
        if width % heads:
            nearest = max(1, round(width / heads)) * heads
            raise ValueError(
                f"adapter width {width} is not a multiple of heads {heads}; the nearest valid width is {nearest}"
            )
        self.heads, self.backend = heads, backend
        self.query = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=out_init, dtype=dtype, rngs=rngs)

    def __call__(self, x, kv, mask):
        query, key, value = (split_heads(y, self.heads) for y in (self.query(x), self.key(kv), self.value(kv)))
        return self.out(merge_heads(attention(query, key, value, mask[:, None, None, :], self.backend)))


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
        self.modulation = (
            nnx.Linear(time_width, 2 * width, kernel_init=zeros, rngs=rngs, **EXACT) if time_width else None
        )

    def __call__(self, x, time):
        x = self.norm(x)
        if self.modulation is None:
            return x
        shift, scale = jnp.split(self.modulation(nnx.silu(time))[:, None], 2, axis=-1)
        return x * (1 + scale) + shift


class TimeEmbedding(nnx.Module):
    """t [B] -> [B, width] in fp32: sinusoid of 1000 t, Linear, SiLU, Linear."""

    def __init__(self, width, *, rngs):
        self.up = nnx.Linear(TIME_CHANNELS, width, rngs=rngs, **EXACT)
        self.down = nnx.Linear(width, width, rngs=rngs, **EXACT)

    def __call__(self, t):
        return self.down(nnx.silu(self.up(sinusoid(1000 * t, TIME_CHANNELS))))


def layer_norm(width, *, affine=True, rngs):
    """In fp32 and by the two-pass variance: the one-pass one cancels where the mean is large against the spread."""
    return nnx.LayerNorm(
        width, use_scale=affine, use_bias=affine, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )
