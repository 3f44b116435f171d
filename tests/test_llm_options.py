"""What a published LLM's header may and may not say: options that the decoder lacks, impossible values, layers and names."""

import json

import jax
import numpy as np
import pytest

from rise_jax.llm_families import folder_config
from rise_jax.llm_gguf import gguf_config
from rise_jax.models.llm import make_llm
from rise_jax.models.llm_config import LLMConfig
from rise_jax.weights import llm_table
from tests import families


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return families.folders(tmp_path_factory)


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        (
            "llama",
            dict(architectures=["MistralForCausalLM"]),
            r"\['MistralForCausalLM'\] is not supported; known: .*Qwen3",
        ),
        (
            "llama",
            dict(rope_parameters={"rope_type": "llama3"}),
            "lacks rope_parameters.factor, rope_parameters.low_freq_factor",
        ),
        ("qwen2", dict(use_sliding_window=True, hidden_act="gelu"), "hidden_act='gelu' .*use_sliding_window=True"),
        (
            "qwen2",
            dict(rope_scaling={"type": "yarn", "factor": 4.0}),
            r"rope_scaling.type='yarn' \(supported: 'default'\)",
        ),
        ("qwen2", dict(quantization_config={"bits": 4}), r"quantization_config=\{'bits': 4\}"),
        ("qwen3", dict(attention_bias=True), "attention_bias=True"),
        (
            "qwen3",
            dict(layer_types=["full_attention", "sliding_attention"]),
            r"layer_types\[1\]='sliding_attention' \(supported: 'full_attention'\)",
        ),
        ("qwen3", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        ("gemma3", dict(attn_logit_softcapping=50.0), r"attn_logit_softcapping=50.0 \(supported: None\)"),
        (
            "gemma3",
            dict(final_logit_softcapping=30.0, hidden_size=None),
            "final_logit_softcapping=30.0 .*\n  it lacks hidden_size",
        ),
        ("gemma3", dict(layer_types=["full_attention"]), r"len\(layer_types\)=1 \(supported: num_hidden_layers=3\)"),
        ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (
            "gemma3",
            dict(layer_types=["chunked_attention"]),
            r"layer_types\[0\]='chunked_attention' \(supported: 'full_att",
        ),
    ],
    ids=str,
)
def test_what_the_decoder_lacks_is_refused_by_name(folders, family, setting, message):
    settings = json.loads((folders(family)[1] / "config.json").read_text())
    if "rope_scaling" in setting:
        settings.pop("rope_parameters")
    with pytest.raises(ValueError, match=f"(?s)c:.*{message}"):
        folder_config({**settings, **setting}, "c")


def test_all_that_a_config_lacks_is_said_at_once():
    with pytest.raises(
        ValueError, match="c: it lacks hidden_size, num_attention_heads, vocab_size, intermediate_size, num_h"
    ):
        folder_config({"architectures": ["Qwen2ForCausalLM"]}, "c")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("attention.head_count_kv", [1, 2], r"head_count_kv=\[1, 2\] \(must be a whole number >= 1\)"),
        ("attention.head_count", 0, r"head_count=0 \(must be a whole number >= 1\)"),
        ("attention.sliding_window_pattern", 0, r"sliding_window_pattern=0 \(must be a whole number >= 1, or a list"),
        ("rope.freq_base", "1e4", r"rope.freq_base='1e4' \(must be a number > 0\)"),
        ("rope.dimension_count", 8, r"rope.dimension_count=8 \(supported: 16\)"),
    ],
)
def test_impossible_values_of_a_gguf_header_are_told(field, value, told):
    header = {"embedding_length": 24, "feed_forward_length": 8, "block_count": 2, "attention.head_count": 2}
    header |= {"attention.key_length": 16, "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 4}
    fields = {f"gemma3.{name}": number for name, number in (header | {field: value}).items()}
    with pytest.raises(ValueError, match=f"g: not supported: gemma3.*{told}"):
        gguf_config(fields | {"general.architecture": "gemma3", "tokenizer.ggml.tokens": ["a"]}, (), True, "g")


def test_the_27b_gemma_is_known_by_its_depth():
    """Its query_pre_attn_scalar (168 = 5376 / 32) is in no GGUF header."""
    sizes = dict(embedding_length=5376, feed_forward_length=1, block_count=62)
    attention = dict(head_count=32, head_count_kv=16, key_length=128, layer_norm_rms_epsilon=1e-6, sliding_window=1024)
    header = {f"gemma3.{key}": value for key, value in sizes.items()}
    header |= {f"gemma3.attention.{key}": value for key, value in attention.items()}
    header |= {"general.architecture": "gemma3", "tokenizer.ggml.tokens": ["a"]}
    config = gguf_config(header, (), True, "g")
    np.testing.assert_allclose(config.query_scale, 168**-0.5)
    assert [i for i in range(62) if not config.local[i]] == list(range(5, 62, 6))


@pytest.mark.parametrize(("layer", "nearest"), [(4, 3), (-5, -4)])
def test_a_layer_that_is_not_there(layer, nearest):
    config = LLMConfig(50, 24, 40, 3, 6, 2, 8)
    assert [config.layer_index(i) for i in (0, 3, -1, -4)] == [0, 3, 3, 0]
    with pytest.raises(ValueError, match=rf"model.llm.layer={layer}: an LLM of 3 layers .* nearest: {nearest}"):
        config.layer_index(layer)


def test_every_published_tensor_has_one_place():
    """Two leaves of one name would lose one of them silently."""
    for family, changes in (("gemma3", dict(qk_norm=True, post_norms=True)), ("qwen2", dict(qkv_bias=True))):
        config = LLMConfig(50, 24, 40, 2, 6, 2, 8, **changes)
        params = make_llm(config)[1]
        count = len(jax.tree.leaves(params)) + (config.depth - 1) * len(jax.tree.leaves(params["blocks"]))
        for kind in ("huggingface", "gguf"):
            places = [(entry.path, entry.layer) for entry in llm_table(config, kind, family).values()]
            assert len(set(places)) == len(places) == count
