"""Weights of Wan's autoencoder: every published name both ways, files of both layouts, and broken ones."""

import hashlib
import inspect
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from rise_jax.models.wan_vae import WAN_2_1, WanVAE
from rise_jax.trees import named_leaves
from rise_jax.weights_wan_vae import load_wan_vae, published_name, save_wan_vae, wan_vae_table
from tests import wan_vae
from tests.wan_vae import SMALL

KEYS = Path(__file__).parent / "fixtures" / "wan_vae_keys.txt"  # of AutoencoderKLWan in diffusers 0.42.1
WIDE = {**SMALL, "base_dim": 40}  # more channels than are turned at a time (placement.py), and no multiple of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vae")
    wan_vae.reference(SMALL).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "vae"))


def weights(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def host(params: dict) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in named_leaves(params).items()}


def published_keys() -> dict[str, tuple[int, ...]]:
    rows = (line.split("\t") for line in KEYS.read_text().splitlines())
    return {name: tuple(json.loads(shape)) for name, shape in rows}


def test_every_published_tensor_has_its_leaf_and_every_leaf_its_tensor():
    leaves = named_leaves(WanVAE().abstract)
    table = wan_vae_table(WAN_2_1, "diffusers")
    assert {name: place.shape(leaves[place.path].shape) for name, place in table.items()} == published_keys()
    assert {place.path for place in table.values()} == set(leaves) and len(table) == 194
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == 126_892_531


def test_the_original_names_are_those_that_diffusers_converts():
    paths = named_leaves(WanVAE().abstract)
    names = dict(published_name(path, WAN_2_1.blocks)[::-1] for path in paths)
    assert len(names) == 194
    assert convert_wan_vae_to_diffusers({original: original for original in names}) == {
        theirs: original for original, theirs in names.items()
    }


def test_the_published_sizes_and_statistics_are_the_defaults():
    theirs = {name: p.default for name, p in inspect.signature(AutoencoderKLWan.__init__).parameters.items()}
    assert (WAN_2_1.width, list(WAN_2_1.multipliers), WAN_2_1.blocks) == (
        theirs["base_dim"],
        theirs["dim_mult"],
        theirs["num_res_blocks"],
    )
    assert (WAN_2_1.channels, list(WAN_2_1.temporal)) == (theirs["z_dim"], theirs["temperal_downsample"])
    assert (list(WAN_2_1.mean), list(WAN_2_1.std)) == (theirs["latents_mean"], theirs["latents_std"])


@pytest.mark.parametrize("sizes", [SMALL, WIDE], ids=["small", "wide"])
def test_what_diffusers_saved_comes_back_to_diffusers(sizes, tmp_path):
    loaded = wan_vae.loaded(sizes, tmp_path / "theirs")
    model = wan_vae.reference(sizes)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))
    save_wan_vae(loaded.params, loaded.config, tmp_path / "a" / "vae")
    again = AutoencoderKLWan.from_pretrained(tmp_path / "a" / "vae")
    assert {key: again.config[key] for key in sizes} == sizes
    assert again.config["latents_mean"] == model.config["latents_mean"]
    assert again.config["latents_std"] == model.config["latents_std"]
    ours, theirs = again.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_one_file_of_either_layout_gives_the_same_parameters(folder, tmp_path):
    loaded = load_wan_vae(folder)
    original = {
        published_name(place.path, loaded.config.blocks)[1]: name
        for name, place in wan_vae_table(loaded.config, "diffusers").items()
    }
    tensors = safetensors.numpy.load_file(weights(folder))
    path = tmp_path / "Wan2.1_VAE.safetensors"
    safetensors.numpy.save_file({ours: tensors[theirs] for ours, theirs in original.items()}, path)
    for file in (path, weights(folder)):
        again = load_wan_vae(file, loaded.config)
        np.testing.assert_equal(host(again.params), host(loaded.params))
        assert again.source.sha256() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_folder_of_a_whole_pipeline(copy):
    assert load_wan_vae(copy.parent).source.path == copy


def test_half_precision_files_come_in_fp32(tmp_path):
    model = wan_vae.reference(SMALL).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    kernel = load_wan_vae(tmp_path).params["decoder"]["conv_out"]["kernel"]
    assert kernel.dtype == np.float32
    expected = model.decoder.conv_out.weight.detach().float().numpy()
    np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 4, 1, 0))


def test_all_mismatches_are_reported_at_once(copy):
    tensors = safetensors.numpy.load_file(weights(copy))
    tensors["decoder.conv_out.gamma"] = np.ones(3, np.float32)
    del tensors["quant_conv.bias"]
    tensors["encoder.conv_in.weight"] = np.zeros((6, 3, 3, 3), np.float32)
    safetensors.numpy.save_file(tensors, weights(copy))
    with pytest.raises(ValueError, match="3 problems") as error:
        load_wan_vae(copy)
    assert "missing: quant_conv.bias (10,)" in str(error.value)
    assert "left over: decoder.conv_out.gamma (3,)" in str(error.value)
    assert "wrong shape: encoder.conv_in.weight is (6, 3, 3, 3), expected (6, 3, 3, 3, 3)" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_folder_without_a_needed_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_wan_vae(copy)


def test_a_damaged_file(copy):
    weights(copy).write_bytes(weights(copy).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cannot be read as safetensors.*download it again"):
        load_wan_vae(copy)


def test_an_unreadable_dtype(copy):
    tensors = safetensors.numpy.load_file(weights(copy))
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"].astype(np.int8)
    safetensors.numpy.save_file(tensors, weights(copy))
    with pytest.raises(ValueError, match="wrong dtype: quant_conv.bias is I8"):
        load_wan_vae(copy)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*absent\.safetensors"):
        load_wan_vae(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no folder at .*absent"):
        load_wan_vae(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"Wan2\.1_VAE\.pth is a pickle.*save its tensors as .safetensors"):
        load_wan_vae(tmp_path / "Wan2.1_VAE.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(_class_name="AutoencoderKL"), "_class_name='AutoencoderKL' is not supported; known: AutoencoderKLWan"),
        (dict(is_residual=True, patch_size=2), "is_residual=True .supported: False..*patch_size=2 .supported: None."),
        (dict(attn_scales=[0.5]), "attn_scales=.0.5."),
        (dict(decoder_base_dim=12), "decoder_base_dim=12 .supported: 6."),
        (dict(in_channels=12, out_channels=12), "in_channels=12 .supported: 3..*out_channels=12 .supported: 3."),
    ],
)
def test_what_this_autoencoder_lacks_is_refused_by_name(copy, settings, message):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(ValueError, match=f"(?s)config.json:.*{message}"):
        load_wan_vae(copy)


@pytest.mark.parametrize("key", ["base_dim", "latents_std"])
def test_a_config_without_a_size(copy, key):
    path = copy / "config.json"
    settings = json.loads(path.read_text())
    del settings[key]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"config.json: it lacks {key}"):
        load_wan_vae(copy)
