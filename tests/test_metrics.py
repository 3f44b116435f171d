"""Pixel rules on fresh renders and spoiled clips, attributes in texts, intervals, flicker, motion."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from rise_jax.data.attributes import BACKGROUNDS, Scene, SceneDealer, Thing
from rise_jax.data.drawing import render
from rise_jax.metrics import attributes_in_text, compare, flicker, kept, motion_energy, score, wilson
from rise_jax.pixel_rules import MeasuredThing, Reading, read_scene

RED_CIRCLE = Thing("circle", "red", "small", "left")
BLUE_SEVEN = Thing("7", "blue", "small", "right")
ONE, TWO = Scene((RED_CIRCLE,), "black"), Scene((RED_CIRCLE, BLUE_SEVEN), "white")


def fresh_clips(count, frames, side, seed):
    """Scenes of both splits in turn, rendered; no seed or stream here is used by the data."""
    rng = np.random.default_rng((9, seed))
    dealers = [SceneDealer(split, frames > 1, rng) for split in ("train", "heldout")]
    for i in range(count):
        scene = dealers[i % 2].deal()
        yield scene, render(scene, frames, side, side, rng)


def spoil(video, blur, noise, rng):
    soft = ndimage.gaussian_filter(video.astype(float), (0, blur, blur, 0))
    return np.clip(soft + rng.normal(0, noise, video.shape), 0, 255).round().astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frames", "side", "count"),
    [(9, 24, 500), (9, 32, 300), (5, 16, 300), (1, 24, 200), (5, 24, 100), (1, 16, 200), (9, 64, 50), (5, 128, 30)],
)
def test_rules_are_right_on_at_least_99_percent_of_fresh_renders(frames, side, count):
    scores = [score(video, scene) for scene, video in fresh_clips(count, frames, side, seed=side + frames)]
    for name in scores[0]:
        share = np.mean([result[name] for result in scores])
        assert share >= 0.99, (name, share)


@pytest.mark.slow
def test_rules_stand_blur_and_noise():
    rng = np.random.default_rng(0)
    scores = [score(spoil(video, 0.6, 15, rng), scene) for scene, video in fresh_clips(200, 9, 24, seed=1)]
    for name in ("colour", "direction", "count", "background"):
        assert np.mean([result[name] for result in scores]) >= 0.97, name
    assert np.mean([result["shape"] for result in scores]) >= 0.9


def test_nothing_is_found_where_nothing_is():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (9, 24, 24, 3), np.uint8)
    assert not any(score(noise, ONE).values())
    for name, rgb in BACKGROUNDS.items():
        empty = np.broadcast_to(np.array(rgb, np.uint8), (9, 24, 24, 3))
        assert read_scene(empty) == Reading((), name)
        assert not any(score(empty, replace(ONE, background="none")).values())


def test_every_wrong_attribute_is_noticed():
    video = render(ONE, 9, 32, 32, np.random.default_rng(0))
    assert score(video, ONE) == dict.fromkeys(
        ("colour", "shape", "direction", "size", "count", "background", "all"), True
    )
    for wrong in (
        dict(colour="blue"),
        dict(shape="square"),
        dict(shape="0"),
        dict(direction="right"),
        dict(direction="up"),
    ):
        result = score(video, Scene((replace(RED_CIRCLE, **wrong),), "black"))
        assert [name for name, held in result.items() if not held] == [*wrong, "all"]
    assert [name for name, held in score(video, replace(ONE, background="gray")).items() if not held] == [
        "background",
        "all",
    ]
    backwards = score(video[::-1], ONE)
    assert not backwards["direction"] and backwards["colour"] and backwards["shape"]
    assert not score(np.repeat(video[:1], 9, 0), ONE)["direction"]


def test_a_speck_is_no_thing_but_a_second_circle_is():
    video = render(ONE, 9, 32, 32, np.random.default_rng(0))
    speck = video.copy()
    speck[:, :2, :2] = (30, 70, 240)
    assert score(speck, ONE)["count"]
    other = render(
        Scene((replace(RED_CIRCLE, colour="green"), replace(RED_CIRCLE, direction="right")), "black"),
        9,
        32,
        32,
        np.random.default_rng(0),
    )
    assert not score(other, ONE)["count"] and len(read_scene(other).things) == 2
    twins = render(
        Scene((RED_CIRCLE, replace(RED_CIRCLE, direction="right")), "black"), 9, 32, 32, np.random.default_rng(0)
    )
    assert sorted(thing.direction for thing in read_scene(twins).things) == ["left", "right"]


def test_a_clip_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match=r"uint8 video \[T, H, W, 3\], got float32 \[9, 8, 8, 3\]"):
        read_scene(np.zeros((9, 8, 8, 3), np.float32))


def reading(*things, background="white"):
    return Reading(tuple(MeasuredThing(*thing) for thing in things), background)


CIRCLE, SEVEN = ("circle", "red", "small", "left"), ("7", "blue", "small", "right")


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        (reading(SEVEN, CIRCLE), set()),  # the order does not matter
        (reading(CIRCLE), {"colour", "shape", "direction", "size", "count", "all"}),
        (reading(CIRCLE, SEVEN, SEVEN), {"count", "all"}),
        (reading(("circle", "blue", "small", "left"), ("7", "red", "small", "right")), {"colour", "all"}),
        (reading(CIRCLE, ("7", "blue", "large", "right")), {"size"}),  # the size is no part of `all`
        (reading(CIRCLE, SEVEN, background="gray"), {"background", "all"}),
    ],
)
def test_things_are_compared_by_their_best_assignment(found, wrong):
    assert {name for name, held in compare(found, TWO).items() if not held} == wrong


def test_only_attributes_asked_for_are_scored():
    asked = replace(TWO, asked=frozenset({"colour", "shape", "count"}))
    assert compare(reading(CIRCLE, SEVEN, background="none"), asked) == dict(
        colour=True, shape=True, count=True, all=True
    )


@pytest.mark.parametrize(
    ("text", "things", "background"),
    [
        (
            "A large red circle moves to the left across a plain black background at a steady speed.",
            [("circle", "red", "large", "left")],
            "black",
        ),
        (
            "A blue number 7 moves up and a small green square moves down on a plain grey background.",
            [("7", "blue", "none", "up"), ("square", "green", "small", "down")],
            "gray",
        ),
        (
            "a red circle and a blue square move downwards",
            [("circle", "red", "none", "down"), ("square", "blue", "none", "down")],
            "none",
        ),
        ("A yellow triangle moves from the left to the right.", [("triangle", "yellow", "none", "right")], "none"),
        ("The number seven slides up, then down.", [("7", "none", "none", "none")], "none"),
        ("A green circle, the background is white.", [("circle", "green", "none", "none")], "white"),
        ("A red arrow moves left on a plain red background.", [], "none"),
        ("", [], "none"),
    ],
)
def test_attributes_are_read_from_captions(text, things, background):
    assert attributes_in_text(text) == Reading(tuple(MeasuredThing(*thing) for thing in things), background)


def test_kept_says_what_a_rephrasing_lost():
    result = kept("A small red square moves left on a plain black background.", ONE)
    assert result == dict(colour=True, shape=False, direction=True, size=True, count=True, background=True, all=False)


def test_wilson_intervals_agree_with_published_values():
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    for (successes, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        np.testing.assert_allclose(wilson(successes, n), expected, atol=5e-5)
    assert wilson(20, 20)[1] == 1
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)


def test_flicker_and_motion_energy_of_simple_clips():
    ramp = np.broadcast_to(np.arange(0, 50, 10, dtype=np.uint8)[:, None, None, None], (5, 4, 4, 3))
    blink = np.broadcast_to(np.array([0, 10, 0, 10, 0], np.uint8)[:, None, None, None], (5, 4, 4, 3))
    assert (flicker(ramp), motion_energy(ramp)) == (0, 10)
    assert (flicker(blink), motion_energy(blink)) == (10, 10)
    assert (flicker(ramp[:2]), motion_energy(ramp[:1])) == (0, 0)
