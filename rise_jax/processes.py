"""Several processes of one run: how they find each other, wait for each other, agree, and end together.

All of it does nothing, or nothing that costs time, where there is one process.
"""

import hashlib
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

#: What launch/local.sh and launch/gke.yaml set; JAX itself reads only the first.
ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
WAIT_SECONDS = 7 * 24 * 3600  # for process 0's LLM, which may take long: a dead process is found out by its heartbeat
_meetings = itertools.count()


def join_processes(heartbeat_seconds: int, detect: bool = False) -> None:
    """Joins the other processes that the environment tells of (see `settings`); none, and there is only this one.

    A process that is not heard of for `heartbeat_seconds` ends all others. Before the first use of a device. Raises
    ValueError for half-set variables.
    """
    found = settings(os.environ, detect)
    if found is None:
        return
    # Its handler takes SIGTERM for itself, and knows no SIGINT: `Stop` does both.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **found, heartbeat_timeout_seconds=heartbeat_seconds, shutdown_timeout_seconds=heartbeat_seconds
    )


def settings(environment: Mapping[str, str], detect: bool = False) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize, or None for a process alone.

    Either all of JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a cluster that JAX
    knows: a SLURM step or Open MPI job of several tasks, a TPU slice on GKE; with `detect`, whatever JAX finds (Cloud TPU VMs).
    """
    given = [name for name in (ADDRESS, COUNT, NUMBER) if environment.get(name)]
    if len(given) == 3:
        count, number = (_whole(environment, name) for name in (COUNT, NUMBER))
        if not 0 <= number < count:
            raise ValueError(f"{NUMBER}={number} is outside [0, {COUNT}={count})")
        plain = dict(coordinator_address=environment[ADDRESS], num_processes=count, process_id=number)
        return plain | {"cluster_detection_method": "deactivate"}
    if given and given != [ADDRESS]:
        missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]
        raise ValueError(f"{', '.join(given)} set without {', '.join(missing)}: set all three, or none")
    tasks = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
    several = any(place in environment and _whole(environment, count) > 1 for place, count in tasks.items())
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    return {} if detect or given or several or "," in workers else None


def is_first() -> bool:
    """Whether this is process 0, the one that writes what is written once."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Returns when all processes are here. `name` is for messages; the order of the calls is what must agree."""
    ocp.multihost.get_barrier_sync_fn()(key=f"rise {next(_meetings)} {name}", timeout_ms=WAIT_SECONDS * 1000)


@contextmanager
def one_voice() -> Iterator[None]:
    """Only process 0 prints; what goes wrong is told on stderr by every process."""
    with open(os.devnull, "w") as silence, nullcontext() if is_first() else redirect_stdout(silence):
        yield


def from_first(value: Any) -> Any:
    """Process 0's value, everywhere: a number, or a tree of arrays whose shapes are the same in all processes."""
    return multihost_utils.broadcast_one_to_all(value)


def gathered(rows: np.ndarray) -> np.ndarray:
    """The rows [n, ...] of all processes, n from each, in the order of the processes."""
    return multihost_utils.process_allgather(rows, tiled=True) if jax.process_count() > 1 else rows


def check_agreed(value: Any, what: str) -> None:
    """Raises RuntimeError where `what` gave this process another JSON value than process 0: going on, they would wait for each other
    without end."""
    ours = np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.uint32)
    if (np.asarray(from_first(ours)) != ours).any():
        raise RuntimeError(
            f"{what} is another for this process than for process 0: all need the same flags, and a disk that they share"
        )


def any_process(flag: bool) -> bool:
    """Whether `flag` holds in any process."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def leave(code: int) -> None:
    """Ends a process that failed. Among others at once, without waiting for them as an ordinary exit does: they may be waiting
    for it. They end by the broken connection or the missing heartbeat."""
    if not jax.distributed.is_initialized():
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def with_signal(step_fn: Callable) -> Callable:
    """`step_fn`, which takes besides `batch["signal"]` (see `Stop.numbers`) and gives the largest of it as `metrics["signal"]`.

    In the step, not in a program beside it: nothing orders the collectives of two programs in flight on a device, and on CPU those of
    one kind then take each other's messages (Gloo knows them apart by kind only).
    """

    def step(state: Any, frozen: Any, batch: dict, key: jax.Array) -> tuple[Any, dict]:
        rest = {name: value for name, value in batch.items() if name != "signal"}
        state, metrics = step_fn(state, frozen, rest, key)
        return state, metrics | {"signal": jnp.max(batch["signal"])}

    return step


class Stop:
    """While active, SIGTERM and SIGINT only ask for a stop; a second one acts as usual."""

    def __init__(self, mesh: Mesh):
        """`mesh`: of all devices, over which the processes agree."""
        self._number = 0  # of the signal this process got
        self._before: dict[int, Any] = {}
        self._largest: jax.Array | int = 0
        self._spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def numbers(self) -> jax.Array:
        """int32 [devices]: for every device the number of the signal that its process got, or 0; for the step that comes next."""
        own = np.full(1, self._number, np.int32)
        return jax.make_array_from_callback((self._spread.mesh.size,), self._spread, lambda _: own)

    def asked(self, largest: jax.Array) -> str:
        """The signal's name, or "". Call it once a step, with the largest of its `numbers`: all processes get the same answer at the
        same step. Where there are several it is the step's before, so that none waits for its devices."""
        earlier, self._largest = self._largest, largest
        return _name(self._number if jax.process_count() == 1 else int(earlier))

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number in self._before:
            self._restore(number)

    def _note(self, number: int, frame: Any) -> None:
        self._number = number
        self._restore(number)

    def _restore(self, number: int) -> None:
        signal.signal(number, self._before[number] or signal.SIG_DFL)  # None: a handler that is not Python's


def _name(number: int) -> str:
    return signal.Signals(number).name if number else ""


def _whole(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} is not a whole number >= 0")
    return int(value)
