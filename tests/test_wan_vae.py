"""Wan's autoencoder against diffusers' AutoencoderKLWan on small random ones, and what chunks and tiles must not change."""

import copy
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rise_jax.models import wan_vae_blocks
from rise_jax.models.wan_vae import WAN_2_1, WanVAE, WanVAEConfig
from rise_jax.models.wan_vae_chunks import in_tiles
from tests import wan_vae
from tests.wan_vae import EARLY, FEWER, PUBLISHED, SMALL, compiled, difference

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(diffusers' model, our functions, parameters)"""
    loaded = wan_vae.loaded(SMALL, tmp_path_factory.mktemp("small"))
    return wan_vae.reference(SMALL), WanVAE(loaded.config), loaded.params


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (PUBLISHED, (2, 1, 24, 8)),
        (FEWER, (1, 9, 16, 24)),
        (SMALL, (1, 5, 10, 6)),
        (SMALL, (2, 1, 6, 14)),
        (EARLY, (1, 9, 8, 12)),
    ],
)
@pytest.mark.slow
def test_latents_and_videos_are_those_of_diffusers(tmp_path, sizes, shape):
    model, pixels = wan_vae.reference(sizes), wan_vae.video(*shape)
    loaded = wan_vae.loaded(sizes, tmp_path)
    vae = WanVAE(loaded.config)
    latents = compiled(vae, "encode")(loaded.params, pixels)
    video = compiled(vae, "decode")(loaded.params, latents)
    assert video.shape == pixels.shape
    frames = (shape[1] - 1) // vae.time_stride + 1
    assert latents.shape == (shape[0], frames, *(n // vae.space_stride for n in shape[2:]), vae.channels)

    expected = wan_vae.standardised(model, pixels)
    assert difference(latents, expected) <= TOLERANCE and expected.std() > 0.1
    expected = wan_vae.decoded(model, np.asarray(latents))
    assert difference(video, expected) <= TOLERANCE and expected.std() > 0.1 and np.mean(np.abs(expected) == 1) < 0.1


@pytest.mark.slow
def test_videos_are_cut_to_their_range(small):
    """With a last layer ten times as large: the norm before it would undo larger latents."""
    vae = small[1]
    model, params = copy.deepcopy((small[0], small[2]))
    model.decoder.conv_out.weight.data *= 10
    last = params["decoder"]["conv_out"]
    params["decoder"]["conv_out"] = last | {"kernel": 10 * last["kernel"]}
    latents = np.random.default_rng(2).normal(size=(1, 1, 3, 3, vae.channels)).astype("f4")
    video = jax.jit(vae.decode)(params, latents)
    assert np.mean(np.abs(video) == 1) > 0.1
    assert difference(video, wan_vae.decoded(model, latents)) <= TOLERANCE


# ---- time ----


CLIP = (1, 11, 6, 8)  # 6 latent frames: 1, then 5, which chunks of 3 do not divide


@pytest.mark.slow
def test_chunks_change_nothing(small):
    _, vae, params = small
    pixels = wan_vae.video(*CLIP)
    latents = compiled(vae, "encode", chunk=None)(params, pixels)
    assert difference(compiled(vae, "encode", chunk=3)(params, pixels), latents) <= TOLERANCE
    video = compiled(vae, "decode", chunk=None)(params, latents)
    assert difference(compiled(vae, "decode", chunk=3)(params, latents), video) <= TOLERANCE


def test_nothing_depends_on_what_comes_later(small):
    _, vae, params = small
    encode, decode = compiled(vae, "encode", chunk=None), compiled(vae, "decode", chunk=None)
    pixels = wan_vae.video(*CLIP)
    latents = encode(params, pixels)
    video = decode(params, latents)
    for frame in range(11):
        other = encode(params, pixels + 0.1 * one(frame, 11))
        assert first_change(other, latents) == (frame + 1) // 2  # frames 1 and 2 are in latent frame 1
    for frame in range(6):
        other = decode(params, latents + 0.1 * one(frame, 6))
        assert first_change(other, video) == max(2 * frame - 1, 0)


def one(frame, frames):
    return (np.arange(frames) == frame).astype("f4")[None, :, None, None, None]


def first_change(a, b):
    """The first frame in which a and b differ at all."""
    return int(np.flatnonzero(np.asarray(a != b).any(axis=(0, 2, 3, 4)))[0])


def forgetful(past, x, count):
    before = jnp.zeros_like(x, shape=(x.shape[0], count, *x.shape[2:]))
    past.after.append(before)
    return jnp.concatenate([before, x], axis=1)


def late(past, x, count):
    past.after.append(jnp.zeros_like(x, shape=(x.shape[0], count, *x.shape[2:])))
    return jnp.pad(x, ((0, 0), (count // 2, count - count // 2), *[(0, 0)] * 3))


def above(conv, x):
    return wan_vae_blocks.convolve_frames(x, conv.kernel[...], stride=2) + conv.bias[...]


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (wan_vae_blocks.Past, "extend", forgetful),
        (wan_vae_blocks.Past, "extend", late),
        (wan_vae_blocks.FrameConv, "halved", above),
    ],
    ids=["frames before the chunk dropped", "zeros on both sides in time", "zeros above instead of below"],
)
@pytest.mark.slow
def test_parity_sees_a_fault(small, monkeypatch, place, name, fault):
    model, vae, params = small
    monkeypatch.setattr(place, name, fault)
    pixels = wan_vae.video(1, 5, 6, 8)
    assert difference(jax.jit(vae.encode)(params, pixels), wan_vae.standardised(model, pixels)) > 100 * TOLERANCE


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_frames():
    vae = WanVAE(wan_vae.config(SMALL))
    side, width = 32, SMALL["base_dim"] * 2

    def temporary(function, frames, *shape):
        shape = jax.ShapeDtypeStruct((1, frames, *shape), jnp.float32)
        return jax.jit(function).lower(vae.abstract, shape).compile().memory_analysis().temp_size_in_bytes

    # Beside input and result: the features at latent resolution and, while they are stacked, a copy of the larger array.
    video = 2 * 3 * (2 * side) ** 2 * 4
    features = width * side**2 * 4
    for function, shape, stride in ((vae.encode, (2 * side, 2 * side, 3), 2), (vae.decode, (side, side, 5), 1)):
        few, many = (temporary(function, n * stride + 1, *shape) for n in (4, 20))
        assert many - few <= 16 * 2 * (video + features)


# ---- space ----


FRAME = (1, 3, 30, 38)  # 15 x 19 latent cells, which tiles of 4 x 4 do not divide
TILE = 8


@pytest.mark.slow
def test_tiles_change_nothing(small):
    _, vae, params = small
    pixels = wan_vae.video(*FRAME)
    latents = compiled(vae, "encode")(params, pixels)
    assert difference(compiled(vae, "encode", tile=TILE)(params, pixels), latents) <= TOLERANCE
    video = compiled(vae, "decode")(params, latents)
    assert difference(compiled(vae, "decode", tile=TILE)(params, latents), video) <= TOLERANCE


@dataclass(frozen=True)
class Blind(WanVAEConfig):
    """Tiles with nothing around them."""

    def encoder_halo(self):
        return 0

    def decoder_halo(self):
        return 0


@pytest.mark.slow
def test_tiles_without_what_surrounds_them_are_noticed(small):
    _, vae, params = small
    blind, pixels = WanVAE(Blind(**vars(vae.config))), wan_vae.video(*FRAME)
    latents = compiled(vae, "encode")(params, pixels)
    assert difference(compiled(blind, "encode", tile=TILE)(params, pixels), latents) > 100 * TOLERANCE
    video = compiled(vae, "decode")(params, latents)
    assert difference(compiled(blind, "decode", tile=TILE)(params, latents), video) > 100 * TOLERANCE


@pytest.mark.parametrize("sizes", [SMALL, EARLY])
@pytest.mark.slow
def test_halos_are_as_far_as_the_layers_see(tmp_path, sizes):
    """The gradient of one cell in the middle reaches `halo` cells to the side, and no further."""
    loaded = wan_vae.loaded(sizes, tmp_path)
    vae = WanVAE(loaded.config)
    config, stride, middle = vae.config, vae.space_stride, 7
    cells = 2 * middle + 1

    def reach(fine, x, inside, outside):
        """In cells, the farthest place of x that the middle cell's result depends on."""
        cell = slice(middle * outside, (middle + 1) * outside)
        gradient = jax.jit(jax.grad(lambda x: fine(x, wan_vae_blocks.Past())[:, :, cell, cell].sum()))(x)
        seen = np.flatnonzero(np.asarray(gradient).any(axis=(0, 1, 3, 4))) // inside
        return max(middle - seen.min(), seen.max() - middle)

    model = vae.module(jax.tree.map(jnp.asarray, loaded.params))
    assert (
        reach(model.encoder.fine, wan_vae.video(1, 1, cells * stride, cells * stride), stride, 1)
        == config.encoder_halo()
    )
    features = np.random.default_rng(3).normal(size=(1, 1, cells, cells, config.width * config.multipliers[-1]))
    assert reach(model.decoder.fine, features.astype("f4"), 1, stride) == config.decoder_halo()


def test_halos_of_the_published_sizes():
    assert (WAN_2_1.encoder_halo(), WAN_2_1.decoder_halo()) == (5, 7)
    assert (WAN_2_1.time_stride, WAN_2_1.space_stride) == (4, 8)


def test_windows_end_where_the_frame_ends():
    sizes = []

    def call(x):
        sizes.append(x.shape[2:4])
        return x + x[:, :, :1, :1] * 0

    x = np.arange(5 * 9, dtype=np.float32).reshape(1, 1, 5, 9, 1)
    np.testing.assert_array_equal(in_tiles(call, x, tile=4, halo=2, inside=1, outside=1), x)
    assert sizes[0] == (5, 9) and set(sizes[1:]) == {(5, 8)}  # the shape of the result, then windows


# ---- errors ----


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 6, 16, 16), r"frames=6 is not 4n\+1; nearest: 5"),
        ((1, 4, 16, 16), r"frames=4 is not 4n\+1; nearest: 5"),
        ((1, 0, 16, 16), r"frames=0 is not 4n\+1; nearest: 1"),
        ((1, 5, 60, 16), r"height=60 is not a multiple of 8; nearest: 64"),
        ((1, 5, 16, 3), r"width=3 is not a multiple of 8; nearest: 8"),
        ((1, 2, 17, 16), r"frames=2 .*nearest: 1, height=17 .*nearest: 16"),
    ],
)
def test_sizes_that_cannot_be_encoded(shape, message):
    vae = WanVAE()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(vae.encode, vae.abstract, jax.ShapeDtypeStruct((*shape, 3), jnp.float32))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (dict(tile=100), "tile=100 is not a positive multiple of 8 pixels; nearest: 96"),
        (dict(tile=0), "tile=0 is not a positive multiple of 8 pixels; nearest: 8"),
        (dict(chunk=0), "chunk=0 is below 1.*nearest: 1"),
    ],
)
def test_pieces_that_do_not_exist(pieces, message):
    vae = WanVAE()
    with pytest.raises(ValueError, match=message):
        vae.encode(vae.abstract, jnp.zeros((1, 1, 8, 8, 3)), **pieces)
    with pytest.raises(ValueError, match=message):
        vae.decode(vae.abstract, jnp.zeros((1, 1, 1, 1, 16)), **pieces)


def test_latents_of_another_autoencoder():
    vae = WanVAE()
    with pytest.raises(ValueError, match="latents of 12 channels: this VAE decodes 16"):
        vae.decode(vae.abstract, jnp.zeros((1, 1, 2, 2, 12)))


def test_sizes_that_do_not_belong_together():
    with pytest.raises(ValueError, match="2 temporal flags for 4 stages: one fewer, 3, is needed"):
        WanVAEConfig(temporal=(True, True))
    with pytest.raises(
        ValueError, match="8 latent channels need as many means and standard deviations, found 16 and 16"
    ):
        WanVAEConfig(channels=8)
