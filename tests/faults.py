"""Faults thrown at real runs of main.py, after each of which the same command must end as an undisturbed run does.

    python tests/faults.py [N] [SEED]     # `make faults`: N random faults (20), and how many of them were survived

A fault is a function `(lab, run, rng)` that starts the run, breaks it and returns when all its processes are gone.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quick import QUICK
from tiny import as_gguf, tiny_flags, write_llm

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 8, 2
ONE_BY_ONE = "--xla_cpu_enable_concurrency_optimized_scheduler=false"  # collectives, as launch/local.sh has it
TEXTS, BATCH = 3, 32  # of 192 clips: an epoch ends after step 6
DEVICES = 2  # of a run, over its processes
HEARTBEAT = 20  # seconds
PATIENCE = 300  # seconds until something that should happen counts as a hang
STOPPED = 75


@dataclass
class Run:
    """A workdir and the command that belongs to it."""

    workdir: Path
    stage: int
    processes: int
    flags: list[str]

    def start(self, number: int = 0, address: str = "", **kwargs) -> subprocess.Popen:
        """Process `number` of the run; its output goes to WORKDIR.NUMBER.log."""
        several = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(self.processes),
            "JAX_PROCESS_ID": str(number),
        }
        with self.log(number).open("a") as log:
            return subprocess.Popen(
                [sys.executable, "main.py", *self.flags],
                cwd=ROOT,
                env=environment(DEVICES // self.processes) | (several if self.processes > 1 else {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                **kwargs,
            )

    def start_all(self) -> list[subprocess.Popen]:
        """All processes of the run, without a launcher that would end one for the other."""
        address = f"127.0.0.1:{free_port()}"
        return [self.start(number, address) for number in range(self.processes)]

    def finish(self) -> dict:
        """The same command, to its end; the summary."""
        codes = wait(self.start_all())
        assert codes == [0] * self.processes, f"{codes}\n{self.said()}"
        return self.summary()

    def log(self, number: int) -> Path:
        return self.workdir.with_name(f"{self.workdir.name}.{number}.log")

    def said(self) -> str:
        return "\n".join(self.log(number).read_text() for number in range(self.processes))

    def summary(self) -> dict:
        return json.loads((self.workdir / "summary.json").read_text())

    def metrics(self) -> list[dict]:
        """The lines so far; a line that is being written is not there yet."""
        file = self.workdir / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def saved(self) -> list[int]:
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def environment(devices: int) -> dict[str, str]:
    """Of a run of main.py on `devices` CPU devices: quick to start and to compile, and with the tests' compilation cache."""
    cache = os.path.join(tempfile.gettempdir(), f"rise_jax_test_cache_{os.getuid()}")
    return os.environ | {
        "PYTHON": sys.executable,  # of launch/local.sh
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK} {ONE_BY_ONE}",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT / "tests" / "fixtures" / "without_torch"),
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait(processes: list[subprocess.Popen], seconds: float = PATIENCE) -> list[int]:
    """Exit codes; what has not ended by then is killed, which counts as a hang."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def until(condition: Callable, processes: list[subprocess.Popen]) -> None:
    """Returns when the condition holds, or when the processes have ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and any(process.poll() is None for process in processes):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


class Lab:
    """A folder with a tiny LLM, and the undisturbed runs that others are compared with, each made when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.llm = as_gguf(write_llm(folder / "llm"))
        self._undisturbed: dict[tuple[int, int], Run] = {}

    def run(self, name: str, stage: int = 1, processes: int = 1, like: Run | None = None) -> Run:
        """A new run; its captions and states are those of `like`, of the same stage."""
        workdir = self.folder / name
        start = [f"--config.run.init_from={self.undisturbed(1).workdir if stage == 2 else ''}"]
        sizes = dict(
            data__texts=TEXTS,
            run__batch_size=BATCH,
            run__accumulate=2,
            run__steps=STEPS,
            run__save_every=SAVE_EVERY,
            run__keep=9,
        )
        flags = [
            *tiny_flags(stage, self.llm, **sizes),
            *start,
            f"--heartbeat_seconds={HEARTBEAT}",
            f"--workdir={workdir}",
        ]
        workdir.mkdir()
        for file in ("captions.jsonl", "states.npz") if like else ():
            shutil.copy(like.workdir / file, workdir / file)
        return Run(workdir, stage, processes, flags)

    def undisturbed(self, stage: int, processes: int = 1) -> Run:
        key = stage, processes
        if key not in self._undisturbed:
            like = next((run for run in self._undisturbed.values() if run.stage == stage), None)
            self._undisturbed[key] = self.run(f"undisturbed-{stage}-{processes}", stage, processes, like)
            self._undisturbed[key].finish()
        return self._undisturbed[key]

    def disturbed(self, name: str, stage: int = 1, processes: int = 1) -> Run:
        return self.run(name, stage, processes, like=self.undisturbed(stage, processes))

    def same_end(self, run: Run) -> None:
        """The same command again ends as the undisturbed run did, bit for bit."""
        end, expected = run.finish(), self.undisturbed(run.stage, run.processes).summary()
        for name in ("steps", "params_sha256", "ema_sha256"):
            assert end[name] == expected[name], f"{name} is {end[name]}, undisturbed {expected[name]}"
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))


# ---- faults ----


def kill_any_time(lab: Lab, run: Run, rng: random.Random) -> None:
    """kill -9 after some step, or, one time in five, before the first."""
    steps = 0 if rng.random() < 0.2 else rng.randrange(len(run.metrics()) + 1, STEPS)
    processes = run.start_all()
    until(lambda: len(run.metrics()) >= steps, processes)
    time.sleep(rng.uniform(0, 0.2 if steps else 10))
    for process in processes:
        process.kill()
    wait(processes)


def kill_while_saving(lab: Lab, run: Run, rng: random.Random) -> None:
    """kill -9 when the temporary folder of a save is there."""
    number = rng.randrange(STEPS // SAVE_EVERY)
    process = run.start()
    saving = lambda: len(run.saved()) >= min(number, 2) and [*(run.workdir / "checkpoints").glob("*tmp*")]
    until(saving, [process])
    time.sleep(rng.uniform(0, 0.02))
    process.kill()
    wait([process])


def stop(lab: Lab, run: Run, rng: random.Random) -> None:
    """SIGTERM or SIGINT to one process of the run, while it steps; all save the same step and say how to go on."""
    chosen = rng.choice([signal.SIGTERM, signal.SIGINT])
    processes = run.start_all()
    until(lambda: (run.workdir / "metrics.jsonl").exists(), processes)
    rng.choice(processes).send_signal(chosen)
    assert wait(processes) == [STOPPED] * run.processes, run.said()
    assert f"stopped by {chosen.name} after step {run.saved()[-1]}, saved" in run.said()
    assert len(run.metrics()) == run.saved()[-1]


def cut_newest(lab: Lab, run: Run, rng: random.Random) -> None:
    """The newest checkpoint of a run that was at its end loses a part of a file."""
    shutil.rmtree(run.workdir)
    shutil.copytree(lab.undisturbed(run.stage, run.processes).workdir, run.workdir)
    (run.workdir / "summary.json").unlink()
    (run.workdir / "config.json").unlink()
    files = [path for path in (run.workdir / "checkpoints" / str(STEPS)).rglob("*") if path.is_file()]
    victim = rng.choice([path for path in files if path.stat().st_size > 1 and path.name != "digest.json"])
    victim.write_bytes(victim.read_bytes()[: rng.randrange(victim.stat().st_size)])


def fill_disk(lab: Lab, run: Run, rng: random.Random) -> None:
    """No file may become larger than a part of a checkpoint, from the second one on; the first stays good."""
    limit = rng.randrange(100_000, 200_000)  # the log has to fit in too
    process = run.start()
    until(lambda: run.saved(), [process])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert wait([process]) == [1], run.said()
    assert "cannot write checkpoint" in run.said() and "File too large" in run.said()
    assert run.saved() == [SAVE_EVERY], "the checkpoint before the full disk"


def lose_one(lab: Lab, run: Run, rng: random.Random) -> None:
    """kill -9 of one process of several, after some step: the others end by themselves, in time and not with 0."""
    steps = rng.randrange(len(run.metrics()) + 1, STEPS - 1)
    processes = run.start_all()
    until(lambda: len(run.metrics()) >= steps, processes)
    lost = rng.choice(processes)
    lost.kill()
    others = [process for process in processes if process is not lost]
    assert 0 not in wait(others, HEARTBEAT + 60), run.said()


ALONE = (kill_any_time, kill_while_saving, stop, cut_newest, fill_disk)
AMONG_TWO = (kill_any_time, stop, lose_one)


def survive(lab: Lab, name: str, faults: Sequence[Callable], stage: int, processes: int, rng: random.Random) -> None:
    """One fault after the other, then the same command."""
    run = lab.disturbed(name, stage, processes)
    for fault in faults:
        fault(lab, run, rng)
    lab.same_end(run)


def main(count: int = 20, seed: int = 0) -> int:
    """One fault in four hits a run of two processes, one in two stage 2."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        lab, survived = Lab(Path(folder)), 0
        for number in range(count):
            processes = 2 if number % 4 == 3 else 1
            kinds = AMONG_TWO if processes == 2 else ALONE
            fault = kinds[(number // 4 if processes == 2 else number - number // 4) % len(kinds)]
            stage = 1 + number // 2 % 2
            what = f"{number + 1}: {fault.__name__}, stage {stage}, {processes} process(es)"
            try:
                survive(lab, f"run-{number}", [fault], stage, processes, rng)
            except Exception:
                print(f"{what}: NOT survived\n{traceback.format_exc()}", flush=True)
            else:
                survived += 1
                print(f"{what}: survived", flush=True)
    print(f"{survived} of {count} survived")
    return int(survived < count)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
