import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rise_jax import flow, sampler

MEAN, STD = 0.7, 0.5  # of the Gaussian data below


def gaussian_data(x, t):
    """E[x_0 | x_t] for data ~ N(MEAN, STD^2): the best possible network output of a data prediction."""
    t = t[:, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    return MEAN + (1 - t) * STD**2 / variance * (x - (1 - t) * MEAN)


def gaussian_velocity(x, t):
    return flow.to_velocity(gaussian_data(x, t), x, t, "data")


def gaussian_error(stepper, steps, shift=1.0):
    """Against the closed form: the ODE keeps (x_t - mean_t) / std_t, so noise n ends at MEAN + STD n."""
    noise = jnp.linspace(-3.0, 3.0, 26).reshape(2, 13)
    x_0 = sampler.sample(gaussian_velocity, noise, sampler.time_table(steps, shift), stepper)
    return float(jnp.abs(x_0 - (MEAN + STD * noise)).max())


@pytest.mark.parametrize("stepper", sampler.STEPPERS)
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.slow
def test_constant_field_is_exact_for_any_number_of_steps(stepper, steps):
    noise, field = jax.random.normal(jax.random.key(0), (2, 2, 2, 3, 3, 1))
    x_0 = sampler.sample(lambda x, t: field, noise, sampler.time_table(steps, 3.0), stepper)
    np.testing.assert_allclose(x_0, noise - field, atol=1e-6)


def test_perfect_velocity_recovers_one_datum():
    x_0, noise = jnp.full((1, 4), 0.3), jax.random.normal(jax.random.key(0), (1, 4))
    sampled = sampler.sample(lambda x, t: flow.to_velocity(x_0, x, t, "data"), noise, sampler.time_table(7), "euler")
    np.testing.assert_allclose(sampled, x_0, atol=1e-6)


@pytest.mark.parametrize(
    ("stepper", "shift", "limit"),
    [
        ("euler", 1.0, 2e-2),
        ("euler", 3.0, 6e-2),
        ("heun", 1.0, 3e-4),
        ("heun", 3.0, 3e-3),
        ("unipc", 1.0, 6e-4),
        ("unipc", 3.0, 3e-3),
    ],
)
def test_gaussian_converges_to_the_closed_form(stepper, shift, limit):
    assert gaussian_error(stepper, 128, shift) < limit


@pytest.mark.parametrize(("stepper", "order"), [("euler", 1), ("heun", 2), ("unipc", 2)])
@pytest.mark.slow
def test_order_of_convergence(stepper, order):
    errors = np.array([gaussian_error(stepper, steps) for steps in (32, 64, 128)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.2)


@pytest.mark.parametrize(
    ("stepper", "expected"),
    [
        ("euler", [1, 0.75, 0.5, 0.25]),
        ("heun", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        ("unipc", [1, 0.75, 0.5, 0.25]),
    ],
)
def test_times_asked_for_never_include_zero(stepper, expected):
    seen = []

    def velocity(x, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return jnp.where(t[:, None] > 0, x, jnp.nan)

    x_0 = sampler.sample(velocity, jnp.ones((3, 2)), sampler.time_table(4), stepper)
    jax.effects_barrier()
    np.testing.assert_array_equal(np.stack(seen), np.repeat(np.array(expected)[:, None], 3, axis=1))
    assert np.isfinite(x_0).all()


def test_time_table():
    np.testing.assert_array_equal(sampler.time_table(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(sampler.time_table(4, 3.0), [1, 0.9, 0.75, 0.5, 0], atol=1e-7)


def test_errors():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        sampler.time_table(0)
    with pytest.raises(ValueError, match="shift must be > 0, got 0"):
        sampler.time_table(4, 0)
    with pytest.raises(ValueError, match="'rk4'; valid: euler, heun, unipc"):
        sampler.sample(lambda x, t: x, jnp.ones((1, 2)), sampler.time_table(2), "rk4")


def two_conditions(x, t):
    """Rows of the first half: a wave of x; of the second half: another one. Fails on an odd batch."""
    half = len(x) // 2
    frequency = jnp.repeat(jnp.array([3.0, 7.0]), half, total_repeat_length=len(x))[:, None]
    return jnp.sin(frequency * x) + t[:, None]


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
@pytest.mark.slow
def test_guidance(scale):
    x, t = jax.random.normal(jax.random.key(0), (3, 5)), jnp.array([0.1, 0.5, 0.9])
    conditional, null = jnp.sin(3 * x) + t[:, None], jnp.sin(7 * x) + t[:, None]
    guided = sampler.guide(two_conditions, scale)(x, t)
    np.testing.assert_allclose(guided, null + scale * (conditional - null), atol=1e-5)


def test_guidance_of_scale_one_is_the_conditional_output_bit_for_bit():
    x, t = jax.random.normal(jax.random.key(0), (3, 5)), jnp.array([0.1, 0.5, 0.9])
    conditional = two_conditions(jnp.concatenate([x, x]), jnp.concatenate([t, t]))[:3]
    np.testing.assert_array_equal(sampler.guide(two_conditions, 1.0)(x, t), conditional)
    traced = jax.jit(lambda scale: sampler.guide(two_conditions, scale)(x, t))(1.0)
    np.testing.assert_array_equal(traced, jax.jit(two_conditions)(jnp.concatenate([x, x]), jnp.concatenate([t, t]))[:3])


@pytest.mark.slow
def test_initial_noise_depends_on_key_and_video_only():
    key, index = jax.random.key(5), jnp.array([4, 0, 17, 3])
    noise = sampler.initial_noise(key, index, (2, 3, 3, 1))
    assert noise.shape == (4, 2, 3, 3, 1)
    alone = [sampler.initial_noise(key, index[i : i + 1], (2, 3, 3, 1))[0] for i in range(4)]
    np.testing.assert_array_equal(noise, np.stack(alone))
    assert len(np.unique(np.asarray(noise))) == noise.size
    assert not np.array_equal(noise, sampler.initial_noise(jax.random.key(6), index, (2, 3, 3, 1)))
