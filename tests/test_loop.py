"""The order of things in the loop: what is dispatched, put on the devices and waited for, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rise_jax.checkpoint import Checkpoints
from rise_jax.loop import NonFiniteError, batches_on, run_steps
from rise_jax.sharding import make_mesh
from rise_jax.throughput import Work

WORK = Work(samples=2, frames=2, tokens=2, flops=2, devices=8, peak=None)


class Value:
    """A metric that notes when it is waited for."""

    def __init__(self, number, note):
        self.number, self.note = number, note

    def __float__(self):
        self.note()
        return float(self.number)


def run(workdir, steps, start=0, save_every=100, profile="", finite=lambda step: True):
    """(exit code, events in their order) of a loop whose steps add 1 to a number and whose metrics are slow to come."""
    events = []
    config = ConfigDict(dict(run=dict(steps=steps, seed=0, batch_size=2, save_every=save_every, profile=profile)))
    advance = jax.jit(lambda state: {"n": state["n"] + 1}, donate_argnums=0)

    def batches():
        for step in range(start, steps):
            events.append(f"batch {step}")
            yield {"number": step}

    def step_fn(state, frozen, batch, key):
        step = batch["number"]
        events.append(f"step {step}")
        fetched = Value(step, lambda: events.append(f"fetch {step}"))
        return advance(state), {
            "loss": fetched,
            "grad_norm": 0.0,
            "finite": finite(step),
            "signal": batch["signal"].max(),
        }

    checkpoints = Checkpoints(workdir / "checkpoints")
    save = checkpoints.save
    checkpoints.save = lambda step, state, meta: (events.append(f"save {step}"), save(step, state, meta))
    with checkpoints:
        state = {"n": jnp.int32(start)}
        code, state = run_steps(
            config, workdir, checkpoints, make_mesh(), step_fn, start, state, {}, batches(), {}, WORK
        )
    assert state["n"] == steps
    return code, events


def test_a_step_is_dispatched_before_the_one_ahead_of_it_is_waited_for_and_its_successors_batch_is_under_way(tmp_path):
    code, events = run(tmp_path, 4)
    assert code == 0
    assert events == [
        *("batch 0", "step 0", "batch 1"),
        *("step 1", "batch 2", "fetch 0"),
        *("step 2", "batch 3", "fetch 1"),
        *("step 3", "fetch 2", "fetch 3", "save 4"),
    ]


def test_no_batch_is_asked_for_beyond_the_last_step_and_a_save_waits_for_its_own_step(tmp_path):
    _, events = run(tmp_path, 5, start=2, save_every=2)
    assert [event for event in events if event.startswith("batch")] == ["batch 2", "batch 3", "batch 4"]
    assert events.index("fetch 3") < events.index("save 4") < events.index("step 4")
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == [4, 5]


@pytest.mark.slow
def test_a_trace_holds_whole_steps(tmp_path):
    _, events = run(tmp_path, 4, profile="1:3")
    assert events.index("fetch 0") < events.index("step 1") and events.index("fetch 2") < events.index("step 3")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_number_that_is_not_finite_ends_the_loop_one_step_late_and_is_not_saved(tmp_path):
    with pytest.raises(NonFiniteError, match="at step 2: stopped"):
        run(tmp_path, 4, finite=lambda step: step != 1)
    assert Checkpoints(tmp_path / "checkpoints", read_only=True).steps() == []


def test_rows_of_the_table_follow_the_text_and_steps_are_counted_from_the_start():
    mesh = make_mesh()
    host = dict(
        video=np.zeros((8, 1, 2, 2, 3), np.uint8),
        text=np.arange(8, dtype=np.int32)[::-1],
        index=np.arange(8) + 24,
        weight=np.ones(8, np.float32),
    )
    table = {"states": 10 * np.arange(8.0)}
    first, second = batches_on(mesh, iter([host, host]), table, start=3)
    assert (first["step"], second["step"]) == (3, 4)
    np.testing.assert_array_equal(first["states"], 10 * np.arange(8.0)[::-1])
    assert first["index"].dtype == np.int32 and "text" not in first
    assert len(first["video"].sharding.device_set) == 8
