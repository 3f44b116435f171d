"""Folders of published parts that are broken in ways a download, a conversion or an edit leaves behind, each answered with words."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from encoders import write_umt5
from tiny import write_llm

from rise_jax.tensor_folder import TensorFolder
from rise_jax.weights import load_llm
from rise_jax.weights_t5 import load_t5

INDEX = "model.safetensors.index.json"


@pytest.fixture
def llm(tmp_path):
    return write_llm(tmp_path / "llm")


@pytest.mark.parametrize(
    ("dtype", "told"), [(np.int8, "I8"), (np.float64, "F64"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (bool, "BOOL")]
)
def test_tensors_of_a_dtype_that_is_not_read_are_listed(llm, dtype, told):
    tensors = safetensors.numpy.load_file(llm / "model.safetensors")
    changed = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    tensors |= {name: tensors[name].astype(dtype) for name in changed}
    safetensors.numpy.save_file(tensors, llm / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model .2 problems.") as raised:
        load_llm(llm)
    for name in changed:
        assert f"wrong dtype: {name} is {told}, readable: F32, F16, BF16" in str(raised.value)


def test_a_folder_without_its_tokenizer_is_told_which_file(llm):
    (llm / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in .*llm"):
        load_llm(llm)


PICKLED = (
    "it holds pytorch_model-00001-of-00002.bin and other pickles, which may run code when read; save the tensors as safetensors "
    "(save_pretrained of transformers and diffusers does), or take a folder that has them so"
)


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("read", [load_llm, load_t5], ids=["llm", "t5"])
def test_a_folder_of_pickles_is_told_as_one(tmp_path, read, lost):
    folder = write_llm(tmp_path / "llm") if read is load_llm else write_umt5(tmp_path / "t5", 16)
    for name in {"model.safetensors", lost}:
        (folder / name).unlink()
    for number in (1, 2):
        (folder / f"pytorch_model-0000{number}-of-00002.bin").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError) as raised:
        read(folder)
    assert lost in str(raised.value) and str(raised.value).endswith(f": {PICKLED}")


def test_pickles_beside_weights_are_not_spoken_of(llm):
    (llm / "pytorch_model.bin").write_bytes(b"PK")
    (llm / "config.json").unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load_llm(llm)
    assert str(raised.value) == f"no config.json in {llm}: a Hugging Face folder needs it"


@pytest.mark.parametrize("text", ["{}", '{"version": ', "[]"])
def test_a_damaged_tokenizer_is_named(llm, text):
    (llm / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="llm/tokenizer.json cannot be read as a tokenizer"):
        load_llm(llm)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        (["a"], "holds no JSON object but list"),
        (None, "holds no JSON object but NoneType"),
    ],
    ids=str,
)
@pytest.mark.parametrize("read", [load_llm, lambda folder: TensorFolder(folder, "model")], ids=["llm", "others"])
def test_an_index_that_is_none(llm, index, message, read):
    (llm / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{INDEX} {message}"):
        read(llm)


@pytest.mark.parametrize("read", [load_llm, lambda folder: TensorFolder(folder, "model")], ids=["llm", "others"])
def test_a_config_that_is_no_object(llm, read):
    (llm / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json holds no JSON object but list"):
        read(llm)
