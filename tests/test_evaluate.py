"""Scores of an evaluation counted by hand on rendered clips, and the held-out loss under three conditions."""

from dataclasses import replace

import numpy as np
import pytest

from rise_jax.data.attributes import Scene, Thing
from rise_jax.data.captions import long_caption
from rise_jax.data.drawing import render
from rise_jax.evaluate import intervals, scene_scores, shares

RED = Scene((Thing("circle", "red", "large", "left"),), "black", frozenset({"colour", "shape", "count"}))
BLUE = replace(RED, things=(Thing("square", "blue", "large", "left"),), language="de")
PAIR = replace(RED, things=(Thing("circle", "green", "small", "left"), Thing("triangle", "red", "small", "right")))
SCENES = [RED, BLUE, PAIR]


def clip(scene):
    return render(scene, 5, 32, 32, np.random.default_rng(0))


@pytest.fixture(scope="module")
def scores():
    """The video of RED shows another colour, the others are right; without states all show BLUE; one rephrasing says BLUE of RED."""
    wrong = replace(RED, things=(replace(RED.things[0], colour="yellow"),))
    texts = [long_caption(BLUE), long_caption(BLUE), long_caption(PAIR)]
    return scene_scores([clip(wrong), clip(BLUE), clip(PAIR)], [clip(BLUE)] * 3, texts, SCENES)


def test_videos_are_scored_against_their_own_prompts(scores):
    assert scores["attribute_accuracy"] == pytest.approx(dict(colour=2 / 3, shape=1, count=1, all=2 / 3))
    assert scores["one_thing"] == dict(colour=0.5, shape=1, count=1, all=0.5)
    assert scores["two_things"] == dict(colour=1, shape=1, count=1, all=1)


def test_shuffled_scores_are_those_against_the_prompt_before(scores):
    """Yellow circle against PAIR, blue square against RED, the pair against BLUE: one right count."""
    assert scores["shuffled"] == pytest.approx(dict(colour=0, shape=0, count=1 / 3, all=0))


def test_zeroed_scores_are_of_the_other_videos_and_kept_of_the_texts(scores):
    assert scores["zeroed"] == pytest.approx(dict(colour=1 / 3, shape=1 / 3, count=2 / 3, all=1 / 3))
    assert scores["kept_by_rephrasing"] == pytest.approx(dict(colour=2 / 3, shape=2 / 3, count=1, all=2 / 3))


def test_scores_are_told_apart_by_the_language_of_the_prompt(scores):
    right = dict(colour=1, shape=1, count=1, all=1)
    assert scores["by_language"] == {
        "de": dict(prompts=1, attribute_accuracy=right, kept_by_rephrasing=right),
        "en": dict(
            prompts=2,
            attribute_accuracy=dict(colour=0.5, shape=1, count=1, all=0.5),
            kept_by_rephrasing=dict(colour=0.5, shape=0.5, count=1, all=0.5),
        ),
    }


def test_shares_and_intervals_count_only_prompts_that_asked():
    asked = [dict(size=True, all=True), dict(all=False), dict(size=False, all=True), dict(size=False, all=True)]
    assert shares(asked) == dict(size=pytest.approx(1 / 3), all=0.75)
    low, high, n = intervals(asked)["size"]
    assert n == 3 and low < 1 / 3 < high
    assert intervals(asked)["all"][2] == 4
