"""Video diffusion transformer with the architecture of Wan 2.1 (Wan2.1 `wan/modules/model.py`, Apache-2.0), at any size.

The same module is the tiny model on a laptop and, with published weights, Wan2.1-T2V. Per block: modulated self-attention with 3-D
rotary positions, ungated cross-attention to the text, modulated MLP. Text enters zero-padded to a fixed length without a mask, as Wan
was trained. Cross-attention keys and values depend on the text alone, so `kv` computes them once per video.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from rise_jax.axes import Array, Float, typed
from rise_jax.models.attention import XLA, Backend, attention, self_attention
from rise_jax.models.layers import EXACT, LowRankLinear, merge_heads, scan_blocks, sinusoid, split_heads, stack
from rise_jax.sharding import place_samples, place_tokens, sequence_padding

TIME_SCALE = 1000.0  # published models take t in [0, 1000]
FREQUENCIES = 256  # width of the time sinusoid, the same at every size
COORDINATES = 14  # channels of `coordinate_channels`
EPS = 1e-6  # of every norm, where nothing else is said


def rope_table(frames: int, height: int, width: int, head_width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [S, d/2] for a grid of frames x height x width tokens, in fp64 arithmetic, as fp32.

    The d/2 rotation pairs are shared out as Wan does: height and width get d//6 each, time the rest; theta 10000.
    """
    spatial = head_width // 6
    sizes = (head_width // 2 - 2 * spatial, spatial, spatial)
    grid = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    angles = [
        positions.reshape(-1, 1) * 10000.0 ** (-np.arange(pairs) / max(pairs, 1))
        for positions, pairs in zip(grid, sizes, strict=True)
    ]
    angles = np.concatenate(angles, axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate_pairs(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates interleaved pairs of x [B, S, N, d] by the angles of cos, sin [S, d/2], in fp32."""
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def patchify(latents: Array, patch: tuple[int, int, int]) -> Array:
    """[B, F, H, W, C] -> [B, S, pt*ph*pw*C]"""
    pt, ph, pw = patch
    return rearrange(latents, "b (f pt) (h ph) (w pw) c -> b (f h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Array:
    """[B, S, pt*ph*pw*C] -> [B, F, H, W, C] for a token grid of (frames, height, width)."""
    (f, h, w), (pt, ph, pw) = grid, patch
    return rearrange(tokens, "b (f h w) (pt ph pw c) -> b (f pt) (h ph) (w pw) c", f=f, h=h, w=w, pt=pt, ph=ph, pw=pw)


def fit_context(context: Array, text_len: int) -> Array:
    """Wan's text rule: [B, L, C] cut or zero-padded to [B, text_len, C]; the padding is attended like any token."""
    context = context[:, :text_len]
    return jnp.pad(context, ((0, 0), (0, text_len - context.shape[1]), (0, 0)))


def coordinate_channels(frames: int, height: int, width: int) -> np.ndarray:
    """[F, H, W, 14] fp32 from the places t, y, x of a cell, each in [-1, 1]: six sines and six cosines of pi/2 and pi times
    t, y and x, then t y and t x, which are what "moves down" and "moves right" mean: without them a direction is the
    product of three signs, and a model is slow to find that (docs/tiny.md)."""
    t, y, x = grid = np.meshgrid(*(np.linspace(-1, 1, size) for size in (frames, height, width)), indexing="ij")
    angles = np.pi * np.stack([factor * axis for axis in grid for factor in (0.5, 1.0)], axis=-1)
    motion = np.stack([t * y, t * x], axis=-1)
    return np.concatenate([np.sin(angles), np.cos(angles), motion], axis=-1).astype(np.float32)


def _norm(width: int, eps: float, affine: bool, one_pass: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The variance in one pass, which is nnx's default, loses digits to the square of a mean far from zero. In two, blocks that are
    # written out one after the other take four times as long: XLA on a CPU computes means again for every value.
    options = dict(epsilon=eps, use_bias=affine, use_scale=affine, dtype=jnp.float32, use_fast_variance=one_pass)
    return nnx.LayerNorm(width, **options, rngs=rngs)


def _modulate(x: Array, scale: Array, shift: Array, dtype) -> Array:
    return (x * (1 + scale) + shift).astype(dtype)


class Attention(nnx.Module):
    """Multi-head attention with RMS norms over the full width of queries and keys, before the head split."""

    def __init__(self, width: int, heads: int, *, eps: float, rank: int = 0, dtype, rngs: nnx.Rngs):
        def linear():
            options = dict(dtype=dtype, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)
            return LowRankLinear(width, width, rank=rank, **options) if rank else nnx.Linear(width, width, **options)

        self.heads, self.dtype = heads, dtype
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        self.query_norm = nnx.RMSNorm(width, epsilon=eps, dtype=jnp.float32, rngs=rngs)
        self.key_norm = nnx.RMSNorm(width, epsilon=eps, dtype=jnp.float32, rngs=rngs)

    def queries(self, x: Array) -> Array:
        return split_heads(self.query_norm(self.query(x)).astype(self.dtype), self.heads)

    def kv(self, x: Array) -> tuple[Array, Array]:
        key = split_heads(self.key_norm(self.key(x)).astype(self.dtype), self.heads)
        return key, split_heads(self.value(x), self.heads)

    def join(self, mixed: Array) -> Array:
        return self.out(merge_heads(mixed))


class Block(nnx.Module):
    def __init__(
        self,
        width: int,
        mlp_width: int,
        heads: int,
        *,
        eps: float,
        low_rank: int = 0,
        one_pass: bool = False,
        dtype,
        backend: Backend = XLA,
        rngs: nnx.Rngs,
    ):
        xavier = nnx.initializers.xavier_uniform()
        self.dtype, self.backend = dtype, backend
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, width)) / width**0.5)
        self.self_norm = _norm(width, eps, False, one_pass, rngs)
        self.self_attn = Attention(width, heads, eps=eps, rank=low_rank, dtype=dtype, rngs=rngs)
        self.cross_norm = _norm(width, eps, True, one_pass, rngs)
        self.cross_attn = Attention(width, heads, eps=eps, dtype=dtype, rngs=rngs)
        self.mlp_norm = _norm(width, eps, False, one_pass, rngs)
        self.up = nnx.Linear(width, mlp_width, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.down = nnx.Linear(mlp_width, width, dtype=dtype, kernel_init=xavier, rngs=rngs)

    def __call__(
        self, x: Array, time: Array, rope: tuple[Array, Array], kv: tuple[Array, Array], mask: Array | None = None
    ) -> Array:
        """x [B, S, D]; time [B, 6, D] fp32; kv: cross-attention keys and values [B, L, N, d]; mask [1, 1, 1, S] of real tokens."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(self.modulation[...] + time, 6, axis=1)

        h = _modulate(self.self_norm(x), scale, shift, self.dtype)
        key, value = self.self_attn.kv(h)
        query, key = rotate_pairs(self.self_attn.queries(h), *rope), rotate_pairs(key, *rope)
        mixed = self_attention(query, key, value, mask, self.backend)
        x = (x + gate * self.self_attn.join(mixed)).astype(self.dtype)

        query = self.cross_attn.queries(self.cross_norm(x).astype(self.dtype))
        x = x + self.cross_attn.join(attention(query, *kv, None, self.backend))

        h = _modulate(self.mlp_norm(x), mlp_scale, mlp_shift, self.dtype)
        return place_tokens((x + mlp_gate * self.down(nnx.gelu(self.up(h)))).astype(self.dtype))


class DiT(nnx.Module):
    """Sizes: width = heads * head width, head width even; latents' F, H, W multiples of `patch`.

    `remat`, one of remat.REMAT, says what blocks keep for the backward pass; no number changes.
    On a mesh whose context axis is larger than 1 the tokens lie split over it, padded with masked ones where they do not divide.

    `low_rank` > 0 gives the projections of self-attention a correction of that rank (layers.LowRankLinear).

    `coordinates` appends the place of every cell to the latents as channels, which Wan's own text-to-video weights do not
    have: rotary positions are relative, so in pure noise a patch cannot tell the middle of the frame from its edge, and a
    model trained from scratch for minutes is late to learn where things are. It stays Wan's architecture, with more
    channels going in than coming out, as in Wan's image-to-video models.
    """

    def __init__(
        self,
        *,
        channels: int,
        d_ctx: int,
        width: int,
        mlp_width: int,
        heads: int,
        depth: int,
        patch: tuple[int, int, int],
        text_len: int,
        eps: float = EPS,
        remat: str = "none",
        unroll: bool = False,
        coordinates: bool = False,
        low_rank: int = 0,
        dtype=jnp.float32,
        backend: Backend = XLA,
        rngs: nnx.Rngs,
    ):
        xavier = nnx.initializers.xavier_uniform()
        self.patch, self.text_len, self.heads, self.dtype = tuple(patch), text_len, heads, dtype
        self.remat, self.unroll, self.coordinates = remat, unroll, coordinates
        patch_values = channels * int(np.prod(patch))
        in_values = (channels + COORDINATES * coordinates) * int(np.prod(patch))
        self.patch_in = nnx.Linear(in_values, width, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.text_up = nnx.Linear(d_ctx, width, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.text_down = nnx.Linear(width, width, dtype=dtype, kernel_init=xavier, rngs=rngs)
        self.time_up = nnx.Linear(FREQUENCIES, width, kernel_init=xavier, rngs=rngs, **EXACT)
        self.time_down = nnx.Linear(width, width, kernel_init=xavier, rngs=rngs, **EXACT)
        self.time_rows = nnx.Linear(width, 6 * width, kernel_init=xavier, rngs=rngs, **EXACT)
        options = dict(eps=eps, low_rank=low_rank, one_pass=unroll, dtype=dtype, backend=backend)
        self.blocks = stack(lambda *, rngs: Block(width, mlp_width, heads, **options, rngs=rngs), depth, rngs)
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, width)) / width**0.5)
        self.out_norm = _norm(width, eps, False, unroll, rngs)
        self.patch_out = nnx.Linear(width, patch_values, dtype=dtype, kernel_init=nnx.initializers.zeros, rngs=rngs)

    @typed
    def kv(self, context: Float[Array, "B L C"]) -> tuple[Float[Array, "depth B K N d"], Float[Array, "depth B K N d"]]:
        """Cross-attention keys and values of every block, from context cut or zero-padded to `text_len`."""
        text = fit_context(context, self.text_len).astype(self.dtype)
        text = self.text_down(nnx.gelu(self.text_up(text)))
        call = lambda block, carry, _: (carry, block.cross_attn.kv(text))
        return scan_blocks(self.blocks, call, None, unroll=self.unroll)[1]

    @typed
    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        t: Float[Array, "B"],
        kv: tuple[Float[Array, "depth B L N d"], Float[Array, "depth B L N d"]],
    ) -> Float[Array, "B F H W C"]:
        """Prediction for noisy latents at time t in [0, 1] (what it predicts is flow.py's business), fp32."""
        grid = tuple(size // p for size, p in zip(latents.shape[1:4], self.patch, strict=True))
        if self.coordinates:
            places = coordinate_channels(*latents.shape[1:4])
            places = jnp.broadcast_to(places, (*latents.shape[:4], COORDINATES))
            latents = jnp.concatenate([latents, places], axis=-1)
        tokens = patchify(latents, self.patch)
        length, padding = tokens.shape[1], sequence_padding(tokens.shape[1])
        mask = jnp.arange(length + padding)[None, None, None] < length if padding else None
        x = self.patch_in(place_tokens(jnp.pad(tokens, ((0, 0), (0, padding), (0, 0)))))
        rope = rope_table(*grid, x.shape[-1] // self.heads)
        rope = tuple(np.pad(table, ((0, padding), (0, 0))) for table in rope)
        time = self.time_down(nnx.silu(self.time_up(sinusoid(TIME_SCALE * t, FREQUENCIES))))
        rows = self.time_rows(nnx.silu(time)).reshape(time.shape[0], 6, -1)

        call = lambda block, x, kv: (block(x, rows, rope, kv, mask), None)
        x, _ = scan_blocks(self.blocks, call, x, kv, remat=self.remat, unroll=self.unroll)
        shift, scale = jnp.split(self.modulation[...] + time[:, None], 2, axis=1)
        x = _modulate(self.out_norm(x), scale, shift, self.dtype)
        tokens = place_samples(self.patch_out(x))[:, :length]
        return unpatchify(tokens, grid, self.patch).astype(jnp.float32)


def abstract_dit(**sizes) -> dict:
    """The nested dict of a DiT's ShapeDtypeStructs, for DiT's own keyword arguments."""
    return nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: DiT(rngs=nnx.Rngs(params=jax.random.key(0)), **sizes)), nnx.Param)
    )
