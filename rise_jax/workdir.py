"""What makes a folder one run's: its config, a lock, and what calls that use the run leave in it."""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rise_jax.writing import told

# Keys that may differ between the starts of one run: they change how long or where it runs, not what it computes.
FREE = r"""(?x)^( run\.(stage|preset|steps|accumulate|save_every|keep|profile) | model\.(attention|sequence|dit\.remat|vae\.tile)
| mesh\..* | sample\..* | data\.(workers|max_bad) )$"""
# Where the same files lie, which their hashes or the checkpoint hold to.
PATHS = r"^model\.((llm|dit|vae|native)\.path|llm\.instruction)$"


@contextmanager
def claimed_workdir(workdir: str | os.PathLike) -> Iterator[None]:
    """Makes the folder and holds its lock. A body that fails leaves no folder that was not there before, unless it wrote into it.

    Raises as `lock_workdir` does.
    """
    new = not Path(workdir).exists()
    with lock_workdir(workdir):
        try:
            yield
        except BaseException:
            if new:
                _remove_unused(Path(workdir))
            raise


def lock_workdir(workdir: str | os.PathLike) -> TextIO:
    """Makes the folder and takes its lock, which lasts until the returned file is closed or the process ends.

    Raises OSError when the folder cannot be made or written (with path and reason), and RuntimeError, naming the
    process, when another run holds the lock.
    """
    path = Path(workdir) / "lock"
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise OSError(error.errno, f"cannot use workdir {workdir}: {error.strerror}") from error
        _take(file, workdir)
        if _is_at(file, path):  # another start may have removed it, with its new workdir, between the two
            break
        file.close()
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _take(file: TextIO, workdir: str | os.PathLike) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise RuntimeError(
            f"workdir {workdir} is in use by process {owner}; stop it or choose another --workdir"
        ) from error
    except OSError as error:
        file.close()
        raise OSError(
            error.errno, f"cannot lock workdir {workdir}: {error.strerror}; its file system must support flock"
        ) from error


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(workdir: Path) -> None:
    """Removes a workdir whose lock this process holds, if all in it is that lock and an empty folder for checkpoints."""
    with suppress(OSError):  # rmdir refuses a folder that holds anything
        names = {path.name for path in workdir.iterdir()}
        if not names <= {"lock", "checkpoints"}:
            return
        if "checkpoints" in names:
            (workdir / "checkpoints").rmdir()
        (workdir / "lock").unlink()
        workdir.rmdir()


def check_workdir(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Compares with the `config.json` of a workdir that has one, see `write_config`.

    Raises ValueError listing each differing key as 'key: was -> now', unless all of them are free (`may_differ`). `config` holds JSON
    values only, nested.
    """
    path = Path(workdir) / "config.json"
    now = json.loads(json.dumps(config))
    if path.exists():
        try:
            was = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); remove it if this workdir is to start anew") from error
        differences = config_differences(was, now)
        fixed = {key: pair for key, pair in differences.items() if not may_differ(key, *pair)}
        if fixed:
            lines = "\n".join(f"  {key}: {was} -> {now}" for key, (was, now) in fixed.items())
            raise ValueError(
                f"workdir {workdir} was made with another config:\n{lines}\nUse these values or another --workdir."
            )


def may_differ(key: str, was: str, now: str) -> bool:
    """Whether the value (JSON) of a key may be another one in a later start of a run: files may be moved, not added or dropped, and
    what this version can do more may be switched off."""
    moved = re.search(PATHS, key) and '""' not in (was, now)
    moved = moved or (key == "model.null" and all(value.endswith('.safetensors"') for value in (was, now)))
    return bool(re.search(FREE, key) or moved or (was, now) == ("absent", "false"))


def write_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Makes `config` that of the workdir. To be called when nothing of it was found to be wrong: it binds all later starts."""
    write_json(Path(workdir) / "config.json", json.loads(json.dumps(config)))


def config_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{dotted key: (JSON before, JSON now)} of every leaf that differs; 'absent' where one side has none."""
    first, second = ({key: json.dumps(value) for key, value in flattened(tree).items()} for tree in (was, now))
    pairs = {key: (first.get(key, "absent"), second.get(key, "absent")) for key in sorted({*first, *second})}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes indented JSON atomically: the file is the old one or the new one, never half.

    Raises OSError with path and reason.
    """
    path = Path(path)
    scratch = path.with_name(path.name + ".tmp")
    try:
        scratch.write_text(json.dumps(value, indent=2) + "\n")
        scratch.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def set_aside(*paths: Path) -> None:
    """Renames what an earlier call left at `paths`, files or folders side by side, to NAME-N and says so: nothing is written over.

    N is the same for all of them, one above the largest that is there. A folder is there as before, empty; of a link to one, what it
    leads to is renamed. Raises OSError with path and reason.
    """
    left = [path.resolve() for path in paths if path.is_file() or (path.is_dir() and any(path.iterdir()))]
    if not left:
        return
    folder, names = left[0].parent, "|".join(re.escape(path.stem) for path in (*paths, *left))
    numbers = [re.fullmatch(rf"(?:{names})-(\d+)", other.stem) for other in folder.iterdir()]
    number = 1 + max((int(found[1]) for found in numbers if found), default=0)
    for path in left:
        kept = path.with_stem(f"{path.stem}-{number}")
        with told(kept):
            path.rename(kept)
            if kept.is_dir():
                path.mkdir()
        print(f"{path} of an earlier call is {kept.name} now", flush=True)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of a nested config."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flattened(value, name + ".") if isinstance(value, Mapping) else {name: value})
    return flat
