"""The loop over steps: batches in, metrics and checkpoints out; ends at the last step, at a signal or at a non-finite number."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rise_jax.data.loader import quarantined
from rise_jax.processes import Stop, is_first, meet
from rise_jax.profiling import Profile
from rise_jax.report import Report
from rise_jax.sharding import put_batch
from rise_jax.workdir import write_json

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command continues


class NonFiniteError(RuntimeError):
    """Loss or gradient was not a finite number; the parameters are those before that step."""


def run_steps(
    config, workdir, checkpoints, mesh, step_fn, start, state, frozen, batches, meta, work
) -> tuple[int, Any]:
    """(exit code, last state): 0 at the last step, EXIT_STOPPED after a signal; both are saved.

    `step_fn`: of `with_signal`. `batches` gives what `batches_on` gives, from step `start` on. Nothing here waits for a step before
    the next one is dispatched, and the next batch is put on the devices while a step runs: metrics come a step late.
    """
    key, last = jax.random.key(config.run.seed), config.run.steps
    with (
        Stop(mesh) as stop,
        Report(workdir, last, start, work) as report,
        Profile(config.run.profile if is_first() else "", workdir / "profile", start) as profile,
    ):
        batch = next(batches)
        for step in range(start, last):
            if profile.turns(step):
                _check_finite(report.flush(), step, config, workdir)
                profile.turn()
                report.pause()
            state, metrics = step_fn(state, frozen, batch | {"signal": stop.numbers()}, key)
            signal = metrics.pop("signal")
            began = time.perf_counter()
            batch = next(batches) if step + 1 < last else None
            waited = time.perf_counter() - began
            _check_finite(report.log(step + 1, metrics | {"data_seconds": waited}), step, config, workdir)
            stopped = stop.asked(signal)
            if stopped or step + 1 == last or (step + 1) % config.run.save_every == 0:
                _check_finite(report.flush(), step + 1, config, workdir)
                bad = quarantined(workdir / "quarantine.jsonl") if is_first() else {}
                checkpoints.save(step + 1, state, meta | {"quarantine": bad})
                report.pause()
            if stopped:
                checkpoints.wait()
                print(f"stopped by {stopped} after step {step + 1}, saved; the same command continues", flush=True)
                return EXIT_STOPPED, state
    checkpoints.wait()
    return 0, state


def compile_step(step_fn: Any, *args: Any) -> jax.stages.Compiled:
    """The executable of a jitted step for arguments of these shapes and shardings, ahead of time; says how long that took."""
    began = time.perf_counter()
    executable = step_fn.lower(*args).compile()
    print(f"compiled the step in {time.perf_counter() - began:.1f} s", flush=True)
    meet("compiled")  # the first collective of a fast process would give up on a slow one: 30 s with Gloo on CPU
    return executable


def batches_on(mesh: jax.sharding.Mesh, batches: Iterator[dict], table: dict, start: int) -> Iterator[dict]:
    """What a training step takes, on the mesh, from the loader's batches of the steps `start`, `start` + 1, ...

    `table`: per-text rows that go with a batch.
    """
    for step, batch in enumerate(batches, start):
        rows = {name: array[batch["text"]] for name, array in table.items()}
        kept = {"video": batch["video"], "weight": batch["weight"], "index": batch["index"].astype(np.int32)}
        yield put_batch(kept | rows, mesh) | {"step": np.int32(step)}


def _check_finite(metrics: dict | None, step: int, config, workdir: Path) -> None:
    """The samples of a step are known from its number: those of all processes, and long after the batch is gone."""
    if metrics is None or metrics["finite"]:
        return
    size = config.run.batch_size
    record = {
        "step": step,
        "samples": list(range((step - 1) * size, step * size)),
        "loss": str(metrics["loss"]),
        "grad_norm": str(metrics["grad_norm"]),
    }
    if is_first():
        write_json(workdir / "nonfinite.json", record)
    raise NonFiniteError(
        f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {step}: stopped before the update. "
        f"The batch's samples are in {workdir / 'nonfinite.json'}; the last checkpoint is good."
    )
