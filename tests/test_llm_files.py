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
from rise_jax.weights import load_llm
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
