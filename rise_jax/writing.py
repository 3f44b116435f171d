"""Files that grow while a run goes on: what is added is there whole or not at all, and a full disk is told with the path."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Growing:
    """A file to add to, its folder made where there is none. Every method raises OSError as 'cannot write PATH: reason'.

    It has no buffer: what was written is in the file, and what a full disk refused is not tried again when it is closed.
    mode: 'ab', or 'xb' for a file that must be new (FileExistsError, a kind of OSError).
    """

    def __init__(self, path: str | os.PathLike, mode: str = "ab"):
        self.path = Path(path)
        with told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open(mode, buffering=0)

    def write(self, content: bytes) -> None:
        """All of it, or nothing where the disk is full after a part."""
        with told(self.path):
            end = self._file.tell()
            try:
                while content:
                    content = content[self._file.write(content) :]
            except OSError:
                self._file.truncate(end)
                raise

    def close(self) -> None:
        with told(self.path):
            self._file.close()


@contextmanager
def told(path: str | os.PathLike) -> Iterator[None]:
    """Gives an OSError of the body the path that it was about to write."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
