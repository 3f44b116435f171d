"""What a run says while it trains: metrics.jsonl, TensorBoard scalars, a progress bar; and summary.json at the end."""

import json
import math
import os
import resource
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from rise_jax.tensorboard import Board
from rise_jax.throughput import Work, device_memory_gib
from rise_jax.workdir import write_json
from rise_jax.writing import Growing, told

# Without a terminal: one line every so many seconds instead of a bar.
LINE_SECONDS = 10.0
# Share of the newest step in the shown step time.
SMOOTHING = 0.1


class Report:
    """Reports a run into `workdir`; only process 0 writes.

    `start_step`: updates made already. On resume, lines of later steps (after the restored checkpoint) are dropped, so
    metrics.jsonl has each step once. A step's number is the count of updates made with it: the first is 1.

    `work`: with it, lines have the rates that the step's seconds make of it. All lines have the peaks of memory so far.

    Raises ValueError for a metrics.jsonl that is damaged before its last line. Where a step cannot be written, the call that
    writes it raises OSError with path and reason.
    """

    def __init__(self, workdir: str | os.PathLike, total_steps: int, start_step: int = 0, work: Work | None = None):
        self._active = jax.process_index() == 0
        self._total, self._work = total_steps, work
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._last_time = self._last_line = time.perf_counter()
        self._step_seconds, self._steps_seen = math.nan, 0
        if not self._active:
            return
        path = Path(workdir) / "metrics.jsonl"
        _drop_after(path, start_step)
        self._file = Growing(path)
        self._board = Board(Path(workdir) / "tensorboard", purge_step=start_step + 1)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty())

    def log(self, step: int, metrics: dict[str, Any]) -> dict[str, float] | None:
        """Takes the metrics (scalars, on device or host) of `step`; returns those of the step logged before, as floats.

        Device values are fetched one step late, when the next step is already dispatched, so the device never idles.
        """
        finished = self.flush()
        self._pending = (step, metrics)
        return finished

    def flush(self) -> dict[str, float] | None:
        """Writes the step held back and returns its metrics; waits for the device. Call it before a checkpoint."""
        if self._pending is None:
            return None
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        self._step_seconds = self._smooth(seconds)
        if self._active:
            rates = self._work.rates(seconds) if self._work else {}
            memory = {"host_memory_gib": peak_memory_gib()} | device_memory_gib()
            self._write(step, {**values, "step_seconds": seconds} | rates | memory)
        return values

    def pause(self) -> None:
        """Leaves out of the step times what the caller did since the last step (a save, an evaluation)."""
        self._last_time = time.perf_counter()

    def close(self) -> None:
        """Writes the step held back and closes all files, even where that step cannot be written."""
        with ExitStack() as closing:
            for part in (self._file, self._board, self._bar) if self._active else ():
                closing.callback(part.close)
            self.flush()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """After an error of the body, that one is told, whatever closing meets."""
        with suppress(Exception) if kind else nullcontext():
            self.close()

    def _smooth(self, seconds: float) -> float:
        """The first step also fills caches and pipelines, so the average starts again at the second."""
        self._steps_seen += 1
        return seconds if self._steps_seen <= 2 else (1 - SMOOTHING) * self._step_seconds + SMOOTHING * seconds

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, **{k: finite_or_none(v) for k, v in values.items()}})
        self._file.write(f"{line}\n".encode())
        self._board.scalars(step, values)
        self._show(step, values)

    def _show(self, step: int, values: dict[str, float]) -> None:
        left = tqdm.format_interval(max(self._total - step, 0) * self._step_seconds)
        text = f"loss {values.get('loss', math.nan):.4f}, {self._step_seconds:.3g} s/step, {left} left"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        due = time.perf_counter() - self._last_line >= LINE_SECONDS or step == self._total
        if self._bar.disable and due:
            self._last_line = time.perf_counter()
            print(f"step {step}/{self._total}: {text}", flush=True)


def write_summary(workdir: str | os.PathLike, summary: dict[str, Any]) -> None:
    """Writes summary.json into `workdir`, atomically."""
    write_json(Path(workdir) / "summary.json", summary)


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, oldest first. Raises ValueError with the line that is damaged."""
    path = Path(workdir) / "metrics.jsonl"
    with path.open("rb") as lines:
        return [_step(path, number, line) for number, line in enumerate(lines, start=1)]


def peak_memory_gib() -> float:
    """Largest resident set of this process so far, in GiB (host memory only)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 30 if sys.platform == "darwin" else 1 << 20)


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN or infinity."""
    return value if np.isfinite(value) else None


def _drop_after(path: Path, step: int) -> None:
    """Keeps the complete lines up to `step`; a line cut by a crash goes too. Raises ValueError with another that is damaged."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        whole = [line for line in lines if line.endswith(b"\n")]
    kept = [line for number, line in enumerate(whole, start=1) if _step(path, number, line)["step"] <= step]
    scratch = path.with_name(path.name + ".tmp")
    with told(path):
        scratch.write_bytes(b"".join(kept))
        scratch.replace(path)


def _step(path: Path, number: int, line: bytes) -> dict[str, float]:
    """What a line says of a step."""
    with suppress(ValueError):
        values = json.loads(line)
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            return values
    raise ValueError(
        f"{path} is damaged (line {number} is no JSON object with a step): remove that line, and the run goes on without it"
    )
