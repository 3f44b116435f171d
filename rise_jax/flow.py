"""Rectified flow. The one statement of the time direction: t = 0 is data, t = 1 is noise.

(1) path              x_t   = (1 - t) x_0 + t noise
(2) velocity          v     = dx_t / dt = noise - x_0
(3) data from v       x_0   = x_t - t v
(4) v from data       v     = (x_t - x_0) / t                              t > 0
(5) time              t     = 1 / (1 + exp(-(mean + std n))),   n ~ N(0, 1)
(6) shifted time      t'    = s t / (1 + (s - 1) t)                        s > 1 moves time towards the noise
(7) velocity loss     |v_hat - v|^2
(8) data loss         |x_0_hat - x_0|^2 / max(t, 0.1)^2                    = (7) by (4) wherever t >= 0.1

Sources: (1, 2) Liu et al. 2209.03003 and Lipman et al. 2210.02747; (5, 6) Esser et al. 2403.03206, 3.1 and 5.3.2.

A network may predict v (`prediction="velocity"`, as Wan's published weights do) or x_0 (`prediction="data"`, easier in
pixel space). Latents are `[B, F, H, W, C]`; everything below holds for any trailing axes. `t` is `[B]`.
"""

import math

import jax
import jax.numpy as jnp

from rise_jax.axes import Array, Bool, Float, Int, typed

PREDICTIONS = ("velocity", "data")
MIN_TIME = 0.1  # floor of t in the weight of (8)

# Sub-streams of a sample's key. The values only have to differ and never to change: they are part of what a seed means.
TIME, NOISE, DROP = 0, 1, 2


@typed
def add_noise(
    x_0: Float[Array, "B *axes"], noise: Float[Array, "B *axes"], t: Float[Array, "B"]
) -> Float[Array, "B *axes"]:
    """(1): x_t."""
    t = _over(t, x_0)
    return (1 - t) * x_0 + t * noise


@typed
def velocity_target(x_0: Float[Array, "B *axes"], noise: Float[Array, "B *axes"]) -> Float[Array, "B *axes"]:
    """(2): noise - x_0."""
    return noise - x_0


@typed
def to_velocity(
    output: Float[Array, "B *axes"], x_t: Float[Array, "B *axes"], t: Float[Array, "B"], prediction: str
) -> Float[Array, "B *axes"]:
    """The velocity that a network's output implies, by (4) if it predicts data: not finite where t = 0."""
    _check(prediction)
    return output if prediction == "velocity" else (x_t - output) / _over(t, x_t)


@typed
def to_data(
    output: Float[Array, "B *axes"], x_t: Float[Array, "B *axes"], t: Float[Array, "B"], prediction: str
) -> Float[Array, "B *axes"]:
    """The clean latents that a network's output implies, by (3) if it predicts velocity."""
    _check(prediction)
    return output if prediction == "data" else x_t - _over(t, x_t) * output


@typed
def loss(
    output: Float[Array, "B *axes"],
    x_0: Float[Array, "B *axes"],
    noise: Float[Array, "B *axes"],
    t: Float[Array, "B"],
    prediction: str,
) -> Float[Array, "B"]:
    """(7) or (8), the mean over each sample's own elements, in fp32."""
    _check(prediction)
    data = prediction == "data"
    target = x_0 if data else velocity_target(x_0, noise)
    error = jnp.square(output.astype(jnp.float32) - target.astype(jnp.float32))
    weight = 1 / jnp.square(jnp.maximum(t, MIN_TIME)) if data else 1.0
    return weight * error.reshape(len(error), -1).mean(axis=1)


def shift_time(t: Array, shift: float) -> Array:
    """(6), any shape; shift 1 is the identity, 0 stays 0 and 1 stays 1.

    Raises:
      ValueError: shift <= 0.
    """
    if shift <= 0:
        raise ValueError(f"shift must be > 0, got {shift}; 1 leaves time as it is")
    return shift * t / (1 + (shift - 1) * t)


@typed
def sample_keys(key: Array, step: int | Int[Array, ""], index: Int[Array, "B"]) -> Array:
    """One key per sample, `fold_in(fold_in(key, step), index)`, from the sample's global index.

    So a sample draws the same time, noise and drop however a batch is packed, cut or spread over devices.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(index)


@typed
def draw_times(keys: Array, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Float[Array, "B"]:
    """keys[B] -> t[B] in [0, 1], logit-normal by (5), then shifted by (6); `mean` > 0 and `shift` > 1 favour noise."""
    return shift_time(jax.nn.sigmoid(mean + std * _normal(keys, TIME, ())), shift)


def draw_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """keys[B] -> standard normal noise [B, *shape], fp32."""
    return _normal(keys, NOISE, shape)


@typed
def draw_drops(keys: Array, rate: float) -> Bool[Array, "B"]:
    """keys[B] -> True where the condition gives way to the null condition, with probability `rate`."""
    return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, DROP), rate))(keys)


def _normal(keys, stream, shape):
    # Drawn flat: XLA's CPU compiler takes seconds for the same bits in a shape of several axes.
    flat = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), (math.prod(shape),)))(keys)
    return flat.reshape(-1, *shape)


def _over(t, x):
    """[B] -> [B, 1, 1, ...], to broadcast over x's trailing axes."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def _check(prediction):
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; valid: {', '.join(PREDICTIONS)}")
