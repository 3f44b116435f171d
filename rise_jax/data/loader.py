"""Batches from a source through grain: infinite, at any step at once, the same whatever the process or worker count.

Batch i is a function of (seed, i): epoch e is permutation e of the items, and batches run across the edges of epochs.
Row r of batch i is sample i * batch_size + r of the run; that number seeds what varies within the sample.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags

from rise_jax.data.sources import BadClipError, Source
from rise_jax.writing import Growing

AHEAD = 4 << 30  # bytes of batches that are loaded ahead, in memory


def make_loader(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    quarantine_file: str | os.PathLike,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    max_bad: float = 0.01,
    process: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches start_step, start_step + 1, ... without end. Close it, or drop it, to stop its threads and processes.

    batch_size: rows over all processes. rows: the b of them that this process loads, ascending; None: all.
    workers: processes that load ahead; 0 loads ahead in threads of this one.
    max_bad: share of the source's clips that may be unreadable, in [0, 1]. process: this one's number among several.
    Each batch: video uint8 [b, T, H, W, 3], text int32 [b] (index into source.texts), index int64 [b] (number of the
    sample in the run), weight float32 [b]. A clip that cannot be read has weight 0, text 0 and a video of zeros, and is
    named with its reason in `quarantine_file` (one JSON line per clip; see `Quarantine`); next() raises RuntimeError when
    there are more of them than max_bad allows. Raises ValueError for values out of range.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    _validate(len(source), batch_size, seed, start_step, rows, workers, max_bad)
    load = _LoadRows(source, seed, batch_size, rows)
    items = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    # Without end there is no remainder; counted with one, batches of 1 are more than a length can say.
    batches = items.batch(batch_size, drop_remainder=True).map_with_index(load)[start_step:]
    threads = min(16, os.cpu_count() or 1, _batches_ahead(len(rows), source.shape, workers))
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads a flag when it starts a process
            flags.FLAGS.mark_as_parsed()
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    quarantine = Quarantine(quarantine_file, clips=len(source), max_bad=max_bad, process=process)
    return _set_bad_aside(ahead, quarantine)


def quarantined(file: str | os.PathLike) -> dict[str, str]:
    """{clip: reason} of all that a quarantine file, and those of other processes beside it, name. ValueError for a damaged one."""
    first = Path(file)
    files = sorted(first.parent.glob(f"{first.stem}*{first.suffix}"))
    # What follows the last line end is nothing, or a line that another process is writing.
    whole = [(file, line) for file in files for line in file.read_bytes().split(b"\n")[:-1]]
    return dict(_entry(file, line) for file, line in whole)


def _entry(file: Path, line: bytes) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        return entry["path"], entry["reason"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): remove it, and clips that cannot be read are listed anew"
        ) from error


class Quarantine:
    """The clips that could not be read: one line each in a file, and a limit on how many there may be.

    The file outlives the run; only clips found bad since this object was made count towards the limit, so that clips
    which were repaired do not. Process N > 0 of several writes NAME-N beside it, since appending to one file over a
    network loses lines; all count each other's.
    """

    def __init__(self, file: str | os.PathLike, *, clips: int, max_bad: float, process: int = 0):
        first = Path(file)
        self.file = first.with_stem(f"{first.stem}-{process}") if process else first
        self.clips, self.max_bad = clips, max_bad
        self._first = first
        self.earlier = quarantined(first).keys()
        self.bad: dict[str, str] = {}

    def add(self, path: str, reason: str, index: int) -> None:
        """Notes one bad clip met at sample `index`. RuntimeError above the limit; OSError with the path if that is unwritable."""
        if path in self.bad:
            return
        listed = quarantined(self._first)
        if path not in listed:
            line = json.dumps({"path": path, "reason": reason, "index": index}, ensure_ascii=False)
            with contextlib.closing(Growing(self.file)) as file:
                file.write(f"{line}\n".encode())
        self.bad |= {path: why for path, why in listed.items() if path not in self.earlier}
        self.bad[path] = reason
        if len(self.bad) > self.max_bad * self.clips:
            raise RuntimeError(self._message())

    def _message(self) -> str:
        needed = math.ceil(1e4 * len(self.bad) / self.clips) / 1e4
        listing = "\n".join(f"  {path}: {reason}" for path, reason in self.bad.items())
        return (
            f"{len(self.bad)} of {self.clips} clips cannot be read, more than data.max_bad={self.max_bad:g} allows:\n"
            f"{listing}\nRepair or remove them (they are listed in {self.file}), or go on without them with "
            f"data.max_bad={needed:g}."
        )


def _batches_ahead(rows: int, shape: tuple[int, ...], workers: int) -> int:
    """How many batches each process may load ahead, so that all of them together hold AHEAD bytes; two at least."""
    return max(2, AHEAD // (rows * math.prod(shape) * max(workers, 1)))


class _LoadRows:
    """(number of a batch, its items [B]) -> this process's rows, loaded; what could not be read is under 'bad'."""

    def __init__(self, source: Source, seed: int, batch_size: int, rows: np.ndarray):
        self.source, self.seed, self.batch_size, self.rows = source, seed, batch_size, rows

    def __call__(self, number: int, items: np.ndarray) -> dict:
        index = number * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[self.rows]
        items = items[self.rows]
        video = np.zeros((len(items), *self.source.shape), np.uint8)
        text, weight, bad = np.zeros(len(items), np.int32), np.ones(len(items), np.float32), []
        for row, item in enumerate(items):
            try:
                sample = self.source.load(int(item), np.random.default_rng((self.seed, index[row])))
            except BadClipError as error:  # sent on as data: the consumer may be another process
                weight[row] = 0
                bad.append((error.path, error.reason, int(index[row])))
                continue
            assert sample.video.shape == self.source.shape, f"{sample.video.shape} is not {self.source.shape}"
            video[row], text[row] = sample
        return {"video": video, "text": text, "index": index, "weight": weight, "bad": bad}


def _set_bad_aside(batches: grain.IterDataset, quarantine: Quarantine) -> Iterator[dict[str, np.ndarray]]:
    with contextlib.closing(iter(batches)) as ahead:
        for batch in ahead:
            for path, reason, index in batch.pop("bad"):
                quarantine.add(path, reason, index)
            yield batch


def _validate(clips, batch_size, seed, start_step, rows, workers, max_bad):
    if clips < 1:
        raise ValueError("the source is empty: it needs at least 1 clip")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1; nearest valid value: 1")
    if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) < 1).any():
        raise ValueError(f"rows={rows.tolist()} must be ascending numbers in [0, {batch_size}), at least one")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} is outside [0, 2**32); nearest valid value: {min(max(seed, 0), 2**32 - 1)}")
    if start_step < 0 or workers < 0:
        raise ValueError(f"start_step={start_step} and workers={workers} must not be negative; nearest valid value: 0")
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad={max_bad} is outside [0, 1]; nearest valid value: {min(max(max_bad, 0), 1)}")
