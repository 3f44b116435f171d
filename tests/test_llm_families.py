"""Every published family against transformers + torch: full passes, decoding with a cache, and what is not supported."""

from dataclasses import replace
from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rise_jax import rephrase
from rise_jax.padding import left_pad
from rise_jax.weights import load_llm
from tests import families, llama

FAMILIES = tuple(families.SETTINGS)
IDS = np.random.default_rng(0).integers(3, families.VOCAB, (2, 70))
PREFIX = np.random.default_rng(1).integers(3, families.VOCAB, 20).tolist()
PROMPTS = [[9, 100, 250], [60], [4, 8, 15, 16, 23, 42, 7, 9, 11]]
PAD, NEW, WIDTH = 2, 20, 11


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return families.folders(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(folders):
    return cache(lambda family: load_llm(folders(family)[1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_states_of_every_layer_and_logits_equal_transformers(folders, loaded, family):
    model, _ = folders(family)
    read = families.reader(loaded(family))
    for start in (0, 3000):
        positions = np.arange(start, start + IDS.shape[1])
        states, logits = read(IDS, positions)
        expected, expected_logits = families.answers(model, IDS, positions)
        assert families.parity(logits, expected_logits) < 1e-5
        for found, layer in zip(states, expected, strict=True):
            assert families.parity(found, layer) < 1e-5
    assert loaded(family).identity["parameters"] == model.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_inner_layers_behind_the_final_norm_are_what_transformers_norms(folders, loaded, family):
    model, _ = folders(family)
    llm = loaded(family)
    normed = llm._replace(config=replace(llm.config, norm_inner=True))
    states, _ = families.reader(normed)(IDS, np.arange(IDS.shape[1]))
    given, _ = families.answers(model, IDS, np.arange(IDS.shape[1]))
    with torch.no_grad():
        expected = [model.model.norm(torch.tensor(state)).numpy() for state in given[:-1]]
    for found, layer in zip(states, [*expected, given[-1]], strict=True):
        assert families.parity(found, layer) < 1e-5


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
        ("llama", dict(rope_parameters=families.LLAMA3 | {"original_max_position_embeddings": 64})),
        ("qwen3", dict(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})),
        ("gemma3", dict(layer_types=["sliding_attention"] * 3)),
        ("gemma3", dict(sliding_window=8)),
        ("gemma3", dict(rope_parameters=families.ropes(factor=1.0))),
        ("gemma3", dict(rope_parameters=families.ropes(local=800.0))),
        ("gemma3", dict(query_pre_attn_scalar=16)),
        ("gemma3", dict(hidden_activation="silu")),
    ],
    ids=str,
)
def test_every_option_matters(folders, family, change):
    """These models are not too tame for parity to show a wrong option: torch itself answers differently."""
    _, expected = families.answers(folders(family)[0], IDS)
    _, changed = families.answers(families.tiny(family, **change), IDS)
    assert families.parity(changed, expected) > 1e-2


def decoded(loaded, layer, dtype=jnp.float32, **settings):
    ids, mask = left_pad(PROMPTS, WIDTH, PAD)
    prefix = llama.jitted(rephrase.encode_prefix, loaded, dtype)(jnp.asarray(PREFIX))
    settings = {"max_new": NEW, "eos": (), "pad": PAD, "layer": layer, **settings}
    decode = llama.jitted(partial(rephrase.rephrase, **settings), loaded, dtype)
    out = decode(prefix, jnp.asarray(ids), jnp.asarray(mask))
    force = llama.jitted(partial(rephrase.teacher_forced, layer=layer), loaded, dtype)
    forced = force(prefix, jnp.asarray(ids), jnp.asarray(mask), out.tokens, out.mask)
    return out, np.asarray(forced, np.float32)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("llama", -2), ("qwen2", -1), ("qwen3", 0), ("gemma3", 2)],
)
@pytest.mark.slow
def test_cached_decoding_equals_the_full_pass(folders, loaded, family, layer):
    """Step by step behind a shared prefix and left padding: the tokens of a greedy choice, and the states of any layer."""
    model, _ = folders(family)
    out, forced = decoded(loaded(family), layer)
    for row, tokens, states, again in zip(PROMPTS, np.asarray(out.tokens), np.asarray(out.states), forced):
        expected, logits = families.answers(model, [PREFIX + row + tokens.tolist()])
        start = len(PREFIX + row) - 1
        assert logits[0, start : start + NEW].argmax(-1).tolist() == tokens.tolist()
        assert families.parity(states, expected[layer][0, start : start + NEW]) < 1e-5
        assert families.parity(again, expected[layer][0, start : start + NEW]) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.slow
def test_bf16_loads_and_decodes_the_states_of_teacher_forcing(tmp_path, family):
    model = families.tiny(family).to(torch.bfloat16)
    loaded = load_llm(llama.save(model, tmp_path), jnp.bfloat16)
    out, forced = decoded(loaded, -1, jnp.bfloat16)
    states = np.asarray(out.states, np.float32)
    assert cosine(states, forced).min() > 0.999
    tokens = np.asarray(out.tokens)[0].tolist()
    expected, _ = families.answers(model, [PREFIX + PROMPTS[0] + tokens])
    assert cosine(states[0], expected[-1][0, -NEW - 1 : -1]).min() > 0.99


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.slow
def test_embeddings_are_scaled_in_the_dtype_of_the_weights(tmp_path):
    """In bf16 the root of the width is rounded before it multiplies: exactly as in transformers."""
    model = families.tiny("gemma3", hidden_size=3072 // 64 * 3, num_hidden_layers=1, layer_types=["full_attention"])
    model = model.to(torch.bfloat16)
    loaded = load_llm(llama.save(model, tmp_path), jnp.bfloat16)
    states, _ = families.reader(loaded, jnp.bfloat16)(IDS, np.arange(IDS.shape[1]))
    np.testing.assert_array_equal(states[0], families.answers(model, IDS)[0][0])
