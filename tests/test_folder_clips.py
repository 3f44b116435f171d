"""The clips of a folder: windows drawn from real files, stills, and files that cannot be read."""

import pickle

import numpy as np
import pytest
from folders import folder_of, source, write_clip, write_metadata
from media import numbers
from PIL import Image

from rise_jax.data.sources import BadClipError
from rise_jax.video import write_png


@pytest.mark.slow
def test_a_window_is_drawn_from_the_clip_and_repeats_with_its_rng(tmp_path):
    write_clip(folder_of(tmp_path) / "0.mp4", count=20, fps=10)
    made = pickle.loads(pickle.dumps(source(tmp_path)))  # as a worker process gets it
    starts = set()
    for seed in range(60):
        sample = made.load(0, np.random.default_rng(seed))
        assert sample.video.shape == (5, 16, 16, 3)
        assert sample.video.dtype == np.uint8
        first = numbers(sample.video)[0]
        assert numbers(sample.video) == list(range(first, first + 5))
        np.testing.assert_array_equal(sample.video, made.load(0, np.random.default_rng(seed)).video)
        starts.add(first)
    assert min(starts) == 0
    assert max(starts) == 15
    assert numbers(made.load(0, None).video) == [7, 8, 9, 10, 11]


def test_frames_are_taken_at_the_rate_asked_for(tmp_path):
    write_clip(folder_of(tmp_path) / "0.mp4", count=40, fps=20)
    assert numbers(source(tmp_path, fps=5).load(0, None).video) == [11, 15, 19, 23, 27]
    assert numbers(source(tmp_path, fps=40).load(0, None).video) == [18, 18, 19, 19, 20]


def test_a_clip_that_is_too_short_holds_its_last_frame(tmp_path):
    write_clip(folder_of(tmp_path) / "0.mp4", count=3, fps=10)
    for rng in (None, np.random.default_rng(0)):
        assert numbers(source(tmp_path).load(0, rng).video) == [0, 1, 2, 2, 2]


def test_one_frame_of_a_clip_is_any_of_them(tmp_path):
    write_clip(folder_of(tmp_path) / "0.mp4", count=6, fps=10)
    made = source(tmp_path, frames=1)
    drawn = {numbers(made.load(0, np.random.default_rng(seed)).video)[0] for seed in range(60)}
    assert drawn == set(range(6))
    assert numbers(made.load(0, None).video) == [2]


def stills(tmp_path):
    write_metadata(tmp_path, [{"file_name": name, "prompt": name} for name in ("a.png", "b.webp", "c.gif", "d.mp4")])
    picture = np.full((20, 30, 3), 9, np.uint8)
    write_png(tmp_path / "a.png", picture)
    Image.fromarray(picture).save(tmp_path / "b.webp", lossless=True)
    later = Image.fromarray(picture + 90)
    Image.fromarray(picture).save(tmp_path / "c.gif", save_all=True, append_images=[later])
    write_clip(tmp_path / "d.mp4")
    return tmp_path


def test_stills_are_images(tmp_path):
    made = source(stills(tmp_path), frames=1)
    for item in range(len(made)):
        assert made.load(item, np.random.default_rng(0)).video.shape == (1, 16, 16, 3)


def test_stills_among_videos_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)2 of 4 clips are still .* 5 frames:.*: a.png\n.*: b.webp\nTake"):
        source(stills(tmp_path))


def test_clips_that_cannot_be_read_say_which_and_why(tmp_path):
    folder_of(tmp_path, 2, split="train")
    (tmp_path / "0.mp4").write_text("this is no video")
    made = source(tmp_path)
    (tmp_path / "1.mp4").unlink()
    for item, reason in ((0, "Invalid data"), (1, "No such file")):
        with pytest.raises(BadClipError, match=reason) as caught:
            made.load(item, None)
        assert caught.value.path == str(tmp_path / f"{item}.mp4")


def test_the_rate_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match=r"data.fps=0 must be above 0"):
        source(folder_of(tmp_path), fps=0)
