"""A trace of some steps of a run, for xprof (`xprof WORKDIR/profile`) or Perfetto."""

import logging
import re
from pathlib import Path
from typing import Any

import jax

LOG = logging.getLogger(__name__)


def window_fault(window: str, steps: int) -> str:
    """What is wrong with a `run.profile` in a run of so many steps, "" for nothing."""
    if not window:
        return ""
    found = re.fullmatch(r"(\d+):(\d+)", window)
    if not found:
        return (
            f"run.profile={window!r} is not START:STOP, two step numbers; nearest: '' (no trace) or '0:{min(3, steps)}'"
        )
    start, stop = map(int, found.groups())
    if not start < stop <= steps:
        stop = min(max(stop, 1), steps)
        return (
            f"run.profile={window!r} needs START < STOP <= run.steps={steps}; nearest: '{min(start, stop - 1)}:{stop}'"
        )
    return ""


class Profile:
    """Traces the steps START+1 to STOP (numbers as in metrics.jsonl) of a window "START:STOP" into `folder`; none for ""."""

    def __init__(self, window: str, folder: Path, start: int = 0):
        self._steps = range(*map(int, window.split(":"))) if window else range(0)
        self._folder = folder
        self._tracing = False
        self._began = self._done = start
        if window and self._steps.stop <= start:
            LOG.warning("run.profile=%r traces nothing: the run goes on from step %d", window, start)

    def turns(self, step: int) -> bool:
        """Whether the trace begins or ends before the step that comes after `step` updates: wait for the devices then, and `turn`."""
        self._done = step
        return (step in self._steps) != self._tracing

    def turn(self) -> None:
        """Begins the trace, or ends it."""
        if self._tracing:
            jax.profiler.stop_trace()
            print(f"traced steps {self._began + 1} to {self._done} into {self._folder}", flush=True)
        else:
            jax.profiler.start_trace(self._folder)
            self._began = self._done
        self._tracing = not self._tracing

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._tracing:
            self._done += 1
            self.turn()
