"""The memory that --mode=plan says: against XLA's own figure, arrays that lie on a mesh, and small cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoders import write_umt5
from tiny import DEPTH, HEADS, KV_HEADS, WIDTH, tiny_config, write_llm
from tiny import preset_config as config_of

from rise_jax import memory, published
from rise_jax.outline import drawn, outline, step_arguments
from rise_jax.plan import Memory, checked_outline, plan, training_memory, use_memory
from rise_jax.sharding import bytes_per_device, make_mesh, planned_mesh, shardings
from rise_jax.step import sample_losses
from rise_jax.trees import combine

GRADIENT = "gradients and activations"


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "unroll"), [("none", True), ("none", False), ("blocks", True)])
def test_activations_are_within_a_fifth_of_the_compiled_figure(remat, unroll):
    """Of the gradient on one device of the preset tiny: as it ships, in a scan, and with remat, which keeps the scan."""
    config = config_of("stage2", "tiny", model__dit__remat=remat, model__dit__unroll=unroll)
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
    """Keys and values of all tokens and layers: of the LLM per prompt, and once for the instruction, which stays; of the DiT for
    prompt and null."""
    config = config_of("stage2", "wan_1_3b")
    outlined = outline(config)
    llm, size = config.model.llm, config.sample.batch_size
    instruction = outlined.text.prefix.mask.shape[1]
    room = 2 * 28 * 2 * 128 * 2  # keys and values, layers, heads, width, bytes
    planned = use_memory(config, outlined)
    assert planned.phases["text: key/value cache"] == room * size * (llm.max_prompt + llm.max_new)
    parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(outlined.text.params))
    assert planned.kept["text model"] == parameters + (room + 5) * instruction
    kv = jax.eval_shape(outlined.model.kv, outlined.model.abstract, like(2 * size, 512, 4096))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in kv) == 2 * 30 * (2 * size) * 512 * 1536 * 2


@pytest.mark.slow
def test_tiles_let_a_card_decode_large_frames():
    """720p, 81 frames: the worst moment is decoding, whose layers above latent resolution then hold a tile at a time."""
    config, needed = config_of("stage1", "wan_1_3b"), {}
    config.sample.update(frames=81, height=720, width=1280)
    for tile in (0, 256):
        config.model.vae.tile = tile
        needed[tile] = use_memory(config, outline(config))
    assert needed[256].phases["VAE decoding"] < needed[0].phases["VAE decoding"] / 3
    assert needed[256].total(scores=False) < 20 * 2**30 < needed[0].total(scores=False)


def test_the_cache_holds_the_layout_around_a_prompt(tmp_path):
    """Of a template that is here: "user", "Prompt: ", "assistant", three line ends, a token a byte, and two control tokens."""
    config = tiny_config(1, write_llm(tmp_path / "llm"))
    layout = len("user" + "Prompt: " + "assistant") + 3 + 2
    tokens = config.model.llm.max_prompt + layout + config.model.llm.max_new
    cache = use_memory(config, outline(config)).phases["text: key/value cache"]
    assert cache == 2 * DEPTH * KV_HEADS * WIDTH // HEADS * 4 * tokens * config.sample.batch_size


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_preset_small_fits_the_gpu_it_is_made_for(stage):
    """78 GiB of an H100, a tenth left free; attention is a kernel there, which keeps no scores."""
    config = config_of(stage, "small")
    outlined = outline(config)
    for needed in (training_memory(config, planned_mesh(), outlined), use_memory(config, outlined)):
        assert needed.total(scores=False) < 70 * 2**30


@pytest.mark.parametrize("captions", ["", "red\n"], ids=["null", "calibrate"])
def test_the_native_encoder_lies_on_the_devices_as_planned(tmp_path, captions, capsys):
    """Training lays it over the mesh by the same rules: these are the leaves that it asks a place for."""
    config = tiny_config(1, write_llm(tmp_path / "llm"), run__batch_size=8)
    config.model.native.update(path=str(write_umt5(tmp_path / "fits", width=16)), length=8)
    if captions:
        (tmp_path / "captions.txt").write_text(captions)
        config.model.calibrate = str(tmp_path / "captions.txt")
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
    assert plan(config, tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert title in printed and "on the devices once, when a run is new" in printed and "on the host" not in printed


def test_the_native_encoders_moment_may_be_the_worst():
    made = Memory({"kept": 5}, {"phase": 2}, {"phase": 1}, {"before": 9})
    assert made.total(scores=True) == 9 and made._replace(before={"before": 7}).total(scores=True) == 8
