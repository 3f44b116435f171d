"""The embedded data set: clips rendered on the fly, a bounded list of texts, deterministic in (seed, index)."""

import numpy as np

from rise_jax.data.attributes import Scene, SceneDealer
from rise_jax.data.captions import write_text
from rise_jax.data.drawing import render
from rise_jax.data.sources import Sample, Text

SPLITS = ("train", "heldout")
MAX_TEXTS = 1000
MIN_SIDE = 16  # pixels; below it digits cannot be told apart
RENDERINGS_PER_TEXT = 64  # in one epoch, unless `length` says otherwise


class ScenesSource:
    """Moving shapes and handwritten digits with prompts and captions; see `attributes` for what varies.

    Sample `i` shows text `i % num_texts`, so that every epoch covers all texts evenly.

    Args:
        split: 'train', or 'heldout' for combinations of (shape, colour, direction) and phrasings never in 'train'.
        num_texts: unique (prompt, caption) pairs, 1 to 1000.
        frames: 1 for images, whose texts say nothing of motion, or 4n + 1.
        height, width: pixels, at least 16.
        length: samples per epoch; by default 64 renderings of every text.
    Raises:
        ValueError: a value out of range; the message names the nearest valid one.
    """

    def __init__(
        self,
        split: str = "train",
        num_texts: int = 768,
        frames: int = 9,
        height: int = 32,
        width: int = 32,
        seed: int = 0,
        length: int | None = None,
    ):
        _check(split, num_texts, frames, height, width, length)
        self.frames, self.height, self.width, self.seed = frames, height, width, seed
        self.shape = (frames, height, width, 3)
        self.length = RENDERINGS_PER_TEXT * num_texts if length is None else length
        self._stream = SPLITS.index(split)
        self.texts, self.scenes = _compose(split, num_texts, frames > 1, np.random.default_rng((self._stream, seed)))

    def __len__(self) -> int:
        return self.length

    def name(self, item: int) -> str:
        return f"scene {item}"

    def load(self, item: int, rng: np.random.Generator | None) -> Sample:
        """Sample in [0, length); `rng` draws the rendering, None gives the sample's one fixed rendering."""
        if not 0 <= item < self.length:
            raise IndexError(f"sample {item} of {self.length}")
        text = item % len(self.texts)
        rng = rng or np.random.default_rng((self._stream, self.seed, item))
        return Sample(render(self.scenes[text], self.frames, self.height, self.width, rng), text)


def _compose(split, num_texts, moving, rng) -> tuple[list[Text], list[Scene]]:
    dealer = SceneDealer(split, moving, rng)
    written: dict[Text, Scene] = {}
    while len(written) < num_texts:
        scene = dealer.deal()
        for _ in range(20):  # repeated only for a text that exists already; images have the fewest
            text, described = write_text(scene, split, rng)
            if text not in written:
                written[text] = described
                break
    return list(written), list(written.values())


def _check(split, num_texts, frames, height, width, length):
    if split not in SPLITS:
        raise ValueError(f"data split {split!r} is unknown; scenes has {' and '.join(SPLITS)}")
    if not 1 <= num_texts <= MAX_TEXTS:
        nearest = min(max(num_texts, 1), MAX_TEXTS)
        raise ValueError(f"num_texts is {num_texts}, the range is 1 to {MAX_TEXTS}; nearest valid: {nearest}")
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames is {frames}, not 4n + 1; nearest valid: {max(4 * round((frames - 1) / 4) + 1, 1)}")
    if min(height, width) < MIN_SIDE:
        raise ValueError(f"{height}x{width} pixels are too few for scenes; the smallest side allowed is {MIN_SIDE}")
    if length is not None and length < 1:
        raise ValueError(f"length is {length} samples; the smallest is 1")
