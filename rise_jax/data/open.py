"""`data.source` and its settings -> a source."""

import difflib

from rise_jax.data.folder import FolderSource
from rise_jax.data.scenes import ScenesSource
from rise_jax.data.sources import Source

SOURCES = ("scenes", "folder", "tfds:NAME")


def source_fault(source: str, path: str = "") -> str:
    """What is wrong with the name of a source and its path, with the nearest that there is; "" for nothing."""
    kind, _, name = source.partition(":")
    if source == "scenes" and path:
        return f"data.path={path!r} is not read where data.source='scenes'; nearest: data.source='folder'"
    if source in ("scenes", "folder") or (kind == "tfds" and name):
        return ""
    near = difflib.get_close_matches(source, SOURCES, n=1, cutoff=0.0)[0]
    return f"data.source={source!r} is unknown (nearest: {near}); valid: {', '.join(SOURCES)}"


def open_source(
    source: str, *, path: str, split: str, frames: int, height: int, width: int, fps: float, texts: int, seed: int
) -> Source:
    """The source called `source`; `texts` and `seed` are for scenes alone, `path` and `fps` for real media.

    Raises ValueError for an unknown name, with the nearest one, and whatever the source itself finds wrong.
    """
    if fault := source_fault(source):
        raise ValueError(fault)
    size = dict(split=split, frames=frames, height=height, width=width)
    if source == "scenes":
        return ScenesSource(num_texts=texts, seed=seed, **size)
    if source == "folder":
        if not path:
            raise ValueError("data.path='' names no folder; nearest: '.', the one that the command runs in")
        return FolderSource(path, fps=fps, **size)
    from rise_jax.data.tfds_source import TfdsSource  # a large import, and it makes a temporary folder

    return TfdsSource(source.partition(":")[2], path=path or None, fps=fps, **size)
