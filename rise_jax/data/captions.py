"""Texts about a scene: short prompts in four languages and several phrasings, and the one style of long captions.

Every phrasing belongs to one split: what 'heldout' says was never said in 'train'.
"""

from dataclasses import dataclass, replace

import numpy as np

from rise_jax.data.attributes import DIGITS, STILL, Scene, Thing
from rise_jax.data.sources import Text

LANGUAGES = {"en": 0.85, "es": 0.05, "fr": 0.05, "de": 0.05}  # share of the prompts
SHARE_DENSE = 0.15  # training prompts that are the long caption itself
NAMES_BACKGROUND, NAMES_SIZE = 0.5, 0.4  # chance that a short prompt names it
OWN_WORDS = 0.5  # chance that training hears an English one as the LLM rephrases it, in words that no caption has
# What a clip has where its prompt names nothing else, as in instructions/scenes.txt: were it left to chance, the clip would teach its
# text by heart, and the LLM, which names a background always, would name another one.
DEFAULT_BACKGROUND, DEFAULT_SIZE = "black", "large"


@dataclass(frozen=True)
class _Phrasings:
    """Of one split in one language. {a} is 'a red circle', {n} 'red circle', {to} the direction, {bg} the background."""

    moving: tuple[str, ...]
    still: tuple[str, ...]
    background: tuple[str, ...]


_PHRASINGS = {
    ("en", "train"): _Phrasings(
        (
            "{n} moving {to}",
            "{a} moving {to}",
            "{a} moves {to}",
            "{n} moves {to}",
            "{a} going {to}",
            "{n} goes {to}",
            "{a} slides {to}",
            "{n} drifting {to}",
        ),
        ("{n}", "{a}", "a picture of {a}", "there is {a}"),
        (" on a {bg} background", ", {bg} background", " on {bg}"),
    ),
    ("en", "heldout"): _Phrasings(
        ("{a} travels {to}", "{n} traveling {to}", "{a} that moves {to}", "{a} is moving {to}", "{n} that moves {to}"),
        ("an image of {a}", "one sees {a}"),
        (" against a {bg} background", " over a {bg} background"),
    ),
    ("es", "train"): _Phrasings(
        ("{a} se mueve {to}", "{n} se mueve {to}", "{a} va {to}", "{n} va {to}"),
        ("{n}", "{a}", "una imagen de {a}"),
        (" sobre fondo {bg}", ", fondo {bg}"),
    ),
    ("es", "heldout"): _Phrasings(
        ("{a} que se mueve {to}", "{n} moviéndose {to}"),
        ("una foto de {a}", "hay {a}"),
        (" en un fondo {bg}", " sobre un fondo {bg}"),
    ),
    ("fr", "train"): _Phrasings(
        ("{a} se déplace {to}", "{n} se déplace {to}", "{a} va {to}", "{n} va {to}"),
        ("{n}", "{a}", "une image avec {a}"),
        (" sur fond {bg}", ", fond {bg}"),
    ),
    ("fr", "heldout"): _Phrasings(
        ("{a} qui se déplace {to}", "{n} qui va {to}"),
        ("une photo avec {a}", "il y a {a}"),
        (" sur un fond {bg}", " devant un fond {bg}"),
    ),
    ("de", "train"): _Phrasings(
        ("{a} bewegt sich {to}", "{n} bewegt sich {to}", "{a} geht {to}", "{n} geht {to}"),
        ("{n}", "{a}", "ein Bild: {a}"),
        (" auf {bg} Hintergrund", ", auf {bg} Hintergrund"),
    ),
    ("de", "heldout"): _Phrasings(
        ("{a}, bewegt sich {to}", "{a} läuft {to}"),
        ("ein Foto: {a}", "da ist {a}"),
        (" vor {bg} Hintergrund", ", vor {bg} Hintergrund"),
    ),
}
_AND = {"en": " and ", "es": " y ", "fr": " et ", "de": " und "}
_DIRECTIONS = {
    "en": {
        "left": ("left", "to the left"),
        "right": ("right", "to the right"),
        "up": ("up", "upwards"),
        "down": ("down", "downwards"),
    },
    "es": {
        "left": ("a la izquierda", "hacia la izquierda"),
        "right": ("a la derecha", "hacia la derecha"),
        "up": ("hacia arriba",),
        "down": ("hacia abajo",),
    },
    "fr": {
        "left": ("à gauche", "vers la gauche"),
        "right": ("à droite", "vers la droite"),
        "up": ("vers le haut",),
        "down": ("vers le bas",),
    },
    "de": {"left": ("nach links",), "right": ("nach rechts",), "up": ("nach oben",), "down": ("nach unten",)},
}
_BACKGROUNDS = {
    "en": {"black": "black", "gray": "gray", "white": "white"},
    "es": {"black": "negro", "gray": "gris", "white": "blanco"},
    "fr": {"black": "noir", "gray": "gris", "white": "blanc"},
    "de": {"black": "schwarzem", "gray": "grauem", "white": "weißem"},
}
_COLOURS = {  # all nouns below are masculine in Spanish and French
    "es": {"red": "rojo", "green": "verde", "blue": "azul", "yellow": "amarillo", "purple": "violeta"},
    "fr": {"red": "rouge", "green": "vert", "blue": "bleu", "yellow": "jaune", "purple": "violet"},
    "de": {"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "purple": "violett"},  # stems
}
_NOUNS = {
    "es": {"circle": "círculo", "square": "cuadrado", "triangle": "triángulo", "digit": "número"},
    "fr": {"circle": "cercle", "square": "carré", "triangle": "triangle", "digit": "numéro"},
    "de": {"circle": "Kreis", "square": "Quadrat", "triangle": "Dreieck", "digit": "Nummer"},
}
_GERMAN_ENDING = {"Kreis": "er", "Quadrat": "es", "Dreieck": "es", "Nummer": "e"}
_CAPTION_ENDINGS = (" at a steady speed.", " at a constant speed.")


def noun_phrase(thing: Thing, language: str, with_size: bool) -> str:
    """'small red circle', or its Spanish, French or German equal, with gender agreement and without an article."""
    digit = thing.shape in DIGITS
    number = f" {thing.shape}" if digit else ""
    if language == "en":
        return (f"{thing.size} " if with_size else "") + f"{thing.colour} {'number' if digit else thing.shape}{number}"
    noun = _NOUNS[language]["digit" if digit else thing.shape]
    colour = _COLOURS[language][thing.colour]
    if language == "de":
        ending = _GERMAN_ENDING[noun]
        size = {"large": "groß", "small": "klein"}[thing.size] + ending + " " if with_size else ""
        return f"{size}{colour}{ending} {noun}{number}"
    if language == "es":
        size = {"large": "gran ", "small": "pequeño "}[thing.size] if with_size else ""
    else:
        size = {"large": "grand ", "small": "petit "}[thing.size] if with_size else ""
    return f"{size}{noun}{number} {colour}"


def _article(thing, language):
    feminine = thing.shape in DIGITS
    return {"en": "a", "es": "un", "fr": "un", "de": "eine" if feminine else "ein"}[language]


def short_prompt(scene: Scene, language: str, split: str, rng: np.random.Generator) -> tuple[str, frozenset[str]]:
    """A concise prompt and the attributes it names; the size is named of single things only."""
    phrasings = _PHRASINGS[language, split]
    moving = scene.things[0].direction != STILL
    with_size = len(scene.things) == 1 and rng.random() < NAMES_SIZE
    pattern = str(rng.choice(phrasings.moving if moving else phrasings.still))
    variant = int(rng.integers(2))
    text = _AND[language].join(
        (pattern if i == 0 or moving else "{a}").format(
            a=f"{_article(thing, language)} {noun_phrase(thing, language, with_size)}",
            n=noun_phrase(thing, language, with_size),
            to=_direction(thing, language, variant),
        )
        for i, thing in enumerate(scene.things)
    )
    asked = {"colour", "shape", "count"} | ({"direction"} if moving else set()) | ({"size"} if with_size else set())
    if rng.random() < NAMES_BACKGROUND:
        asked.add("background")
        text += str(rng.choice(phrasings.background)).format(bg=_BACKGROUNDS[language][scene.background])
    return text, frozenset(asked)


def _direction(thing, language, variant):
    if thing.direction == STILL:
        return ""
    options = _DIRECTIONS[language][thing.direction]
    return options[variant % len(options)]


def long_caption(scene: Scene, ending: int = 0) -> str:
    """The detailed English caption of a scene; the size only where `scene.asked` has it.

    `ending` picks one of two closing phrases.
    """
    moving = scene.things[0].direction != STILL
    phrases = [f"a {noun_phrase(thing, 'en', 'size' in scene.asked)}" for thing in scene.things]
    if moving:
        phrases = [f"{phrase} moves {thing.direction}" for phrase, thing in zip(phrases, scene.things)]
    things = " and ".join(phrases)
    close = _CAPTION_ENDINGS[ending % len(_CAPTION_ENDINGS)] if moving else "."
    return f"{things[0].upper()}{things[1:]} on a plain {scene.background} background{close}"


def write_text(scene: Scene, split: str, rng: np.random.Generator) -> tuple[Text, Scene]:
    """A text of the scene, and the scene with `asked` and `language` set to what its prompt names and speaks.

    Prompts in other languages than English, and in training a part of the short English ones, come without a long caption, for the
    LLM to write: training has to see the states that it will meet in use. A small LLM translates badly, but its states still tell the
    attributes apart; in English it says "goes upwards" where captions say "moves up".
    """
    ending = int(rng.integers(len(_CAPTION_ENDINGS)))
    if split == "train" and rng.random() < SHARE_DENSE:
        described = replace(scene, asked=_all_attributes(scene))
        caption = long_caption(described, ending)
        return Text(caption, caption), described
    language = str(rng.choice(list(LANGUAGES), p=list(LANGUAGES.values())))
    prompt, asked = short_prompt(scene, language, split, rng)
    described = _with_defaults(replace(scene, asked=asked, language=language))
    own = language != "en" or (split == "train" and rng.random() < OWN_WORDS)
    return Text(prompt, None if own else long_caption(described, ending)), described


def _with_defaults(scene):
    unnamed_size = len(scene.things) == 1 and "size" not in scene.asked
    return replace(
        scene,
        background=scene.background if "background" in scene.asked else DEFAULT_BACKGROUND,
        things=tuple(replace(thing, size=DEFAULT_SIZE) for thing in scene.things) if unnamed_size else scene.things,
    )


def _all_attributes(scene):
    unsaid = {"size"} if len(scene.things) == 2 else set()
    return scene.asked - unsaid - ({"direction"} if scene.things[0].direction == STILL else set())
