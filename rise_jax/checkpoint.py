"""Checkpoints: asynchronous, atomic, verified, restored to any sharding.

A checkpoint is one folder `<directory>/<step>`: the state (arrays, by Orbax), `meta` (JSON) and `digest.json` with the
size and CRC-32 of each file. Orbax writes to a temporary name and renames, so a killed save leaves the older ones as
they were; the digests are there because Orbax restores a flipped bit without complaint.

Of several processes all call the same methods in the same order; each writes and reads its devices' parts, and process 0 decides
which checkpoints there are and whether they are whole.
"""

import json
import logging
import os
import re
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rise_jax.processes import any_process, from_first, is_first, meet
from rise_jax.trees import named_leaves

LOG = logging.getLogger(__name__)
DIGEST = "digest.json"
SLICE = 2**24  # bytes that a replica writes at least, where replicas share the writing of an array


def _share_large_arrays_alone() -> None:
    """Orbax would cut arrays of any size into a slice per replica, each by a program compiled for its shape: the first save of every
    start would hold up the steps for seconds."""
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SLICE)
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


# Warnings of Orbax of what is done here on purpose: a handler in place of another, a folder that is only read.
ON_PURPOSE = ("Type handler registry", "Given directory is read only")
logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith(ON_PURPOSE))
_share_large_arrays_alone()


class Checkpoints:
    """The newest `keep` >= 1 checkpoints under `directory`; 2 or more, so that a damaged one has a predecessor.

    With `read_only` nothing on disk changes, and the directory need not exist.

    Raises OSError with path and reason when the directory cannot be made.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, *, read_only: bool = False):
        if keep < 1:
            raise ValueError(f"run.keep={keep} must be >= 1; 2 keeps one to fall back to")
        self.directory = Path(directory).absolute()
        self._read_only = read_only
        self._unsettled: tuple[int, Future] | None = None  # the step that is being written, until it has its digests
        self._background = ThreadPoolExecutor(1)
        if not read_only:
            _make_folder(self.directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            save_interval_steps=0 if read_only else 1,
            create=False,
            read_only=read_only,
            # In a thread of its own: a new folder, which a start that fails takes away again, has nothing to clean up.
            cleanup_tmp_directories=not read_only and any(self.directory.iterdir()),
            single_host_load_and_broadcast=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, item_names=("state", "meta"), options=options)

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first: those that process 0 sees."""
        if not self.directory.is_dir():
            return []
        self._manager.reload()
        return sorted(map(int, self._manager.all_steps()))

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing; returns once the state is off the devices, so its buffers may be donated.

        A step that is there already is left alone. Raises OSError with path and reason, also for an earlier save that
        failed meanwhile.
        """
        self.wait()
        jax.block_until_ready(state)  # on every device: Orbax asks the other processes by programs with collectives
        if step in self.steps():
            return
        document = {"meta": meta, "leaves": _describe(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(document))
        self._try_writing(step, lambda: self._manager.save(step, args=args))
        self._unsettled = step, self._background.submit(self._settle, step)

    def wait(self) -> None:
        """Returns when the last save is on disk with its digests. Raises OSError with path and reason if it failed."""
        unsettled, self._unsettled = self._unsettled, None
        if unsettled:
            step, settled = unsettled
            self._try_writing(step, settled.result)

    def close(self) -> None:
        """Waits, then frees the threads."""
        try:
            self.wait()
        except OSError:
            with suppress(Exception):  # Orbax tells of the same fault again, in its own words
                self._free()
            raise
        self._free()

    def _free(self) -> None:
        self._background.shutdown()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        """Closes, without a word of its own where there is an error already. A process that failed among others does not close: the
        others may never come to where closing waits for them."""
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            with suppress(Exception):
                self.close()

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, dict] | None:
        """(step, state, meta) of the newest good checkpoint, or of `step`; None when there is none at all.

        `abstract_state`: ShapeDtypeStructs, with the shardings to restore to. A damaged checkpoint is passed over with
        a warning that says why (and moved to `damaged-<step>` beside the folder, unless read-only).
        Raises ValueError when a checkpoint's leaves are not those of `abstract_state`, naming all differences; OSError
        when `step` is missing or damaged, or when every checkpoint is damaged.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise FileNotFoundError(f"{self.directory} has no checkpoint of step {step}; it has {steps or 'none'}")
        reasons = {}
        for candidate in [step] if step is not None else reversed(steps):
            try:
                state, meta = self._read(candidate, abstract_state)
            except DamagedError as error:
                reasons[candidate] = str(error)
                continue
            self._pass_over(reasons, candidate)
            return candidate, state, meta
        if reasons:
            listing = "\n".join(f"  step {bad}: {reason}" for bad, reason in reasons.items())
            raise OSError(f"no checkpoint in {self.directory} can be read:\n{listing}")
        return None

    def meta(self) -> dict:
        """That of the newest checkpoint whose meta can be read; no array is. Raises OSError where there is none."""
        for step in reversed(self.steps()):
            with suppress(DamagedError):
                return self._restore_item(step, meta=ocp.args.JsonRestore()).meta["meta"]
        raise OSError(f"no checkpoint in {self.directory} can be read")

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
        folder = self.directory / str(step)
        fault = _fault(folder) if is_first() else ""
        if from_first(bool(fault)):
            raise DamagedError(fault or "found by process 0")
        document = self._restore_item(step, meta=ocp.args.JsonRestore()).meta
        differences = _differences(document["leaves"], _describe(abstract_state))
        if differences:
            raise ValueError(f"{folder} does not fit this model:\n" + "\n".join(f"  {line}" for line in differences))
        state = self._restore_item(step, state=ocp.args.StandardRestore(abstract_state)).state
        return state, document["meta"]

    def _restore_item(self, step: int, **items: Any) -> Any:
        fault, found = None, None
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises bare Exception for an unreadable array
            fault = error
        if any_process(fault is not None):
            said = f"{type(fault).__name__}: {_first_line(fault)}" if fault else "another process could not read it"
            raise DamagedError(said) from fault
        return found

    def _pass_over(self, reasons: dict[int, str], used: int) -> None:
        for step, reason in reasons.items():
            LOG.warning("checkpoint %s is damaged (%s); using step %d", self.directory / str(step), reason, used)
            if not self._read_only and is_first():
                _move_aside(self.directory / str(step))
        if reasons and not self._read_only:
            meet("damaged checkpoints aside")
            self._manager.reload()

    def _settle(self, step: int) -> None:
        """Reading what was written takes about as long as writing it, so the loop does not wait for that either."""
        self._manager.wait_until_finished()
        if is_first():
            _write_digest(self.directory / str(step))

    def _try_writing(self, step: int, write: Any) -> None:
        try:
            write()
        except Exception as error:  # Orbax and TensorStore wrap the disk's error in several types
            raise OSError(f"cannot write checkpoint {self.directory / str(step)}: {_reason(error)}") from error


class DamagedError(OSError):
    """A checkpoint whose files are missing, cut or changed."""


def _describe(state: Any) -> dict[str, list]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named_leaves(state).items()}


def _differences(saved: dict[str, list], wanted: dict[str, list]) -> list[str]:
    def text(entry: list) -> str:
        return f"{entry[1]}{entry[0]}"

    missing = [f"missing in the checkpoint: {name} {text(wanted[name])}" for name in wanted if name not in saved]
    extra = [f"only in the checkpoint: {name} {text(saved[name])}" for name in saved if name not in wanted]
    changed = [
        f"different: {name} is {text(saved[name])} in the checkpoint, {text(wanted[name])} here"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    return missing + extra + changed


def _write_digest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = {str(path.relative_to(folder)): [path.stat().st_size, _crc32(path)] for path in files}
    scratch = folder / f"{DIGEST}.tmp"
    scratch.write_text(json.dumps(digest, indent=0))
    scratch.replace(folder / DIGEST)


def _fault(folder: Path) -> str:
    """What is wrong with a checkpoint's files, "" for nothing.

    One without digests (killed between rename and digest) is complete, only unverified.
    """
    if not (folder / DIGEST).is_file():
        return ""
    try:
        digest = json.loads((folder / DIGEST).read_text())
    except ValueError as error:
        return f"{DIGEST} is not JSON: {error}"
    for name, (size, crc) in digest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if _crc32(path) != crc:
            return f"{name} has changed since it was written (CRC-32)"
    return ""


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            crc = zlib.crc32(chunk, crc)
    return crc


def _move_aside(folder: Path) -> None:
    target = folder.parent.parent / f"damaged-{folder.name}"
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"cannot make {folder}: {error.strerror}") from error


def _reason(error: BaseException) -> str:
    """The disk's own words, which TensorStore puts at the end of a long line as a code."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
