"""Media files for the tests: pictures of few colours, and videos that ffmpeg encodes."""

from fractions import Fraction

import av
import numpy as np

from rise_jax.video import frames_at, open_media

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
QUARTERS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(16, 0).repeat(16, 1)  # one colour per corner
SAMPLES = 48000  # of sound, per second


def flat(colours, height=32, width=48):
    """Frames of one colour each."""
    return np.broadcast_to(np.array(colours, np.uint8)[:, None, None], (len(colours), height, width, 3)).copy()


def grays(count):
    """Frame n has level 4 n."""
    return flat([(4 * n,) * 3 for n in range(count)])


def numbers(frames):
    """Which frame of `grays` each one is."""
    return [round(float(np.mean(frame)) / 4) for frame in frames]


def encode(path, frames, rate=10, codec="libx264", milliseconds=None, container=None, noise=0, **options):
    """A file of ffmpeg's own making; with `milliseconds`, the time of each frame; with `noise`, so many seconds of it to hear."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate, options={name: str(value) for name, value in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        sound = file.add_stream("libopus", SAMPLES) if noise else None
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = milliseconds[number] if milliseconds else round(1000 * number / rate)
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if sound:
            hear(file, sound, noise)
    return path


def hear(file, sound, seconds):
    """Noise from 0 s on, in packets of 20 ms."""
    rng, length = np.random.default_rng(0), SAMPLES // 50
    for number in range(50 * seconds):
        heard = rng.integers(-9999, 9999, (1, length)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(heard, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SAMPLES, number * length, Fraction(1, SAMPLES)
        file.mux(sound.encode(frame))
    file.mux(sound.encode())


def read_at(path, times):
    with open_media(path) as reader:
        return numbers(frames_at(reader, np.array(times)))
