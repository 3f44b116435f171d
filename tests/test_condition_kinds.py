"""What conditions the video: each kind's states against transformers and the other kinds; one loss in both modes; never mixed up."""

import tracemalloc
from contextlib import nullcontext

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from encoders import write_umt5
from tiny import write_llm

from rise_jax.condition_kinds import CONDITIONS, Encode, open_text
from rise_jax.conditions import cached_states, complete, fingerprint_of
from rise_jax.data.sources import Text, TooLong
from rise_jax.language import Pair
from tests import llama
from tests.families import parity

PROMPTS = ["a red circle", "ein Kreis auf Weiß, klein und rot, links oben", "7"]
TEXTS = [Text("a red circle", "A red circle."), *(Text(prompt, None) for prompt in PROMPTS)]
ALONE = ("encode", "rewrite_then_encode")  # the LLM reads some text alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llm(tmp_path_factory.mktemp("llm"), ends=True)


@pytest.fixture(scope="module")
def kinds(folder):
    settings = dict(instruction="scenes", dtype="float32", max_prompt=60, max_new=24)
    return {name: open_text(name, path=str(folder), **settings) for name in CONDITIONS if name != "native"}


# ---- states ----


@pytest.mark.parametrize(("opens", "layer"), [(False, -1), (True, -1), (True, -2)])
def test_encoded_states_are_those_of_transformers_at_the_prompts_tokens(opens, layer, tmp_path):
    """Where the tokenizer opens texts with BOS, it is read, and its state is left out. No instruction is read: there is none."""
    model = llama.tiny()
    llama.save(model, tmp_path)
    if opens:
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        start = ("<|start|>", backend.token_to_id("<|start|>"))
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="<|start|> $A", special_tokens=[start])
        backend.save(str(tmp_path / "tokenizer.json"))
    settings = dict(instruction="/nowhere", dtype="float32", max_prompt=60, max_new=1, layer=layer)
    heard = Encode(path=str(tmp_path), **settings).rephrase(PROMPTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt, states, mask in zip(PROMPTS, heard.states, heard.mask):
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            expected = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, int(opens) :]
        assert np.flatnonzero(mask).tolist() == list(range(len(expected))) and len(expected) == len(ids) - opens
        assert parity(states[mask], expected) <= 1e-5
        assert not states[~mask].any()
    assert heard.texts == [None] * 3


@pytest.mark.slow
def test_rewrite_then_encode_reads_alone_what_rephrase_says(kinds):
    said, rewritten = (kinds[name].rephrase(PROMPTS) for name in ("rephrase", "rewrite_then_encode"))
    assert rewritten.tokens == said.tokens and rewritten.texts == said.texts and all(map(len, said.tokens))
    assert all(kinds[name].write(PROMPTS) == (said.tokens, said.texts) for name in ("rephrase", ALONE[1]))
    np.testing.assert_array_equal(rewritten.mask, said.mask)
    states, mask = kinds["encode"].teach([Pair("", ids) for ids in said.tokens])
    np.testing.assert_allclose(rewritten.states, states[:, :24], atol=1e-5)
    np.testing.assert_array_equal(rewritten.mask, mask[:, :24])
    assert np.abs(rewritten.states - said.states)[said.mask].max() > 0.1


@pytest.mark.slow
def test_the_seed_draws_the_rewritten_text(kinds):
    drawn = [kinds[name].rephrase(PROMPTS, temperature=1.0, seeds=[3, 4, 5]) for name in ("rephrase", ALONE[1])]
    assert drawn[0].tokens == drawn[1].tokens != kinds["rephrase"].rephrase(PROMPTS).tokens
    assert kinds[ALONE[1]].write(PROMPTS, temperature=1.0, seeds=[3, 4, 5])[0] == drawn[0].tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rephrase", ALONE[1]])
def test_no_state_is_kept_to_write_captions(name, tmp_path):
    """Four batches of an LLM with wide states: the host never holds as much as theirs would be."""
    folder = write_llm(tmp_path / "llm", width=128)
    instruction = str(folder / "instruction.txt")
    kind = open_text(name, path=str(folder), instruction=instruction, dtype="float32", max_prompt=20, max_new=24)
    texts = [Text(f"{number:03}", None) for number in range(128)]
    complete(texts[:32], kind, tmp_path / "compiled.jsonl")
    tracemalloc.start()
    try:
        complete(texts, kind, tmp_path / "captions.jsonl")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(texts) * 24 * 128 * 4


def test_a_rewriting_without_a_token_has_no_states(kinds):
    states, mask = kinds["rewrite_then_encode"].teach([Pair("a", [])])
    assert states.shape == (1, 24, 16) and not states.any() and not mask.any()


@pytest.mark.parametrize("name", ALONE)
def test_training_has_the_states_of_use(kinds, name, tmp_path):
    """For texts without a caption; a given one is what rewriting reads, and nothing to `encode`, which has none written."""
    kind, file = kinds[name], tmp_path / "captions.jsonl"
    pairs = complete(TEXTS, kind, file)
    states, mask = kind.teach(pairs)
    used = kind.rephrase(PROMPTS)
    np.testing.assert_array_equal(mask[1:], used.mask)
    np.testing.assert_allclose(states[1:], used.states, atol=1e-5)
    assert file.exists() == kind.writes
    given = kinds["rephrase"].pair(TEXTS[0]) if kind.writes else pairs[1]
    assert pairs[0] == given


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.slow
def test_company_and_padding_change_nothing(kinds, name):
    """More texts than a batch, of mixed lengths, in another order; and whatever ids stand behind the mask, in the step."""
    kind, rng = kinds[name], np.random.default_rng(0)
    pairs = [Pair("", rng.integers(3, 250, size).tolist()) for size in (3, 21, *[6] * 33)]
    states, mask = kind.teach(pairs)
    few, few_mask = kind.teach(pairs[1::-1])
    np.testing.assert_allclose(few[::-1], states[:2], atol=1e-5)
    np.testing.assert_array_equal(few_mask[::-1], mask[:2])
    assert len({row.tobytes() for row in states}) == 35
    batch = kind.tokens(pairs)
    noise = rng.integers(0, 250, batch["encoded_ids"].shape).astype(np.int32)
    batch["encoded_ids"] = np.where(batch["states_mask"], batch["encoded_ids"], noise)
    in_step, kept = jax.jit(kind.states_in_step)({"llm": kind.params, "prefix": kind.prefix}, batch)
    np.testing.assert_allclose(in_step, states, atol=1e-5)
    np.testing.assert_array_equal(kept, mask)


def test_prompts_that_cannot_be_encoded_are_refused(kinds):
    for prompt, message in (
        (" ", "the prompt is empty"),
        ("x" * 61, "the prompt has 61 tokens, at most 60 are allowed .model.llm.max_prompt.; it is never cut"),
        ("a <|end|>", "holds the language model's control token '<|end|>'"),
    ):
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            kinds["encode"].rephrase([prompt])


def test_a_caption_over_the_budget_is_refused(kinds):
    with pytest.raises(ValueError, match=r"has \d+ tokens, model.llm.max_new=24 is the limit; raise it to"):
        kinds["rewrite_then_encode"].pair(Text("a", "long " * 20))


LONG = "long " * 20


@pytest.mark.parametrize(
    ("text", "refusing"),
    [
        (Text("short", "short"), set()),
        (Text(LONG, "short"), {"rephrase", "encode"}),
        (Text("short", LONG), {"rephrase", "rewrite_then_encode"}),
        (Text(LONG, None), {"rephrase", "encode", "rewrite_then_encode"}),
    ],
)
def test_only_what_is_read_of_a_text_has_to_keep_its_budget(kinds, text, refusing):
    """rewrite_then_encode reads a prompt where its caption is still to be written."""
    for name, kind in kinds.items():
        with pytest.raises(TooLong) if name in refusing else nullcontext():
            kind.check(text)


# ---- never mixed up ----


def test_identities_say_the_condition(kinds, folder, tmp_path):
    """That of `rephrase` is as before there was a choice; to `encode` the instruction is nothing."""
    identity = kinds["rephrase"].identity
    assert set(identity) == {"sha256", "dtype", "instruction", "align"} and identity["align"] == "predictor"
    rewritten = identity | {"condition": "rewrite_then_encode", "align": "token"}
    assert kinds["rewrite_then_encode"].identity == rewritten
    encoded = rewritten | {"condition": "encode"}
    del encoded["instruction"]
    assert kinds["encode"].identity == encoded
    settings = dict(dtype="float32", max_prompt=60, max_new=24, layer=1)
    assert open_text("encode", path=str(folder), instruction="", **settings).identity == encoded | {"layer": 1}


@pytest.mark.slow
def test_captions_and_states_of_another_condition_are_refused(kinds, tmp_path):
    pairs = complete(TEXTS, kinds["rephrase"], tmp_path / "captions.jsonl")
    with pytest.raises(ValueError, match="for another condition or length; align, condition differ: remove it"):
        complete(TEXTS, kinds["rewrite_then_encode"], tmp_path / "captions.jsonl")
    assert len({fingerprint_of(pairs, kind) for kind in kinds.values()}) == 3
    cached_states(pairs, kinds["rephrase"], tmp_path / "states.npz")
    with pytest.raises(ValueError, match=r"states.npz holds states of .*; align, condition, instruction differ\)"):
        cached_states(pairs, kinds["encode"], tmp_path / "states.npz")


# ---- native ----


@pytest.mark.slow
def test_native_states_are_the_encoders_in_training_and_in_use(tmp_path):
    """Of transformers' model, end token included, whatever stands beside a text; a run of it goes without an adapter."""
    folder = write_umt5(tmp_path / "t5", width=16)
    native = CONDITIONS["native"](path=str(folder), length=6, dtype="float32")
    heard = native.rephrase(["red", "red red blue"])
    model = transformers.UMT5EncoderModel.from_pretrained(folder)
    for row, ids in enumerate(([3, 1], [3, 3, 2, 1])):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0]
        assert heard.mask[row].sum() == len(ids) and heard.tokens[row] == ids
        assert parity(heard.states[row, : len(ids)], expected) <= 1e-5
    np.testing.assert_allclose(native.teach([Pair("", [3, 1])])[0][0], heard.states[0], atol=1e-6)
    with pytest.raises(
        ValueError, match="a text has 8 tokens with its end token, at most 6 are allowed .model.native.length."
    ):
        native.rephrase(["red " * 7])
    with pytest.raises(ValueError, match="the prompt is empty"):
        native.rephrase([" "])
