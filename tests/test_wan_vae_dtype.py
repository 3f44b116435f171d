"""Wan's VAE in bfloat16 errs as diffusers' does in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import tiny_config
from wan import equations
from wan_vae import SMALL, decoded, loaded, reference, standardised, video

from rise_jax.build import model_from
from rise_jax.language import states_in_batch
from rise_jax.models.wan_vae import WanVAE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    found = loaded(SMALL, tmp_path_factory.mktemp("vae"))
    return WanVAE(found.config), found.params


def error(found, exact):
    return float(np.linalg.norm(np.asarray(found, np.float32) - exact) / np.linalg.norm(exact))


def in_bfloat16(half, values):
    """diffusers' module with weights in bfloat16, on values [B, T, H, W, C], as fp32."""
    with torch.no_grad():
        return half(torch.from_numpy(values).movedim(-1, 1).bfloat16()).movedim(1, -1).float().numpy()


def test_latents(ours):
    vae, params = ours
    pixels = video(2, 5, 16, 24)
    found = jax.jit(lambda x: vae.encode(params, x, dtype=jnp.bfloat16))(pixels)
    assert found.dtype == jnp.float32
    exact, model = standardised(reference(SMALL), pixels), reference(SMALL).bfloat16()
    theirs = in_bfloat16(lambda x: model.encode(x).latent_dist.mode(), pixels)
    theirs = (theirs - np.float32(model.config.latents_mean)) / np.float32(model.config.latents_std)
    assert 1e-3 < error(found, exact) < 1.5 * error(theirs, exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_config_says_in_which_it_computes(dtype, tmp_path):
    found = loaded(SMALL, tmp_path)
    config = tiny_config(1, tmp_path, model__vae__path=str(tmp_path), model__vae__dtype=dtype)
    model, latents = model_from(config.model, 8, states_in_batch), jnp.zeros((1, 2, 8, 12, SMALL["z_dim"]))
    for program, values in ((model.encode, video(1, 5, 16, 24)), (model.decode, latents)):
        trace = jax.make_jaxpr(program)(found.params, values)
        assert ("bf16" in str(trace)) == (dtype == "bfloat16")
        convolutions = [x for x in equations(trace.jaxpr) if x.primitive.name == "conv_general_dilated"]
        asked = {x.params["precision"] for x in convolutions}  # of fp32; a TPU would take one pass of bf16
        assert asked == ({(jax.lax.Precision.HIGH,) * 2} if dtype == "float32" else {None})


def test_videos(ours):
    vae, params = ours
    latents = np.random.default_rng(2).normal(size=(2, 2, 8, 12, vae.channels)).astype("f4")
    found = jax.jit(lambda x: vae.decode(params, x, dtype=jnp.bfloat16))(latents)
    assert found.dtype == jnp.float32
    exact, model = decoded(reference(SMALL), latents), reference(SMALL).bfloat16()
    raw = latents * np.float32(model.config.latents_std) + np.float32(model.config.latents_mean)
    theirs = in_bfloat16(lambda x: model.decode(x).sample, raw)
    assert 1e-3 < error(found, exact) < 1.5 * error(theirs, exact)
