"""Folders of captioned clips for the tests."""

import csv
import json

from media import grays

from rise_jax.data.folder import FolderSource
from rise_jax.video import write_video


def write_clip(path, count=20, fps=10):
    write_video(path, grays(count), fps)


def write_metadata(folder, rows, suffix="jsonl"):
    folder.mkdir(exist_ok=True)
    if suffix == "jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "metadata.jsonl").write_text(content, encoding="utf-8")
        return
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list({column: None for row in rows for column in row}))
        writer.writeheader()
        writer.writerows(rows)


def source(folder, **changes):
    return FolderSource(folder, **{"frames": 5, "height": 16, "width": 16, "fps": 10, "split": "train"} | changes)


def folder_of(tmp_path, count=1, **columns):
    """Clips 0.mp4, 1.mp4, ... with prompts 'clip 0', ... and further columns."""
    rows = [{"file_name": f"{n}.mp4", "prompt": f"clip {n}"} | columns for n in range(count)]
    write_metadata(tmp_path, rows)
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    return tmp_path
