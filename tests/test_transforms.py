"""How windows of time and pictures are cut."""

import numpy as np
import pytest

from rise_jax.data.transforms import clip_times, resize_cover


def test_clip_times_stay_inside_and_reach_both_ends():
    rng = np.random.default_rng(0)
    times = np.array([clip_times(9.9, 10, 17, 8, rng) for _ in range(3000)])
    np.testing.assert_allclose(np.diff(times), 1 / 8, atol=1e-12)
    assert times.min() == 0
    assert 9.8 < times.max() <= 9.9 + 1e-9
    counts = np.bincount(np.round(times[:, 0] * 10).astype(int))
    assert len(counts) == 80  # 9.9 s less the window of 2 s, in frames of 0.1 s, both ends
    assert counts.min() > 10
    np.testing.assert_allclose(clip_times(9.9, 10, 17, 8, None), 3.9 + np.arange(17) / 8)


def test_clip_times_of_a_window_that_just_fits():
    for rate in (8, 23.976, 29.97, 30, 60):
        times = clip_times(16 / rate, rate, 17, rate, np.random.default_rng(0))
        np.testing.assert_allclose(times, np.arange(17) / rate)


@pytest.mark.parametrize("rate", [8, 23.976, 29.97, 30, 60])
def test_clip_times_count_the_windows_of_media_of_any_rate(rate):
    last = (16 + 6) / rate  # frames before the last one: 16 of the window and 6 to spare
    starts = {round(clip_times(last, rate, 17, rate, np.random.default_rng(n))[0] * rate) for n in range(80)}
    assert starts == set(range(7))
    np.testing.assert_allclose(clip_times(last, rate, 17, rate, None)[0], 3 / rate)


def test_resize_cover_crops_the_centre():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, :20], picture[:, 20:40], picture[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    wide, high = resize_cover(picture, 10, 10), resize_cover(picture.transpose(1, 0, 2), 7, 7)
    for middle in (wide[:, 1:-1], high[1:-1]):  # the outermost pixels may see a little of what is cut off
        np.testing.assert_array_equal(middle, np.broadcast_to([0, 255, 0], middle.shape))
    assert (wide[:, [0, -1], 1] > 220).all()
    assert (high[[0, -1], :, 1] > 220).all()


def test_resize_cover_keeps_a_picture_of_the_right_size_and_flips_with_it():
    picture = np.random.default_rng(0).integers(0, 256, (24, 36, 3)).astype(np.uint8)
    np.testing.assert_array_equal(resize_cover(picture, 24, 36), picture)
    flipped = resize_cover(np.ascontiguousarray(picture[::-1, ::-1]), 10, 9)
    assert np.abs(resize_cover(picture, 10, 9)[::-1, ::-1].astype(int) - flipped).max() <= 1


def test_resize_cover_averages_what_it_makes_smaller():
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(resize_cover(checks, 8, 8).astype(int) - 127.5).max() <= 2


# Quotients that rounding carries past a side of the picture: (rows, columns) of the source, (height, width) of the clip.
ROUNDED_UP = [((1000, 2000), (480, 832)), ((1296, 1936), (480, 832)), ((53, 26), (49, 24)), ((26, 53), (24, 49))]


@pytest.mark.parametrize(("source", "size"), ROUNDED_UP)
def test_resize_cover_never_asks_for_more_than_the_picture(source, size):
    assert resize_cover(np.zeros((*source, 3), np.uint8), *size).shape == (*size, 3)


@pytest.mark.parametrize("size", [(24, 24), (49, 24), (24, 49), (30, 52)])
def test_resize_cover_takes_pictures_of_every_size(size):
    for rows in range(1, 60):
        for columns in range(1, 60):
            assert resize_cover(np.zeros((rows, columns, 3), np.uint8), *size).shape == (*size, 3)
