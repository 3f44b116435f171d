"""Clips in files: read mp4, webm, gif, webp, png and jpg, write mp4 and png. Also uint8 [0, 255] <-> float [-1, 1].

Video is RGB. In reading, a file's rotation and EXIF orientation are applied, transparency is laid on black, and
grayscale becomes RGB. Writing replaces the file in one rename, so a name never holds half a file.
"""

import io
import itertools
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

VIDEO_SUFFIXES = (".mp4", ".webm")
ANIMATED_SUFFIXES = (".gif", ".webp")  # of one frame or several
STILL_SUFFIXES = (".png", ".jpg", ".jpeg")
_DEFAULT_SECONDS = 0.1  # browsers show a frame that long when its file says 0


class MediaError(ValueError):
    """Media that cannot be decoded. The message is the reason, without the path."""


def to_float(video):
    """uint8 in [0, 255] -> float32 in [-1, 1]; numpy or jax."""
    return video.astype("float32") / 127.5 - 1.0


def to_uint8(video):
    """Float in [-1, 1] -> uint8 in [0, 255], rounded; values outside are clipped. numpy or jax."""
    return ((video + 1.0) * 127.5).round().clip(0, 255).astype("uint8")


def read_video(media: str | os.PathLike | bytes) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """All frames of a file (or of its bytes) and their mean rate per second. Raises OSError or MediaError."""
    with open_media(media) as reader:
        return np.stack([reader.rgb(frame) for _, frame in reader.frames(0.0)]), reader.fps


def is_still(path: str | os.PathLike) -> bool:
    """Whether a readable file holds a single picture; an unreadable one is no still."""
    suffix = Path(path).suffix.lower()
    if suffix not in ANIMATED_SUFFIXES:
        return suffix in STILL_SUFFIXES
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1
    except Exception:  # Pillow raises almost anything on damaged files
        return False


@contextmanager
def open_media(media: str | os.PathLike | bytes) -> "Iterator[_Pictures | _Stream]":
    """A reader of one file, told by content, not by suffix; to be read through once. Raises OSError or MediaError."""
    with io.BytesIO(media) if isinstance(media, bytes) else open(media, "rb") as file:
        head = file.read(12)
        file.seek(0)
        if head.startswith((b"\x89PNG", b"\xff\xd8", b"GIF8")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP"):
            yield _Pictures(file)
            return
        with _decoding():  # a path is read by ffmpeg itself, which is faster than through Python
            container = av.open(file if isinstance(media, bytes) else os.path.abspath(media))
        with container:
            yield _Stream(container)


def frames_at(reader: "_Pictures | _Stream", times: np.ndarray) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The picture shown at each time (seconds from the start, ascending); after the end, the last picture.

    A picture counts from 10 ms or a quarter of a frame before its time: formats round times to as much as 10 ms. A
    stream is entered at the key frame before times[0], so the cost does not grow with its length.
    """
    times = times + min(0.25 / reader.fps, 0.01)
    shown, place = None, 0
    for start, frame in reader.frames(min(times[0], reader.last)):
        while shown is not None and place < len(times) and times[place] < start:
            yield reader.rgb(shown)
            place += 1
        if place == len(times):
            return
        shown = frame
    for _ in times[place:]:
        yield reader.rgb(shown)


@contextmanager
def _decoding():
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # Pillow and ffmpeg raise almost anything on damaged files
        raise MediaError(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}") from error


class _Pictures:
    """GIF, WebP, PNG and JPEG. `fps`: mean rate; `last`: when the last frame starts, in seconds."""

    def __init__(self, file: io.BufferedIOBase):
        with _decoding():
            self._image = Image.open(file)
            # A JPEG of several pictures holds one photo and its depth or brightness map.
            count = self._image.n_frames if self._image.format in ("GIF", "WEBP", "PNG") else 1
            self._seconds = [self._show(number) for number in range(count)]
        self.fps = count / sum(self._seconds)
        self.last = sum(self._seconds[:-1])

    def _show(self, number: int) -> float:
        self._image.seek(number)
        self._image.load()
        return self._image.info.get("duration", 0) / 1000 or _DEFAULT_SECONDS

    def frames(self, start: float) -> Iterator[tuple[float, Image.Image]]:
        """(time in seconds, frame), from the first one: these formats cannot be entered in the middle."""
        for number, time in enumerate(itertools.accumulate(self._seconds[:-1], initial=0.0)):
            with _decoding():
                self._show(number)
                yield time, ImageOps.exif_transpose(self._image)

    def rgb(self, frame: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
        if frame.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut to 255
            frame = Image.fromarray((np.asarray(frame) >> 8).astype(np.uint8))
        if frame.has_transparency_data:
            frame = Image.alpha_composite(Image.new("RGBA", frame.size, "black"), frame.convert("RGBA"))
        return np.asarray(frame.convert("RGB"))


class _Stream:
    """The first video stream of an ffmpeg container. `fps` and `last` as in _Pictures."""

    def __init__(self, container: av.container.InputContainer):
        if not container.streams.video:
            raise MediaError("holds no video")
        self._container, self._video = container, container.streams.video[0]
        self._video.codec_context.thread_count = 1  # the loader already decodes one clip per core
        self._start = self._video.start_time or 0
        rate = self._video.average_rate or self._video.guessed_rate
        if not rate:
            raise MediaError("has no frame rate")
        self.fps = float(rate)
        with _decoding():
            self.last = max(0.0, self._length() - 1 / self.fps)

    def _length(self) -> float:
        """Seconds from the start of the first frame to the end of the last one.

        Matroska says how long a file is, sound and all; how long a stream is, in a tag or not at all. Without one, the packets
        are gone through, undecoded.
        """
        start = float(self._start * self._video.time_base)
        if self._video.duration:
            return float(self._video.duration * self._video.time_base)
        if end := _seconds(self._video.metadata.get("DURATION", "")):
            return end - start
        whole = (self._container.duration or 0) / av.time_base
        if whole and len(self._container.streams) == 1:
            return whole - start
        ends = self._ends()
        found = max(ends.values(), default=0.0)
        if found + 1 < whole:  # a second, since the last packet may not say how long it is
            raise MediaError(f"ends at {found:.2f} s, but its header says {whole:.2f} s")
        self._container.seek(self._start, stream=self._video)
        return ends.get(self._video.index, start) - start

    def _ends(self) -> dict[int, float]:
        """When the last packet of each stream ends, in seconds; leaves the container at its end."""
        ends: dict[int, float] = {}
        for packet in self._container.demux():
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
        return ends

    def frames(self, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """(time in seconds, frame), from the key frame at or before `start`. MediaError if it ends before its time."""
        with _decoding():
            if start > 1:  # within the first second there is nothing to gain
                self._container.seek(self._start + int(start / self._video.time_base), stream=self._video)
            frames = self._container.decode(self._video)
            first = next(frames, None)
            if first is None or self._time(first) > start:  # an index can point too far
                self._container.seek(self._start, stream=self._video)
                frames, first = self._container.decode(self._video), None
            end = -math.inf
            for frame in itertools.chain([first] if first else [], frames):
                end = self._time(frame) + float((frame.duration or 0) * frame.time_base)
                yield self._time(frame), frame
            if end + max(0.1, 2 / self.fps) < self.last + 1 / self.fps:
                raise MediaError(f"ends at {max(end, 0):.2f} s, but its header says {self.last + 1 / self.fps:.2f} s")

    def _time(self, frame: av.VideoFrame) -> float:
        if frame.pts is None:
            raise MediaError("has a frame without a time")
        return float((frame.pts - self._start) * frame.time_base)

    def rgb(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        if frame.is_corrupt:
            raise MediaError(f"is damaged at {self._time(frame):.2f} s")
        with _decoding():
            return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _seconds(clock: str) -> float | None:
    """'00:01:02.500000000', as ffmpeg writes it, in seconds; None for other text."""
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", clock.strip("\0 "))
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else None


def write_video(path: str | os.PathLike, video: UInt8[np.ndarray, "T H W 3"], fps: float) -> None:
    """H.264 in mp4, yuv420p, which every player shows. An odd height or width gets its last row or column twice.

    fps: frames per second, > 0. Raises ValueError for another kind of array, OSError if the file cannot be written.
    """
    check_pixels(video, 4)
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001), options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    write_file(path, file.getvalue())


def write_png(path: str | os.PathLike, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Raises ValueError for another kind of array, OSError if the file cannot be written."""
    check_pixels(image, 3)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    write_file(path, file.getvalue())


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """All of the file or none of it, folders made as needed. OSError with the path and the reason."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {len(content)} bytes: {error.strerror}", str(path)) from error


def check_pixels(array: np.ndarray, rank: int) -> None:
    """Raises ValueError for anything but uint8 [H, W, 3] (rank 3) or [T, H, W, 3] (rank 4), or for an empty one."""
    if array.dtype != np.uint8 or array.ndim != rank or array.shape[-1] != 3 or 0 in array.shape:
        axes = "T, H, W, 3"[3 * (4 - rank) :]
        raise ValueError(f"expected uint8 [{axes}], got {array.dtype} {list(array.shape)}")
