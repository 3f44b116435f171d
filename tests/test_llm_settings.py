"""Settings in an LLM's config.json: those of every published one are known, any other is refused by its name, type or value."""

import pytest
import transformers

from rise_jax import known_sizes
from rise_jax.llm_families import folder_config
from tests import families, published_configs

NAMES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
BASES = {
    "llama": published_configs.SMOLLM2_135M,
    "qwen2": published_configs.QWEN2_5_1_5B,
    "qwen3": published_configs.QWEN3_0_6B,
    "gemma3": published_configs.GEMMA_3_1B,
}


def config(name):
    return folder_config(published_configs.LLMS[name], "c")


# (width, depth, heads, kv_heads, head_width, vocab, rope_base, tied), by the models' cards
SIZES = {
    "llama_2_7b": (4096, 32, 32, 32, 128, 32000, 1e4, False),
    "llama_3_1_8b": (4096, 32, 32, 8, 128, 128256, 5e5, False),
    "llama_3_2_1b": (2048, 16, 32, 8, 64, 128256, 5e5, True),
    "smollm2_135m": (576, 30, 9, 3, 64, 49152, 1e5, True),
    "smollm2_1_7b": (2048, 24, 32, 32, 64, 49152, 1.3e5, True),
    "qwen2_5_1_5b": (1536, 28, 12, 2, 128, 151936, 1e6, True),
    "qwen2_0_5b": (896, 24, 14, 2, 64, 151936, 1e6, True),
    "qwen3_0_6b": (1024, 28, 16, 8, 128, 151936, 1e6, True),
    "gemma_3_1b": (1152, 26, 4, 1, 256, 262144, 1e6, True),
    "gemma_3_270m": (640, 18, 4, 1, 256, 262144, 1e6, True),
    "gemma_3_4b": (2560, 34, 8, 4, 256, 262208, 1e6, True),
}


@pytest.mark.parametrize("name", published_configs.LLMS)
def test_every_published_config_is_read(name):
    found = config(name)
    sizes = found.width, found.depth, found.heads, found.kv_heads, found.head_width, found.vocab
    assert (*sizes, found.rope_base, found.tied) == SIZES[name]


@pytest.mark.parametrize("name", published_configs.LLMS)
def test_the_same_config_as_transformers_5_writes_it(name, tmp_path):
    """Read by transformers and saved: new spellings, and all that its class adds; the same model."""
    published = published_configs.LLMS[name]
    kind = transformers.AutoConfig.for_model(published["model_type"]).__class__
    kind.from_dict(published).save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).to_dict()
    assert "rope_parameters" in again.get("text_config", again)
    assert folder_config(again, "c") == config(name)


@pytest.mark.parametrize("family", families.CLASSES)
def test_the_defaults_of_transformers_are_read(family):
    settings = families.CLASSES[family][0]().to_dict()
    name = NAMES.get(family, "Gemma3ForCausalLM")
    assert folder_config(settings | {"architectures": [name]}, "c").depth == settings["num_hidden_layers"]


def test_what_transformers_4_wrote_for_every_model_is_read():
    """All attributes of its base class, as `to_dict` gave them."""
    base = dict(
        **dict(return_dict=True, output_hidden_states=False, output_attentions=False, torchscript=False),
        **dict(torch_dtype="float32", use_bfloat16=False, tf_legacy_loss=False, pruned_heads={}, is_decoder=False),
        **dict(tie_word_embeddings=True, chunk_size_feed_forward=0, is_encoder_decoder=False, prefix=None),
        **dict(cross_attention_hidden_size=None, add_cross_attention=False, tie_encoder_decoder=False),
        **dict(finetuning_task=None, id2label={"0": "a"}, label2id={"a": 0}, tokenizer_class=None, sep_token_id=None),
        **dict(decoder_start_token_id=None, task_specific_params=None, problem_type=None, _name_or_path="x"),
        **dict(max_length=20, min_length=0, do_sample=False, early_stopping=False, num_beams=1, num_beam_groups=1),
        **dict(diversity_penalty=0.0, temperature=1.0, top_k=50, top_p=1.0, typical_p=1.0, repetition_penalty=1.0),
        **dict(length_penalty=1.0, no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0, bad_words_ids=None),
        **dict(num_return_sequences=1, output_scores=False, return_dict_in_generate=False, suppress_tokens=None),
        **dict(forced_bos_token_id=None, forced_eos_token_id=None, remove_invalid_values=False),
        **dict(exponential_decay_length_penalty=None, begin_suppress_tokens=None),
    )
    for settings in BASES.values():
        assert folder_config(base | settings, "c") == folder_config(settings, "c")


def test_sizes_known_by_name_are_those_of_the_configs():
    for name, known in (
        ("smollm2_135m", "SmolLM2-135M"),
        ("qwen3_0_6b", "Qwen3-0.6B"),
        ("llama_3_2_1b", "Llama-3.2-1B"),
    ):
        sizes, found = known_sizes.LLMS[known], config(name)
        for size in ("vocab", "width", "mlp_width", "depth", "heads", "kv_heads", "head_width", "tied"):
            assert getattr(sizes, size) == getattr(found, size)


WRONG = [
    ("llama", dict(logit_scale=0.5), "logit_scale=0.5 (unknown; nearest: "),
    ("llama", dict(foo=1), "foo=1 (unknown; nearest: "),
    ("llama", dict(rms_norm_epsilon=1e-5), "rms_norm_epsilon=1e-05 (unknown; nearest: rms_norm_eps;"),
    ("llama", dict(sliding_window=512), "sliding_window=512 (supported: None)"),
    ("llama", dict(pretraining_tp=2), "pretraining_tp=2 (supported: 1)"),
    ("llama", dict(text_config={"hidden_size": 4}), "text_config={'hidden_size': 4} (unknown; "),
    ("llama", dict(per_layer_config={"1": {}}), "per_layer_config={'1': {}} (unknown; "),
    ("llama", dict(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6' (must be a number > 0)"),
    ("llama", dict(rms_norm_eps=0), "rms_norm_eps=0 (must be a number > 0)"),
    ("llama", dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan (must be a number > 0)"),
    ("llama", dict(rope_theta="abc"), "rope_theta='abc' (must be a number > 0)"),
    ("llama", dict(rope_theta=10**400), "(must be a number > 0)"),
    ("llama", dict(hidden_size="2"), "hidden_size='2' (must be a whole number >= 1)"),
    ("llama", dict(hidden_size=True), "hidden_size=True (must be a whole number >= 1)"),
    ("llama", dict(hidden_size=576.0), "hidden_size=576.0 (must be a whole number >= 1)"),
    ("llama", dict(num_hidden_layers=-1), "num_hidden_layers=-1 (must be a whole number >= 1)"),
    ("llama", dict(num_key_value_heads=0), "num_key_value_heads=0 (must be a whole number >= 1)"),
    ("llama", dict(num_key_value_heads=2), "num_attention_heads=9 is not a multiple of num_key_value_heads=2"),
    ("llama", dict(hidden_size=9), "hidden_size=9 over num_attention_heads=9 gives no even head width"),
    ("llama", dict(head_dim=3), "head_dim=3 (must be an even whole number >= 2)"),
    ("llama", dict(tie_word_embeddings="no"), "tie_word_embeddings='no' (must be true or false)"),
    ("llama", dict(eos_token_id="</s>"), "eos_token_id='</s>' (must be a token's number, or a list of them)"),
    ("llama", dict(rope_scaling="yarn"), "rope_scaling='yarn' (must be an object)"),
    (
        "llama",
        dict(rope_scaling={"rope_type": ["llama3"]}),
        "rope_scaling.rope_type=['llama3'] (supported: 'default' or",
    ),
    ("llama", dict(rope_scaling={"mrope_section": [1]}), "rope_scaling.mrope_section=[1] (unknown; "),
    ("qwen2", dict(sliding_window="all"), "sliding_window='all' (must be a whole number >= 0)"),
    ("qwen2", dict(layer_types="full"), "layer_types='full' (must be a list of one or more types)"),
    ("qwen2", dict(layer_types=["full_attention"]), "len(layer_types)=1 (supported: num_hidden_layers=28)"),
    ("qwen3", dict(no_rope_layers=[1]), "no_rope_layers=[1] (unknown; "),
    ("gemma3", dict(sliding_window_pattern=0), "sliding_window_pattern=0 (must be a whole number >= 1)"),
    ("gemma3", dict(query_pre_attn_scalar=-1), "query_pre_attn_scalar=-1 (must be a number > 0)"),
    ("gemma3", dict(rope_local_base_freq=[]), "rope_local_base_freq=[] (must be a number > 0)"),
    ("gemma3", dict(rope_parameters={"rope_theta": 5e5}), "rope_parameters.rope_theta=500000.0 (unknown; "),
]


@pytest.mark.parametrize(("family", "setting", "told"), WRONG, ids=[f"{row[0]} {row[1]!r:.60}" for row in WRONG])
def test_anything_else_is_told_in_one_line(family, setting, told):
    with pytest.raises(ValueError) as raised:
        folder_config(BASES[family] | setting, "llm/config.json")
    assert str(raised.value).startswith("llm/config.json: ") and told in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 240


def test_all_faults_are_told_together():
    with pytest.raises(ValueError) as raised:
        folder_config(BASES["llama"] | dict(foo=1, hidden_size="2", pretraining_tp=4, vocab_size=None), "c")
    assert [line.split("=")[0] for line in str(raised.value).splitlines()] == [
        "c:",
        "  not supported: hidden_size",
        "  not supported: pretraining_tp",
        "  not supported: foo",
        "  it lacks vocab_size",
    ]


@pytest.mark.parametrize(
    ("change", "told"), [({"foo": 1}, "foo=1 (unknown; "), ({"text_config": 3}, "text_config=3 (must")]
)
def test_the_outer_settings_of_a_multimodal_model_are_looked_at_too(change, told):
    with pytest.raises(ValueError) as raised:
        folder_config(published_configs.GEMMA_3_4B | change, "c")
    assert f"c: not supported: {told}" in str(raised.value)


def test_the_scaling_of_llama_3_needs_two_borders():
    rope = published_configs.LLAMA_3_1_8B["rope_scaling"] | dict(high_freq_factor=1.0)
    with pytest.raises(ValueError, match=r"rope_scaling.high_freq_factor=1.0 \(must be above low_freq_factor=1.0\)"):
        folder_config(published_configs.LLAMA_3_1_8B | {"rope_scaling": rope}, "c")
