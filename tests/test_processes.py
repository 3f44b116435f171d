"""Who is told to join others, and how a signal asks for a stop. Real processes: test_survive.py."""

import os
import signal

import jax
import numpy as np
import pytest

from rise_jax.processes import (
    Stop,
    any_process,
    check_agreed,
    from_first,
    gathered,
    meet,
    settings,
    with_signal,
)
from rise_jax.sharding import make_mesh, put, shardings

PLAIN = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


def test_plain_variables_say_it_all():
    assert settings(PLAIN | SLURM) == {
        "coordinator_address": "host:1",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    "environment",
    [
        SLURM,
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3", "OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"JAX_COORDINATOR_ADDRESS": "host:1"},  # JAX finds the rest, or says what is missing
    ],
)
def test_a_cluster_of_several_is_left_to_jax(environment):
    assert settings(environment) == {}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script itself, not a step of it
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_a_process_alone_joins_nobody_unless_told(environment):
    assert settings(environment) is None
    assert settings(environment, detect=True) == {}


def test_half_set_or_wrong_variables_are_named():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID set without JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"):
        settings({"JAX_PROCESS_ID": "0"})
    with pytest.raises(ValueError, match="set without JAX_PROCESS_ID"):
        settings({name: PLAIN[name] for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")})
    with pytest.raises(ValueError, match=r"JAX_PROCESS_ID=2 is outside \[0, JAX_NUM_PROCESSES=2\)"):
        settings(PLAIN | {"JAX_PROCESS_ID": "2"})
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two' is not a whole number"):
        settings(PLAIN | {"JAX_NUM_PROCESSES": "two"})


def test_alone_all_of_it_is_the_identity():
    meet("nobody")
    rows = np.arange(6).reshape(2, 3)
    assert from_first(True) and not any_process(False) and any_process(True)
    np.testing.assert_array_equal(from_first(rows), rows)
    np.testing.assert_array_equal(gathered(rows), rows)
    check_agreed(["anything"], "it")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_once_and_acts_the_second_time(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with Stop(make_mesh()) as stop:
            assert stop.asked(0) == "" and not stop.numbers().any()
            os.kill(os.getpid(), number)
            assert stop.asked(0) == number.name and not acted
            np.testing.assert_array_equal(stop.numbers(), [number] * 8)
            os.kill(os.getpid(), number)
            assert acted == [number]
        os.kill(os.getpid(), number)
        assert acted == [number] * 2
    finally:
        signal.signal(number, before)


def test_a_step_tells_of_the_signal_that_one_device_knows_of():
    """And hands on everything else."""
    step = with_signal(lambda state, frozen, batch, key: (state + batch["rows"] + frozen, {"loss": key}))
    numbers = jax.device_put(np.int32([0, 0, 0, 0, 0, 15, 0, 0]), Stop(make_mesh()).numbers().sharding)
    state, metrics = jax.jit(step)(1, 2, {"rows": 3, "signal": numbers}, 4)
    assert (state, metrics) == (6, {"loss": 4, "signal": signal.SIGTERM})


def test_put_places_host_and_device_arrays_alike():
    mesh = make_mesh(data=2, fsdp=4)
    value = np.arange(64, dtype=np.float32).reshape(8, 8)
    tree = {"a": {"kernel": value}, "b": jax.numpy.ones(3)}
    targets = shardings(tree, mesh)
    placed = put(tree, targets)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == targets
    np.testing.assert_array_equal(placed["a"]["kernel"], value)
