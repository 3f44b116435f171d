"""From media of any size and rate to clips of one: which moments are taken, and which part of the picture."""

import os

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from rise_jax.video import frames_at, open_media


def read_clip(
    media: str | os.PathLike | bytes, shape: tuple[int, int, int, int], fps: float, rng: np.random.Generator | None
) -> UInt8[np.ndarray, "T H W 3"]:
    """A window of `shape` (T, H, W, 3) at `fps` out of a file or its bytes. Raises OSError or video.MediaError."""
    frames, height, width, _ = shape
    with open_media(media) as reader:
        times = clip_times(reader.last, reader.fps, frames, fps, rng)
        return np.stack([resize_cover(frame, height, width) for frame in frames_at(reader, times)])


def clip_times(
    last: float, rate: float, frames: int, fps: float, rng: np.random.Generator | None
) -> Float[np.ndarray, "T"]:
    """When to look, in seconds: `frames` times 1 / `fps` apart, starting at a frame of the media.

    The window is drawn evenly from those that fit, or is the centre one where rng is None. Media too short for a
    window is taken from its start; the times then run past `last`, its last frame, which is held.

    last: when the last frame of the media starts, in seconds.   rate: its frames per second.
    """
    spare = last - (frames - 1) / fps
    starts = 1 + max(0, int(spare * rate + 1e-3))  # whole frames of the media; 1e-3 for rounded timestamps
    start = (starts - 1) // 2 if rng is None else rng.integers(starts)
    return start / rate + np.arange(frames) / fps


def resize_cover(image: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """The largest centred part of the picture with the proportions asked for, resized with antialiasing (bicubic)."""
    rows, columns = image.shape[:2]
    scale = min(rows / height, columns / width)
    # Rounding may carry a side beyond the picture, which Pillow refuses.
    cut_rows, cut_columns = min(scale * height, rows), min(scale * width, columns)
    left, top = (columns - cut_columns) / 2, (rows - cut_rows) / 2
    box = (left, top, left + cut_columns, top + cut_rows)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box))
