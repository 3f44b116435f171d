"""Prompts in four languages and long captions: literal examples, and that held-out phrasings are unseen."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rise_jax
from rise_jax.data import captions
from rise_jax.data.attributes import COLOURS, DIGITS, DIRECTIONS, SHAPES, Scene, SceneDealer, Thing, is_held_out
from rise_jax.data.scenes import ScenesSource
from rise_jax.metrics import attributes_in_text, kept

BLUE_SQUARE = Thing("square", "blue", "large", "left")
RED_SEVEN = Thing("7", "red", "small", "up")


@pytest.mark.parametrize(
    ("thing", "language", "with_size", "phrase"),
    [
        (BLUE_SQUARE, "en", False, "blue square"),
        (RED_SEVEN, "en", True, "small red number 7"),
        (BLUE_SQUARE, "es", True, "gran cuadrado azul"),
        (RED_SEVEN, "es", False, "número 7 rojo"),
        (BLUE_SQUARE, "fr", True, "grand carré bleu"),
        (RED_SEVEN, "fr", True, "petit numéro 7 rouge"),
        (BLUE_SQUARE, "de", True, "großes blaues Quadrat"),
        (RED_SEVEN, "de", True, "kleine rote Nummer 7"),
        (Thing("circle", "yellow", "small", "up"), "de", True, "kleiner gelber Kreis"),
    ],
)
def test_noun_phrases_agree_in_gender(thing, language, with_size, phrase):
    assert captions.noun_phrase(thing, language, with_size) == phrase


def test_long_captions_say_what_is_seen():
    scene = Scene((BLUE_SQUARE,), "gray")
    assert (
        captions.long_caption(scene) == "A large blue square moves left on a plain gray background at a steady speed."
    )
    unsized = replace(scene, asked=scene.asked - {"size"})
    assert captions.long_caption(unsized).startswith("A blue square moves left on")
    still = Scene((replace(BLUE_SQUARE, direction="still"),), "gray")
    assert captions.long_caption(still) == "A large blue square on a plain gray background."


@pytest.mark.parametrize("moving", [True, False])
def test_long_captions_state_every_attribute_that_prompts_name(moving):
    rng = np.random.default_rng(0)
    dealer = SceneDealer("train", moving, rng)
    for _ in range(200):
        text, scene = captions.write_text(dealer.deal(), "train", rng)
        if text.rephrased is not None:
            assert all(kept(text.rephrased, scene).values()), (text, scene)


@pytest.mark.parametrize("language", list(captions.LANGUAGES))
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prompts_name_what_they_are_said_to_ask_for(language, split):
    rng = np.random.default_rng(0)
    dealer = SceneDealer(split, True, rng)
    spoken = {  # written out again, so that a wrong word in the tables shows
        "en": ("red blue green yellow purple", "circle square triangle", "black gray white"),
        "es": ("rojo azul verde amarillo violeta", "círculo cuadrado triángulo", "negro gris blanco"),
        "fr": ("rouge bleu vert jaune violet", "cercle carré triangle", "noir gris blanc"),
        "de": ("rot blau grün gelb violett", "Kreis Quadrat Dreieck", "schwarzem grauem weißem"),
    }[language]
    ways = {
        "en": "right left up down",
        "es": "derecha izquierda arriba abajo",
        "fr": "droite gauche haut bas",
        "de": "rechts links oben unten",
    }[language].split()
    colours, shapes, backgrounds = (words.split() for words in spoken)
    for _ in range(100):
        scene = dealer.deal()
        prompt, asked = captions.short_prompt(scene, language, split, rng)
        assert {"colour", "shape", "direction", "count"} <= asked
        for thing in scene.things:
            assert colours[list(COLOURS).index(thing.colour)] in prompt
            assert (shapes[SHAPES.index(thing.shape)] if thing.shape in SHAPES else thing.shape) in prompt
            assert re.search(rf"\b{ways[list(DIRECTIONS).index(thing.direction)]}", prompt), prompt
        said = backgrounds[["black", "gray", "white"].index(scene.background)] in prompt
        assert said == ("background" in asked), prompt


def test_prompts_of_images_say_nothing_of_motion():
    source = ScenesSource(num_texts=400, frames=1)
    verbs = r"mov|go|slid|drift|left|right|\bup|down|muev|va\b|déplac|beweg|geht|links|gauche|izquierda"
    for text, scene in zip(source.texts, source.scenes, strict=True):
        assert "direction" not in scene.asked
        assert not re.search(verbs, f"{text.prompt} {text.rephrased}"), text


@pytest.mark.parametrize("moving", [True, False])
def test_no_held_out_phrasing_is_a_training_phrasing(moving):
    """With attributes blanked, prompts of the two splits share nothing but the bare noun phrase's words."""
    rng = np.random.default_rng(3)
    scene = Scene((BLUE_SQUARE if moving else replace(BLUE_SQUARE, direction="still"),), "gray")
    for language in captions.LANGUAGES:
        said = {
            split: {captions.short_prompt(scene, language, split, rng)[0] for _ in range(400)}
            for split in ("train", "heldout")
        }
        assert not said["train"] & said["heldout"]
        assert len(said["heldout"]) >= 4


def test_the_mix_of_languages_of_dense_prompts_and_of_the_llms_own_words():
    source = ScenesSource(num_texts=1000)
    dense = np.mean([text.prompt == text.rephrased for text in source.texts])
    unwritten = np.mean([text.rephrased is None for text in source.texts])
    assert abs(dense - captions.SHARE_DENSE) < 0.04
    english = captions.LANGUAGES["en"]
    assert abs(unwritten - (1 - captions.SHARE_DENSE) * (1 - english + english * captions.OWN_WORDS)) < 0.04
    english = [text for text in source.texts if text.rephrased is not None]
    assert not any(re.search("[áéíóúüñßà]| nach | va ", text.prompt) for text in english)
    held_out = ScenesSource("heldout", num_texts=300).texts
    assert not any(text.prompt == text.rephrased for text in held_out)
    unwritten = np.mean([text.rephrased is None for text in held_out])
    assert abs(unwritten - (1 - captions.LANGUAGES["en"])) < 0.06, "English ones are measured with given captions"


def test_the_instruction_shows_no_held_out_combination_and_no_list_of_values():
    path = Path(rise_jax.__file__).parent / "instructions" / "scenes.txt"
    shown = [
        thing
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("caption: ")
        for thing in attributes_in_text(line).things
    ]
    assert len(shown) >= 8
    assert not any(is_held_out(t.shape, t.colour, t.direction) for t in shown if t.direction in DIRECTIONS)
    assert {thing.colour for thing in shown} < set(COLOURS)
    assert len({thing.shape for thing in shown} & set(DIGITS)) <= 2
