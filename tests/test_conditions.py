"""Captions and states that are made once: the same as in use, kept with what they depend on, refused when that has changed."""

import io
import json

import numpy as np
import pytest
from tiny import write_llm

from rise_jax import conditions
from rise_jax.conditions import cached_states, complete, fingerprint_of, rephrased
from rise_jax.data.sources import Text
from rise_jax.language import Language, Pair

SETTINGS = dict(instruction="scenes", dtype="float32", max_prompt=60, max_new=24)
TEXTS = [Text("a red circle", "A red circle."), Text("un cercle", None), Text("ein Kreis auf Weiß, klein", None)]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return Language(path=str(write_llm(tmp_path_factory.mktemp("llm"), ends=True)), **SETTINGS)


@pytest.mark.slow
def test_written_captions_give_training_the_states_of_use(language, tmp_path):
    """Teacher forcing on what the LLM wrote equals what decoding kept, prompt by prompt."""
    pairs = complete(TEXTS, language, tmp_path / "captions.jsonl")
    states, mask = language.teach(pairs)
    used = language.rephrase([text.prompt for text in TEXTS[1:]])
    assert used.mask.any()
    np.testing.assert_array_equal(mask[1:], used.mask)
    np.testing.assert_allclose(states[1:], used.states, atol=1e-4)


def test_given_captions_are_kept_and_written_ones_are_read_back(language, tmp_path):
    first = complete(TEXTS, language, tmp_path / "captions.jsonl")
    assert first[0].tokens == language.prompter.rephrased_ids("A red circle.")
    before = (tmp_path / "captions.jsonl").read_bytes()
    assert complete(TEXTS, language, tmp_path / "captions.jsonl") == first
    assert (tmp_path / "captions.jsonl").read_bytes() == before
    assert len(before.splitlines()) == 3


@pytest.mark.slow
def test_captions_written_before_a_run_ended_are_not_written_again(language, tmp_path, monkeypatch):
    """Two of three are kept when the LLM fails at the third; then only that one is asked for, and the file is as if nothing failed."""
    texts = [Text(prompt, None) for prompt in ("a red circle", "a green square", "a blue triangle")]
    expected = complete(texts, language, tmp_path / "whole.jsonl")
    write, asked = language.write, []

    def failing(prompts, **options):
        asked.append(prompts)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return write(prompts, **options)

    monkeypatch.setattr(conditions, "PART", 1)
    monkeypatch.setattr(language, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        complete(texts, language, tmp_path / "parts.jsonl")
    assert complete(texts, language, tmp_path / "parts.jsonl") == expected
    assert asked[2] == asked[3] and len(asked) == 4
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_prompts_that_the_llm_answers_with_nothing_are_named_when_the_others_are_kept(tmp_path, monkeypatch):
    """The one token that this LLM may write is a blank for most prompts. Parts of 4, each with one that it answers."""
    folder = write_llm(tmp_path / "llm", seed=122, ends=True)
    language = Language(path=str(folder), **SETTINGS | dict(instruction=str(folder / "instruction.txt"), max_new=1))
    answered, silent = ["!!!!!!!!!!", "zzzzzzzzzzzzzzz"], ["7", "7 ball", "a red", "a red circle", "ein", "ein ball"]
    file = tmp_path / "captions.jsonl"
    monkeypatch.setattr(conditions, "PART", 4)
    named = ", ".join(map(repr, silent[:5]))
    told = rf"wrote nothing for 6 of 8 prompts: {named} and 1 more; give their `rephrased` .* kept in {file}\)"
    with pytest.raises(ValueError, match=told):
        complete([Text(prompt, None) for prompt in (*silent, *answered)], language, file)
    kept = file.read_bytes()
    with pytest.raises(ValueError, match="wrote nothing for 1 of 1 prompts: 'ein'; give"):
        complete([Text(prompt, None) for prompt in (*answered, "ein")], language, file)
    assert file.read_bytes() == kept
    pairs = complete([*(Text(prompt, None) for prompt in answered), Text("ein", "1")], language, file)
    assert [pair.tokens for pair in pairs[:2]] == language.write(answered)[0] and all(pair.tokens for pair in pairs)


def test_prompts_that_the_llm_answers_with_nothing_are_told_of_in_use(tmp_path, caplog):
    """Of the LLM above."""
    folder = write_llm(tmp_path / "llm", seed=122, ends=True)
    language = Language(path=str(folder), **SETTINGS | dict(instruction=str(folder / "instruction.txt"), max_new=1))
    heard = rephrased(["!!!!!!!!!!", "ein", "7"], language)
    assert [bool(text) for text in heard.texts] == [True, False, False]
    assert "wrote nothing for 2 of 3 prompts: 'ein', '7'; their videos follow no text" in caplog.text
    caplog.clear()
    rephrased(["!!!!!!!!!!"], language)
    assert not caplog.text


def test_captions_of_another_instruction_are_refused(language, tmp_path):
    complete(TEXTS, language, tmp_path / "captions.jsonl")
    lines = (tmp_path / "captions.jsonl").read_text().splitlines()
    head = json.loads(lines[0])
    head["llm"]["instruction"] = "0" * 64
    (tmp_path / "captions.jsonl").write_text("\n".join([json.dumps(head), *lines[1:]]))
    with pytest.raises(ValueError, match="another LLM or instruction"):
        complete(TEXTS, language, tmp_path / "captions.jsonl")


def test_states_are_kept_and_stale_ones_refused(language, tmp_path):
    pairs = complete(TEXTS, language, tmp_path / "captions.jsonl")
    file = tmp_path / "states.npz"
    states, mask = cached_states(pairs, language, file)
    stamp = file.stat().st_mtime_ns
    again, _ = cached_states(pairs, language, file)
    np.testing.assert_array_equal(states, again)
    assert file.stat().st_mtime_ns == stamp and mask.sum() == sum(len(pair.tokens) for pair in pairs)
    with pytest.raises(ValueError, match="holds states of other texts"):
        cached_states(pairs[:2], language, file)


def without(content, name):
    """An npz file without one of its arrays."""
    kept, file = dict(np.load(io.BytesIO(content))), io.BytesIO()
    np.savez(file, **{key: value for key, value in kept.items() if key != name})
    return file.getvalue()


DAMAGED_STATES = {
    "cut": (lambda content: content[: len(content) // 2], "not a zip file"),
    "empty": (lambda content: b"", "No data left in file"),
    "no mask": (lambda content: without(content, "mask"), "mask is not a file in the archive"),
    "text": (lambda content: b"these are no states", "pickle"),
    "bent": (lambda content: content.replace(b"NUMPY", b"NUMBY"), "Bad CRC-32|magic"),
    "one array": (lambda content: content[content.index(b"\x93NUMPY") :], ".+"),
}


@pytest.mark.parametrize("damage", DAMAGED_STATES)
def test_damaged_states_are_told_with_their_file(language, tmp_path, damage):
    pairs = [language.pair(text) for text in TEXTS[:1]]
    file = tmp_path / "states.npz"
    states, _ = cached_states(pairs, language, file)
    change, reason = DAMAGED_STATES[damage]
    file.write_bytes(change(file.read_bytes()))
    told = rf"{file} is damaged \(.*({reason}).*\): remove it, and it is made again"
    with pytest.raises(ValueError, match=told):
        cached_states(pairs, language, file)
    file.unlink()
    np.testing.assert_array_equal(cached_states(pairs, language, file)[0], states)


WRITTEN = [{"prompt": text.prompt, "rephrased": "ñ", "tokens": [1, 2]} for text in TEXTS[1:]]


def captions(language, file):
    """As `complete` writes them."""
    lines = [conditions._head(language), *WRITTEN]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


DAMAGED_CAPTIONS = {
    "empty": (lambda content: b"", "line 1 is no JSON object with llm, max_new"),
    "cut": (lambda content: content[:-20], "line 3 is no JSON object with prompt, rephrased, tokens"),
    "cut in a letter": (lambda content: content[: content.rindex("ñ".encode()) + 1], "line 3 is no JSON"),
    "no head": (lambda content: content.split(b"\n", 1)[1], "line 1 is no JSON object with llm"),
    "no tokens": (lambda content: content.replace(b'"tokens"', b'"token"', 1), "line 2 is no JSON object with prompt"),
    "a list": (lambda content: content + b"[]\n", "line 4 is no JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGED_CAPTIONS)
def test_damaged_captions_are_told_with_their_file_and_line(language, tmp_path, damage):
    file = captions(language, tmp_path / "captions.jsonl")
    change, reason = DAMAGED_CAPTIONS[damage]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{file} is damaged \({reason}.*\): remove it, and it is made again"):
        complete(TEXTS, language, file)


def test_a_prompt_may_hold_any_line_separator_of_unicode(language, tmp_path):
    text = Text("one\u2028two\x85three", None)
    first = complete([text], language, tmp_path / "captions.jsonl")
    assert complete([text], language, tmp_path / "captions.jsonl") == first


@pytest.mark.slow
def test_states_of_another_layer_are_other_states_and_are_never_mixed_up(language, tmp_path_factory, tmp_path):
    folder = str(write_llm(tmp_path_factory.mktemp("llm"), ends=True))
    first, same = Language(path=folder, layer=1, **SETTINGS), Language(path=folder, layer=-2, **SETTINGS)
    assert first.identity == same.identity != language.identity
    pairs = complete(TEXTS[:1], language, tmp_path / "captions.jsonl")
    assert len({fingerprint_of(pairs, other) for other in (first, same, language)}) == 2
    cached_states(pairs, language, tmp_path / "states.npz")
    with pytest.raises(ValueError, match="holds states of other texts, another LLM"):
        cached_states(pairs, first, tmp_path / "states.npz")
    # What it says is the final layer's business; what was kept while it spoke is what teaching gives.
    prompts = [text.prompt for text in TEXTS[1:]]
    said, finals = first.rephrase(prompts), language.rephrase(prompts)
    assert said.tokens == finals.tokens and said.mask.any()
    states, _ = first.teach([Pair(prompt, tokens) for prompt, tokens in zip(prompts, said.tokens)])
    np.testing.assert_allclose(states, said.states, atol=1e-4)
    assert np.abs(said.states - finals.states).max() > 0.1


@pytest.mark.slow
def test_states_behind_the_final_norm_are_other_states_but_for_the_last_layer(tmp_path_factory):
    folder = str(write_llm(tmp_path_factory.mktemp("llm"), ends=True))
    made = lambda **options: Language(path=folder, **SETTINGS, **options)
    inner, normed, last = made(layer=1), made(layer=1, final_norm=True), made(final_norm=True)
    assert inner.identity != normed.identity and last.identity == made().identity
    (plain,), (unit,) = (each.teach([each.pair(TEXTS[0])])[0] for each in (inner, normed))
    spread = np.sqrt((plain**2).mean(-1, keepdims=True) + 1e-5)  # its norm has weights of 1
    np.testing.assert_allclose(unit, plain / spread, atol=1e-4)
    assert np.abs(unit - plain).max() > 0.1


def test_a_layer_that_the_llm_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.llm.layer=3: .* 2 layers .* nearest: 2"):
        Language(path=str(write_llm(tmp_path)), layer=3, **SETTINGS)


@pytest.mark.slow
def test_a_text_has_the_same_states_in_any_company(language):
    """Batch, order and padded width change nothing."""
    texts = [Text(f"prompt {'x' * n}", "word " * m) for n, m in ((1, 1), (40, 4), (9, 2), (20, 3))]
    pairs = [language.pair(text) for text in texts]
    together, mask = language.teach(pairs)
    for i, pair in enumerate(pairs):
        alone, own = language.teach([pair])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
        np.testing.assert_array_equal(own[0], mask[i])


def test_a_caption_over_the_budget_is_refused_with_both_numbers(language):
    with pytest.raises(ValueError, match=r"has \d+ tokens, model.llm.max_new=24 is the limit; raise it to"):
        language.pair(Text("a", "long " * 20))
