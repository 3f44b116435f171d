"""Measures of finished videos and of rephrased texts: attributes against the prompt, intervals, flicker, motion.

The size is measured by itself and is no part of `all`, though prompts may name one.
"""

import re
from itertools import permutations
from math import sqrt

import numpy as np

from rise_jax.data.attributes import BACKGROUNDS, COLOURS, DIGITS, SHAPES, SIZES, Scene
from rise_jax.pixel_rules import MeasuredThing, Reading, read_scene

_THING_ATTRIBUTES = ("colour", "shape", "direction", "size")
_NEEDED_FOR_ALL = ("colour", "shape", "direction", "count", "background")
_DIRECTION_WORDS = {
    "left": "left",
    "leftward": "left",
    "leftwards": "left",
    "right": "right",
    "rightward": "right",
    "rightwards": "right",
    "up": "up",
    "upward": "up",
    "upwards": "up",
    "top": "up",
    "down": "down",
    "downward": "down",
    "downwards": "down",
    "bottom": "down",
}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def compare(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Which of the attributes asked for (`scene.asked`) the reading has, and `all`: whether it has all of them, the size aside.

    Things are matched by the assignment with most agreements. An attribute holds when it holds of every thing
    asked for; a surplus thing spoils `count` only.
    """
    wanted = scene.things
    found = list(reading.things) + [None] * (len(wanted) - len(reading.things))
    asked = [name for name in _THING_ATTRIBUTES if name in scene.asked]
    agreements = [
        [
            [thing is not None and getattr(thing, name) == getattr(want, name) for name in asked]
            for thing, want in zip(order, wanted, strict=True)
        ]
        for order in permutations(found, len(wanted))
    ]
    best = np.array(max(agreements, key=lambda rows: sum(map(sum, rows)))).reshape(len(wanted), len(asked))
    result = {name: bool(best[:, i].all()) for i, name in enumerate(asked)}
    if "count" in scene.asked:
        result["count"] = len(reading.things) == len(wanted)
    if "background" in scene.asked:
        result["background"] = reading.background == scene.background
    result["all"] = all(result[name] for name in _NEEDED_FOR_ALL if name in result)
    return result


def score(video: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which attributes asked for a finished video [T, H, W, 3] uint8 shows; see `compare`."""
    return compare(read_scene(video), scene)


def kept(text: str, scene: Scene) -> dict[str, bool]:
    """Which attributes asked for an English rephrasing still states; see `compare`."""
    return compare(attributes_in_text(text), scene)


def attributes_in_text(text: str) -> Reading:
    """The attributes that an English caption states; 'none' where it is silent or contradicts itself.

    A thing is a shape word, or a digit; its colour and size stand before it, its direction after it. Where only the
    last thing has a direction ('a circle and a square move up') it holds for all.
    """
    words = re.findall(r"[a-z]+|\d+", text.lower().replace("grey", "gray"))
    background = "none"
    before, things = {}, []
    for place, word in enumerate(words):
        if word in BACKGROUNDS:
            near = words[max(place - 2, 0) : place + 2]
            background = word if {"background", "backdrop"} & set(near) else background
        elif word in COLOURS:
            before["colour"] = word
        elif word in SIZES:
            before["size"] = word
        elif (shape := _shape(word, words[place - 1] if place else "")) is not None:
            things.append({**before, "shape": shape, "directions": set()})
            before = {}
        elif word in _DIRECTION_WORDS and things and "from" not in words[max(place - 2, 0) : place]:
            things[-1]["directions"].add(_DIRECTION_WORDS[word])
    return Reading(tuple(_stated(thing, things[-1]) for thing in things), background)


def _shape(word, previous):
    if word in SHAPES or word in DIGITS:
        return word
    if word in _NUMBER_WORDS and previous in ("digit", "number"):
        return str(_NUMBER_WORDS.index(word))
    return None


def _stated(thing, last):
    directions = thing["directions"] or last["directions"]
    direction = next(iter(directions)) if len(directions) == 1 else "none"
    return MeasuredThing(thing["shape"], thing.get("colour", "none"), thing.get("size", "none"), direction)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share: Wilson 1927, JASA 22, p. 209."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: need 0 <= successes <= n and n >= 1")
    z = 1.959964
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def motion_energy(video: np.ndarray) -> float:
    """Mean absolute change from frame to frame, in levels of [0, 255]; 0 for one frame."""
    return _mean_size(np.diff(video.astype(np.float32), axis=0))


def flicker(video: np.ndarray) -> float:
    """Mean distance of a frame from the mean of its neighbours, in levels of [0, 255]; 0 for fewer than 3 frames."""
    return _mean_size(np.diff(video.astype(np.float32), n=2, axis=0) / 2)


def _mean_size(change):
    return float(np.abs(change).mean()) if change.size else 0.0
