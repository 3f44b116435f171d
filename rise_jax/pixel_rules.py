"""Pixel rules: what a finished clip of the scenes data shows, whoever rendered or generated it."""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.svm import SVC

from rise_jax.data.attributes import BACKGROUNDS, COLOURS, DIGITS, SHAPES, SIZES, STILL
from rise_jax.data.drawing import GLYPHS_PER_DIGIT, coverage

NONE = "none"
_MIN_BACKGROUND = 0.3  # share of the pixels near the background's colour, below which there is none
_NEAR = 70.0  # levels of RGB distance that still count as the background's colour
_MIN_AREA = 0.008  # share of the frame that a thing covers at least; the thinnest small digit covers 0.02
_MIN_SHARE = 0.3  # of the largest thing's area; smaller blobs are taken for specks
_MIN_TRAVEL = 0.12  # of the frame's side; less is no motion
_GRID = 12  # cells along each side of the normalised mask that the classifier sees
# Of the frame's side; a thing of more is large. The smallest large ones are squares and triangles, drawn at 0.9 of their diameter.
_LARGE = (SIZES["small"][1] + 0.9 * SIZES["large"][0]) / 2


class MeasuredThing(NamedTuple):
    """Like `attributes.Thing`, each field possibly 'none'."""

    shape: str
    colour: str
    size: str
    direction: str


class Reading(NamedTuple):
    """What was found: at most a few things, largest first or in reading order, and the background or 'none'."""

    things: tuple[MeasuredThing, ...]
    background: str


def read_scene(video: np.ndarray) -> Reading:
    """Measures background, count and each thing's shape, colour, size and direction in a clip uint8 [T, H, W, 3]."""
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"expected a uint8 video [T, H, W, 3], got {video.dtype} {list(video.shape)}")
    pixels = video.astype(np.float32)
    background = _background(pixels)
    if background == NONE:
        return Reading((), NONE)
    masks = _separate(_inks(pixels, np.array(BACKGROUNDS[background], np.float32)))
    return Reading(tuple(_measure(colour, mask) for colour, mask in masks), background)


def _background(pixels):
    shares = {
        name: (np.linalg.norm(pixels - np.array(rgb, np.float32), axis=-1) < _NEAR).mean()
        for name, rgb in BACKGROUNDS.items()
    }
    name = max(shares, key=shares.get)
    return name if shares[name] >= _MIN_BACKGROUND else NONE


def _inks(pixels, background):
    """Per colour how much of it lies over the background at each pixel: {colour: [T, H, W] in [0, 1]}.

    Every pixel belongs to the one colour whose mixture with the background comes nearest to it.
    """
    rays = np.array(list(COLOURS.values()), np.float32) - background
    offset = pixels - background
    amount = np.clip(offset @ (rays / (rays**2).sum(1, keepdims=True)).T, 0, 1)
    error = np.linalg.norm(offset[..., None, :] - amount[..., None] * rays, axis=-1)
    nearest = error.argmin(-1)
    return {name: np.where(nearest == i, amount[..., i], 0) for i, name in enumerate(COLOURS)}


def _separate(inks):
    """The things: (colour, mask [T, H, W]) of each, largest first."""
    candidates = []
    for colour, ink in inks.items():
        labels, count = _blobs(ink)
        candidates += [(colour, np.where(labels == k, ink, 0)) for k in range(1, count + 1)]
    areas = [(mask > 0.5).sum((1, 2)).mean() for _, mask in candidates]
    order = sorted(range(len(candidates)), key=lambda i: -areas[i])
    least = max(_MIN_AREA * next(iter(inks.values()))[0].size, _MIN_SHARE * max(areas, default=0))
    return [candidates[i] for i in order if areas[i] >= least]


def _blobs(ink):
    """Labels of blobs connected in space and time: things of one colour in separate lanes never touch."""
    reach = 2 * max(1, round(0.03 * min(ink.shape[1:]))) + 1  # closes gaps in thin strokes, and between frames in 5
    solid = ndimage.binary_dilation(ink > 0.5, np.ones((1, reach, reach)))
    return ndimage.label(solid, np.ones((3, 3, 3)))


def _measure(colour, mask):
    seen = [frame for frame in mask if (frame > 0.5).sum() >= _MIN_AREA * frame.size / 2]
    crops, diameters = zip(*(_normalised(frame) for frame in seen), strict=True)
    diameter = float(np.median(diameters)) / min(mask.shape[1:])
    shape = str(_classifier().predict(np.mean(crops, 0).reshape(1, -1))[0])
    return MeasuredThing(shape, colour, "large" if diameter > _LARGE else "small", _direction(mask))


def _direction(mask):
    """'left', 'right', 'up', 'down', or 'still': the slope of the centre of mass over the frames."""
    frames, height, width = mask.shape
    mass = mask.sum((1, 2))
    seen = np.flatnonzero(mass >= 0.3 * np.median(mass[mass > 0]))
    if len(seen) < 3:
        return STILL
    centres = np.stack(
        [
            (mask.sum(2) @ np.arange(height))[seen] / mass[seen] / height,
            (mask.sum(1) @ np.arange(width))[seen] / mass[seen] / width,
        ]
    )
    down, right = (np.polyfit(seen, centre, 1)[0] * (frames - 1) for centre in centres)
    if max(abs(down), abs(right)) < _MIN_TRAVEL:
        return STILL
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _normalised(frame):
    """(the thing alone, centred and scaled to [_GRID, _GRID], its diameter in pixels) from a mask [H, W]."""
    low_y, high_y = _extent(frame.max(1))
    low_x, high_x = _extent(frame.max(0))
    diameter = max(high_y - low_y, high_x - low_x)
    steps = (np.arange(_GRID) + 0.5) / _GRID - 0.5
    rows = (low_y + high_y) / 2 + 1.1 * diameter * steps - 0.5
    columns = (low_x + high_x) / 2 + 1.1 * diameter * steps - 0.5
    return ndimage.map_coordinates(frame, np.meshgrid(rows, columns, indexing="ij"), order=1), diameter


def _extent(profile):
    """Where a soft profile begins and ends, in pixels with fractions: an edge pixel counts by its cover."""
    inside = np.flatnonzero(profile > 0.5)
    first, last = inside[0], inside[-1]
    low = first - (profile[first - 1] if first > 0 else 0) + (1 - profile[first])
    high = last + 1 + (profile[last + 1] if last + 1 < len(profile) else 0) - (1 - profile[last])
    return low, high


@cache
def _classifier():
    """Shapes and digits from normalised masks; fitted once per process on sharp and blurred drawings, ~1 s."""
    rng = np.random.default_rng(0)
    examples, labels = [], []
    for shape in SHAPES + DIGITS:
        variants = range(GLYPHS_PER_DIGIT) if shape in DIGITS else range(2 * GLYPHS_PER_DIGIT)
        for variant in variants:
            for side in (24, 32):
                for low, high in SIZES.values():
                    centres = side / 2 + rng.uniform(-1, 1, (2, 3))
                    masks = coverage(shape, side * rng.uniform(low, high), *centres, side, side, variant)
                    blurred = [ndimage.gaussian_filter(m, rng.uniform(0.3, 0.8)) for m in masks]
                    examples += [np.mean([_normalised(m)[0] for m in masks], 0), _soft(blurred)]
                    labels += [shape, shape]
    return SVC(C=10).fit(np.array(examples).reshape(len(examples), -1), labels)


def _soft(masks):
    return np.mean([_normalised(np.clip(m / m.max(), 0, 1))[0] for m in masks], 0)
