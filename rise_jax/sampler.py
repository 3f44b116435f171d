"""From noise to data: a table of times, a stepper and guidance, in one scan. Knows no model, no text and no file.

A `velocity` is any function (x[B, ...], t[B]) -> dx/dt[B, ...] in the time of `flow`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rise_jax.axes import Array, Float, Int, typed
from rise_jax.flow import draw_noise, shift_time
from rise_jax.unipc import MARGIN, unipc

Velocity = Callable[[Array, Array], Array]
STEPPERS = {"euler": "even", "heun": "even", "unipc": "unipc"}  # and the time table that goes with each
TABLES = ("even", "unipc", "flow_match_euler")
FINEST = 1e-3  # published models count time in thousandths


def time_table(steps: int, shift: float = 1.0, table: str = "even") -> Array:
    """[steps + 1] descending times from noise to data = 0, evenly spaced before they are shifted (flow.py, equation 6).

    'even' runs from 1 to 0. The others are diffusers' and stop at a thousandth before they add the 0:
    'unipc' (UniPCMultistepScheduler with use_flow_sigmas, as in Wan) takes `steps` intervals from 1 to 0.001, leaves out
    that last time, and starts 1e-6 below 1; 'flow_match_euler' (FlowMatchEulerDiscreteScheduler) spreads its times from 1
    to the *shifted* thousandth, which is then shifted again: so late a time that its last step hardly moves anything.

    Raises:
      ValueError: steps < 1, shift <= 0 or an unknown table.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, got {steps}")
    if table == "even":
        return shift_time(jnp.linspace(1.0, 0.0, steps + 1), shift)
    if table == "unipc":
        times = shift_time(np.linspace(1.0, FINEST, steps + 1)[:-1], shift)
        times = np.minimum(times, 1 - MARGIN)
    elif table == "flow_match_euler":
        times = shift_time(np.linspace(1.0, shift_time(FINEST, shift), steps), shift)
    else:
        raise ValueError(f"unknown time table {table!r}; valid: {', '.join(TABLES)}")
    return jnp.asarray(np.append(times, 0.0), jnp.float32)


def times_for(stepper: str, steps: int, shift: float = 1.0) -> Array:
    """The time table that goes with a stepper: 'unipc' for UniPC, as it is published, 'even' for the others.

    Raises:
      ValueError: unknown stepper, steps < 1 or shift <= 0.
    """
    return time_table(steps, shift, STEPPERS[_known(stepper)])


@typed
def sample(
    velocity: Velocity, noise: Float[Array, "B *axes"], times: Float[Array, "n"], stepper: str
) -> Float[Array, "B *axes"]:
    """Integrates dx/dt = velocity(x, t) from x = `noise` at times[0] down to times[-1].

    'euler' is of first order and asks for n - 1 velocities. 'heun' (explicit trapezoid) is of second order and asks for
    2n - 3. 'unipc' (unipc.py) is of second order and asks for n - 1. The last step of each is one of first order, so none
    ever asks for the velocity at times[-1] = 0, where a predicted x_0 gives none.

    Raises:
      ValueError: unknown stepper.
    """
    if _known(stepper) == "unipc":
        return unipc(velocity, noise, times)
    size = noise.shape[:1]

    def evaluate(carry, row):
        x, start, first_slope = carry
        t, dt, corrects = row
        slope = velocity(x, jnp.full(size, t)).astype(noise.dtype)
        start = jnp.where(corrects, start, x)
        mean_slope = jnp.where(corrects, (first_slope + slope) / 2, slope)
        return (start + dt * mean_slope, start, slope), None

    (x, _, _), _ = jax.lax.scan(evaluate, (noise, noise, jnp.zeros_like(noise)), _evaluations(times, stepper))
    return x


def guide(velocity: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance: v_null + scale (v_cond - v_null), both from one batch of 2B.

    `velocity` takes (x[2B, ...], t[2B]) and must condition rows 0 .. B-1 on the prompts and rows B .. 2B-1 on the null
    condition; the result takes (x[B, ...], t[B]). Written so that scale 1 gives v_cond bit for bit. Source: Ho and
    Salimans 2207.12598, equation 6.
    """

    def guided(x, t):
        conditional, null = jnp.split(velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t])), 2)
        return conditional + (scale - 1) * (conditional - null)

    return guided


@typed
def initial_noise(key: Array, index: Int[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """[B, *shape] normal noise that depends on (key, index of the video) alone, never on how videos are batched."""
    return draw_noise(jax.vmap(lambda i: jax.random.fold_in(key, i))(index), shape)


def _evaluations(times, stepper):
    """The velocity evaluations in order: (time, step from the last start, does it correct the Euler step before it)."""
    now, after = times[:-1], times[1:]
    dt = after - now
    if stepper == "euler":
        return now, dt, jnp.zeros(len(dt), bool)
    each_twice = jnp.stack([now, after], axis=1).reshape(-1)[:-1]
    return each_twice, jnp.repeat(dt, 2)[:-1], jnp.arange(len(each_twice)) % 2 == 1


def _known(stepper):
    if stepper not in STEPPERS:
        raise ValueError(f"unknown stepper {stepper!r}; valid: {', '.join(STEPPERS)}")
    return stepper
