"""The scenes data: its split, its balance, its determinism, and what the renderer draws."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits

from rise_jax.data.attributes import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
)
from rise_jax.data.drawing import GLYPHS_PER_DIGIT, coverage, glyphs, render
from rise_jax.data.scenes import MAX_TEXTS, ScenesSource

COMBINATIONS = list(product(SHAPES + DIGITS, COLOURS, DIRECTIONS))


@pytest.fixture(scope="module")
def train():
    return ScenesSource("train")


@pytest.fixture(scope="module")
def heldout():
    return ScenesSource("heldout", num_texts=400)


def combinations(source):
    return {(thing.shape, thing.colour, thing.direction) for scene in source.scenes for thing in scene.things}


def test_at_least_a_fifth_of_the_combinations_is_held_out_and_no_pair_of_values_with_it():
    kept = [c for c in COMBINATIONS if not is_held_out(*c)]
    assert len(kept) <= 0.8 * len(COMBINATIONS)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(c[i], c[j]) for c in kept} == {(c[i], c[j]) for c in COMBINATIONS}


def test_the_splits_share_no_combination_and_no_prompt(train, heldout):
    assert not any(is_held_out(*c) for c in combinations(train))
    assert all(is_held_out(*c) for c in combinations(heldout))
    assert not {text.prompt for text in train.texts} & {text.prompt for text in heldout.texts}


def test_training_meets_every_pair_of_values(train):
    met = combinations(train)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(c[i], c[j]) for c in met} == {(c[i], c[j]) for c in COMBINATIONS}


@pytest.mark.parametrize(("split", "frames"), [("train", 9), ("train", 1), ("heldout", 9)])
def test_a_quarter_has_digits_a_quarter_two_things_and_values_are_balanced(split, frames):
    source = ScenesSource(split, num_texts=768, frames=frames)
    assert len(set(source.texts)) == 768 == len(source.scenes)
    with_digit = np.mean([any(thing.shape in DIGITS for thing in scene.things) for scene in source.scenes])
    assert 0.25 <= with_digit <= 0.35
    assert 0.2 <= np.mean([len(scene.things) == 2 for scene in source.scenes]) <= 0.3
    things = [thing for scene in source.scenes for thing in scene.things]
    for values, counts in (
        (COLOURS, Counter(thing.colour for thing in things)),
        (SHAPES, Counter(thing.shape for thing in things if thing.shape in SHAPES)),
        (DIGITS, Counter(thing.shape for thing in things if thing.shape in DIGITS)),
        (BACKGROUNDS, Counter(scene.background for scene in source.scenes if "background" in scene.asked)),
        (SIZES, Counter(scene.things[0].size for scene in source.scenes if "size" in scene.asked)),
        (DIRECTIONS if frames > 1 else ["still"], Counter(thing.direction for thing in things)),
    ):
        assert set(counts) == set(values)
        assert min(counts.values()) >= 0.6 * max(counts.values()), counts


def test_what_a_prompt_leaves_open_is_the_same_in_every_scene(train):
    unnamed = [scene for scene in train.scenes if "background" not in scene.asked]
    assert len(unnamed) > 100 and {scene.background for scene in unnamed} == {"black"}
    unsized = [scene for scene in train.scenes if "size" not in scene.asked]
    sizes = {(len(scene.things), thing.size) for scene in unsized for thing in scene.things}
    assert sizes == {(1, "large"), (2, "small")}


def test_two_things_differ_in_colour_and_pass_each_other(train):
    for scene in train.scenes:
        if len(scene.things) == 2:
            first, second = scene.things
            assert first.colour != second.colour
            assert {first.direction, second.direction} in ({"left", "right"}, {"up", "down"})


def test_texts_and_clips_are_functions_of_seed_and_index():
    one, same, other = ScenesSource(num_texts=50), ScenesSource(num_texts=50), ScenesSource(num_texts=50, seed=1)
    assert one.texts == same.texts and one.scenes == same.scenes and one.texts != other.texts
    forward = [one.load(i, None).video for i in range(12)]
    backward = [same.load(i, None).video for i in reversed(range(12))][::-1]
    np.testing.assert_array_equal(forward, backward)
    again = one.load(3, np.random.default_rng(5)).video
    np.testing.assert_array_equal(again, same.load(3, np.random.default_rng(5)).video)
    assert (again != one.load(3, np.random.default_rng(6)).video).any()


def test_an_epoch_covers_all_texts_evenly():
    source = ScenesSource(num_texts=7, length=21, height=16, width=16)
    assert len(source) == 21
    assert Counter(source.load(i, None).text for i in range(21)) == dict.fromkeys(range(7), 3)
    with pytest.raises(IndexError, match="21 of 21"):
        source.load(21, None)


@pytest.mark.parametrize(("frames", "height", "width"), [(9, 24, 24), (1, 32, 32), (5, 48, 64), (9, 128, 128)])
def test_clips_have_the_shape_asked_for(frames, height, width):
    source = ScenesSource(num_texts=20, frames=frames, height=height, width=width)
    video = source.load(0, None).video
    assert video.shape == (frames, height, width, 3) == source.shape and video.dtype == np.uint8


def test_a_large_square_is_drawn_with_its_colours_and_moves_right_at_constant_speed():
    scene = Scene((Thing("square", "blue", "large", "right"),), "gray")
    video = render(scene, 9, 32, 32, np.random.default_rng(0)).astype(float)
    np.testing.assert_array_equal(video[0, 0, 0], BACKGROUNDS["gray"])
    mass = np.abs(video - BACKGROUNDS["gray"]).sum(-1)
    centre = (mass * np.arange(32)).sum((1, 2)) / mass.sum((1, 2))
    steps = np.diff(centre)
    assert steps.min() > 0.5 and np.ptp(steps) < 0.1
    middle = int(centre[4]), int((mass[4].sum(1) * np.arange(32)).sum() / mass[4].sum())
    np.testing.assert_array_equal(video[4, middle[1], middle[0]], COLOURS["blue"])


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi / 4), ("square", 0.81), ("triangle", 0.405)])
def test_coverage_adds_up_to_the_area_of_the_shape_at_any_sub_pixel_place(shape, area):
    cover = coverage(shape, 20, [31.5, 32.0, 32.3], [32.0, 31.7, 32.25], 64, 64)
    np.testing.assert_allclose(cover.sum((1, 2)), area * 400, rtol=0.02)
    assert cover.min() == 0 and cover.max() == 1


def test_a_whole_pixel_step_moves_every_drawing_by_one_pixel():
    for shape in SHAPES + DIGITS:
        cover = coverage(shape, 10, [12.3, 13.3], [12.1, 12.1], 26, 26)
        np.testing.assert_allclose(cover[0, :-1], cover[1, 1:], atol=1e-5)


def test_two_things_never_touch_and_nothing_leaves_the_frame():
    rng = np.random.default_rng(1)
    for first, second in (("left", "right"), ("up", "down")):
        scene = Scene((Thing("circle", "red", "small", first), Thing("8", "blue", "small", second)), "black")
        for _ in range(20):
            video = render(scene, 9, 24, 24, rng).astype(int)
            red, blue = video[..., 0] > 120, video[..., 2] > 120
            assert not (red & blue).any()
            halves = (red[:, :, 12:], blue[:, :, :12]) if first == "up" else (red[:, 12:], blue[:, :12])
            assert not halves[0].any() and not halves[1].any()
            assert np.ptp((video[..., 0] > 120).sum((1, 2))) <= 14  # the area stays, so the edge cuts nothing off


def test_digits_are_scikit_learns_and_varied():
    images, labels = load_digits(return_X_y=True)
    for digit in DIGITS:
        own = images[labels == int(digit)].reshape(-1, 8, 8)
        assert len(glyphs()[digit]) == GLYPHS_PER_DIGIT
        for glyph in glyphs()[digit]:
            assert (sliding_window_view(own, glyph.shape, (1, 2)) == 16 * glyph).all((-2, -1)).any()
    drawings = [coverage("5", 12, [12], [12], 24, 24, i) for i in range(GLYPHS_PER_DIGIT)]
    assert len({drawing.tobytes() for drawing in drawings}) == GLYPHS_PER_DIGIT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(split="test"), "'test' is unknown; scenes has train and heldout"),
        (dict(num_texts=MAX_TEXTS + 1), "num_texts is 1001, the range is 1 to 1000; nearest valid: 1000"),
        (dict(num_texts=0), "nearest valid: 1"),
        (dict(frames=8), r"frames is 8, not 4n \+ 1; nearest valid: 9"),
        (dict(frames=0), "nearest valid: 1"),
        (dict(height=8), "8x32 pixels are too few .* allowed is 16"),
        (dict(length=0), "length is 0"),
    ],
)
def test_values_out_of_range_are_refused_with_the_nearest_valid_one(wrong, message):
    with pytest.raises(ValueError, match=message):
        ScenesSource(**wrong)


def test_no_colour_is_near_another_or_near_a_background():
    palette = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    distance = np.linalg.norm(palette[:, None] - palette[None], axis=-1)
    assert distance[~np.eye(len(palette), dtype=bool)].min() >= 120


@pytest.mark.parametrize(("split", "frames"), [("train", 9), ("train", 1), ("heldout", 9)])
def test_a_scene_knows_the_language_of_its_prompt(split, frames):
    """Told from the words for its colours, which no two languages share; dense prompts are English."""
    words = {
        "en": "red|blue|green|yellow|purple",
        "es": "rojo|azul|verde|amarillo|violeta",
        "fr": "rouge|bleu|vert|jaune|violet",
        "de": "(rot|blau|grün|gelb|violett)e[rs]?",
    }
    source = ScenesSource(split, num_texts=400, frames=frames)
    for text, scene in zip(source.texts, source.scenes, strict=True):
        spoken = {name for name, colours in words.items() if re.search(rf"\b({colours})\b", text.prompt)}
        assert spoken == {scene.language}, text
    assert {scene.language for scene in source.scenes} == set(words)
