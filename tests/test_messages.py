"""Messages about files that a config names: each has the file's name."""

import pytest
from ml_collections import ConfigDict

from rise_jax.generate import read_prompts
from rise_jax.published import check_files
from rise_jax.tensor_folder import TensorFolder
from rise_jax.text import Instruction
from rise_jax.weights_wan import STEM, wan_sizes


def model(**changes):
    parts = {"dit": {"path": ""}, "vae": {"path": "pixels"}, "native": {"path": ""}, "adapter": {"d_ctx": 16}}
    return ConfigDict(parts | {"condition": "rephrase", "null": "learned", "calibrate": ""} | changes)


READERS = {
    "instruction": Instruction.read,
    "prompts": lambda path: read_prompts(str(path)),
    "captions": lambda path: check_files(model(calibrate=str(path)), absent=[""]),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path, reader):
    path = tmp_path / "texts.txt"
    path.write_bytes("a dog\na café".encode("latin-1"))
    with pytest.raises(ValueError) as raised:
        READERS[reader](path)
    assert str(raised.value) == f"{path}, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_line_ends_are_no_part_of_a_prompt(tmp_path, ends):
    (tmp_path / "texts.txt").write_bytes(f"a dog{ends}a café{ends}".encode())
    assert read_prompts(str(tmp_path / "texts.txt")) == ["a dog", "a café"]


@pytest.mark.parametrize("changes", [{"null": "native"}, {"condition": "native"}])
def test_a_native_encoder_without_a_path(changes):
    with pytest.raises(FileNotFoundError, match="model.native.path='' is no folder: the native encoder is needed here"):
        check_files(model(**changes))


@pytest.mark.parametrize("name", ["[]", "{}", "3"])
def test_a_class_that_is_no_name(tmp_path, name):
    (tmp_path / "config.json").write_text(f'{{"_class_name": {name}}}')
    (tmp_path / f"{STEM}.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError) as raised:
        wan_sizes(TensorFolder(tmp_path, STEM))
    told = f"_class_name={name} is not supported; known: WanTransformer3DModel, WanModel"
    assert str(raised.value) == f"{tmp_path}/config.json: {told}"
