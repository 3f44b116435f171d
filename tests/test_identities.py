"""Which LLM, text encoder or VAE a folder holds: all that its states and latents depend on counts; place and writer do not."""

import hashlib
import json
import shutil

import pytest
import tokenizers
import wan_vae
from encoders import write_umt5
from tiny import TEMPLATE, as_gguf, preset_config, write_llm

from rise_jax.condition_kinds import open_text
from rise_jax.models.wan_vae import WanVAEConfig
from rise_jax.outline import text_identity
from rise_jax.published import load_vae, vae_identity
from rise_jax.tensor_folder import not_default, sha256_of
from rise_jax.weights import load_llm, open_weights
from rise_jax.weights_t5 import encoder_folder, load_t5


@pytest.fixture
def llm(tmp_path):
    return write_llm(tmp_path / "llm")


@pytest.fixture
def t5(tmp_path):
    return write_umt5(tmp_path / "t5", width=16)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    wan_vae.reference(wan_vae.SMALL).save_pretrained(folder)
    return folder


def change(file, **values):
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | values))


def without_accents(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFD(), tokenizers.normalizers.StripAccents()]
    )
    backend.save(str(folder / "tokenizer.json"))


def template_of_its_own(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
OTHER_LLM = {
    "rotary base": lambda folder: change(folder / "config.json", rope_theta=500.0),
    "rotary scaling": lambda folder: change(folder / "config.json", rope_scaling=LLAMA3),
    "norm": lambda folder: change(folder / "config.json", rms_norm_eps=1e-6),
    "end token": lambda folder: change(folder / "generation_config.json", eos_token_id=[2, 5]),
    "chat template": lambda folder: change(folder / "tokenizer_config.json", chat_template=TEMPLATE + " "),
    "no chat template": lambda folder: change(folder / "tokenizer_config.json", chat_template=None),
    "chat template in a file": template_of_its_own,
    "tokenizer": without_accents,
    "first token": lambda folder: change(folder / "tokenizer_config.json", bos_token="<|start|>"),
}


@pytest.mark.parametrize("name", OTHER_LLM)
def test_another_llm_with_the_same_weights_is_told_apart(llm, name):
    before = load_llm(llm).identity["sha256"]
    OTHER_LLM[name](llm)
    assert load_llm(llm).identity["sha256"] != before


def own_file(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    change(folder / "tokenizer_config.json", chat_template=None)


SAME_LLM = {
    "writer": lambda folder: change(
        folder / "config.json", transformers_version="5.0", torch_dtype="bfloat16", _name_or_path="/home/me/llm"
    ),
    "names": lambda folder: change(folder / "tokenizer_config.json", name_or_path="/home/me", model_max_length=77),
    "spelling": lambda folder: change(
        folder / "config.json", rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10000}
    ),
    "default": lambda folder: change(folder / "config.json", attention_bias=False),
    "place of the chat template": own_file,
    "drawing": lambda folder: change(folder / "generation_config.json", temperature=0.6, top_p=0.9),
}


@pytest.mark.parametrize("name", SAME_LLM)
def test_the_same_llm_from_another_place_or_writer_is_known_again(llm, tmp_path, name):
    moved = shutil.copytree(llm, tmp_path / "elsewhere" / "other")
    SAME_LLM[name](moved)
    assert load_llm(moved).identity["sha256"] == load_llm(llm).identity["sha256"] == open_weights(llm).sha256()


def test_a_gguf_file_has_the_hash_of_its_bytes(llm):
    file = as_gguf(llm)
    assert load_llm(file).identity["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


OTHER_T5 = {
    "buckets": lambda folder: change(folder / "config.json", relative_attention_max_distance=64),
    "norm": lambda folder: change(folder / "config.json", layer_norm_epsilon=1e-5),
    "end token": lambda folder: change(folder / "config.json", eos_token_id=2),
    "tokenizer": without_accents,
}


@pytest.mark.parametrize("name", OTHER_T5)
def test_another_text_encoder_with_the_same_weights_is_told_apart(t5, name):
    before = load_t5(t5).source.sha256()
    OTHER_T5[name](t5)
    assert load_t5(t5).source.sha256() != before


def test_the_same_text_encoder_is_known_again_within_a_pipeline(t5, tmp_path):
    shutil.copytree(t5, tmp_path / "wan" / "text_encoder")
    (tmp_path / "wan" / "tokenizer").mkdir()
    shutil.move(tmp_path / "wan" / "text_encoder" / "tokenizer.json", tmp_path / "wan" / "tokenizer")
    change(tmp_path / "wan" / "text_encoder" / "config.json", transformers_version="5.0", dropout_rate=0.3)
    found = {encoder_folder(path).sha256() for path in (t5, tmp_path / "wan", tmp_path / "wan" / "text_encoder")}
    assert found == {load_t5(t5).source.sha256()}


def test_a_plan_and_training_say_the_same_of_a_text_encoder(t5):
    config = preset_config("stage1", "tiny", model__condition="native", model__native__path=str(t5))
    assert text_identity(config.model) == open_text("native", **config.model.native).identity


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
def test_a_vae_with_other_statistics_is_told_apart(vae, tmp_path, key):
    moved = shutil.copytree(vae, tmp_path / "pipeline" / "vae")
    change(moved / "config.json", _diffusers_version="9", dropout=0.1)
    assert (
        vae_identity(str(moved)) == vae_identity(str(moved.parent)) == vae_identity(str(vae)) == load_vae(str(vae))[1]
    )
    values = json.loads((moved / "config.json").read_text())[key]
    change(moved / "config.json", **{key: [values[0] + 0.1, *values[1:]]})
    assert vae_identity(str(moved)) == load_vae(str(moved))[1] != vae_identity(str(vae))


def test_the_last_digits_of_a_fraction_do_not_count(tmp_path):
    """They differ between CPUs, where a fraction is worked out; whole numbers count to the last."""
    of = lambda value: sha256_of([], {"a": value})
    assert of(1 / 3) == of(1 / 3 + 1e-12) != of(1 / 3 + 1e-6)
    assert of(10**12) != of(10**12 + 1)


def test_settings_at_their_defaults_are_not_hashed(tmp_path):
    """So a setting that comes to have a default later, and the published VAE, leave hashes as they are."""
    assert not_default(WanVAEConfig()) == {}
    assert not_default(WanVAEConfig(width=8)) == {"width": 8}
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of([tmp_path / "a"], {}) == sha256_of([tmp_path / "a"])
