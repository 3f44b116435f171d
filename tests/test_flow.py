import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rise_jax import flow

SHAPE = (3, 2, 4, 5, 3)  # B F H W C
T = jnp.array([0.2, 0.5, 0.9])


@pytest.fixture
def pair():
    return jax.random.normal(jax.random.key(0), SHAPE), jax.random.normal(jax.random.key(1), SHAPE)


def test_time_zero_is_data_and_time_one_is_noise(pair):
    x_0, noise = pair
    np.testing.assert_array_equal(flow.add_noise(x_0, noise, jnp.zeros(3)), x_0)
    np.testing.assert_array_equal(flow.add_noise(x_0, noise, jnp.ones(3)), noise)


def test_each_sample_has_its_own_time():
    x_t = flow.add_noise(jnp.full((2, 2), 8.0), jnp.full((2, 2), 4.0), jnp.array([0.25, 0.75]))
    np.testing.assert_array_equal(x_t, [[7, 7], [5, 5]])


def test_velocity_is_the_derivative_of_the_path(pair):
    x_0, noise = pair
    _, derivative = jax.jvp(lambda t: flow.add_noise(x_0, noise, t), (T,), (jnp.ones(3),))
    np.testing.assert_allclose(flow.velocity_target(x_0, noise), derivative, atol=1e-6)


@pytest.mark.parametrize("prediction", flow.PREDICTIONS)
def test_a_perfect_network_implies_the_true_data_and_velocity(pair, prediction):
    x_0, noise = pair
    x_t = flow.add_noise(x_0, noise, T)
    output = {"data": x_0, "velocity": noise - x_0}[prediction]
    np.testing.assert_allclose(flow.to_velocity(output, x_t, T, prediction), noise - x_0, atol=2e-6)
    np.testing.assert_allclose(flow.to_data(output, x_t, T, prediction), x_0, atol=2e-6)
    np.testing.assert_allclose(flow.loss(output, x_0, noise, T, prediction), 0, atol=1e-12)


def test_data_loss_is_the_loss_on_the_implied_velocity(pair):
    x_0, noise = pair
    output = x_0 + jax.random.normal(jax.random.key(2), SHAPE)
    implied = flow.to_velocity(output, flow.add_noise(x_0, noise, T), T, "data")
    expected = flow.loss(implied, x_0, noise, T, "velocity")
    np.testing.assert_allclose(flow.loss(output, x_0, noise, T, "data"), expected, rtol=1e-5)


def test_data_loss_weight_stops_growing_below_time_a_tenth():
    x_0, noise = jnp.zeros((4, 2)), jnp.ones((4, 2))
    losses = flow.loss(x_0 + 0.5, x_0, noise, jnp.array([0.0, 0.05, 0.1, 0.5]), "data")
    np.testing.assert_allclose(losses, [25, 25, 25, 1], rtol=1e-6)


def test_loss_is_per_sample_and_fp32():
    output = jnp.array([[0.0, 0.0], [1.0, 3.0]], jnp.bfloat16)
    losses = flow.loss(output, jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.ones(2), "velocity")
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, [0, 5])


def test_shift_multiplies_the_noise_to_data_odds():
    t = jnp.linspace(0.01, 0.99, 50)
    shifted = flow.shift_time(t, 3.0)
    np.testing.assert_allclose(shifted / (1 - shifted), 3 * t / (1 - t), rtol=1e-4)
    np.testing.assert_array_equal(flow.shift_time(jnp.array([0.0, 0.5, 1.0]), 3.0), [0, 0.75, 1])
    np.testing.assert_array_equal(flow.shift_time(t, 1.0), t)


def test_errors_name_the_valid_choices():
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="'eps'; valid: velocity, data"):
        flow.loss(x, x, x, jnp.ones(1), "eps")
    with pytest.raises(ValueError, match="'eps'; valid: velocity, data"):
        flow.to_velocity(x, x, jnp.ones(1), "eps")
    with pytest.raises(ValueError, match="shift must be > 0, got -1"):
        flow.shift_time(x, -1)


def test_wrong_shapes_are_refused():
    with pytest.raises(Exception, match="shape|type"):
        flow.add_noise(jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.zeros(2))


def draws(key, step, index):
    keys = flow.sample_keys(key, step, jnp.asarray(index))
    return flow.draw_times(keys), flow.draw_noise(keys, (2, 3)), flow.draw_drops(keys, 0.5)


@pytest.mark.slow
def test_draws_do_not_depend_on_how_the_batch_is_packed():
    key, index = jax.random.key(7), np.array([5, 900, 3, 2**31 - 1, 12, 6], np.int32)
    whole = draws(key, 4, index)
    order = np.array([3, 0, 5, 1, 4, 2])
    parts = [jax.jit(draws)(key, 4, index[part]) for part in (order[:2], order[2:3], order[3:])]
    for one, *pieces in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(one[order], np.concatenate(pieces))


@pytest.mark.slow
def test_draws_do_not_depend_on_the_mesh():
    key, index = jax.random.key(7), jnp.arange(100, 116)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(index, NamedSharding(mesh, PartitionSpec("data")))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(draws)(key, 4, spread), jax.jit(draws)(key, 4, index))


def test_draws_depend_on_key_step_and_index():
    reference = draws(jax.random.key(0), 1, [1])
    for other in (draws(jax.random.key(1), 1, [1]), draws(jax.random.key(0), 2, [1]), draws(jax.random.key(0), 1, [2])):
        assert not np.array_equal(reference[0], other[0])
        assert not np.array_equal(reference[1], other[1])


def test_step_may_be_traced():
    key, index = jax.random.key(0), jnp.arange(3)
    traced = jax.jit(lambda step: draws(key, step, index))(jnp.int32(9))
    jax.tree.map(np.testing.assert_array_equal, traced, draws(key, 9, index))


def test_drawn_times_are_shifted():
    keys = flow.sample_keys(jax.random.key(0), 0, jnp.arange(50))
    plain, shifted = flow.draw_times(keys, 0.3, 1.1), flow.draw_times(keys, 0.3, 1.1, 3.0)
    np.testing.assert_array_equal(shifted, flow.shift_time(plain, 3.0))


@pytest.mark.slow
def test_draws_follow_their_distributions_independently():
    count = 20_000
    keys = flow.sample_keys(jax.random.key(3), 0, jnp.arange(count))
    t, drop = np.asarray(flow.draw_times(keys, 0.5, 2.0), np.float64), np.asarray(flow.draw_drops(keys, 0.1))
    noise = np.asarray(flow.draw_noise(keys, (2,)))
    logits = np.log(t / (1 - t))
    sigma = 5 / count**0.5  # five standard errors of a mean of unit variance
    assert abs(logits.mean() - 0.5) < 2 * sigma and abs(logits.std() - 2) < 2 * sigma
    assert abs(noise.mean()) < sigma and abs(noise.std() - 1) < sigma
    assert abs(drop.mean() - 0.1) < 0.3 * sigma
    streams = np.corrcoef(np.stack([logits, noise[:, 0], noise[:, 1], drop]))
    assert np.abs(streams - np.eye(4)).max() < sigma
    assert not flow.draw_drops(keys, 0.0).any() and flow.draw_drops(keys, 1.0).all()
