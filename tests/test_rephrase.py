"""Decoding: against transformers' generate, against teacher forcing, and its independence of batches and padding."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rise_jax import rephrase
from rise_jax.models.llm import make_llm
from rise_jax.padding import left_pad
from rise_jax.text import Instruction, Prompter
from rise_jax.weights import load_llm
from tests import llama

PREFIX = [5, 80, 33, 210, 7, 14]
PROMPTS = [[9, 100, 250], [60], [4, 8, 15, 16, 23, 42], [301, 11, 12, 13]]
PAD, NEW = 2, 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(torch model, the same model loaded here)"""
    model = llama.tiny()
    return model, load_llm(llama.save(model, tmp_path_factory.mktemp("tiny")))


@cache
def compiled(function, config, dtype, **settings):
    """A function of rephrase.py for such a model: tests with the same settings trace it once."""
    return jax.jit(partial(function, make_llm(config, dtype)[0], **settings))


def decode(loaded, rows, width=8, prefix=PREFIX, keys=None, dtype=jnp.float32, **settings):
    ids, mask = left_pad(rows, width, PAD)
    settings = {"max_new": NEW, "eos": (), "pad": PAD, **settings}
    kept = compiled(rephrase.encode_prefix, loaded.config, dtype)(loaded.params, jnp.asarray(prefix))
    return compiled(rephrase.rephrase, loaded.config, dtype, **settings)(
        loaded.params, kept, jnp.asarray(ids), jnp.asarray(mask), keys=keys
    )


def force(loaded, rows, decoded, width=8, prefix=PREFIX, dtype=jnp.float32):
    ids, mask = left_pad(rows, width, PAD)
    kept = compiled(rephrase.encode_prefix, loaded.config, dtype)(loaded.params, jnp.asarray(prefix))
    return compiled(rephrase.teacher_forced, loaded.config, dtype)(
        loaded.params, kept, jnp.asarray(ids), jnp.asarray(mask), decoded.tokens, decoded.mask
    )


def generate(model, row, **settings):
    """transformers' greedy tokens after PREFIX + row."""
    ids = torch.tensor([PREFIX + row])
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": None, **settings}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_greedy_tokens_equal_transformers(tiny):
    model, loaded = tiny
    out = decode(loaded, PROMPTS)
    assert np.asarray(out.tokens).tolist() == [generate(model, row) for row in PROMPTS]
    assert np.asarray(out.mask).all()


@pytest.mark.slow
def test_an_end_token_ends_its_row_only(tiny):
    model, loaded = tiny
    free = np.asarray(decode(loaded, PROMPTS).tokens)
    ends = (int(free[0, 3]), int(free[1, 5]))
    out = decode(loaded, PROMPTS, eos=ends)
    for row, tokens, mask, states in zip(PROMPTS, *map(np.asarray, (out.tokens, out.mask, out.states))):
        expected = generate(model, row, eos_token_id=list(ends))
        expected = expected[:-1] if expected[-1] in ends else expected
        assert tokens[mask].tolist() == expected
        assert mask[: len(expected)].all()
        assert (tokens[~mask] == PAD).all() and (states[~mask] == 0).all()
    assert np.asarray(out.mask).sum() < out.mask.size


@pytest.mark.slow
def test_repetition_penalty_counts_generated_tokens_only(tiny):
    model, loaded = tiny
    out = decode(loaded, PROMPTS, repetition_penalty=1.7)
    for row, tokens in zip(PROMPTS, np.asarray(out.tokens)):
        penalty = transformers.RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=len(PREFIX + row))
        assert tokens.tolist() == generate(model, row, logits_processor=[penalty])
    assert not np.array_equal(out.tokens, decode(loaded, PROMPTS).tokens)


@pytest.mark.slow
def test_states_are_those_that_emit_the_tokens(tiny):
    """transformers' last hidden state at position P - 1 + i is the state of token i."""
    model, loaded = tiny
    out = decode(loaded, PROMPTS)
    for row, tokens, states in zip(PROMPTS, np.asarray(out.tokens), out.states):
        with torch.no_grad():
            whole = model(torch.tensor([PREFIX + row + tokens.tolist()]), output_hidden_states=True)
        start = len(PREFIX + row) - 1
        np.testing.assert_allclose(states, whole.hidden_states[-1][0, start : start + NEW], atol=1e-4)
        assert whole.logits[0, start : start + NEW].argmax(-1).tolist() == tokens.tolist()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "drawn"])
@pytest.mark.slow
def test_decoded_states_equal_teacher_forced_ones(tiny, settings):
    _, loaded = tiny
    keys = jax.random.split(jax.random.key(3), len(PROMPTS)) if settings else None
    out = decode(loaded, PROMPTS, eos=(7, 30, 100, 200), keys=keys, **settings)
    np.testing.assert_allclose(force(loaded, PROMPTS, out), out.states, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "drawn"])
@pytest.mark.slow
def test_batches_and_padding_change_nothing(tiny, settings):
    _, loaded = tiny
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(3)))(jnp.arange(len(PROMPTS)))
    together = decode(loaded, PROMPTS, keys=keys, **settings)
    order = [2, 0]
    apart = decode(loaded, [PROMPTS[i] for i in order], width=13, keys=keys[jnp.array(order)], **settings)
    np.testing.assert_array_equal(apart.tokens, together.tokens[jnp.array(order)])
    np.testing.assert_allclose(apart.states, together.states[jnp.array(order)], atol=1e-4)


@pytest.mark.slow
def test_a_row_that_ended_does_not_depend_on_the_others(tiny):
    """Alone, its decoding stops reading at its end; beside longer rows, padding is read on."""
    _, loaded = tiny
    ends = (int(decode(loaded, PROMPTS).tokens[0, 3]),)
    together, alone = decode(loaded, PROMPTS, eos=ends), decode(loaded, PROMPTS[:1], eos=ends)
    assert together.mask[1:].any(axis=0)[4:].any()
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[0])
    np.testing.assert_allclose(alone.states[0], together.states[0], atol=1e-4)


@pytest.mark.slow
def test_one_new_token(tiny):
    _, loaded = tiny
    one, more = decode(loaded, PROMPTS, max_new=1), decode(loaded, PROMPTS)
    np.testing.assert_array_equal(one.tokens, more.tokens[:, :1])
    np.testing.assert_allclose(one.states, more.states[:, :1], atol=1e-5)


@pytest.mark.slow
def test_drawn_first_tokens_follow_the_softmax(tiny):
    model, loaded = tiny
    count, temperature = 4096, 2.0
    keys = jax.random.split(jax.random.key(0), count)
    drawn = decode(loaded, [PROMPTS[0]] * count, max_new=1, temperature=temperature, keys=keys).tokens[:, 0]
    with torch.no_grad():
        logits = model(torch.tensor([PREFIX + PROMPTS[0]])).logits[0, -1]
    expected = torch.softmax(logits / temperature, -1).numpy()
    found = np.bincount(np.asarray(drawn), minlength=len(expected)) / count
    assert np.abs(found - expected).sum() < 3 * np.sqrt(len(expected) / count)
    assert expected.max() < 0.9


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_nucleus_equals_transformers(top_p):
    logits = np.random.default_rng(0).normal(0, 2, (6, 40)).astype(np.float32)
    expected = transformers.TopPLogitsWarper(top_p)(None, torch.tensor(logits)).numpy()
    np.testing.assert_array_equal(rephrase.nucleus(jnp.asarray(logits), top_p), expected)


def test_drawing_needs_keys(tiny):
    with pytest.raises(ValueError, match=r"temperature=0\.7 draws tokens and needs keys"):
        decode(tiny[1], PROMPTS, temperature=0.7)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "new"), [("float32", 16), ("bfloat16", 8)])
def test_smollm2_decodes_the_states_of_teacher_forcing(dtype, new):
    loaded = llama.smollm2(dtype)
    examples = (("un gato duerme", "A grey cat sleeps on a sunny window sill, its tail moving slowly."),)
    prompter = Prompter(loaded.tokenizer, Instruction("Rewrite the prompt as one vivid video caption.", examples), 40)
    prompts = ["a cat running", "2 kids fly a red kite over a green hill at sunset, seen from far above", "снег"]
    rows = [prompter.prompt_ids(text) for text in prompts]
    settings = dict(width=prompter.width, prefix=prompter.prefix_ids, dtype=jnp.dtype(dtype))
    out = decode(loaded, rows, eos=prompter.stop, max_new=new, **settings)
    forced = np.asarray(force(loaded, rows, out, **settings), np.float32)[np.asarray(out.mask)]
    decoded = np.asarray(out.states, np.float32)[np.asarray(out.mask)]
    assert len(decoded) > 2 * new
    if dtype == "float32":
        np.testing.assert_allclose(decoded, forced, atol=1e-3)
    cosine = (decoded * forced).sum(-1) / np.linalg.norm(decoded, axis=-1) / np.linalg.norm(forced, axis=-1)
    assert cosine.min() > 0.999
