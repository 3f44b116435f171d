"""A damaged adapter.json of an export is told in one line: the file, the key, and what it may be."""

import json

import pytest
from tiny import tiny_config

from rise_jax.condition_kinds import CONDITIONS
from rise_jax.export_card import CARD, SAMPLE, read_card
from rise_jax.models.adapter import KINDS
from rise_jax.pipeline import Pipeline


@pytest.fixture
def card(tmp_path):
    """As a run of the tiny config writes it."""
    config = tiny_config(1, tmp_path / "llm")
    return {
        "format": 2,
        "rise_jax": "0.1.0",
        "step": 3,
        "model": json.loads(json.dumps(config.model.to_dict())),
        "llm": {"identity": {"sha256": "0"}, "width": 16, "instruction": "Say more."},
        "null": "learned",
        "sample": {name: config.sample[name] for name in SAMPLE} | dict(frames=1, height=16, width=16),
        "fps": 8.0,
        "provenance": {},
    }


def write(folder, card):
    (folder / CARD).parent.mkdir(exist_ok=True)
    (folder / CARD).write_text(json.dumps(card))
    return folder


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_and_condition_is_read(tmp_path, card, kind, condition):
    card["model"]["adapter"]["kind"] = kind
    card["model"]["condition"] = condition
    card["llm"]["instruction"] = "Say more." if CONDITIONS[condition].writes else None
    assert read_card(write(tmp_path, card)) == card


WRONG = [
    ("model.condition", "rewrite", "model.condition='rewrite' (supported: 'rephrase' or 'encode' or"),
    ("model.condition", [], "model.condition=[] (supported: "),
    ("model.adapter.kind", "refinery", "model.adapter.kind='refinery' (supported: 'refiner' or"),
    ("model.adapter.latents", 4, "model.adapter.latents=4 (unknown; nearest: model."),
    ("model.adapter.foo", 4, "model.adapter.foo=4 (unknown; nearest: model."),
    ("model.adapter.width", "16", "model.adapter.width='16' (must be a whole number >= 1)"),
    ("model.dit.coordinate", True, "model.dit.coordinate=True (unknown; nearest: model.dit.coordinates;"),
    ("model.dit.patch", [1, 2], "model.dit.patch=[1, 2] (must be a list of 3 whole numbers >= 1)"),
    ("model.llm.dtype", "float8", "model.llm.dtype='float8' (supported: 'float32' or 'bfloat16')"),
    ("model.llm.layer", "last", "model.llm.layer='last' (must be a whole number)"),
    ("model.vae.dtype", "int8", "model.vae.dtype='int8' (supported: 'float32' or 'bfloat16')"),
    ("model.vae.tile", -8, "model.vae.tile=-8 (must be a whole number >= 0)"),
    ("model.dtype", "float64", "model.dtype='float64' (supported: 'float32' or 'bfloat16')"),
    ("model.foo", 1, "model.foo=1 (unknown; nearest: "),
    ("model.adapter", [{}], "model.adapter=[{}] (must be an object)"),
    ("model.dit", [1], "model.dit=[1] (must be an object)"),
    ("model", 3, "model=3 (must be an object)"),
    ("llm.width", 0, "llm.width=0 (must be a whole number >= 1)"),
    ("llm.instruction", 3, "llm.instruction=3 (must be a text)"),
    ("sample.stepper", "leap", "sample.stepper='leap' (supported: 'euler' or "),
    ("fps", "8", "fps='8' (must be a number > 0)"),
]


@pytest.mark.parametrize(("path", "value", "told"), WRONG, ids=[f"{row[0]}={row[1]}" for row in WRONG])
def test_impossible_values_are_told(tmp_path, card, path, value, told):
    *groups, key = path.split(".")
    target = card
    for group in groups:
        target = target[group]
    target[key] = value
    with pytest.raises(ValueError) as raised:
        Pipeline.from_export(write(tmp_path, card))
    assert str(raised.value).startswith(f"{tmp_path}/{CARD}: not supported: {told}") and "\n" not in str(raised.value)


LACKING = ["model", "llm", "sample", "fps", "model.condition", "model.llm", "model.llm.path", "model.dit.width"]


@pytest.mark.parametrize("path", [*LACKING, "model.adapter.kind", "model.vae.path", "llm.identity", "sample.steps"])
def test_missing_keys_are_told(tmp_path, card, path):
    *groups, key = path.split(".")
    target = card
    for group in groups:
        target = target[group]
    del target[key]
    with pytest.raises(ValueError) as raised:
        Pipeline.from_export(write(tmp_path, card))
    assert str(raised.value) == f"{tmp_path}/{CARD}: it lacks {path}"


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_instruction_is_never_missing_and_null_where_nothing_is_written(tmp_path, card, condition):
    card["model"]["condition"] = condition
    writes = CONDITIONS[condition].writes
    card["llm"]["instruction"] = None if writes else "Say more."
    wrong = "it lacks llm.instruction" if writes else "not supported: llm.instruction='Say more.' (supported: None)"
    for told in (wrong, "it lacks llm.instruction"):
        with pytest.raises(ValueError) as raised:
            Pipeline.from_export(write(tmp_path, card))
        assert str(raised.value) == f"{tmp_path}/{CARD}: {told}"
        card["llm"].pop("instruction", None)


@pytest.mark.parametrize("group", ["model", "llm", "sample", "model.adapter", "model.llm"])
def test_an_empty_group_is_told(tmp_path, card, group):
    *outer, key = group.split(".")
    (card[outer[0]] if outer else card)[key] = {}
    with pytest.raises(ValueError, match=rf"{CARD}: it lacks {group}\."):
        Pipeline.from_export(write(tmp_path, card))


@pytest.mark.parametrize("value", [[], None, "card"])
def test_a_card_that_is_no_object_is_told(tmp_path, card, value):
    with pytest.raises(ValueError, match=rf"{CARD} holds no JSON object but {type(value).__name__}"):
        Pipeline.from_export(write(tmp_path, value))
