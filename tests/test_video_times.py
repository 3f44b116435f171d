"""Which frame is shown at a time, of even and uneven clips, and that a late window is found without reading the front."""

import numpy as np
import pytest
from media import encode, grays, read_at

from rise_jax.video import MediaError, frames_at, open_media


def test_frames_are_those_shown_at_the_time(tmp_path):
    path = encode(tmp_path / "a.mp4", grays(20), rate=10)
    assert read_at(path, np.arange(5) / 10) == [0, 1, 2, 3, 4]  # its own rate
    assert read_at(path, 0.3 + np.arange(4) / 5) == [3, 5, 7, 9]  # half of it
    assert read_at(path, np.arange(5) / 20) == [0, 0, 1, 1, 2]  # twice
    assert read_at(path, [1.7, 1.9, 2.1, 9.0]) == [17, 19, 19, 19]  # past the end


def test_frames_of_an_uneven_clip_are_those_shown_at_the_time(tmp_path):
    path = encode(tmp_path / "a.mp4", grays(5), milliseconds=[0, 100, 700, 800, 1000])
    assert read_at(path, [0.0, 0.3, 0.5, 0.75, 0.9, 1.0]) == [0, 1, 1, 2, 3, 4]


def test_a_long_last_frame_is_no_damage(tmp_path):
    path = encode(tmp_path / "a.mp4", grays(12), milliseconds=[*range(0, 1000, 100), 5000, 9000])
    assert read_at(path, [0.5, 4.0, 5.0, 8.9, 9.0]) == [5, 9, 10, 10, 11]


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_every_start_finds_the_same_frames_as_reading_from_the_front(tmp_path, suffix, codec):
    path = encode(tmp_path / f"a.{suffix}", grays(60), codec=codec, g=12)
    for start in range(60):
        assert read_at(path, [start / 10]) == [start]


def test_a_late_window_does_not_read_the_front(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3)).astype(np.uint8)
    noise[80:] = 128
    path = encode(tmp_path / "a.mp4", noise, g=10, bf=0, crf=30)
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin : begin + len(content) // 2] = bytes(len(content) // 2)  # the front half cannot be decoded
    (tmp_path / "b.mp4").write_bytes(content)
    with open_media(tmp_path / "b.mp4") as reader:
        late = list(frames_at(reader, np.array([8.5, 9.5])))
    assert np.abs(np.array(late).astype(int) - 128).max() <= 4
    with open_media(tmp_path / "b.mp4") as reader, pytest.raises(MediaError):
        list(frames_at(reader, np.array([0.0, 9.5])))


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_times_count_from_the_first_frame(tmp_path, suffix, codec):
    path = encode(tmp_path / f"a.{suffix}", grays(30), codec=codec, milliseconds=[*range(3000, 6000, 100)], g=5)
    assert read_at(path, [0.0, 0.5, 1.5, 2.9]) == [0, 5, 15, 29]
    assert read_at(path, [2.0, 2.5]) == [20, 25]
