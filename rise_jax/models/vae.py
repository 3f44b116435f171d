"""Video autoencoders behind one interface: `encode` pixels to latents, `decode` back, strides and channels as attributes.

`Pixels` is the exact one: space-time-to-depth with the time geometry of Wan's VAE, so that images (T = 1) need no special path.
"""

import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx

from rise_jax.axes import Array, Float, typed


class Pixels(nnx.Module):
    """Folds 4 frames into channels: T = 4n+1 frames, the first repeated 4 times, become F = n+1 latent frames.

    There are no parameters: `params` is {}.
    """

    time_stride = 4
    space_stride = 1
    channels = 12

    @typed
    def encode(self, params: dict, video: Float[Array, "B T H W 3"]) -> Float[Array, "B F H W 12"]:
        """[-1, 1] video with T = 4n+1 -> latents in [-1, 1]."""
        first = jnp.repeat(video[:, :1], self.time_stride, axis=1)
        return rearrange(
            jnp.concatenate([first, video[:, 1:]], axis=1), "b (f k) h w c -> b f h w (k c)", k=self.time_stride
        )

    @typed
    def decode(self, params: dict, latents: Float[Array, "B F H W 12"]) -> Float[Array, "B T H W 3"]:
        """Inverse of `encode`; the four copies of the first frame are averaged."""
        frames = rearrange(latents, "b f h w (k c) -> b (f k) h w c", k=self.time_stride)
        first = reduce(frames[:, : self.time_stride], "b k h w c -> b 1 h w c", "mean")
        return jnp.concatenate([first, frames[:, self.time_stride :]], axis=1)
