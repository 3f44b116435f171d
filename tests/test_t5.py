"""The text encoder: agreement with transformers on models it saved, buckets, padding, and every kind of broken folder."""

import functools
import json
import shutil
from copy import deepcopy as copy_of

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from diffusers import UniPCMultistepScheduler, WanPipeline
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from rise_jax.models.dit import fit_context
from rise_jax.models.t5 import T5Config, distance_buckets, make_t5
from rise_jax.weights_t5 import load_t5, text_ids

KINDS = {
    "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
    "t5": (transformers.T5Config, transformers.T5EncoderModel),
}
SIZES = dict(vocab_size=96, d_model=24, d_kv=10, d_ff=36, num_layers=3, num_heads=3)
LENGTHS = (40, 17, 1)  # across the borders of 4, 8 and 16 of 16 buckets up to 20
IDS = np.random.default_rng(0).integers(2, 96, (3, 40))
MASK = np.arange(40) < np.array(LENGTHS)[:, None]


@functools.cache
def theirs(kind):
    """A random encoder whose attention is far from flat and whose positions matter."""
    torch.manual_seed(0)
    buckets = dict(relative_attention_num_buckets=16, relative_attention_max_distance=20)
    config, model = KINDS[kind]
    model = model(config(**SIZES, **buckets, feed_forward_proj="gated-gelu", eos_token_id=1, pad_token_id=0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.5 if "relative" in name else 0.25
            parameter.normal_(1.0 if "norm" in name else 0.0, scale)
    return model


def train_tokenizer():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(["a cat runs over the hill", "the dog and the cat run home"] * 8, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@functools.cache
def tokenizer_text():
    """Two trainings number their pieces differently: here they have the order of the alphabet, so every run reads the same ids."""
    found = json.loads(train_tokenizer().to_str())
    special, pieces = found["model"]["vocab"][:3], found["model"]["vocab"][3:]
    found["model"]["vocab"] = special + sorted([piece, round(score, 3)] for piece, score in pieces)
    return json.dumps(found)


def save(kind, folder, shard="1GB"):
    theirs(kind).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text(tokenizer_text())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders["umt5"], tmp_path / "model")


def change_config(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    change(weights)
    safetensors.numpy.save_file(weights, file)


def encode(loaded, ids, mask, dtype=jnp.float32):
    t5, _ = make_t5(loaded.config, dtype)

    @jax.jit
    def apply(params, ids, mask):
        with jax.default_matmul_precision("highest"):
            return t5(params)(ids, mask)

    return np.asarray(apply(loaded.params, jnp.asarray(ids), jnp.asarray(mask)).astype(jnp.float32))


def encode_torch(kind, ids, mask):
    with torch.no_grad():
        states = theirs(kind)(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    return states.numpy() * mask[..., None]


@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_transformers(kind, shard, tmp_path):
    loaded = load_t5(save(kind, tmp_path, shard))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    ours, expected = encode(loaded, IDS, MASK), encode_torch(kind, IDS, MASK)
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-5
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == theirs(kind).num_parameters()
    without_positions = encode_torch(kind, IDS[:, ::-1].copy(), MASK[:1].repeat(3, 0))[:, ::-1]
    assert np.abs(without_positions[0] - expected[0]).max() > 0.1  # order matters, so the biases are really in


def test_the_kinds_differ_in_their_biases(folders):
    params = {kind: load_t5(folder).params for kind, folder in folders.items()}
    assert params["umt5"]["blocks"]["self_attn"]["position_bias"].shape == (3, 16, 3)
    assert params["t5"]["position_bias"].shape == (16, 3)
    assert "position_bias" not in params["umt5"] and "position_bias" not in params["t5"]["blocks"]["self_attn"]


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 20), (8, 64)])
def test_buckets_are_those_of_transformers(buckets, distance):
    config = transformers.UMT5Config(
        **SIZES, relative_attention_num_buckets=buckets, relative_attention_max_distance=distance
    )
    attention = UMT5Attention(config, has_relative_attention_bias=True)
    attention.relative_attention_bias.weight.data = torch.arange(float(buckets))[:, None].repeat(1, SIZES["num_heads"])
    expected = attention.compute_bias(600, 600)[0, 0].detach().numpy()
    np.testing.assert_array_equal(distance_buckets(600, buckets, distance), expected)


def test_buckets_of_the_published_models_by_hand():
    found = distance_buckets(300, 32, 128)[0]  # query 0: keys ahead
    at = {1: 17, 7: 23, 8: 24, 11: 24, 12: 25, 15: 25, 16: 26, 32: 28, 64: 30, 90: 30, 91: 31, 299: 31}
    assert {distance: found[distance] for distance in at} == at
    assert distance_buckets(300, 32, 128)[299, 299 - 16] == 10


@pytest.mark.slow
def test_padding_is_zero_and_changes_nothing(folders):
    loaded = load_t5(folders["umt5"])
    padded = encode(loaded, IDS, MASK)
    other = encode(loaded, np.where(MASK, IDS, 7), MASK)
    np.testing.assert_array_equal(padded, other)
    np.testing.assert_array_equal(padded[~MASK], 0)
    alone = encode(loaded, IDS[1:2, :17], MASK[1:2, :17])
    np.testing.assert_allclose(padded[1, :17], alone[0], atol=1e-5)


def test_bf16_is_as_near_to_fp32_as_torch_is(folders):
    exact = encode_torch("umt5", IDS, MASK)
    with torch.no_grad():
        rounded = copy_of(theirs("umt5")).bfloat16()(torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    expected = rounded.last_hidden_state.float().numpy() * MASK[..., None] - exact
    loaded = load_t5(folders["umt5"], jnp.bfloat16)
    assert loaded.params["blocks"]["up"]["kernel"].dtype == jnp.bfloat16
    assert loaded.params["blocks"]["mlp_norm"]["scale"].dtype == jnp.float32
    error = encode(loaded, IDS, MASK, jnp.bfloat16) - exact
    assert 0 < np.square(error).mean() < 2 * np.square(expected).mean() < 0.1 * np.square(exact).mean()


def test_the_published_sizes_have_their_published_counts():
    count = lambda config: sum(leaf.size for leaf in jax.tree.leaves(make_t5(config, jnp.bfloat16)[1]))
    xxl = dict(width=4096, mlp_width=10240, depth=24, heads=64, head_width=64)
    assert count(T5Config(vocab=256384, **xxl, shared_bias=False)) == 5_680_910_336
    assert count(T5Config(vocab=32128, **xxl, shared_bias=True)) == 4_762_310_656


def test_a_whole_models_folder_and_a_tied_second_name_are_read(copy, folders):
    def spoil(weights):
        weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
        weights["decoder.block.0.layer.0.SelfAttention.q.weight"] = np.zeros((2, 2), np.float32)
        weights["lm_head.weight"] = np.zeros((2, 2), np.float32)

    change_weights(copy, spoil)
    same = jax.tree.map(np.array_equal, load_t5(copy).params, load_t5(folders["umt5"]).params)
    assert all(jax.tree.leaves(same))


def test_all_mismatches_are_reported_at_once(copy):
    def spoil(weights):
        weights["encoder.extra"] = np.zeros(3, np.float32)
        weights["encoder.block.1.layer.0.SelfAttention.k.weight"] = np.zeros((30, 23), np.float32)
        weights["encoder.final_layer_norm.weight"] = np.zeros(24, np.int8)
        del weights["encoder.block.2.layer.1.DenseReluDense.wo.weight"]

    change_weights(copy, spoil)
    with pytest.raises(ValueError, match="4 problems") as error:
        load_t5(copy)
    for problem in (
        "left over: encoder.extra (3,)",
        "wrong shape: encoder.block.1.layer.0.SelfAttention.k.weight is (30, 23), expected (30, 24)",
        "wrong dtype: encoder.final_layer_norm.weight is I8, readable: F32, F16, BF16",
        "missing: encoder.block.2.layer.1.DenseReluDense.wo.weight (24, 36)",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(model_type="mt5"), "model_type='mt5' is not supported; known: t5, umt5"),
        (dict(feed_forward_proj="relu"), "feed_forward_proj='relu' .supported: 'gated-gelu'"),
        (dict(model_type="t5", feed_forward_proj="relu", is_gated_act=False), "(?s)relu.*is_gated_act=False"),
        (dict(is_decoder=True), "is_decoder=True"),
    ],
)
def test_what_the_encoder_lacks_is_refused_by_name(copy, setting, message):
    change_config(copy, **setting)
    with pytest.raises(ValueError, match=message):
        load_t5(copy)


def test_a_size_that_the_config_lacks(copy):
    settings = json.loads((copy / "config.json").read_text())
    del settings["d_kv"], settings["d_ff"]
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: it lacks d_ff, d_kv"):
        load_t5(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_t5(copy)


def test_a_damaged_tokenizer_is_named(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model/tokenizer\.json cannot be read as a tokenizer"):
        load_t5(copy)


def test_a_pipelines_folder_is_read(folders, tmp_path):
    shutil.copytree(folders["umt5"], tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    shutil.move(tmp_path / "text_encoder" / "tokenizer.json", tmp_path / "tokenizer")
    for path in (tmp_path, tmp_path / "text_encoder"):
        assert (
            load_t5(path).tokenizer.encode("a cat")
            == tokenizers.Tokenizer.from_str(tokenizer_text()).encode("a cat", add_special_tokens=False).ids
        )


def test_a_prompt_becomes_what_wans_pipeline_hands_its_dit(folders):
    """Text -> ids -> states -> cut to the true length and padded with zeros: diffusers against ours."""
    prompts = ["a cat runs", "the dog  and\n the cat &amp;amp; a dog run over the hill ", ""]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_text()), pad_token="<pad>", eos_token="</s>"
    )
    parts = dict(tokenizer=fast, text_encoder=theirs("umt5"), vae=None, transformer=None)
    pipeline = WanPipeline(**parts, scheduler=UniPCMultistepScheduler())
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=50)[0]
    loaded = load_t5(folders["umt5"])
    ids, mask = text_ids(loaded.tokenizer, prompts, 45)
    ours = fit_context(jnp.asarray(encode(loaded, ids, mask)), 50)
    assert np.abs(ours - expected.numpy()).max() / np.abs(expected.numpy()).max() < 1e-5
    assert not mask.all() and expected[:, 45:].abs().max() == 0


def test_a_text_over_the_limit_is_refused(folders):
    tokenizer = load_t5(folders["umt5"]).tokenizer
    length = len(tokenizer.encode("a cat runs")) + 1
    assert text_ids(tokenizer, ["a cat runs"], length)[1].all()
    with pytest.raises(ValueError, match=f"{length} tokens with its end token, at most {length - 1} are allowed"):
        text_ids(tokenizer, ["a cat runs"], length - 1)
