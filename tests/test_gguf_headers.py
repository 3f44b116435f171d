"""GGUF headers: whatever the decoder does not know or have is refused by its name, and what changes nothing passes."""

import pytest

from rise_jax.llm_gguf import gguf_config

SIZES = {
    "embedding_length": 24,
    "feed_forward_length": 8,
    "block_count": 2,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def config(family, fields, **others):
    """Of a header with `SIZES` and `fields`, whose keys stand behind the family's name and a dot, and `others`."""
    header = {f"{family}.{name}": value for name, value in (SIZES | fields).items()} | others
    return gguf_config(header | {"general.architecture": family, "tokenizer.ggml.tokens": ["a"]}, (), True, "m.gguf")


WRONG = [
    ("llama", {"rope.scale_linear": 4.0}, "llama.rope.scale_linear=4.0 (supported: 1)"),
    ("llama", {"rope.scaling.factor": 4.0}, "llama.rope.scaling.factor=4.0 (supported: 1)"),
    ("gemma3", {"rope.scaling.factor": 8.0, "attention.sliding_window": 4}, "rope.scaling.factor=8.0 (supported: 1)"),
    ("llama", {"rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor=2.0 (supported: 1)"),
    ("llama", {"rope.scaling.alpha": 2.0}, "llama.rope.scaling.alpha=2.0 (unknown; nearest: llama.rope.scaling."),
    ("qwen2", {"attention.causal": False}, "qwen2.attention.causal=False (supported: True)"),
    ("llama", {"attention.scale": 3.0}, "llama.attention.scale=3.0 (supported: None)"),
    ("qwen3", {"attention.sliding_window": 4}, "qwen3.attention.sliding_window=4 (supported: 0)"),
    ("llama", {"logit_scale": 0.2}, "llama.logit_scale=0.2 (supported: 1)"),
    ("llama", {"expert_count": 8}, "llama.expert_count=8 (supported: 0)"),
    ("llama", {"embeding_scale": 8.0}, "llama.embeding_scale=8.0 (unknown; nearest: llama."),
    ("llama", {"context_length": -3}, "llama.context_length=-3 (must be a whole number >= 1)"),
    (
        "llama",
        {"attention.head_count_kv": 3},
        "attention.head_count=2 is not a multiple of llama.attention.head_count_kv=3",
    ),
    (
        "qwen2",
        {"embedding_length": 22},
        "qwen2.embedding_length=22 over qwen2.attention.head_count=2 gives no even head",
    ),
    ("llama", {"attention.value_length": 8}, "llama.attention.value_length=8 (supported: 12)"),
    ("llama", {"rope.dimension_count": 6}, "llama.rope.dimension_count=6 (supported: 12)"),
    (
        "gemma3",
        {"attention.sliding_window": 4, "attention.sliding_window_pattern": [True]},
        "len(gemma3.attention.sliding_window_pattern)=1 (supported: gemma3.block_count=2)",
    ),
    (
        "gemma3",
        {"attention.sliding_window": 4, "attention.sliding_window_pattern": [True, True, False]},
        "len(gemma3.attention.sliding_window_pattern)=3 (supported: gemma3.block_count=2)",
    ),
]


@pytest.mark.parametrize(("family", "fields", "told"), WRONG, ids=[f"{row[0]} {row[1]}" for row in WRONG])
def test_what_the_decoder_lacks_is_told_in_one_line(family, fields, told):
    with pytest.raises(ValueError) as raised:
        config(family, fields)
    message = str(raised.value)
    assert message.startswith("m.gguf: ") and told in message and "\n" not in message


@pytest.mark.parametrize("tokens", [[], [1, 2], "a"])
def test_a_vocabulary_that_is_none_is_told(tokens):
    header = {f"llama.{name}": value for name, value in SIZES.items()}
    with pytest.raises(ValueError, match=r"g: not supported: tokenizer.ggml.tokens=.* \(must be a list of one or more"):
        gguf_config(header | {"general.architecture": "llama", "tokenizer.ggml.tokens": tokens}, (), True, "g")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_published_files_hold_beside_the_sizes_changes_nothing(family):
    said = {
        "context_length": 4096,
        "vocab_size": 1,
        "rope.dimension_count": 12,
        "attention.key_length": 12,
        "attention.value_length": 12,
        "attention.causal": True,
        "expert_count": 0,
        "expert_used_count": 0,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 4.0,
    }
    assert config(family, said) == config(family, {})


def test_keys_of_others_are_not_looked_at():
    others = {
        "general.foo": 1,
        "quantize.imatrix.file": "x",
        "split.count": 0,
        "tokenizer.ggml.foo": 2,
        "llamas.scale": 3,
    }
    header = {f"llama.{name}": value for name, value in SIZES.items()}
    header |= {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"]}
    assert gguf_config(header | others, (), True, "g") == gguf_config(header, (), True, "g")


def test_a_part_of_a_model_in_several_files_is_refused():
    with pytest.raises(ValueError, match="m.gguf: one of 3 parts of a model; join them"):
        config("llama", {}, **{"split.count": 3})
