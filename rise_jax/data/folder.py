"""A folder of clips and a caption file beside them: `data.source=folder data.path=DIR`.

DIR holds `metadata.jsonl` or `metadata.csv` (UTF-8, one row per clip) with the columns

    file_name   the clip, relative to DIR: mp4, webm, gif, webp, png, jpg or jpeg
    prompt      what a user would type
    caption     a long description: the prompt where there is none, its rephrasing where there is one
    rephrased   optional: the long form to train on; goes before `caption`
    split       optional, on every row then: 'train' or 'heldout'

Each row needs a prompt or a caption. Where no long form is given, the frozen LLM writes it. Without `split`, 5 % of the
clips are held out, at least one of two or more, by a hash of their names.
"""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rise_jax.data.sources import BadClipError, Sample, nearest, text_of, unique_texts
from rise_jax.data.transforms import read_clip
from rise_jax.video import ANIMATED_SUFFIXES, STILL_SUFFIXES, VIDEO_SUFFIXES, MediaError, is_still

METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "prompt", "caption", "rephrased", "split")
SPLITS = ("train", "heldout")
SUFFIXES = VIDEO_SUFFIXES + ANIMATED_SUFFIXES + STILL_SUFFIXES
_HELD_OUT = 0.05
LISTED = 100  # lines of an error
NEAREST = 5  # of them with the nearest name: seconds each among 100,000


class FolderSource:
    """Clips of `frames` frames at `fps`, resized to cover height x width and cropped at the centre.

    From each clip a random window of time is taken, one frame of it where `frames` is 1; a shorter clip keeps showing
    its last frame. A still picture is a clip only where `frames` is 1.
    Raises ValueError (a caption file that breaks the rules above, a still among videos, an empty split) or
    FileNotFoundError (no folder, no caption file, missing clips), with the row and the nearest valid choice.
    """

    def __init__(
        self, path: str | os.PathLike, *, frames: int, height: int, width: int, fps: float, split: str = "train"
    ):
        if split not in SPLITS:
            raise ValueError(f"data split {split!r} is unknown; a folder has {' and '.join(SPLITS)}")
        if not fps > 0:
            raise ValueError(f"data.fps={fps} must be above 0 frames per second")
        self.folder, self.shape, self.fps = Path(path), (frames, height, width, 3), fps
        rows = _read_rows(self.folder)
        _check_clips(self.folder, rows, frames)
        rows = _split(self.folder, rows, split)
        self.files = [row["file_name"] for row in rows]
        self.texts, self._text = unique_texts(text_of(row) for row in rows)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, item: int) -> str:
        return str(self.folder / self.files[item])

    def load(self, item: int, rng: np.random.Generator | None) -> Sample:
        try:
            video = read_clip(self.folder / self.files[item], self.shape, self.fps, rng)
        except MediaError as error:
            raise BadClipError(self.name(item), str(error)) from error
        except OSError as error:
            raise BadClipError(self.name(item), f"{type(error).__name__}: {error.strerror or error}") from error
        return Sample(video, int(self._text[item]))


def _read_rows(folder: Path) -> dict[str, dict[str, str]]:
    """Rows without their blank cells, by what messages call them: 'DIR/metadata.csv line 3'."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path={folder} is no folder")
    found = [folder / name for name in METADATA if (folder / name).exists()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds both {' and '.join(METADATA)}; keep one of them")
    if not found:
        near = nearest(METADATA[0], (entry.name for entry in folder.iterdir()))
        raise FileNotFoundError(
            f"{folder} holds no {' or '.join(METADATA)}{near}; "
            "write one row per clip, with file_name and prompt or caption"
        )
    try:
        rows = dict((_read_csv if found[0].suffix == ".csv" else _read_jsonl)(found[0]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{found[0]} cannot be read: {error}") from error
    rows = {place: _clean(place, row) for place, row in rows.items()}
    if not rows:
        raise ValueError(f"{found[0]} has no rows; it needs one per clip, with file_name and prompt or caption")
    _check_duplicates(rows)
    return rows


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _check_once(f"{path} line 1", reader.fieldnames or [])
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row:
                raise ValueError(f"{place} has more cells than the header; quote cells that hold a comma")
            yield place, row


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = json.loads(line, object_pairs_hook=partial(_row_of, place))
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no JSON object like {{'file_name': ..., 'prompt': ...}}")
        yield place, row


def _row_of(place: str, pairs: list[tuple[str, Any]]) -> dict:
    _check_once(place, [column for column, _ in pairs])
    return dict(pairs)


def _check_once(place: str, columns: Sequence[str]) -> None:
    """Of two columns with one name, the readers of both formats would take the last."""
    for column in columns:
        if columns.count(column) > 1:
            raise ValueError(f"{place} has {column!r} twice; one of them is enough")


def _clean(place: str, row: dict) -> dict[str, str]:
    for column, cell in row.items():
        if column not in COLUMNS:
            known = ", ".join(COLUMNS)
            raise ValueError(f"{place}: unknown column {column!r}{nearest(column, COLUMNS)}; columns are {known}")
        if not isinstance(cell, str | None):
            raise ValueError(f"{place}: {column} is {cell!r}, not text")
    row = {column: cell.strip() for column, cell in row.items() if cell and cell.strip()}
    if "file_name" not in row:
        raise ValueError(f"{place} has no file_name")
    if text_of(row) is None:
        raise ValueError(f"{place}: no text in prompt or caption of {row['file_name']}; each clip needs one of them")
    if row.get("split", SPLITS[0]) not in SPLITS:
        raise ValueError(f"{place}: split is {row['split']!r}{nearest(row['split'], SPLITS)}; it is train or heldout")
    return row


def _check_duplicates(rows: dict[str, dict[str, str]]) -> None:
    first: dict[str, str] = {}
    for place, row in rows.items():
        file = os.path.normpath(row["file_name"])
        if file in first:
            raise ValueError(f"{place}: {row['file_name']} again, after {first[file]}; one row per clip")
        first[file] = place


def _check_clips(folder: Path, rows: dict[str, dict[str, str]], frames: int) -> None:
    """All clips exist, have a known suffix, and can fill `frames` frames; every one that does not is named."""
    present = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES}
    named = {place: os.path.normpath(row["file_name"]) for place, row in rows.items()}
    missing = [place for place, file in named.items() if file not in present and not (folder / file).is_file()]
    idle = present - set(named.values())
    if missing:
        near = {place: nearest(named[place], idle) for place in missing[:NEAREST]}
        listing = _listed([f"  {place}: {named[place]}{near.get(place, '')}" for place in missing])
        raise FileNotFoundError(f"{len(missing)} of {len(rows)} clips are missing in {folder}:\n{listing}")
    unknown = [f"  {place}: {file}" for place, file in named.items() if Path(file).suffix.lower() not in SUFFIXES]
    if unknown:
        listing = _listed(unknown)
        raise ValueError(f"{len(unknown)} of {len(rows)} files are not of {', '.join(SUFFIXES)}:\n{listing}")
    stills = [f"  {place}: {file}" for place, file in named.items() if frames > 1 and is_still(folder / file)]
    if stills:
        listing = _listed(stills)
        raise ValueError(
            f"{len(stills)} of {len(rows)} clips are still pictures, which cannot fill {frames} frames:\n{listing}\n"
            "Take them out of the caption file, or train on images with 1 frame."
        )
    if idle:
        message = "%s: %d clips have no row in the caption file and are not used, such as %s"
        logging.getLogger(__name__).warning(message, folder, len(idle), min(idle))


def _listed(lines: list[str]) -> str:
    more = [f"  and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join(lines[:LISTED] + more)


def _split(folder: Path, rows: dict[str, dict[str, str]], split: str) -> list[dict[str, str]]:
    without = [place for place, row in rows.items() if "split" not in row]
    if len(without) == len(rows):
        held_out = _hashed_out([row["file_name"] for row in rows.values()])
        chosen = [row for row in rows.values() if (row["file_name"] in held_out) == (split == "heldout")]
    elif without:
        raise ValueError(f"{without[0]} has no split; {len(rows) - len(without)} of {len(rows)} rows have one")
    else:
        chosen = [row for row in rows.values() if row["split"] == split]
    if not chosen:
        advice = f"give some of them split={split}" if len(rows) > 1 else "one clip cannot serve both splits: add clips"
        raise ValueError(f"{folder}: none of {len(rows)} clips is in split {split!r}; {advice}")
    return chosen


def _hashed_out(files: list[str]) -> set[str]:
    """The files held out: independent of their order, and nearly so of which others there are."""
    order = sorted(files, key=lambda file: hashlib.sha256(file.encode()).digest())
    bound = int(_HELD_OUT * 2**32).to_bytes(4, "big")
    count = sum(hashlib.sha256(file.encode()).digest()[:4] < bound for file in files)
    return set(order[: min(max(count, 1), len(files) - 1)])
