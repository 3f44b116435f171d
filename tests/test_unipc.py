"""Samplers as published: time tables and whole trajectories against diffusers' schedulers, and UniPC by its paper."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from rise_jax import sampler

NOISE = np.random.default_rng(0).normal(size=(2, 3, 2, 5)).astype("f4")
STEPS = [1, 2, 3, 5, 20, 50]
SHIFTS = [1.0, 3.0, 8.0]


def published(stepper, steps, shift):
    """(scheduler ready to step, the name of its time table here)"""
    if stepper == "euler":
        scheduler, table = FlowMatchEulerDiscreteScheduler(shift=shift), "flow_match_euler"
    else:
        options = dict(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
        scheduler, table = UniPCMultistepScheduler(flow_shift=shift, **options), "unipc"
    scheduler.set_timesteps(steps)
    return scheduler, table


def field(x, t, library):
    """A velocity that bends in x, mixes elements and changes with time."""
    return library.sin(3 * x + 2 * t) + 0.7 * x[..., ::-1] * t if library is jnp else field_torch(x, t)


def field_torch(x, t):
    return torch.sin(3 * x + 2 * t) + 0.7 * x.flip(-1) * t


@partial(jax.jit, static_argnames="stepper")
def trajectory(times, stepper):
    velocity = lambda x, t: field(x, t.reshape(-1, 1, 1, 1), jnp)
    return sampler.sample(velocity, jnp.asarray(NOISE), times, stepper)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("stepper", ["euler", "unipc"])
def test_tables_and_trajectories_are_diffusers(stepper, steps, shift):
    scheduler, table = published(stepper, steps, shift)
    times = sampler.time_table(steps, shift, table)
    np.testing.assert_allclose(times, scheduler.sigmas, rtol=1e-6)

    x = torch.tensor(NOISE)
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        x = scheduler.step(field_torch(x, sigma), time, x, return_dict=False)[0]
    error = np.abs(trajectory(times, stepper) - x.numpy()).max() / np.abs(x.numpy()).max()
    assert error < 1e-5


def test_the_tables_differ_where_their_descriptions_say():
    even, unipc, euler = (np.asarray(sampler.time_table(10, 3.0, table)) for table in sampler.TABLES)
    shifted = lambda t: 3 * t / (1 + 2 * t)
    assert even[0] == euler[0] == 1 and 0 < 1 - unipc[0] < 2e-6
    assert even[-1] == unipc[-1] == euler[-1] == 0
    np.testing.assert_allclose(even[-2], shifted(0.1), rtol=1e-6)
    np.testing.assert_allclose(unipc[-2], shifted(0.1 + 0.9 * 0.001), rtol=1e-6)
    np.testing.assert_allclose(euler[-2], shifted(shifted(0.001)), rtol=1e-6)


def test_each_stepper_has_its_table():
    for stepper, table in (("euler", "even"), ("heun", "even"), ("unipc", "unipc")):
        np.testing.assert_array_equal(sampler.times_for(stepper, 7, 5.0), sampler.time_table(7, 5.0, table))


def test_errors():
    with pytest.raises(ValueError, match="'linear'; valid: even, unipc, flow_match_euler"):
        sampler.time_table(4, 1.0, "linear")
    with pytest.raises(ValueError, match="'unipcc'; valid: euler, heun, unipc"):
        sampler.times_for("unipcc", 4)
    for table in sampler.TABLES:
        with pytest.raises(ValueError, match="shift must be > 0, got -1"):
            sampler.time_table(4, -1, table)
