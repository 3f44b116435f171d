"""What a scene is: one or two things, each with a shape or digit, a colour, a size and a direction, on a plain background.

The split into training and held-out combinations of (shape, colour, direction) is decided here and nowhere else.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

SHAPES = ("circle", "square", "triangle")
DIGITS = tuple("0123456789")
COLOURS = {  # RGB, [0, 255]; pairwise at least 120 apart, so that blurred pixels still have one nearest colour
    "red": (230, 30, 30),
    "blue": (30, 70, 240),
    "green": (25, 190, 50),
    "yellow": (250, 225, 30),
    "purple": (180, 40, 215),
}
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
SIZES = {
    "small": (0.34, 0.38),
    "large": (0.52, 0.57),
}  # range of the diameter, as a fraction of the frame's shorter side
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}  # steps along (height, width)
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
STILL = "still"  # the direction of things in images
TWO_THINGS = 0.25  # share of the scenes
WITH_DIGIT = 0.30  # share of the scenes, one- and two-thing scenes alike


@dataclass(frozen=True)
class Thing:
    """One moving shape or digit; `shape` is one of SHAPES or DIGITS."""

    shape: str
    colour: str
    size: str
    direction: str


@dataclass(frozen=True)
class Scene:
    """One or two things of different colours on a background.

    Two things pass each other in opposite directions: the first in the upper or left half, the second in the other.
    `asked` lists the attributes that the prompt names: colour, shape, count always, direction in videos, sometimes
    background and size. `language` is that of the prompt.
    """

    things: tuple[Thing, ...]
    background: str
    asked: frozenset[str] = frozenset({"colour", "shape", "direction", "count", "background", "size"})
    language: str = "en"


def is_held_out(shape: str, colour: str, direction: str) -> bool:
    """True for a quarter of the combinations: one direction of each (shape, colour), never a whole pair of values."""
    place = (SHAPES + DIGITS).index(shape) + list(COLOURS).index(colour) + list(DIRECTIONS).index(direction)
    return place % 4 == 0


class _Deck:
    """Deals cards in random order; each card once before any comes again, so that all values are equally frequent."""

    def __init__(self, cards, rng):
        self.cards, self.rng, self.left = list(cards), rng, []

    def deal(self, fits=lambda card: True):
        """The next card that fits."""
        for card in reversed(self.left):
            if fits(card):
                self.left.remove(card)
                return card
        self.left = [self.cards[i] for i in self.rng.permutation(len(self.cards))] + self.left
        return self.deal(fits)


class SceneDealer:
    """Endless scenes of one split ('train' or 'heldout'), every attribute equally frequent among its kind."""

    def __init__(self, split: str, moving: bool, rng: np.random.Generator):
        held_out = split == "heldout"
        combinations = [c for c in product(SHAPES + DIGITS, COLOURS, DIRECTIONS) if is_held_out(*c) == held_out]
        self.shapes = _Deck([c for c in combinations if c[0] in SHAPES], rng)
        self.digits = _Deck([c for c in combinations if c[0] in DIGITS], rng)
        one, two = 40 * (1 - TWO_THINGS), 40 * TWO_THINGS
        kinds = [(count, i < WITH_DIGIT * share) for count, share in ((1, one), (2, two)) for i in range(round(share))]
        self.kinds = _Deck(kinds, rng)
        self.backgrounds = _Deck(BACKGROUNDS, rng)
        self.sizes = _Deck(SIZES, rng)
        self.moving, self.rng = moving, rng

    def deal(self) -> Scene:
        """The next scene; two things are small, differ in colour and pass each other in opposite directions."""
        count, with_digit = self.kinds.deal()
        first = (self.digits if with_digit else self.shapes).deal()
        chosen = [first]
        if count == 2:
            chosen.append(self.shapes.deal(lambda c: c[1] != first[1] and c[2] == OPPOSITE[first[2]]))
            chosen = [chosen[i] for i in self.rng.permutation(2)]
        size = self.sizes.deal() if count == 1 else "small"
        things = [
            Thing(shape, colour, size, direction if self.moving else STILL) for shape, colour, direction in chosen
        ]
        return Scene(tuple(things), self.backgrounds.deal())
