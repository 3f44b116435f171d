"""Webm with sound that goes on when the pictures have ended: it says how long it is as a whole, and of its streams only in a tag."""

import av
import numpy as np
import pytest
from media import encode, grays, numbers, read_at

from rise_jax.video import MediaError, frames_at, open_media, read_video


def heard(path, tagged=True, **changes):
    """30 pictures in 3 s with 6 s of noise; without its tags, as other programs than ffmpeg write it."""
    encode(path, grays(30), codec="libvpx-vp9", noise=6, **{"container": {"write_crc32": "0"}} | changes)
    if not tagged:
        content = path.read_bytes()
        assert b"DURATION" in content
        path.write_bytes(content.replace(b"DURATION", b"ABSENTED"))
    return path


@pytest.mark.parametrize("tagged", [True, False])
def test_longer_sound_is_no_damage(tmp_path, tagged):
    path = heard(tmp_path / "a.webm", tagged)
    with av.open(str(path)) as container:
        assert container.duration > 5.9 * av.time_base and container.streams.video[0].duration is None
    with open_media(path) as reader:
        assert reader.last == pytest.approx(2.9, abs=2e-2)
        assert numbers(frames_at(reader, np.array([2.5, 2.7, 2.9]))) == [25, 27, 29]
    assert numbers(read_video(path.read_bytes())[0]) == list(range(30))


@pytest.mark.parametrize("start", [0.0, 0.9, 1.1, 2.9])
def test_pictures_are_found_after_the_packets_were_gone_through(tmp_path, start):
    assert read_at(heard(tmp_path / "a.webm", tagged=False, g=5), [start]) == [round(10 * start)]


@pytest.mark.parametrize("live", ["0", "1"])
@pytest.mark.parametrize("tagged", [True, False])
def test_pictures_that_begin_after_the_sound(tmp_path, tagged, live):
    container = {"write_crc32": "0", "live": live}
    late = {"milliseconds": [*range(2000, 5000, 100)], "container": container}
    path = heard(tmp_path / "a.webm", tagged or live == "1", **late)
    with open_media(path) as reader:
        assert reader.last == pytest.approx(2.9, abs=2e-2)
        assert numbers(frames_at(reader, np.array([0.0, 1.5, 2.9]))) == [0, 15, 29]


@pytest.mark.parametrize("tagged", [True, False])
def test_a_file_cut_short_is_damage(tmp_path, tagged):
    path = heard(tmp_path / "a.webm", tagged)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 4])
    with pytest.raises(MediaError, match=rf"ends at [012]\.\d\d s, but its header says {'3.0' if tagged else '6.0'}"):
        read_video(path)
