"""Frozen models of others over a mesh: they lie on it in parts and say what they say on one device."""

from functools import partial

import jax
import numpy as np
import pytest
import wan_vae
from encoders import write_umt5
from tiny import tiny_config

from rise_jax.build import language_from
from rise_jax.data.sources import Text
from rise_jax.models.wan_vae import WanVAE
from rise_jax.published import load_null, load_vae
from rise_jax.sharding import make_mesh, put_rows, shardings
from rise_jax.trees import named_leaves

MESH = (2, 2, 1, 2)  # data, fsdp, context, tensor


def shares(params):
    """Elements that one device holds, of all."""
    leaves = named_leaves(params).values()
    return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """model.* of a run on the states of a small umT5."""
    folder = tmp_path_factory.mktemp("t5")
    model = tiny_config(1, folder).model
    model.native.update(path=str(write_umt5(folder, width=16)), length=8, dtype="float32")
    model.update(condition="native", null="native")
    return model


@pytest.mark.slow
def test_the_native_encoder_says_the_same_and_no_device_holds_it_whole(native):
    alone, spread = language_from(native), language_from(native, mesh=make_mesh(*MESH))
    assert shares(alone.params) == 1 and shares(spread.params) < 0.5
    pairs = [alone.pair(Text(prompt, None)) for prompt in ("red", "red red red", "blue red")]
    expected, found = alone.teach(pairs), spread.teach(pairs)
    assert np.abs(expected[0]).max() > 0.1
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.slow
def test_the_native_null_is_the_same_from_a_spread_encoder(native):
    mesh = make_mesh(*MESH)
    with jax.set_mesh(mesh):
        found, _ = load_null(native, partial(shardings, mesh=mesh))
    np.testing.assert_allclose(found, load_null(native)[0], atol=1e-5)


@pytest.mark.slow
def test_wans_vae_makes_the_same_latents_and_videos_in_parts(tmp_path):
    wan_vae.reference(wan_vae.SMALL).save_pretrained(tmp_path)
    vae, videos, mesh = WanVAE(wan_vae.config(wan_vae.SMALL)), wan_vae.video(4, 5, 16, 16), make_mesh(*MESH)
    alone, spread = load_vae(str(tmp_path))[0], load_vae(str(tmp_path), partial(shardings, mesh=mesh))[0]
    assert shares(spread) < 0.75  # of the kernels, whose input channels fsdp divides
    latents = jax.jit(vae.encode)(alone, videos)
    decoded = jax.jit(vae.decode)(alone, latents)
    with jax.set_mesh(mesh):
        found = jax.jit(vae.encode)(spread, put_rows(videos, mesh))
        again = jax.jit(vae.decode)(spread, put_rows(np.asarray(latents), mesh))
    assert wan_vae.difference(found, latents) < 1e-5 and wan_vae.difference(again, decoded) < 1e-5
