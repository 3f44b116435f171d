"""Wan 2.1's causal video autoencoder (Wan2.1 `wan/modules/vae.py`, Apache-2.0), at any size: the interface of `vae.Pixels`, with
parameters.

T = 4n+1 frames become n+1 latent frames: the first frame stands for itself, four frames share each later one, and no latent
depends on a frame after its own four. An image is T = 1.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from rise_jax.axes import Array, Float, typed
from rise_jax.models.wan_vae_blocks import CausalConv, Down, FrameAttention, Norm, Past, Residual, Up
from rise_jax.models.wan_vae_chunks import in_tiles, over_time

COLOURS = 3


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes and latent statistics; the defaults are Wan 2.1's.

    One stage per multiplier of `width`, each of `blocks` residual blocks (the decoder has one more). Between stages height and
    width halve, and so do the frames where `temporal` says so. Latents are standardised by `mean` and `std`, one per channel.
    """

    width: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    channels: int = 16
    temporal: tuple[bool, ...] = (False, True, True)
    # fmt: off
    mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )
    std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on

    def __post_init__(self):
        """ValueError where the lengths do not belong together."""
        stages, latent = len(self.multipliers), self.channels
        if len(self.temporal) != stages - 1:
            raise ValueError(
                f"{len(self.temporal)} temporal flags for {stages} stages: one fewer, {stages - 1}, is needed"
            )
        if (len(self.mean), len(self.std)) != (latent, latent):
            raise ValueError(
                f"{latent} latent channels need as many means and standard deviations, "
                f"found {len(self.mean)} and {len(self.std)}"
            )

    @property
    def time_stride(self) -> int:
        return 2 ** sum(self.temporal)

    @property
    def space_stride(self) -> int:
        return 2 ** len(self.temporal)

    def encoder_halo(self) -> int:
        """How many latent cells beyond its own `Encoder.fine` sees: 5 for Wan 2.1, of 8 pixels each."""
        reach = 0
        for _ in self.temporal:
            reach = 2 * reach + 1 + 2 * self.blocks
        return -(-(reach + 1) // self.space_stride)

    def decoder_halo(self) -> int:
        """How many latent cells beyond its own `Decoder.fine` sees: 7 for Wan 2.1, of 8 pixels each."""
        reach = 1
        for _ in self.temporal:
            reach = (reach + 2 * (self.blocks + 1) + 2) // 2
        return reach


WAN_2_1 = WanVAEConfig()


class Encoder(nnx.Module):
    """Frames -> mean and log variance of the latents, before `quant`. `fine` stands above latent resolution, `coarse` at it."""

    def __init__(self, config: WanVAEConfig):
        width, layers = config.width, []
        self.conv_in = CausalConv(COLOURS, width)
        for multiplier, temporal in zip(config.multipliers, (*config.temporal, None)):
            for _ in range(config.blocks):
                layers.append(Residual(width, config.width * multiplier))
                width = config.width * multiplier
            layers += [] if temporal is None else [Down(width, temporal)]
        self.down = _numbered(layers)
        self.middle = _middle(width)
        self.norm_out = Norm(width)
        self.conv_out = CausalConv(width, 2 * config.channels)
        self.last = config.blocks

    def fine(self, x: Array, past: Past) -> Array:
        """[B, T, H, W, 3] -> [B, F, H/8, W/8, C]"""
        return _run(_ordered(self.down)[: -self.last], self.conv_in(x, past), past)

    def coarse(self, x: Array, past: Past) -> Array:
        """[B, F, h, w, C] -> [B, F, h, w, 2 * channels]"""
        x = _run([*_ordered(self.down)[-self.last :], *_ordered(self.middle)], x, past)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), past)


class Decoder(nnx.Module):
    """Latents after `post_quant` -> frames. `coarse` stands at latent resolution, `fine` above it."""

    def __init__(self, config: WanVAEConfig):
        width, layers = config.width * config.multipliers[-1], []
        self.conv_in = CausalConv(config.channels, width)
        self.middle = _middle(width)
        for multiplier, temporal in zip(config.multipliers[::-1], (*config.temporal[::-1], None)):
            for _ in range(config.blocks + 1):
                layers.append(Residual(width, config.width * multiplier))
                width = config.width * multiplier
            if temporal is not None:
                layers.append(Up(width, temporal))
                width //= 2
        self.up = _numbered(layers)
        self.norm_out = Norm(width)
        self.conv_out = CausalConv(width, COLOURS)
        self.first = config.blocks + 1

    def coarse(self, x: Array, past: Past) -> Array:
        """[B, F, h, w, channels] -> [B, F, h, w, C]"""
        layers = [*_ordered(self.middle), *_ordered(self.up)[: self.first]]
        return _run(layers, self.conv_in(x, past), past)

    def fine(self, x: Array, past: Past) -> Array:
        """[B, F, h, w, C] -> [B, T, 8h, 8w, 3]"""
        x = _run(_ordered(self.up)[self.first :], x, past)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), past)


class Autoencoder(nnx.Module):
    """All parameters."""

    def __init__(self, config: WanVAEConfig):
        self.encoder = Encoder(config)
        self.quant = CausalConv(2 * config.channels, 2 * config.channels, time=1, space=1)
        self.post_quant = CausalConv(config.channels, config.channels, time=1, space=1)
        self.decoder = Decoder(config)


class WanVAE:
    """Pure functions over the parameters, fp32; `abstract` is the nested dict of their shapes.

    `dtype` is that of convolutions and what passes between layers; norms sum squares in fp32, and videos and latents are fp32.

    A call holds in memory its video and latents, features at latent resolution (half the video's values for Wan 2.1), and the
    layers' values for one chunk of one tile. `chunk` is that of latent frames run at once (None: all); `tile` the side of the square
    pieces, in pixels, in which the layers above latent resolution run one after the other (None: the whole frame). A piece has
    `encoder_halo` or `decoder_halo` cells more on every side (40 and 56 pixels for Wan 2.1), all that these layers see, so
    neither changes the result beyond rounding. The layers at latent resolution, where attention sees all of a frame, run whole.
    """

    def __init__(self, config: WanVAEConfig = WAN_2_1):
        self.config = config
        self.time_stride, self.space_stride = config.time_stride, config.space_stride
        self.channels = config.channels
        self._graph, params, rest = nnx.split(nnx.eval_shape(lambda: Autoencoder(config)), nnx.Param, ...)
        assert not jax.tree.leaves(rest), "only Params may be leaves of the VAE"
        self.abstract = nnx.to_pure_dict(params)

    def module(self, params: dict, dtype=jnp.float32) -> Autoencoder:
        """The module itself, inside a trace, with parameters in `dtype`."""
        return nnx.merge(self._graph, jax.tree.map(lambda leaf: leaf.astype(dtype), params))

    @typed
    def encode(
        self,
        params: dict,
        video: Float[Array, "B T H W 3"],
        *,
        chunk: int | None = 1,
        tile: int | None = None,
        dtype=jnp.float32,
    ) -> Float[Array, "B F h w C"]:
        """[-1, 1] video, T = 4n+1, H and W multiples of 8 -> standardised latents, the mode of their distribution.

        ValueError for other sizes, for a `tile` that is no multiple of 8, and for a `chunk` below 1.
        """
        frames, height, width = video.shape[1:4]
        self._check_video(frames, height, width)
        chunk, cells = self._pieces(chunk, tile, frames)
        model = self.module(params, dtype)
        x = in_tiles(
            lambda x: over_time(model.encoder.fine, x, chunk * self.time_stride),
            video.astype(dtype),
            tile=cells,
            halo=self.config.encoder_halo(),
            inside=self.space_stride,
            outside=1,
        )
        mean = model.quant.over(over_time(model.encoder.coarse, x, chunk))[..., : self.channels].astype(jnp.float32)
        return (mean - jnp.array(self.config.mean)) / jnp.array(self.config.std)

    @typed
    def decode(
        self,
        params: dict,
        latents: Float[Array, "B F h w C"],
        *,
        chunk: int | None = 1,
        tile: int | None = None,
        dtype=jnp.float32,
    ) -> Float[Array, "B T H W 3"]:
        """Standardised latents -> video of T = 4(F - 1) + 1 frames, cut to [-1, 1].

        ValueError for another number of channels, for a `tile` that is no multiple of 8, and for a `chunk` below 1.
        """
        if latents.shape[-1] != self.channels:
            raise ValueError(f"latents of {latents.shape[-1]} channels: this VAE decodes {self.channels}")
        chunk, cells = self._pieces(chunk, tile, latents.shape[1])
        model = self.module(params, dtype)
        x = latents.astype(jnp.float32) * jnp.array(self.config.std) + jnp.array(self.config.mean)
        x = over_time(model.decoder.coarse, model.post_quant.over(x.astype(dtype)), chunk)
        video = in_tiles(
            lambda x: over_time(model.decoder.fine, x, chunk),
            x,
            tile=cells,
            halo=self.config.decoder_halo(),
            inside=1,
            outside=self.space_stride,
        )
        return jnp.clip(video.astype(jnp.float32), -1, 1)

    def _check_video(self, frames: int, height: int, width: int) -> None:
        stride = self.time_stride
        faults = []
        if (frames - 1) % stride:
            near = stride * round((frames - 1) / stride) + 1
            faults.append(f"frames={frames} is not {stride}n+1; nearest: {near}")
        stride = self.space_stride
        for name, size in (("height", height), ("width", width)):
            if size % stride:
                faults.append(
                    f"{name}={size} is not a multiple of {stride}; nearest: {_nearest_multiple(size, stride)}"
                )
        if faults:
            raise ValueError(f"this VAE cannot encode the video: {', '.join(faults)}")

    def _pieces(self, chunk: int | None, tile: int | None, frames: int) -> tuple[int, int | None]:
        """(latent frames per chunk, latent cells per side of a tile or None)"""
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk={chunk} is below 1, the fewest latent frames that run at once; nearest: 1")
        if tile is not None and (tile < 1 or tile % self.space_stride):
            near = _nearest_multiple(tile, self.space_stride)
            raise ValueError(f"tile={tile} is not a positive multiple of {self.space_stride} pixels; nearest: {near}")
        return chunk or frames, tile and tile // self.space_stride


def _nearest_multiple(size: int, stride: int) -> int:
    return max(stride, stride * round(size / stride))


def _numbered(layers: list[nnx.Module]) -> nnx.Dict:
    """A list as a tree whose paths are text, as everywhere else."""
    return nnx.Dict({str(i): layer for i, layer in enumerate(layers)})


def _ordered(layers: nnx.Dict) -> list[nnx.Module]:
    return [layers[str(i)] for i in range(len(layers))]


def _middle(width: int) -> nnx.Dict:
    return _numbered([Residual(width, width), FrameAttention(width), Residual(width, width)])


def _run(layers: list[nnx.Module], x: Array, past: Past) -> Array:
    for layer in layers:
        x = layer(x, past)
    return x
