"""TensorBoard's event files, written where they are made. tensorboardX's own writer hands events to a thread, which ends when the
disk is full, and then waits for it without end."""

import itertools
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from rise_jax.writing import Growing


class Board:
    """A new event file in `folder`, made as needed. Every method raises OSError with path and reason.

    purge_step: TensorBoard no longer shows what earlier files of the folder hold of this step and of later ones.
    """

    def __init__(self, folder: Path, purge_step: int):
        self._file = _new_file(folder)
        version = "brain.Event:2"
        self._add(Event(file_version=version))
        self._add(Event(step=purge_step, file_version=version))
        self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step, by name. They are in the file then, but not forced to the disk, which can take longer
        than a step."""
        named = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=named)))

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._file.write(_record(event.SerializeToString()))


def _new_file(folder: Path) -> Growing:
    """Named as tensorboardX does, by second and host; and with a number where another start had the same second."""
    stem = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
    paths = (folder / (f"{stem}.{number}" if number else stem) for number in itertools.count())
    return Growing(next(path for path in paths if not path.exists()), "xb")


def _record(content: bytes) -> bytes:
    """TFRecord: the length, its checksum, the content, its checksum; little-endian."""
    length = struct.pack("<Q", len(content))
    return length + _checksum(length) + content + _checksum(content)


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))
