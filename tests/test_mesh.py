"""The same numbers on every mesh: loss, gradients, parameters after steps, tokens, videos. Eight devices."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from noisy import noise
from tiny import tiny_config, write_llm

from rise_jax import sampler
from rise_jax.build import describe_attention, language_from, model_from
from rise_jax.language import states_in_batch
from rise_jax.models.attention import Backend
from rise_jax.pipeline import make_latents
from rise_jax.runs import born_state, initial_parameters
from rise_jax.sharding import make_mesh, put_batch, put_rows, shardings
from rise_jax.step import make_train_step, new_state
from rise_jax.trees import named_leaves, partition

pytestmark = pytest.mark.slow

D_LLM, TOKENS, BATCH = 16, 5, 8
CONFIG = ConfigDict(
    dict(
        adapter=dict(kind="refiner", d_ctx=16, width=16, depth=1, heads=2, registers=2, time_cond="off"),
        dit=dict(path="", width=32, mlp_width=32, heads=4, depth=2, patch=(1, 4, 4), text_len=8),
        vae=dict(path="pixels"),
        null="learned",
        trainable=(".",),
        dtype="float32",
        prediction="data",
        shift=1.0,
    )
)
FRAMES = 9  # 3 latent frames of 2 x 2 tokens: 12, which do not divide over 8 devices
SGD = optax.chain(optax.trace(decay=0.0), optax.sgd(0.01))  # the trace is the gradient
STEPS = 3

MESHES = {  # mesh, Backend.sequence
    "fsdp_tensor": ((1, 2, 1, 4), "auto"),
    "ulysses": ((2, 1, 4, 1), "auto"),
    "ring": ((1, 1, 8, 1), "auto"),
    "fsdp_ulysses_tensor": ((1, 2, 2, 2), "auto"),
    "data_fsdp_ring": ((2, 2, 2, 1), "ring"),
}


def make(sequence="auto"):
    return model_from(CONFIG, D_LLM, states_in_batch, backend=Backend(sequence=sequence))


def make_batch():
    rng = np.random.default_rng(0)
    return dict(
        video=rng.integers(0, 256, (BATCH, FRAMES, 8, 8, 3), dtype=np.uint8),
        states=rng.normal(size=(BATCH, TOKENS, D_LLM)).astype(np.float32),
        states_mask=np.arange(TOKENS)[None] < rng.integers(1, TOKENS + 1, (BATCH, 1)),
        index=np.arange(BATCH, dtype=np.int32),
        weight=np.ones(BATCH, np.float32),
    )


def run(model, state, batch):
    """(losses of STEPS steps, gradients of the first, parameters after the last), on the host."""
    rates = dict(drop=0.25, time_mean=0.0, time_std=1.0, ema=0.9)
    step = jax.jit(make_train_step(model, SGD, **rates))
    losses, first = [], None
    for i in range(STEPS):
        state, metrics = step(state, {"params": {}, "vae": {}}, batch | {"step": np.int32(i)}, jax.random.key(0))
        losses.append(float(metrics["loss"]))
        first = jax.device_get(state.opt_state[0].trace) if first is None else first
    return losses, first, jax.device_get(state.params)


@pytest.fixture(scope="module")
def params():
    return noise(make().abstract)


@pytest.fixture(scope="module")
def one_device(params):
    return run(make(), new_state(params, SGD), make_batch())


def assert_within_bound(found, expected):
    """max|a-b| <= 1e-5 max(max|leaf|, 1e-3 global max)"""
    expected = named_leaves(expected)
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    assert largest > 0
    off = {
        name: np.abs(leaf - expected[name]).max() / max(np.abs(expected[name]).max(), 1e-3 * largest)
        for name, leaf in named_leaves(found).items()
    }
    assert len(off) == len(expected) and max(off.values()) <= 1e-5, max(off.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_same_loss_gradients_and_parameters(name, params, one_device):
    sizes, sequence = MESHES[name]
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        state = born_state(jax.device_put(params, shardings(params, mesh)), SGD, lambda tree: shardings(tree, mesh))
        losses, gradients, after = run(make(sequence), state, put_batch(make_batch(), mesh))
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    assert_within_bound(gradients, one_device[1])
    assert_within_bound(after, one_device[2])


def sampled(model, params, inputs):
    times = sampler.times_for("euler", 3)
    call = lambda params, inputs: make_latents(model, params, *inputs, times, 3.0, shape=(3, 8, 8, 12), stepper="euler")
    return np.asarray(jax.jit(call)(params, inputs))


@pytest.fixture(scope="module")
def latents(params):
    """(states, mask and seeds of two videos, their latents on one device)"""
    batch = make_batch()
    inputs = batch["states"][:2], batch["states_mask"][:2], np.arange(2, dtype=np.int32)
    return inputs, sampled(make(), params, inputs)


@pytest.mark.parametrize("name", ["data_fsdp_ring", "ring", "fsdp_ulysses_tensor"])
def test_every_mesh_gives_the_same_latents(name, params, latents):
    inputs, expected = latents
    sizes, sequence = MESHES[name]
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        found = sampled(make(sequence), jax.device_put(params, shardings(params, mesh)), put_rows(inputs, mesh))
    assert np.abs(expected).max() > 1 and np.abs(found - expected).max() <= 1e-4


def test_the_tokens_of_the_dit_lie_over_context(params):
    """No device works on more than its share of the 12 tokens, padded to 16, once they are split."""
    mesh = make_mesh(1, 1, 8, 1)
    model, batch = make(), make_batch()
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh))
        kv = jax.jit(model.kv)(placed, np.zeros((1, 8, 16), np.float32))
        call = jax.jit(model.dit).lower(placed, np.zeros((1, 3, 8, 8, 12), np.float32), batch["weight"][:1], kv)
        text = call.compile().as_text()
    assert "f32[1,2,32]" in text and "f32[1,16,32]" not in text  # the width is 32


def test_states_are_born_in_parts(tmp_path):
    """Every parameter, average and moment that a rule splits: no device holds all of it."""
    config = tiny_config(1, write_llm(tmp_path / "llm"))
    mesh = make_mesh(1, 4, 1, 2)
    place = lambda tree: shardings(tree, mesh)
    model = model_from(config.model, 16, states_in_batch)
    heard = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32), np.ones((2, 3), bool)
    trained, _ = partition(initial_parameters(model, config, None, {}, heard, place).tree, ["."])
    state = born_state(trained, optax.adamw(1e-3), place)
    split = 0
    for name, leaf in named_leaves(state).items():
        assert leaf.sharding == named_leaves(place(state))[name], name
        if name.endswith(("/query/kernel", "/out/kernel", "/up/kernel", "/down/kernel")):
            split += 1
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}, name
    assert split >= 4 * 6  # parameters, averages and two moments of the adapter's and the DiT's projections


def test_the_language_model_lies_over_the_mesh_and_says_the_same(tmp_path):
    config = tiny_config(1, write_llm(tmp_path / "llm"))
    mesh = make_mesh(2, 2, 1, 2)
    alone, spread = language_from(config.model), language_from(config.model, mesh=mesh)
    kernel = spread.params["blocks"]["mlp"]["up"]["kernel"]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    prompts = ["a red circle", "ein blaues Quadrat", "3"]
    expected, found = alone.rephrase(prompts), spread.rephrase(prompts)
    assert found.tokens == expected.tokens and found.texts == expected.texts
    np.testing.assert_allclose(found.states, expected.states, atol=1e-4)


def test_the_first_line_names_how_attention_goes():
    says = lambda sizes, sequence="auto": describe_attention(CONFIG, Backend(sequence=sequence), make_mesh(*sizes))
    assert says((8, 1, 1, 1)) == "attention xla"
    assert says((2, 1, 4, 1)) == "attention xla, ulysses over context"
    assert says((1, 1, 8, 1)) == says((2, 1, 4, 1), "ring").replace("4", "8") == "attention xla, ring over context"
    with pytest.raises(ValueError, match="4 heads do not divide over mesh.context=8"):
        says((1, 1, 8, 1), "ulysses")
