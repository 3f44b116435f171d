"""Renders a scene as a clip: anti-aliased shapes and real handwritten digits, at sub-pixel positions, in numpy."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from rise_jax.data.attributes import BACKGROUNDS, COLOURS, DIGITS, DIRECTIONS, SIZES, STILL, Scene

GLYPHS_PER_DIGIT = 24


@cache
def glyphs() -> dict[str, list[np.ndarray]]:
    """Per digit the most typical handwritten examples (nearest to the class mean), cropped, values in [0, 1]."""
    rows = _table()
    images, labels = rows[:, :-1], rows[:, -1]
    chosen = {}
    for digit in DIGITS:
        own = images[labels == int(digit)]
        order = np.argsort(((own - own.mean(0)) ** 2).sum(1), kind="stable")[:GLYPHS_PER_DIGIT]
        chosen[digit] = [_crop(own[i].reshape(8, 8) / 16) for i in order]
    return chosen


def _table():
    """The rows of scikit-learn's digits: 64 values in 0..16 and the label. Its import, two seconds of every start, is not needed."""
    return np.loadtxt(Path(find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")


def _crop(image):
    inked = image > 0.25
    return image[np.ix_(inked.any(1), inked.any(0))].astype(np.float32)


def coverage(shape: str, size, cy, cx, height: int, width: int, glyph: int = 0) -> np.ndarray:
    """Share of each pixel covered by a thing of diameter `size` (pixels) at each centre: [T, H, W] in [0, 1].

    Args:
        cy, cx: centres [T], in pixels; the middle of the first pixel is 0.5.
        glyph: which handwritten example, for digits.
    """
    y = (np.arange(height, dtype=np.float32) + 0.5 - np.asarray(cy, np.float32)[:, None])[:, :, None]
    x = (np.arange(width, dtype=np.float32) + 0.5 - np.asarray(cx, np.float32)[:, None])[:, None, :]
    if shape in DIGITS:
        return _digit_coverage(glyphs()[shape][glyph], np.float32(size), y[:, :, 0], x[:, 0, :])
    half = np.float32(size / 2)
    if shape == "circle":
        distance = np.sqrt(y * y + x * x) - half
    elif shape == "square":
        distance = np.maximum(np.abs(y), np.abs(x)) - 0.9 * half
    elif shape == "triangle":  # apex up, as wide as high
        distance = np.maximum(y - 0.9 * half, (2 * np.abs(x) - y - 0.9 * half) / np.float32(np.sqrt(5)))
    else:
        raise ValueError(f"no drawing rule for the shape {shape!r}")
    return np.clip(0.5 - distance, 0, 1)


def _digit_coverage(glyph, size, y, x):
    rows = _interpolation(glyph.shape[0], glyph.shape[0] / size, y)
    columns = _interpolation(glyph.shape[1], glyph.shape[0] / size, x)
    ink = rows @ glyph @ columns.transpose(0, 2, 1)
    return np.clip((ink - 0.2) / 0.4, 0, 1)  # a steeper edge than plain linear interpolation, for legible strokes


def _interpolation(count, cells_per_pixel, offsets):
    """Linear interpolation weights [T, pixels, count] of glyph cells at pixel offsets from the glyph's centre."""
    position = offsets * cells_per_pixel + (count - 1) / 2
    return np.clip(1 - np.abs(position[:, :, None] - np.arange(count, dtype=np.float32)), 0, 1)


def render(scene: Scene, frames: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One clip of the scene, uint8 [T, H, W, 3]; size, place, speed and handwriting vary with `rng`."""
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    clip = np.broadcast_to(background, (frames, height, width, 3))
    for place, thing in enumerate(scene.things):
        size = rng.uniform(*SIZES[thing.size]) * min(height, width)
        cy, cx = _path(thing, size, _lane(scene, place), frames, (height, width), rng)
        ink = coverage(thing.shape, size, cy, cx, height, width, rng.integers(GLYPHS_PER_DIGIT))[..., None]
        clip = clip + ink * (np.array(COLOURS[thing.colour], np.float32) - clip)
    return np.round(clip).astype(np.uint8)


def _lane(scene, place):
    """The part of the frame one thing may use: ((low, high) along height, (low, high) along width), in [0, 1]."""
    if len(scene.things) == 1:
        return (0, 1), (0, 1)
    half = (0, 0.5) if place == 0 else (0.5, 1)
    vertical = scene.things[0].direction in ("up", "down")
    return ((0, 1), half) if vertical else (half, (0, 1))


def _path(thing, size, lane, frames, extent, rng):
    """Centres along height and width, each [T]: most of the lane at constant speed, a little off its middle."""
    step = (0, 0) if thing.direction == STILL else DIRECTIONS[thing.direction]
    centres = []
    for (low, high), length, along in zip(lane, extent, step, strict=True):
        room = (high - low) * length - size  # free pixels beside the thing
        middle = (low + high) / 2 * length
        if along:
            travel = rng.uniform(0.85, 1.0) * room
            start = middle + along * (rng.uniform(-0.5, 0.5) * (room - travel) - travel / 2)
            centres.append(start + along * travel * np.linspace(0, 1, frames))
        else:
            spread = 0.9 if thing.direction == STILL else 0.4
            centres.append(np.full(frames, middle + rng.uniform(-0.5, 0.5) * spread * room))
    return centres
