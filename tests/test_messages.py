"""Messages about files that a config names: each has the file's name."""

import pytest
from ml_collections import ConfigDict

from configs import stage1, stage2
from rise_jax.generate import read_prompts
from rise_jax.published import check_files
from rise_jax.tensor_folder import TensorFolder
from rise_jax.text import Instruction
from rise_jax.validate import validate
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


PARTS = {"vae": "vae", "dit": "transformer", "native": "text_encoder"}  # group of the config -> subfolder of a pipeline


def refused(part, path):
    """What is said of `path` as the config's path of a part."""
    changes = {part: {"path": str(path)}} | ({"condition": "native"} if part == "native" else {})
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        check_files(model(**changes))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("part", PARTS)
def test_a_pipeline_without_a_part_is_told_which(tmp_path, part):
    (tmp_path / "model_index.json").write_text("{}")
    told = (
        f"model.{part}.path: {tmp_path} lacks {PARTS[part]}/: the pipeline is incomplete, download that part of it, too"
    )
    assert refused(part, tmp_path) == told


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "pytorch_model.bin"])
def test_a_pickle_is_called_one(tmp_path, part, name):
    (tmp_path / name).write_bytes(b"PK")
    told = refused(part, tmp_path / name)
    assert told.startswith(f"model.{part}.path: {tmp_path / name} is a pickle, which may run code when read: ")


def test_a_pickle_as_a_null_condition(tmp_path):
    (tmp_path / "null.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="null.pt is a pickle, which may run code when read: save its tensors as"):
        check_files(model(null=str(tmp_path / "null.pt")))


@pytest.mark.parametrize("part", ["dit", "native"])
def test_a_file_where_a_folder_is_due(tmp_path, part):
    (tmp_path / "model.safetensors").write_bytes(b"")
    told = f"model.{part}.path: {tmp_path}/model.safetensors is a file, give its folder"
    assert refused(part, tmp_path / "model.safetensors") == told


def test_the_vae_of_wans_original_repository_is_a_pickle_in_it(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    (tmp_path / f"{STEM}.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    told = refused("vae", tmp_path)
    assert told.startswith(f"model.vae.path: {tmp_path}/config.json: _class_name='WanModel' is not supported; ")
    assert "Wan2.1_VAE.pth, a pickle, which may run code" in told and told.endswith("whose name ends in -Diffusers")


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_that_is_not_here_is_told_by_its_key_and_where_to_get_it(tmp_path, part):
    told = refused(part, tmp_path / "absent")
    assert told.startswith(f"model.{part}.path") and f"{tmp_path}/absent" in told and "docs/published.md says" in told


@pytest.mark.parametrize("stage", [stage1, stage2])
def test_a_preset_without_its_files_names_the_keys(tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as raised:
        validate(stage.get_config("wan_1_3b"))
    told = str(raised.value)
    assert told.startswith("model.vae.path: no folder at Wan2.1-T2V-1.3B-Diffusers; docs/published.md says where")
    assert all(f"model.{part}.path" in told for part in (*PARTS, "llm"))
