"""What --mode=plan says: against XLA's own figure, arrays that lie on a mesh, the real LLM's batches, and small cases by hand."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from encoders import write_umt5
from tiny import tiny_config, write_llm

from rise_jax import known_sizes, memory, published
from rise_jax.condition_kinds import CONDITIONS, open_text
from rise_jax.data.sources import Text
from rise_jax.models.llm import make_llm
from rise_jax.models.vae import Pixels
from rise_jax.outline import drawn, outline, step_arguments
from rise_jax.plan import Memory, checked_outline, flops_of_step, plan, training_memory, use_memory
from rise_jax.sharding import bytes_per_device, make_mesh, planned_mesh, shardings
from rise_jax.step import sample_losses
from rise_jax.train import train
from rise_jax.trees import combine

PRESETS = ("tiny", "small_frozen", "wan_1_3b")  # one of a kind
GRADIENT = "gradients and activations"


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def config_of(stage, preset, **changes):
    config = importlib.import_module(f"configs.{stage}").get_config(preset)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


# ---- memory ----


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_activations_are_within_a_fifth_of_the_compiled_figure(remat):
    """Of the preset tiny, its gradient on one device; layers stay in their scan, which compiles sooner."""
    config = config_of("stage2", "tiny", model__dit__remat=remat, model__dit__unroll=False)
    outlined, size = outline(config), config.run.batch_size
    planned = training_memory(config, planned_mesh(), outlined)
    gradients = bytes_per_device(outlined.trainable, planned_mesh())
    activations = planned.phases[GRADIENT] + planned.scores[GRADIENT] - gradients
    _, frozen, batch, _ = step_arguments(config, outlined, size)

    def loss(trainable, frozen, batch, *noise):
        params = combine(trainable, frozen["params"])
        return sample_losses(outlined.model, params, frozen, batch, *noise).mean()

    arguments = outlined.trainable, frozen, batch, *drawn(config, outlined, size)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile().memory_analysis()
    assert compiled.output_size_in_bytes == pytest.approx(gradients, rel=0.001)
    assert activations == pytest.approx(compiled.temp_size_in_bytes, rel=0.2)


def test_what_the_backward_pass_waits_for_by_hand():
    """A sine waits with its slope, a product with its two factors; inputs and weights are there anyway."""
    w, x = like(8, 8), like(4, 8)
    assert memory.kept_bytes(lambda w, x: jnp.sin(x @ w).sum(), w, x) == (4 * 8 * 4, 0)
    assert memory.kept_bytes(lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x).sum(), w, x) == (0, 0)
    inputs = lambda w, x: jax.lax.scan(jax.checkpoint(lambda c, _: (jnp.sin(c @ w), None)), x, None, length=5)[0].sum()
    assert memory.kept_bytes(inputs, w, x) == (5 * 4 * 8 * 4, 0)


def test_scores_are_told_apart():
    batch, heads, queries, keys, width = 2, 3, 60, 64, 8
    q, kv = like(batch, queries, heads, width), like(batch, keys, heads, width)
    score = 4 * batch * heads * queries * keys
    attend = lambda w, q, kv: jax.nn.dot_product_attention(q @ w, kv @ w, kv @ w).sum()
    kept = memory.kept_bytes(attend, like(width, width), q, kv)
    assert 2 * score <= kept.scores <= 2.2 * score, "exponentials and weights, and sums of them"
    assert kept.other == 4 * batch * heads * width * (queries + 2 * keys), "query, key, value"
    with_scores, without = (memory.peak_bytes(attend, like(width, width), q, kv, scores=flag) for flag in (True, False))
    assert with_scores - without >= score
    assert without < with_scores / 2


def test_the_worst_moment_by_hand():
    """1 KiB in, then two of 4 KiB at once, then one of 4 KiB and the result, which is the caller's."""
    x = like(256)

    def function(x):
        wide = jnp.tile(x, 4)
        other = jnp.cos(wide)
        return (wide * other)[:256]

    peak = memory.peak_bytes(function, x)
    assert 2 * 4096 <= peak <= 3 * 4096
    assert (
        memory.peak_bytes(lambda x: jax.lax.scan(lambda c, _: (function(c), None), x, None, length=9)[0], x)
        <= peak + 1024
    )


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(data=8)])
def test_bytes_per_device_are_those_of_arrays_on_a_mesh(sizes):
    outlined = outline(config_of("stage2", "tiny"))
    abstract = outlined.model.abstract
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    mesh = make_mesh(**{"data": 1, **sizes})
    placed = jax.device_put(arrays, shardings(arrays, mesh))
    first = [
        shard
        for leaf in jax.tree.leaves(placed)
        for shard in leaf.addressable_shards
        if shard.device == jax.devices()[0]
    ]
    assert bytes_per_device(abstract, planned_mesh(**{"data": 1, **sizes})) == sum(shard.data.nbytes for shard in first)


@pytest.mark.slow
def test_the_mesh_shares_out_state_and_activations():
    config = config_of("stage2", "tiny")
    outlined = outline(config)
    of = lambda **sizes: training_memory(config, planned_mesh(**sizes), outlined)
    one, data, fsdp, context = of(), of(data=4), of(data=1, fsdp=4), of(data=1, context=4)
    gradients = bytes_per_device(outlined.trainable, planned_mesh())
    assert data.kept == one.kept and fsdp.kept["optimizer"] < 0.3 * one.kept["optimizer"]
    for split, held in (
        (data, gradients),
        (fsdp, bytes_per_device(outlined.trainable, planned_mesh(data=1, fsdp=4))),
        (context, gradients),
    ):
        assert split.phases[GRADIENT] - held == pytest.approx((one.phases[GRADIENT] - gradients) / 4, rel=0.02)
        assert split.scores[GRADIENT] == pytest.approx(one.scores[GRADIENT] / 4, rel=0.02)
    heads = config.model.dit.heads
    assert of(data=1, tensor=2 * heads + 1).scores == one.scores, "heads that do not divide stay whole"
    config.run.accumulate = 2
    halves = of()
    assert halves.phases[GRADIENT] - 2 * gradients == pytest.approx((one.phases[GRADIENT] - gradients) / 2, rel=0.02)
    assert one.total(scores=True) == sum(one.kept.values()) + one.phases[GRADIENT] + one.scores[GRADIENT]


@pytest.mark.slow
def test_caches_by_hand():
    """Keys and values of all tokens and layers: of the LLM per prompt and once for the instruction, of the DiT for prompt and null."""
    config = config_of("stage2", "wan_1_3b")
    outlined = outline(config)
    llm, size = config.model.llm, config.sample.batch_size
    instruction = outlined.text.prefix.mask.shape[1]
    room = 2 * 28 * 2 * 128 * 2  # keys and values, layers, heads, width, bytes
    cache = use_memory(config, outlined).phases["text: key/value cache"]
    assert cache == room * (size * (llm.max_prompt + llm.max_new) + instruction) + 5 * instruction
    kv = jax.eval_shape(outlined.model.kv, outlined.model.abstract, like(2 * size, 512, 4096))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kv) == 2 * 30 * (2 * size) * 512 * 1536 * 2


# ---- sizes ----


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
    template = rows["prompt_ids"].shape[1] - config.model.llm.max_prompt if condition == "rephrase" else 0
    for name, row in planned.items():
        assert row.shape[1] == rows[name].shape[1] - template * name.startswith("prompt"), (
            "what the template adds is left out"
        )
    assert outlined.text.width == real.width and outlined.text.length == real.length
    assert jax.tree.map(jnp.shape, outlined.text.params) == jax.tree.map(jnp.shape, real.params)
    frozen = {"llm": outlined.text.params, "prefix": outlined.text.prefix}
    states, mask = jax.eval_shape(outlined.text.states, frozen, planned)
    assert states.shape == (3, real.length, real.width) and mask.shape == states.shape[:2]


# ---- the mode ----


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
    assert plan(config, parts / "run") == 0
    assert "model.native.path='umt5-xxl' is not here" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="model.native.path='umt5-xxl' is no folder"):
        train(config, parts / "run")


@pytest.mark.parametrize("captions", ["", "red\n"], ids=["null", "calibrate"])
def test_the_native_encoder_lies_on_the_devices_as_planned(parts, captions, capsys):
    """Training lays it over the mesh by the same rules: these are the leaves that it asks a place for."""
    config = tiny_config(1, parts / "llm", run__batch_size=8)
    config.model.native.update(path=str(write_umt5(parts / "fits", width=16)), length=8)
    if captions:
        (parts / "captions.txt").write_text(captions)
        config.model.calibrate = str(parts / "captions.txt")
    else:
        config.model.null = "native"
    asked, mesh = [], make_mesh(data=1, fsdp=8)

    def place(tree):
        asked.append(tree)
        return shardings(tree, mesh)

    (published.native_statistics if captions else published.load_null)(config.model, place)
    outlined, wide = checked_outline(config), planned_mesh(data=1, fsdp=8)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), asked[0]) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), outlined.native.params
    )
    (title, before), *_ = training_memory(config, wide, outlined).before.items()
    trees = outlined.native.params, outlined.model.abstract
    held = sum(bytes_per_device(tree, wide) for tree in trees)
    assert held < before < held + 2**20 and held < sum(bytes_per_device(tree, planned_mesh()) for tree in trees)
    assert plan(config, parts / "run") == 0
    printed = capsys.readouterr().out
    assert title in printed and "on the devices once, when a run is new" in printed and "on the host" not in printed


def test_the_native_encoders_moment_may_be_the_worst():
    made = Memory({"kept": 5}, {"phase": 2}, {"phase": 1}, {"before": 9})
    assert made.total(scores=True) == 9 and made._replace(before={"before": 7}).total(scores=True) == 8


def test_sizes_of_parts_that_are_here_come_from_their_files(tmp_path):
    assert isinstance(known_sizes.vae_sizes("pixels")[0], Pixels)
    assert "is not here" in known_sizes.vae_sizes(str(tmp_path / "none"))[1]
    assert "model.native.path='' is not here" in known_sizes.native_sizes("")[1]
