"""What the loader asks of a source of clips, and the helpers that sources share. numpy only."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8


class Text(NamedTuple):
    """One caption: what a user would type, and its long form (None where the frozen LLM still has to write it)."""

    prompt: str
    rephrased: str | None


class TooLong(ValueError):
    """A text over its budget; `tokens` is how many it has."""

    def __init__(self, message: str, tokens: int):
        super().__init__(message)
        self.tokens = tokens


class Sample(NamedTuple):
    """One clip, uint8 in [0, 255], and the index of its caption in the `texts` of its source."""

    video: UInt8[np.ndarray, "T H W 3"]
    text: int


class Source(Protocol):
    """A finite set of captioned clips of one shape. Kept picklable, for worker processes."""

    texts: list[Text]  # distinct
    shape: tuple[int, int, int, int]  # T, H, W, 3

    def __len__(self) -> int:
        """Items per epoch."""

    def load(self, item: int, rng: np.random.Generator | None) -> Sample:
        """Item in [0, len). A function of (item, state of rng): `rng` draws what varies from epoch to epoch, such as
        the window of time; None asks for the one in the centre, for evaluation. Raises BadClipError."""

    def name(self, item: int) -> str:
        """What a message calls this item: a path, or a place in a dataset."""


class BadClipError(Exception):
    """A clip that cannot be read: its name, and why."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def identity_of(source: Source) -> dict:
    """What a run's order of samples depends on: how many clips there are, and their texts."""
    texts = hashlib.sha256()
    for text in source.texts:
        texts.update(json.dumps(text).encode())
    return {"count": len(source), "texts": texts.hexdigest()}


def check_clips(who: str, then: dict, source: Source) -> None:
    """Raises ValueError where the clips of a run that goes on are not those that it began with, `then`."""
    now = identity_of(source)
    if now != then:
        raise ValueError(
            f"{who} began with other data: {then['count']} clips then, {now['count']} now, and their texts are "
            f"{'the same' if now['texts'] == then['texts'] else 'others'}. Put the captions back as they were, or start anew with "
            "another --workdir and run.init_from"
        )


def text_of(cells: Mapping[str, str]) -> Text | None:
    """The caption in the columns prompt, caption, rephrased (blank = absent); None without one of the first two.

    `caption` is the prompt where there is none, and its long form where there is one; `rephrased` goes before it.
    """
    prompt, caption, rephrased = (cells.get(column, "").strip() for column in ("prompt", "caption", "rephrased"))
    return Text(prompt or caption, rephrased or (prompt and caption) or None) if prompt or caption else None


def unique_texts(captions: Iterable[Text]) -> tuple[list[Text], np.ndarray]:
    """Distinct captions in order of first use, and for each caption its index among them (int32 [n])."""
    places: dict[Text, int] = {}
    index = np.array([places.setdefault(caption, len(places)) for caption in captions], np.int32)
    return list(places), index


def nearest(name: str, choices: Iterable[str]) -> str:
    """' (nearest: ...)' for an error message, or '' where nothing is near."""
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f" (nearest: {near[0]})" if near else ""
