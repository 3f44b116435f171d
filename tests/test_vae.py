import jax.numpy as jnp
import numpy as np
import pytest

from rise_jax.models.vae import Pixels


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.slow
def test_decoding_gives_back_what_was_encoded(frames):
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, frames, 4, 6, 3)), jnp.float32)
    latents = Pixels().encode({}, video)
    assert latents.shape == (2, (frames - 1) // 4 + 1, 4, 6, 12)
    np.testing.assert_allclose(Pixels().decode({}, latents), video, atol=1e-6)


def test_the_first_latent_frame_is_the_first_frame_four_times():
    video = jnp.arange(5 * 3, dtype=jnp.float32).reshape(1, 5, 1, 1, 3)
    latents = Pixels().encode({}, video)
    np.testing.assert_array_equal(latents[0, 0, 0, 0], [0, 1, 2] * 4)
    np.testing.assert_array_equal(latents[0, 1, 0, 0], np.arange(3, 15))


def test_decoding_averages_the_copies_of_the_first_frame():
    latents = jnp.zeros((1, 1, 1, 1, 12)).at[0, 0, 0, 0, 0].set(4.0)
    np.testing.assert_array_equal(Pixels().decode({}, latents)[0, 0, 0, 0], [1, 0, 0])
