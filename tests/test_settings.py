"""Settings in the config.json of a text encoder, a DiT and a VAE: the published ones are read, any other is told in a line."""

import json

import numpy as np
import pytest
import safetensors.numpy
import transformers

from rise_jax.known_sizes import UMT5_XXL
from rise_jax.models.wan_vae import WAN_2_1
from rise_jax.tensor_folder import TensorFolder
from rise_jax.weights_t5 import t5_config
from rise_jax.weights_wan import wan_sizes
from rise_jax.weights_wan_vae import wan_vae_config
from tests import published_configs

PARTS = {
    "t5": (published_configs.T5_V1_1_XXL, t5_config),
    "umt5": (published_configs.UMT5_XXL, t5_config),
    "dit": (published_configs.DIT, wan_sizes),
    "original dit": (published_configs.DIT_ORIGINAL, wan_sizes),
    "vae": (published_configs.VAE, wan_vae_config),
}


@pytest.fixture
def read(tmp_path):
    """(part, changes of its settings) -> what is read of a folder with such a config.json and weights of another model."""

    def function(part, **changes):
        settings, reader = PARTS[part]
        (tmp_path / "config.json").write_text(json.dumps(settings | changes))
        safetensors.numpy.save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
        return reader(TensorFolder(tmp_path, "model"))

    return function


def test_published_configs_are_read(read):
    assert read("umt5") == UMT5_XXL
    t5 = read("t5")
    assert (t5.vocab, t5.shared_bias, t5.buckets, t5.max_distance) == (32128, True, 32, 128)
    assert read("vae") == WAN_2_1
    sizes = dict(width=1536, mlp_width=8960, heads=12, depth=30, channels=16, patch=(1, 2, 2), d_ctx=4096, text_len=512)
    for part in ("dit", "original dit"):
        assert read(part)[0] == sizes | dict(eps=1e-6, coordinates=False)


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_what_transformers_writes_today_is_read(kind, read):
    classes = {"t5": transformers.T5Config, "umt5": transformers.UMT5Config}
    settings = classes[kind].from_dict(PARTS[kind][0]).to_dict()
    assert read(kind, **settings) == read(kind)


def test_what_transformers_4_wrote_for_every_t5_is_read(read):
    base = dict(add_cross_attention=False, cross_attention_hidden_size=None, is_decoder=False, pruned_heads={})
    base |= dict(tie_encoder_decoder=False, n_positions=512, torchscript=False, task_specific_params={"a": {"b": 1}})
    assert read("t5", **base) == read("t5")


WRONG = [
    ("t5", dict(foo=1), "foo=1 (unknown; nearest: "),
    ("t5", dict(num_head=64), "num_head=64 (unknown; nearest: num_heads;"),
    ("t5", dict(is_decoder=True), "is_decoder=True (supported: False)"),
    ("t5", dict(feed_forward_proj="gated-silu"), "feed_forward_proj='gated-silu' (supported: 'gated-gelu')"),
    ("t5", dict(quantization_config={"bits": 8}), "quantization_config={'bits': 8} (supported: None)"),
    ("t5", dict(num_heads=0), "num_heads=0 (must be a whole number >= 1)"),
    ("umt5", dict(d_ff="36"), "d_ff='36' (must be a whole number >= 1)"),
    ("umt5", dict(layer_norm_epsilon="x"), "layer_norm_epsilon='x' (must be a number > 0)"),
    ("umt5", dict(relative_attention_num_buckets=2), "relative_attention_num_buckets=2 (must be a whole number >= 4)"),
    ("umt5", dict(relative_attention_max_distance=8), "relative_attention_max_distance=8 (must be > 8: 32 buckets)"),
    ("umt5", dict(eos_token_id=[]), "eos_token_id=[] (must be a token's number, or a list of them)"),
    ("umt5", dict(pad_token_id="0"), "pad_token_id='0' (must be a whole number >= 0)"),
    ("dit", dict(num_attention_heads=0), "num_attention_heads=0 (must be a whole number >= 1)"),
    ("dit", dict(num_attention_heads="2"), "num_attention_heads='2' (must be a whole number >= 1)"),
    ("dit", dict(attention_head_dim=3), "attention_head_dim=3 (must be an even whole number >= 2)"),
    ("dit", dict(patch_size=2), "patch_size=2 (must be a list of 3 whole numbers >= 1)"),
    ("dit", dict(patch_size=[1, 2]), "patch_size=[1, 2] (must be a list of 3 whole numbers >= 1)"),
    ("dit", dict(patch_size=[1, 2, 0]), "patch_size[2]=0 (must be a whole number >= 1)"),
    ("dit", dict(eps="1"), "eps='1' (must be a number > 0)"),
    ("dit", dict(qk_norm=None), "qk_norm=None (supported: 'rms_norm_across_heads')"),
    ("dit", dict(rope_max_len=5), "rope_max_len=5 (unknown; nearest: rope_max_seq_len;"),
    ("original dit", dict(num_heads=7), "dim=1536 over num_heads=7 gives no even head width"),
    ("original dit", dict(dim=[1536]), "dim=[1536] (must be a whole number >= 1)"),
    ("original dit", dict(window_size=[3, 3]), "window_size=[3, 3] (supported: [-1, -1])"),
    ("vae", dict(foo=1), "foo=1 (unknown; nearest: "),
    ("vae", dict(base_dim="96"), "base_dim='96' (must be a whole number >= 1)"),
    ("vae", dict(z_dim=0), "z_dim=0 (must be a whole number >= 1)"),
    ("vae", dict(z_dim=8), "len(latents_mean)=16 (must be 8: z_dim=8)"),
    ("vae", dict(latents_mean=[0.0] * 4), "len(latents_mean)=4 (must be 16: z_dim=16)"),
    ("vae", dict(latents_std=[1.0] * 15 + [0]), "latents_std[15]=0 (must be a number > 0)"),
    ("vae", dict(latents_std=1.0), "latents_std=1.0 (must be a list of one or more numbers > 0)"),
    ("vae", dict(dim_mult=4), "dim_mult=4 (must be a list of one or more whole numbers >= 1)"),
    ("vae", dict(dim_mult=[1, 2, "4", 4]), "dim_mult[2]='4' (must be a whole number >= 1)"),
    ("vae", dict(dim_mult=[1, 2]), "len(temperal_downsample)=3 (must be 1: len(dim_mult)=2)"),
    ("vae", dict(temperal_downsample=[0, 1, 1]), "temperal_downsample[0]=0 (must be true or false)"),
    ("vae", dict(num_res_blocks=None), "it lacks num_res_blocks"),
]


@pytest.mark.parametrize(("part", "setting", "told"), WRONG, ids=[f"{row[0]} {row[1]!r:.60}" for row in WRONG])
def test_anything_else_is_told_with_file_key_value_and_what_is_valid(read, tmp_path, part, setting, told):
    with pytest.raises(ValueError) as raised:
        read(part, **setting)
    said = str(raised.value)
    assert said.startswith(f"{tmp_path}/config.json:") and told in said
    assert all(len(line) < 200 + len(str(tmp_path)) for line in said.splitlines())


def test_all_faults_are_told_together(read):
    with pytest.raises(ValueError) as raised:
        read("dit", num_layers=0, eps=None, qk_norm=1, foo={})
    assert [line.split("=")[0].split()[-1] for line in str(raised.value).splitlines()[1:]] == [
        "num_layers",
        "qk_norm",
        "foo",
    ]
