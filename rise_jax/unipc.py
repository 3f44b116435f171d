"""UniPC of order 2 (Zhao et al. 2302.04867, B(h) = e^h - 1, data prediction) for the path of `flow`: what Wan samples with.

With alpha = 1 - t, sigma = t, lambda = log(alpha / sigma) and m = x - t v, the clean data that the velocity at (x, t) implies:

(1) predictor   x'  = (s'/s) x + b (m + (m_1 - m) / 2r)                                  t -> t', next evaluation at x'
(2) corrector   x   = (s/s_1) x_1 + b_1 (m_1 + rho (m_2 - m_1) / r_1 + rho' (m - m_1))    redoes the step that led to x
(3) b = alpha' - alpha s'/s,   r = (lambda_1 - lambda) / (lambda' - lambda)

A digit counts steps back, a prime one forth. The weights of (2) solve rho + rho' = b_1, r rho + rho' = b_2, where for a step
h in lambda: b_1 = 1/(1 - e^-h) - 1/h and b_2 = 1/(1 - e^-h) - 2 b_1 / h. The first step and the last have order 1: no m_1 in
(1); the correction of the first has rho = 0, rho' = 1/2. The velocity is asked for once per step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rise_jax.axes import Array

#: lambda is infinite at t = 1; what is published starts this much below.
MARGIN = 1e-6


def unipc(velocity: Callable[[Array, Array], Array], noise: Array, times: Array) -> Array:
    """x [B, ...] at times[-1], from x = `noise` at times[0] and dx/dt = velocity(x[B, ...], t[B]).

    Diffusers and Wan hand the network t cut to a whole thousandth; here it gets t itself.
    """
    size = noise.shape[:1]

    def step(carry, row):
        x, x_1, m_1, m_2 = carry
        m = x - row["time"] * velocity(x, jnp.full(size, row["time"])).astype(noise.dtype)
        before = row["before"]
        mixed = m_1 + before["older"] * (m_2 - m_1) + before["newer"] * (m - m_1)
        x = jnp.where(before["corrects"], before["keep"] * x_1 + before["move"] * mixed, x)
        x_next = row["keep"] * x + row["move"] * (m + row["older"] * (m_1 - m))
        return (x_next, x, m, m_1), None

    zero = jnp.zeros_like(noise)
    return jax.lax.scan(step, (noise, noise, zero, zero), _weights(times))[0][0]


def _weights(times):
    """Per step, the weights of (1) and, under "before", those of (2) for the step before it."""
    count = len(times) - 1
    now, after = times[:-1], times[1:]
    keep, move = after / now, (1 - after) - (1 - now) * after / now
    inner = jnp.minimum(times[:-1], 1 - MARGIN)  # all but the end, t = 0, where lambda is infinite again
    logits = jnp.log1p(-inner) - jnp.log(inner)
    h = jnp.append(jnp.diff(logits), jnp.inf)
    ratio = -jnp.append(1.0, h[:-1]) / h

    second = (jnp.arange(count) > 0) & (jnp.arange(count) < count - 1)
    tail = -1 / jnp.expm1(-h)
    b_1 = tail - 1 / h
    b_2 = tail - 2 * b_1 / h
    rho = jnp.where(second, (b_1 - b_2) / (1 - ratio), 0)
    older = jnp.where(second, 1 / ratio, 0)
    newer = jnp.where(second, b_1 - rho, 0.5)

    shifted = lambda values: jnp.append(0, values[:-1])
    before = dict(keep=keep, move=move, older=rho * older, newer=newer)
    before = {name: shifted(values).astype(times.dtype) for name, values in before.items()}
    before["corrects"] = jnp.arange(count) > 0
    return dict(time=now, keep=keep, move=move, older=older / 2, before=before)
