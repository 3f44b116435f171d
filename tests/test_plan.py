"""What --mode=plan says: the sizes of parts that are here or not, the real LLM's batches, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from encoders import write_umt5
from tiny import preset_config as config_of
from tiny import tiny_config, write_llm

from rise_jax import known_sizes
from rise_jax.condition_kinds import CONDITIONS, open_text
from rise_jax.data.sources import Text
from rise_jax.models.llm import make_llm
from rise_jax.models.vae import Pixels
from rise_jax.outline import outline, text_identity
from rise_jax.plan import checked_outline, flops_of_step, plan, training_memory
from rise_jax.sharding import planned_mesh
from rise_jax.train import train

PRESETS = ("tiny", "small_frozen", "wan_1_3b")  # one of a kind
GRADIENT = "gradients and activations"


@pytest.mark.slow
def test_the_embedded_llm_has_the_sizes_said():
    published, _ = known_sizes.llm_sizes("embedded")
    from rise_jax.weights import open_weights

    file = open_weights("embedded").config()
    assert make_llm(file)[1].keys() == make_llm(published)[1].keys()
    assert jax.tree.map(lambda leaf: leaf.shape, make_llm(file)[1]) == jax.tree.map(
        lambda leaf: leaf.shape, make_llm(published)[1]
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen2.5-0.5B-Instruct", 494_032_768),
        ("models/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen3-0.6B", 596_049_920),
        ("SmolLM2-1.7B-Instruct", 1_711_376_384),
        ("Llama-3.2-1B-Instruct", 1_235_814_400),
        ("Llama-3.2-3B", 3_212_749_824),
    ],
)
def test_known_llms_have_their_published_counts(name, count):
    """The counts that the models' cards give, to the last parameter."""
    sizes, note = known_sizes.llm_sizes(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(make_llm(sizes)[1])) == count
    assert "is not here" in note


def test_an_llm_that_is_not_here_has_no_hash():
    config = config_of("stage1", "wan_1_3b", model__llm__layer=-2)
    said = text_identity(config.model)
    assert said.keys() == {"dtype", "align", "instruction", "layer"} and said["layer"] == 27
    config.model.condition = "native"
    assert text_identity(config.model) == {"dtype": "bfloat16", "align": "token", "condition": "native"}


def test_an_unknown_llm_is_named_with_its_nearest():
    with pytest.raises(ValueError, match=r"Qwen2\.5-1\.6B.*nearest: Qwen2\.5-1\.5B"):
        known_sizes.llm_sizes("weights/Qwen2.5-1.6B-Instruct")


@pytest.mark.parametrize("condition", ["rephrase", "encode", "rewrite_then_encode"])
@pytest.mark.slow
def test_the_batch_is_the_one_training_has(condition, tmp_path):
    """Rows, dtypes and widths of a real LLM's, which lies in a folder."""
    folder = write_llm(tmp_path / "llm")
    files = dict(model__llm__path=str(folder), model__llm__instruction=str(folder / "instruction.txt"))
    config = config_of("stage2", "tiny", model__condition=condition, data__states="in_step", **files)
    outlined = outline(config)
    real = open_text(condition, **config.model[CONDITIONS[condition].group])
    rows = real.tokens([real.pair(Text("a red circle", "A red circle moves."))] * 3)
    planned = outlined.text.rows(3)
    assert planned.keys() == rows.keys()
    assert {name: row.dtype for name, row in planned.items()} == {name: row.dtype for name, row in rows.items()}
    assert {name: row.shape for name, row in planned.items()} == {name: row.shape for name, row in rows.items()}
    assert outlined.text.width == real.width and outlined.text.length == real.length
    assert jax.tree.map(jnp.shape, outlined.text.params) == jax.tree.map(jnp.shape, real.params)
    if condition == "rephrase":
        assert jax.tree.map(jnp.shape, outlined.text.prefix) == jax.tree.map(jnp.shape, real.prefix)
    assert text_identity(config.model) == real.identity
    frozen = {"llm": outlined.text.params, "prefix": outlined.text.prefix}
    states, mask = jax.eval_shape(outlined.text.states, frozen, planned)
    assert states.shape == (3, real.length, real.width) and mask.shape == states.shape[:2]


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_plan(preset, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan(config_of("stage2", preset, mesh__data=2), tmp_path / "run") == 0
    said = capsys.readouterr().out
    for words in (
        "2 device(s)",
        "parameters, millions",
        "memory per device in training",
        "per training step",
        "per video",
    ):
        assert words in said
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.slow
def test_stage_0_and_the_native_condition_have_plans(tmp_path, capsys):
    assert plan(config_of("stage0", "tiny"), tmp_path) == 0
    native = dict(model__condition="native", model__adapter__kind="identity", model__adapter__registers=0)
    config = config_of("stage1", "wan_1_3b", **native)
    config.model.trainable = (".",)
    assert plan(config, tmp_path) == 0
    assert "5,680.91" in capsys.readouterr().out


@pytest.mark.slow
def test_states_in_the_step_and_the_vae_are_counted():
    config = config_of("stage1", "wan_1_3b", run__batch_size=2)
    outlined = checked_outline(config)
    step, held = flops_of_step(config, outlined), training_memory(config, planned_mesh(), outlined)
    tokens = config.model.llm.max_prompt + config.model.llm.max_new - 1
    matrices = 1_310_000_000 * 2 * 2 * tokens  # of the LLM's layers, no embedding; 2 clips
    assert matrices < step["text model"] < 1.15 * matrices
    assert set(held.phases) == {GRADIENT, "VAE encoding", "text model's pass"}
    cached = config_of("stage1", "wan_1_3b", run__batch_size=2, data__states="cached")
    without = flops_of_step(cached, checked_outline(cached))
    assert without == step | {"text model": 0}


def test_faults_come_before_anything_is_traced(tmp_path):
    with pytest.raises(ValueError, match=r"run\.batch_size=16 .*mesh\.data=3"):
        plan(config_of("stage2", "tiny", mesh__data=3), tmp_path)
    with pytest.raises(ValueError, match=r"data\.frames=8 is not 4n\+1"):
        plan(config_of("stage2", "wan_1_3b", data__frames=8), tmp_path)
    with pytest.raises(ValueError, match=r"mesh sizes must be >= 1"):
        plan(config_of("stage2", "tiny", mesh__fsdp=0), tmp_path)
    with pytest.raises(FileNotFoundError, match="model.llm.instruction='scnes' is no file; nearest .*: scenes"):
        plan(config_of("stage2", "tiny", model__llm__instruction="scnes"), tmp_path)


@pytest.fixture
def parts(tmp_path):
    """A language model, one whose weights are int8, a text encoder of width 8, a file of other tensors, an empty text."""
    llm = write_llm(tmp_path / "llm")
    tensors = safetensors.numpy.load_file(llm / "model.safetensors")
    whole = {name: (100 * tensor).astype(np.int8) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, write_llm(tmp_path / "int8") / "model.safetensors")
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    write_umt5(tmp_path / "t5", width=8)
    (tmp_path / "empty.txt").write_text(" ")
    return tmp_path


REFUSED = [
    (dict(model__llm__path="{}/int8"), "wrong dtype: model.norm.weight is I8, readable: F32, F16, BF16"),
    (dict(model__vae__path="{}/llm"), "llm lacks diffusion_pytorch_model.safetensors"),
    (dict(model__vae__path="{}/other.safetensors"), "left over: a (3,)"),
    (dict(model__null="{}/other.safetensors"), "must give one tensor `null` [1, L, 16], found {'a': (3,)}"),
    (
        dict(model__null="lerned"),
        "model.null='lerned' is no file: give learned, native or a .safetensors with a tensor",
    ),
    (dict(model__null="native"), "model.native.path='' is no folder: the native encoder is needed here"),
    (dict(model__condition="native"), "model.native.path='' is no folder: the native encoder is needed here"),
    (dict(model__null="native", model__native__path="{}/llm"), "config.json: model_type='llama' is not supported"),
    (dict(model__null="native", model__native__path="{}/t5"), "model.adapter.d_ctx=16, but 8 in"),
    (
        dict(model__calibrate="captions.txt"),
        "model.calibrate='captions.txt' is no file: give one with a caption a line",
    ),
    (dict(model__calibrate="{}/empty.txt"), "empty.txt holds no caption: write one a line"),
    (dict(run__init_from="runs/stag1"), "run.init_from='runs/stag1' is no folder with a run"),
    (dict(data__source="tfds:"), "data.source='tfds:' is unknown (nearest: tfds:NAME)"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_plan_and_training_refuse_the_same_in_the_same_words_before_the_llm_is_loaded(parts, changes, told):
    """An LLM that is not there would be told of when it is loaded."""
    changes = {name: value.replace("{}", str(parts)) for name, value in changes.items()}
    if "model__calibrate" in changes:
        changes |= dict(model__native__path=str(write_umt5(parts / "fits", width=16)))
    config = tiny_config(1, parts / "llm", run__batch_size=8, **changes)
    if config.model.vae.path != "pixels":
        config.data.update(height=64, width=64)
        config.sample.update(height=64, width=64)
    said = []
    for mode, llm in ((plan, None), (train, "/nowhere")):
        if llm and "model__llm__path" not in changes:
            config.model.llm.path = llm
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            mode(config, parts / "run")
        said.append(str(raised.value))
    assert told in said[0] and said[0] == said[1]
    assert not (parts / "run").exists()


def test_a_run_that_has_begun_may_have_lost_what_it_started_from(parts):
    config = tiny_config(1, parts / "llm", run__init_from="/nowhere")
    (parts / "run" / "checkpoints" / "2" / "state").mkdir(parents=True)
    (parts / "run" / "checkpoints" / "2" / "meta").mkdir()
    assert plan(config, parts / "run") == 0


def test_training_needs_a_native_encoder_that_a_plan_supposes(parts, capsys):
    config = tiny_config(1, parts / "llm", model__null="native", model__native__path="umt5-xxl")
    config.model.adapter.d_ctx = 4096
    assert plan(config, parts / "run") == 0
    assert "model.native.path='umt5-xxl' is not here" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="model.native.path='umt5-xxl' is no folder"):
        train(config, parts / "run")


@pytest.mark.parametrize("asked", ["null", "calibrate"])
def test_a_native_encoder_that_is_not_here_has_its_published_width(parts, asked):
    config = tiny_config(1, parts / "llm", model__native__path="umt5-xxl")
    (parts / "captions.txt").write_text("red")
    config.model[asked] = "native" if asked == "null" else str(parts / "captions.txt")
    with pytest.raises(ValueError, match=r"model\.adapter\.d_ctx=16, but 4096 in umt5-xxl .umT5-XXL's: .* is not here"):
        plan(config, parts / "run")


def test_sizes_of_parts_that_are_here_come_from_their_files(tmp_path):
    assert isinstance(known_sizes.vae_sizes("pixels")[0], Pixels)
    assert "is not here" in known_sizes.vae_sizes(str(tmp_path / "none"))[1]
    assert "model.native.path='umt5' is not here" in known_sizes.native_sizes("umt5")[1]
    with pytest.raises(FileNotFoundError, match="model.native.path='' names no encoder"):
        known_sizes.native_sizes("")
