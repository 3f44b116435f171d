"""Folders of Wan's DiT that are broken or hold something else: said by name, all problems at once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rise_jax.placement import check
from rise_jax.tensor_folder import TensorFolder
from rise_jax.weights_wan import STEM, abstract_wan, load_wan, wan_table
from tests import wan
from tests.wan import TINY, read_tensors, sizes_of, write_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model as diffusers saves it."""
    path = tmp_path_factory.mktemp("tiny")
    wan.build_torch(**TINY).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_all_mismatches_are_reported_at_once(copy):
    tensors = read_tensors(copy)
    del tensors["blocks.1.norm2.bias"]
    tensors["blocks.0.norm3.weight"] = np.zeros(24, np.float32)
    tensors["patch_embedding.weight"] = np.zeros((24, 4, 2, 2), np.float32)
    tensors["proj_out.bias"] = np.zeros(16, np.int8)
    write_tensors(copy, tensors)
    with pytest.raises(ValueError, match="4 problems") as error:
        load_wan(copy)
    for problem in (
        "missing: blocks.1.norm2.bias (24,)",
        "left over: blocks.0.norm3.weight (24,)",
        "wrong shape: patch_embedding.weight is (24, 4, 2, 2), expected (24, 4, 1, 2, 2)",
        "wrong dtype: proj_out.bias is I8, readable: F32, F16, BF16",
    ):
        assert problem in str(error.value)


def test_names_that_may_be_there_are_only_let_pass_when_said(folder):
    source = TensorFolder(folder, STEM)
    abstract = abstract_wan(sizes_of(TINY))
    table = wan_table(abstract, TINY["patch"], "diffusers")
    extra = table.pop("proj_out.bias")
    check(abstract, table, source, ("proj_out.",))
    with pytest.raises(ValueError, match=r"left over: proj_out\.bias"):
        check(abstract, table, source)
    assert extra.path == "patch_out/bias"


@pytest.mark.parametrize("name", ["config.json", f"{STEM}.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_wan(copy)
    with pytest.raises(FileNotFoundError, match="no folder at .*absent"):
        load_wan(copy / "absent")


def test_all_missing_shards_are_named(tmp_path):
    wan.build_torch(**TINY).save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1:3]
    for file in gone:
        file.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {gone[0].name}, {gone[1].name}: the folder is incomplete"):
        load_wan(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 50, 3000, -1])
def test_a_truncated_file_says_so(copy, kept):
    file = copy / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"safetensors cannot be read as safetensors.*download it again"):
        load_wan(copy)


def test_a_header_whose_sizes_do_not_agree_says_so(copy):
    file = copy / f"{STEM}.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[16]', b'"shape":[15]', 1))
    with pytest.raises(ValueError, match=r"proj_out\.bias is \(15,\) of F32 in 64 bytes.*download it again"):
        load_wan(copy)


def test_a_broken_config_says_so(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_wan(copy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(_class_name="HunyuanVideoTransformer3DModel"),
            "Hunyuan.*not supported; known: WanTransformer3DModel, WanModel",
        ),
        (
            dict(qk_norm="layer_norm", image_dim=1280),
            "(?s)qk_norm='layer_norm' .supported: 'rms_norm_across_heads'..*image_dim=1280",
        ),
        (dict(freq_dim=128), "freq_dim=128 .supported: 256"),
        (dict(cross_attn_norm=False), "cross_attn_norm=False .supported: True"),
        (dict(window_attention=4), "window_attention=4 .unknown"),
        (dict(in_channels=36), "36 channels in and 4 out are not supported: equal numbers"),
        (dict(ffn_dim=None, num_layers=None), "lacks ffn_dim, num_layers"),
    ],
)
def test_what_the_dit_lacks_is_refused_by_name(copy, settings, message):
    change_config(copy, **settings)
    with pytest.raises(ValueError, match=message):
        load_wan(copy)


SECOND = ["diffusers", "WanTransformer3DModel"]


@pytest.mark.parametrize(
    ("second", "index", "sign"),
    [
        ("transformer_2", None, "transformer_2/"),
        ("low_noise_model", None, "low_noise_model/"),
        (None, {"boundary_ratio": 0.875}, "boundary_ratio in model_index.json"),
        (None, {"transformer_2": SECOND}, "transformer_2 in model_index.json"),
        ("transformer_2", {"boundary_ratio": 0.875, "transformer_2": SECOND}, "transformer_2/, boundary_ratio in .*"),
    ],
)
@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_model_of_two_experts_is_refused(folder, tmp_path, second, index, sign, part):
    """Wan 2.2 A14B: each expert has the sizes of Wan 2.1 14B."""
    pipeline = tmp_path / "wan"
    for name in ("transformer", second):
        if name:
            shutil.copytree(folder, pipeline / name)
    if index:
        (pipeline / "model_index.json").write_text(json.dumps(index))
    told = rf"wan holds a model of two experts \({sign}.*\), as Wan 2\.2 .*not supported; take Wan2\.1-T2V-1\.3B"
    for path in (pipeline / part, *([pipeline / second] if second else [])):
        with pytest.raises(ValueError, match=told):
            load_wan(path)


def test_a_pipeline_of_one_transformer_is_read_whatever_its_index_leaves_empty(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "transformer")
    index = {"transformer": SECOND, "transformer_2": [None, None], "boundary_ratio": None}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "transformer"):
        assert load_wan(path).source.path == tmp_path / "transformer"
