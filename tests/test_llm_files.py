"""Files of every published LLM family: GGUF and folders, published oddities, and what is not supported."""

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

from rise_jax.llm_families import folder_config
from rise_jax.llm_gguf import gguf_config
from rise_jax.models.llm import make_llm
from rise_jax.models.llm_config import LLMConfig
from rise_jax.weights import llm_table, load_llm
from tests import families, llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return families.folders(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(folders):
    return cache(lambda family: load_llm(folders(family)[1]))


def same(first, second):
    assert jax.tree.structure(first.params) == jax.tree.structure(second.params)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def write_gguf(path: Path, family: str, model, **extra) -> Path:
    """`model` as llama.cpp's converter would write it: Gemma's norms with the 1 added, no rotary rows interleaved."""
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, family)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "gemma3":
        rope = config.rope_parameters["full_attention"]
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    else:
        rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "<end>", "b", "ab", *(f"w{i}" for i in range(config.vocab_size - 4))])
    writer.add_token_types([1, 3, *([1] * (config.vocab_size - 2))])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for key, value in extra.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.FLOAT32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        shift = family == "gemma3" and name.endswith("norm.weight")
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), value + np.float32(1) if shift else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GEMMA_AS_CONVERTED = dict(  # what a GGUF header cannot say is as llama.cpp supposes it
    num_hidden_layers=6,
    query_pre_attn_scalar=16,
    layer_types=[*["sliding_attention"] * 5, "full_attention"],
    rope_parameters=families.ropes(local=10_000.0),
)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
def test_gguf_and_folder_give_the_same_model(tmp_path, folders, loaded, family):
    if family == "gemma3":
        model = families.tiny(family, **GEMMA_AS_CONVERTED)
        from_folder = load_llm(llama.save(model, tmp_path / "folder"))
    else:
        model, from_folder = folders(family)[0], loaded(family)
    from_gguf = load_llm(write_gguf(tmp_path / "m.gguf", family, model))
    same(from_gguf, from_folder)
    eps, query_scale = from_folder.config.norm_eps, from_folder.config.query_scale
    np.testing.assert_allclose(from_gguf.config.norm_eps, eps)
    np.testing.assert_allclose(from_gguf.config.query_scale or 0, query_scale or 0)
    assert dataclasses.replace(from_gguf.config, norm_eps=eps, query_scale=query_scale) == from_folder.config


def test_the_divisors_of_a_gguf_file_are_llama3s(folders):
    """llama.cpp writes them as the tensor rope_freqs.weight, by its own formula."""
    config = folder_config(json.loads((folders("llama")[1] / "config.json").read_text()), "config.json")
    found = []
    for frequency in 500.0 ** (-np.arange(0, 16, 2) / 16):  # LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py
        wavelength = 2 * np.pi / frequency
        smooth = (32 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        found.append(1 if wavelength < 32 / 4 else 8 if wavelength > 32 / 1 else between)
    assert min(found) == 1 and max(found) == 8 and any(1 < divisor < 8 for divisor in found)
    np.testing.assert_allclose(config.rope_divisors, found, rtol=1e-5)


def test_a_multimodal_gemma_gives_its_text_part(tmp_path, folders, loaded):
    model, _ = folders("gemma3")
    sight = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=model.config.to_dict(), vision_config=sight, mm_tokens_per_image=4)
    )
    whole.model.language_model.load_state_dict(model.model.state_dict())
    folder = llama.save(whole, tmp_path)
    assert any("vision" in name for name in safetensors.numpy.load_file(folder / "model.safetensors"))
    same(load_llm(folder), loaded("gemma3"))
    assert load_llm(folder).config == loaded("gemma3").config


@pytest.fixture
def copy(folders, tmp_path):
    return lambda family: Path(shutil.copytree(folders(family)[1], tmp_path / family))


@pytest.mark.parametrize("changed", [False, True], ids=["a copy of the embeddings", "its own"])
def test_a_tied_model_that_was_saved_with_a_head(copy, loaded, changed):
    """A copy of the embeddings is dropped; a head of its own is used, as transformers does."""
    folder = copy("qwen2")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].copy()
    head[-1] += changed
    safetensors.numpy.save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
    found = load_llm(folder)
    if not changed:
        same(found, loaded("qwen2"))
    assert found.config.tied is not changed
    states = np.random.default_rng(0).normal(size=(1, 56)).astype(np.float32)
    logits = make_llm(found.config)[0](found.params).logits(jnp.asarray(states))
    np.testing.assert_allclose(logits, states @ head.T, rtol=1e-4, atol=1e-4)


def test_tables_of_old_llama_files_are_left_aside(copy, loaded):
    folder = copy("llama")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    same(load_llm(folder), loaded("llama"))


def test_a_config_of_transformers_before_5(copy, loaded):
    """rope_theta, rope_scaling, rope_local_base_freq and sliding_window_pattern instead of rope_parameters and layer_types."""
    for family, old in {
        "llama": dict(rope_theta=500.0, rope_scaling={k: v for k, v in families.LLAMA3.items() if k != "rope_theta"}),
        "gemma3": dict(
            rope_theta=800.0, rope_local_base_freq=60.0, rope_scaling={"rope_type": "linear", "factor": 4.0}
        ),
    }.items():
        path = copy(family) / "config.json"
        settings = json.loads(path.read_text())
        del settings["rope_parameters"]
        assert folder_config({**settings, **old}, "c") == loaded(family).config
    settings.pop("layer_types")
    settings.pop("_sliding_window_pattern", None)
    assert folder_config({**settings, **old, "sliding_window_pattern": 2}, "c").local == (True, False, True)


def test_a_published_config_that_names_few_sizes():
    """gemma-3-4b-it's config.json, as published: what it leaves out is the default of transformers' class."""
    text = dict(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        sliding_window=1024,
    )
    found = folder_config({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}, "c")
    reference = transformers.Gemma3TextConfig(**text)
    assert (found.heads, found.kv_heads, found.head_width, found.vocab) == (8, 4, 256, reference.vocab_size)
    assert found.local == tuple(kind == "sliding_attention" for kind in reference.layer_types)
    assert (found.query_scale, found.window, found.tied) == (1 / 16, 1024, True)
    ropes = reference.rope_parameters
    assert found.rope_base == ropes["full_attention"]["rope_theta"]
    assert found.local_rope_base == ropes["sliding_attention"]["rope_theta"]
    assert found.rope_divisors == (8.0,) * 128


# ---- refused ----


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


def test_gguf_options_that_the_decoder_lacks(tmp_path):
    model = families.tiny("gemma3", **GEMMA_AS_CONVERTED)
    path = write_gguf(tmp_path / "m.gguf", "gemma3", model, gemma3__final_logit_softcapping=30.0)
    with pytest.raises(
        ValueError, match=r"m.gguf: not supported: gemma3.final_logit_softcapping=30.0 \(supported: None\)"
    ):
        load_llm(path)
    with pytest.raises(
        ValueError, match=r"g:\n  not supported: qwen2.rope.scaling.type='yarn'.*\n  it lacks qwen2.embedding"
    ):
        gguf_config({"general.architecture": "qwen2", "qwen2.rope.scaling.type": "yarn"}, (), True, "g")


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
