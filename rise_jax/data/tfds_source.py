"""Clips from a prepared TensorFlow Datasets folder, without tensorflow: `data.source=tfds:NAME data.path=DATA_DIR`.

The dataset is stored as ArrayRecord (`file_format='array_record'`) and has the features

    video or image   Tensor uint8 [T, H, W, 3] or [H, W, 3], or the bytes of a file as a Tensor of objects, shape ()
    prompt, caption, rephrased    Text, read as in `sources.text_of`; `text` is another name for prompt
    fps              optional number, shape (): frames per second of a video Tensor; data.fps where there is none

Its split 'train' is used for training, 'validation' or else 'test' as held out.
"""

import math
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from rise_jax.data.sources import BadClipError, Sample, Text, nearest, text_of, unique_texts
from rise_jax.data.transforms import clip_times, read_clip, resize_cover
from rise_jax.video import MediaError

SPLITS = {"train": ("train",), "heldout": ("validation", "test")}
MEDIA = ("video", "image")
TEXTS = ("prompt", "caption", "rephrased", "text")


class TfdsSource:
    """Windows of `frames` frames at `fps`, resized and cropped to height x width, as FolderSource takes them.

    Reads the dataset through once when made, for its texts. Raises ValueError for a dataset, split or feature that is
    not there or of another kind, and for images where `frames` is above 1, naming the valid choices.
    """

    def __init__(
        self, name: str, *, path: str | None, frames: int, height: int, width: int, fps: float, split: str = "train"
    ):
        if not fps > 0:
            raise ValueError(f"data.fps={fps} must be above 0 frames per second")
        self.shape, self.fps = (frames, height, width, 3), fps
        self.title, self._examples = _open(name, path, split)
        features = self._examples.dataset_info.features
        self._media = _media(self.title, features, frames)
        _check_kinds(self.title, features)
        self.texts, self._text = unique_texts(_text(self.name(item), self._examples[item]) for item in range(len(self)))

    def __len__(self) -> int:
        return len(self._examples)

    def name(self, item: int) -> str:
        return f"{self.title}[{item}]"

    def load(self, item: int, rng: np.random.Generator | None) -> Sample:
        example = self._examples[item]
        media = example[self._media]
        if isinstance(media, bytes):
            try:
                video = read_clip(media, self.shape, self.fps, rng)
            except MediaError as error:
                raise BadClipError(self.name(item), str(error)) from error
        else:
            rate = example.get("fps")
            rate = self.fps if rate is None else float(rate)
            self._check_media(item, media, rate)
            video = self._window(media, rate, rng)
        return Sample(video, int(self._text[item]))

    def _check_media(self, item: int, media: UInt8[np.ndarray, "... H W 3"], rate: float) -> None:
        if not media.size:
            raise BadClipError(self.name(item), f"its {self._media} is empty: {list(media.shape)}")
        if not 0 < rate < math.inf:
            raise BadClipError(self.name(item), f"its fps is {rate:g}; it must be a number above 0")

    def _window(
        self, media: UInt8[np.ndarray, "... H W 3"], rate: float, rng: np.random.Generator | None
    ) -> UInt8[np.ndarray, "T H W 3"]:
        frames, height, width, _ = self.shape
        media = media.reshape(-1, *media.shape[-3:])
        times = clip_times((len(media) - 1) / rate, rate, frames, self.fps, rng)
        shown = np.minimum(times * rate + 0.25, len(media) - 1).astype(int)
        return np.stack([resize_cover(media[place], height, width) for place in shown])


def _open(name: str, path: str | None, split: str):
    """(title for messages, random-access examples of one split)."""
    if split not in SPLITS:
        raise ValueError(f"data split {split!r} is unknown; tfds has {' and '.join(SPLITS)}")
    try:
        splits = tfds.data_source(name, data_dir=path, download=False)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tfds:{name} is not in data.path={path}{nearest(name, _names(path))}") from error
    except NotImplementedError as error:  # tfds's reason says which file formats have random access
        raise ValueError(f"tfds:{name} in data.path={path} cannot be read: {error}") from error
    if not splits:
        raise ValueError(
            f"tfds:{name} is not prepared in data.path={path or ''!r}: prepare it there, or give the folder it is in"
        )
    found = [name for name in SPLITS[split] if name in splits]
    if not found:
        raise ValueError(
            f"tfds:{name} has no split {' or '.join(SPLITS[split])} for {split!r}; its splits: {', '.join(splits)}"
        )
    return f"tfds:{name}/{found[0]}", splits[found[0]]


def _names(path: str | None) -> list[str]:
    prepared = [entry.name for entry in Path(path).iterdir()] if path and Path(path).is_dir() else []
    return prepared + tfds.list_builders(with_community_datasets=False)


def _media(title: str, features: tfds.features.FeaturesDict, frames: int) -> str:
    """The name of the feature that holds the media, checked."""
    found = [name for name in MEDIA if name in features]
    if len(found) != 1:
        raise ValueError(f"{title} needs one feature named video or image; its features: {', '.join(sorted(features))}")
    name = found[0]
    feature, rank = features[name], {"video": 4, "image": 3}[name]
    shape = tuple(feature.shape)
    encoded = np.dtype(feature.np_dtype).hasobject and shape == ()
    if not encoded and (feature.np_dtype != np.uint8 or len(shape) != rank or shape[-1] != 3):
        axes = "[T, H, W, 3]" if name == "video" else "[H, W, 3]"
        raise ValueError(
            f"{title}: {name} is {np.dtype(feature.np_dtype)} {list(shape)}; "
            f"it must be uint8 {axes}, or object [] with the bytes of a file"
        )
    if name == "image" and frames > 1:
        raise ValueError(f"{title} holds still images, which cannot fill {frames} frames; train on it with 1 frame")
    return name


def _check_kinds(title: str, features: tfds.features.FeaturesDict) -> None:
    """Raises ValueError for a text that is none, such as a list of them or a label, and for a rate that is no number."""
    needed = dict.fromkeys(TEXTS, ("Text", "O")) | {"fps": ("a Scalar of an integer or floating dtype", "iuf")}
    for name, (what, kinds) in needed.items():
        if name in features and not _holds_one(features[name], kinds):
            raise ValueError(f"{title}: the feature {name} is {features[name]!r}; it must be {what}")


def _holds_one(feature: tfds.features.FeatureConnector, kinds: str) -> bool:
    """Whether it is a tensor of shape () and of one of numpy's kinds of dtype."""
    one = isinstance(feature, tfds.features.Tensor) and feature.shape == ()
    return one and np.dtype(feature.np_dtype).kind in kinds


def _text(name: str, example: dict) -> Text:
    cells = {column: example[column].decode() for column in TEXTS if example.get(column)}
    cells.setdefault("prompt", cells.pop("text", ""))
    text = text_of(cells)
    if text is None:
        raise ValueError(f"{name} has no text in prompt, caption or text; its features: {', '.join(sorted(example))}")
    return text
