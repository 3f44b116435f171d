"""Layers of Wan's causal video autoencoder (Wan2.1 `wan/modules/vae.py`, Apache-2.0), channels last.

A layer is called as `layer(x, past)` on one chunk of frames [B, T, H, W, C]; `past` hands it what it needs of the chunk before.
Kernels are [(kt,) kh, kw, in, out].
"""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from rise_jax.axes import Array
from rise_jax.models.attention import attention


class Past:
    """The last frames that causal layers saw of the chunk before.

    A call of the layers takes them in order and leaves in `after`, in the same order, the frames for the next chunk.
    Without `frames`, the chunk is the first: a single frame, with nothing but zeros before it.
    """

    def __init__(self, frames: list[Array] | None = None):
        self.first = frames is None
        self.after: list[Array] = []
        self._before = iter(frames or ())

    def extend(self, x: Array, count: int) -> Array:
        """x [B, T, ...] -> [B, count + T, ...], with the `count` frames before it."""
        before = jnp.zeros_like(x, shape=(x.shape[0], count, *x.shape[2:])) if self.first else next(self._before)
        x = jnp.concatenate([before, x], axis=1)
        self.after.append(x[:, -count:])
        return x


def convolve_frames(x: Array, kernel: Array, stride: int = 1) -> Array:
    """2-D convolution of every frame, with a zero on every side: [B, T, H, W, I] with [kh, kw, I, O] -> [B, T, H', W', O].

    In fp32 a GPU computes it in TF32, as torch does, and a TPU in three passes of bf16, not in the one of its default.
    """
    padding = "VALID" if kernel.shape[0] == 1 else ((1, 1), (1, 1))
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[2:]),
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGH if x.dtype == jnp.float32 else None,
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


class FrameConv(nnx.Module):
    """A 2-D convolution, the same for every frame."""

    def __init__(self, inputs: int, outputs: int, size: int = 3):
        self.kernel = nnx.Param(jnp.zeros((size, size, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array) -> Array:
        return convolve_frames(x, self.kernel[...]) + self.bias[...]

    def halved(self, x: Array) -> Array:
        """With a stride of 2 and zeros below and to the right only."""
        # A row and a column of zeros in the kernel instead: XLA has no fast CPU convolution for uneven padding.
        kernel = jnp.pad(self.kernel[...], ((1, 0), (1, 0), (0, 0), (0, 0)))
        return convolve_frames(x, kernel, stride=2) + self.bias[...]


class CausalConv(nnx.Module):
    """A 3-D convolution that sees no later frame; its zeros in time all stand before the first frame."""

    def __init__(self, inputs: int, outputs: int, *, time: int = 3, space: int = 3):
        self.kernel = nnx.Param(jnp.zeros((time, space, space, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Array, past: Past) -> Array:
        extended = past.extend(x, self.kernel.shape[0] - 1)
        # All but the last tap would see the zeros before the first frame: an image costs a third.
        return self.over(x, taps=1) if past.first else self.over(extended)

    def over(self, x: Array, *, taps: int | None = None, stride: int = 1) -> Array:
        """The plain convolution, of the last `taps` taps in time (None: all): T frames become (T - taps) // stride + 1."""
        # A sum of 2-D convolutions, one per temporal tap. On 2 CPU cores XLA's 3-D convolution took 1.5 to 4.6 times as long.
        kernel = self.kernel[...][-taps if taps else 0 :]
        last = (x.shape[1] - len(kernel)) // stride * stride
        parts = (x[:, k : k + last + 1 : stride] for k in range(len(kernel)))
        return sum(convolve_frames(part, tap) for part, tap in zip(parts, kernel)) + self.bias[...]


class Norm(nnx.Module):
    """Channels scaled to a root mean square of 1, then by `scale`, which has `axes` axes of size 1 before its channels."""

    def __init__(self, width: int, axes: int = 3):
        self.scale = nnx.Param(jnp.ones((*[1] * axes, width)))

    def __call__(self, x: Array) -> Array:
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        scaled = x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * (x.shape[-1] ** 0.5 * self.scale[...])
        return scaled.astype(x.dtype)


class Residual(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1x1 convolution carries x where the width changes."""

    def __init__(self, inputs: int, outputs: int):
        self.norm1 = Norm(inputs)
        self.conv1 = CausalConv(inputs, outputs)
        self.norm2 = Norm(outputs)
        self.conv2 = CausalConv(outputs, outputs)
        self.shortcut = CausalConv(inputs, outputs, time=1, space=1) if inputs != outputs else None

    def __call__(self, x: Array, past: Past) -> Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)), past)
        h = self.conv2(jax.nn.silu(self.norm2(h)), past)
        return h + (x if self.shortcut is None else self.shortcut.over(x))


class FrameAttention(nnx.Module):
    """Single-head self-attention among the places of one frame, plus x."""

    def __init__(self, width: int):
        self.norm = Norm(width, axes=2)
        self.qkv = FrameConv(width, 3 * width, 1)
        self.out = FrameConv(width, width, 1)

    def __call__(self, x: Array, past: Past) -> Array:
        qkv = rearrange(self.qkv(self.norm(x)), "b t h w (three c) -> three (b t) (h w) 1 c", three=3)
        return x + self.out(attention(*qkv).reshape(x.shape))


class Down(nnx.Module):
    """Halves height and width; with `temporal`, also the frames after the first."""

    def __init__(self, width: int, temporal: bool):
        self.conv = FrameConv(width, width)
        self.time = CausalConv(width, width, space=1) if temporal else None

    def __call__(self, x: Array, past: Past) -> Array:
        x = self.conv.halved(x)
        if self.time is None:
            return x
        if past.first:  # a single frame, which stays as it is
            past.after.append(x)
            return x
        return self.time.over(past.extend(x, 1), stride=2)


class Up(nnx.Module):
    """Doubles height and width and halves the channels; with `temporal`, also doubles the frames after the first."""

    def __init__(self, width: int, temporal: bool):
        self.conv = FrameConv(width, width // 2)
        self.time = CausalConv(width, 2 * width, space=1) if temporal else None

    def __call__(self, x: Array, past: Past) -> Array:
        if self.time is not None:
            x = self._more_frames(x, past)
        return self.conv(repeat(x, "b t h w c -> b t (h 2) (w 2) c"))

    def _more_frames(self, x: Array, past: Past) -> Array:
        if past.first:  # stays as it is, and the frames after it do not see it here
            past.after.append(jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:])))
            return x
        return rearrange(self.time(x, past), "b t h w (two c) -> b (t two) h w c", two=2)
