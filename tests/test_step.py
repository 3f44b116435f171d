"""The step: what it may change, what it must not, and that packing and cached states change no number."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from noisy import noise

from rise_jax.build import model_from
from rise_jax.language import states_in_batch
from rise_jax.loop import compile_step
from rise_jax.optim import make_optimizer
from rise_jax.sharding import batch_sharding, make_mesh, shardings
from rise_jax.step import make_eval_step, make_gradients, make_train_step, new_state
from rise_jax.trees import combine, named_leaves, partition, tree_sha256

D_LLM, TOKENS, BATCH = 16, 5, 8
SIZES = dict(
    adapter=dict(kind="refiner", d_ctx=16, width=16, depth=1, heads=2, registers=2, time_cond="off"),
    dit=dict(path="", width=32, mlp_width=32, heads=4, depth=2, patch=(1, 4, 4), text_len=8, remat="none"),
    vae=dict(path="pixels"),
    null="learned",
    trainable=(".",),
    dtype="float32",
    prediction="data",
    shift=1.0,
)
RATES = dict(drop=0.25, time_mean=0.0, time_std=1.0, ema=0.9)
NOTHING = {"params": {}, "vae": {}}  # that is frozen


def make(**changes):
    return model_from(ConfigDict(SIZES | changes), D_LLM, states_in_batch)


def make_batch(seed=0, frames=5, size=BATCH, step=0):
    rng = np.random.default_rng(seed)
    return dict(
        video=rng.integers(0, 256, (size, frames, 8, 8, 3), dtype=np.uint8),
        states=rng.normal(size=(size, TOKENS, D_LLM)).astype(np.float32),
        states_mask=np.arange(TOKENS)[None] < rng.integers(1, TOKENS + 1, (size, 1)),
        index=np.arange(size, dtype=np.int32),
        weight=np.ones(size, np.float32),
        step=np.int32(step),
    )


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def params(model):
    return noise(model.abstract)


STEPS = {}  # id of a model: that model, an optimizer and their step, jitted once for all tests


def sgd_step(model):
    if id(model) not in STEPS:
        optimizer = optax.sgd(0.1, momentum=0.9)
        STEPS[id(model)] = model, optimizer, jax.jit(make_train_step(model, optimizer, **RATES))
    return STEPS[id(model)][1:]


def run(model, params, batch, patterns=(".",), steps=1):
    optimizer, step = sgd_step(model)
    trainable, frozen = partition(params, list(patterns))
    state, metrics = new_state(trainable, optimizer), None
    for i in range(steps):
        state, metrics = step(state, {"params": frozen, "vae": {}}, batch | {"step": np.int32(i)}, jax.random.key(0))
    return state, metrics, frozen


LOSSES = {}  # id of a model: that model and its loss, jitted once for all tests


def loss_of(model, params, batch, drop=RATES["drop"]):
    """A step's loss alone, without its gradient, which takes longest to compile."""

    def loss(params, batch, key, drop):
        rates = RATES | {"drop": drop}
        rates.pop("ema")
        return make_gradients(model, **rates)(params, NOTHING, batch, key, jnp.int32(0))[0]

    _, jitted = LOSSES.setdefault(id(model), (model, jax.jit(loss, static_argnums=3)))
    return float(jitted(params, batch, jax.random.key(0), drop))


def close(a, b, scale):
    """Promise of mesh invariance: max|a-b| <= 1e-5 max(max|leaf|, 1e-3 global max)."""
    return np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1e-3 * scale)


def assert_same_gradients(before, first, second):
    moved = {
        name: np.asarray(leaf) - np.asarray(named_leaves(before)[name]) for name, leaf in named_leaves(first).items()
    }
    other = {
        name: np.asarray(leaf) - np.asarray(named_leaves(before)[name]) for name, leaf in named_leaves(second).items()
    }
    scale = max(np.abs(value).max() for value in moved.values())
    assert scale > 0
    # one fp32 rounding of the parameter itself, which the difference above carries
    rounding = {name: 2e-7 * np.abs(np.asarray(leaf)).max() for name, leaf in named_leaves(before).items()}
    bad = [n for n in moved if not close(moved[n], other[n], scale) and np.abs(moved[n] - other[n]).max() > rounding[n]]
    assert not bad, bad


@pytest.mark.slow
def test_every_leaf_is_trained_and_only_those_chosen_move(model, params):
    state, _, _ = run(model, params, make_batch())
    still = [
        name for name, leaf in named_leaves(state.params).items() if np.array_equal(leaf, named_leaves(params)[name])
    ]
    # Adding one vector to all keys adds one number to a query's scores: softmax takes it out, so that bias has no gradient.
    # In the DiT the norm behind the key projection gives it one.
    assert still in ([], ["adapter/blocks/self_attn/key/bias"])
    pattern = r"^adapter/|cross_attn/(key|value)/"
    state, _, frozen = run(model, params, make_batch(), [pattern], steps=3)
    assert set(named_leaves(state.params)) == {name for name in named_leaves(params) if re.search(pattern, name)}
    assert tree_sha256(combine(frozen, state.params)) != tree_sha256(params)
    assert tree_sha256(frozen) == tree_sha256(partition(params, pattern)[1])


@pytest.mark.slow
def test_zero_weight_clips_change_nothing(model, params):
    batch = make_batch()
    batch["weight"][[2, 5]] = 0
    first, _, _ = run(model, params, batch)
    batch["video"][[2, 5]] = 7
    second, _, _ = run(model, params, batch)
    assert tree_sha256(first.params) == tree_sha256(second.params)


@pytest.mark.slow
def test_a_sample_draws_the_same_noise_in_any_batch(model, params):
    """The mean over a batch equals the mean over its halves: the draws follow the sample's index, not its row."""
    batch = make_batch()
    loss = lambda rows: loss_of(model, params, {k: v[rows] if np.ndim(v) else v for k, v in batch.items()})
    whole = loss(np.arange(8))
    np.testing.assert_allclose(whole, (loss(np.arange(4)) + loss(np.arange(4, 8))) / 2, rtol=1e-6)
    np.testing.assert_allclose(whole, loss(np.arange(8)[::-1].copy()), rtol=1e-6)


PARTS = 4


@pytest.mark.slow
def test_accumulation_equals_the_large_batch_for_the_memory_of_one_part(plain, whole_batch):
    """Clips that could not be read are spread unevenly: the mean is over the weights of the whole batch, not of the parts'."""
    loss, gradients, memory = whole_batch
    other, other_gradients, part_memory = of_batch(plain, PARTS)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    bad = [n for n, g in named_leaves(gradients).items() if not close(g, named_leaves(other_gradients)[n], scale)]
    assert not bad, bad
    assert part_memory < 0.6 * memory


@pytest.fixture(scope="module")
def plain():
    """(model, parameters) with the adapter that compiles fastest."""
    model = make(adapter=dict(kind="mlp", d_ctx=16, width=16, registers=2, time_cond="off"))
    return model, noise(model.abstract)


@pytest.fixture(scope="module")
def whole_batch(plain):
    return of_batch(plain, 1)


def uneven_batch():
    batch = make_batch(size=32)
    batch["weight"][1::PARTS] = 0  # one of the parts has nothing to say
    batch["weight"][[0, 2, 6]] = 0
    return batch


def of_batch(plain, parts):
    """(loss, gradients, bytes beside arguments and results) of a batch in some parts."""
    model, params = plain
    gradients = make_gradients(model, drop=0.25, time_mean=0.0, time_std=1.0, accumulate=parts)
    arguments = params, NOTHING, uneven_batch(), jax.random.key(0), jnp.int32(0)
    compiled = jax.jit(gradients).lower(*arguments).compile()
    return *jax.tree.map(np.asarray, compiled(*arguments)), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_padding_behind_the_tokens_changes_nothing(model, params):
    batch = make_batch()
    longer = dict(batch)
    longer["states"] = np.concatenate([batch["states"], np.full((BATCH, 1, D_LLM), 1e4, np.float32)], 1)
    longer["states_mask"] = np.concatenate([batch["states_mask"], np.zeros((BATCH, 1), bool)], 1)
    np.testing.assert_allclose(loss_of(model, params, batch), loss_of(model, params, longer), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("poison", ["states", "loss_overflow"])
def test_a_non_finite_step_changes_nothing_and_blocks_the_next(model, params, poison):
    optimizer, step = sgd_step(model)
    state = new_state(params, optimizer)
    before = tree_sha256(state)
    bad = make_batch(step=0)
    bad["states"][1] = np.nan if poison == "states" else 0
    if poison == "loss_overflow":
        bad["weight"][1] = np.inf
    state, metrics = step(state, NOTHING, bad, jax.random.key(0))
    assert not metrics["finite"]
    state, metrics = step(state, NOTHING, make_batch(step=1), jax.random.key(0))
    assert metrics["finite"] and tree_sha256(state) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refiner", "resampler", "mlp"])
@pytest.mark.parametrize("time_cond", ["off", "adaln"])
def test_every_adapter_kind_trains(kind, time_cond):
    sizes = dict(SIZES["adapter"], kind=kind, time_cond=time_cond) | (dict(latents=4) if kind == "resampler" else {})
    sizes = {k: v for k, v in sizes.items() if kind != "mlp" or k not in ("depth", "heads")}
    model = make(adapter=sizes)
    _, metrics, _ = run(model, noise(model.abstract), make_batch(), ["^adapter/"])
    assert metrics["finite"] and metrics["grad_norm"] > 0


@pytest.mark.slow
def test_on_a_mesh_accumulation_donation_and_the_placement_of_the_ema(plain, whole_batch):
    (model, params), (loss, gradients, _) = plain, whole_batch
    optimizer, mesh = optax.sgd(0.1, momentum=0.9), make_mesh(2, 2, 1, 2)
    with jax.set_mesh(mesh):
        state = new_state(jax.tree.map(jnp.copy, params), optimizer)
        state = jax.device_put(state, shardings(state, mesh))
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        rows = {k: jax.device_put(v, batch_sharding(mesh)) if np.ndim(v) else v for k, v in uneven_batch().items()}
        step = make_train_step(model, optimizer, accumulate=PARTS, **RATES)
        step = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
        arguments = NOTHING, rows, jax.random.key(0)
        compiled = compile_step(step, state, *arguments)
        after, metrics = compiled(state, *arguments)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_same_gradients(params, jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params, gradients), after.params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    on_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(after))
    assert compiled.memory_analysis().alias_size_in_bytes >= on_device
    split = {name for name, leaf in named_leaves(after.params).items() if not leaf.sharding.is_fully_replicated}
    assert len(split) > 10
    for name in split:
        for tree in (after.params, after.ema, after.opt_state[0].trace):
            assert named_leaves(tree)[name].sharding == named_leaves(placed.params)[name], name


@pytest.mark.slow
def test_the_null_condition_is_what_a_dropped_prompt_gets(model, params):
    """With every condition dropped, the states cannot matter; with none dropped, they do."""
    other = make_batch()
    other["states"] = other["states"][::-1].copy()
    for drop, equal in ((1.0, True), (0.0, False)):
        losses = [loss_of(model, params, batch, drop) for batch in (make_batch(), other)]
        assert (losses[0] == losses[1]) == equal


@pytest.mark.slow
def test_it_learns_64_samples_and_uses_the_condition(model):
    """The loss falls far below the null condition's, and another sample's states raise it again."""
    optimizer = make_optimizer(3e-3, warmup=10)
    batch = make_batch(frames=1, size=64)
    colours = np.random.default_rng(5).integers(0, 256, (64, 1, 1, 1, 3), dtype=np.uint8)
    batch["video"] = np.broadcast_to(colours, batch["video"].shape).copy()
    batch["states"] = np.broadcast_to(np.random.default_rng(6).normal(size=(64, 1, D_LLM)), (64, TOKENS, D_LLM)).astype(
        np.float32
    )
    state = new_state(jax.jit(model.init)(jax.random.key(0)), optimizer)
    step = jax.jit(make_train_step(model, optimizer, drop=0.1, time_mean=1.0, time_std=1.0, ema=0.9))
    for i in range(100):
        state, _ = step(state, NOTHING, batch | {"step": np.int32(i)}, jax.random.key(0))
    evaluate = jax.jit(make_eval_step(model), static_argnums=3)
    losses = lambda states: float(
        evaluate(state.params, NOTHING, batch | {"states": states}, (0.9,), jax.random.key(1)).mean()
    )
    true, shuffled = losses(batch["states"]), losses(np.roll(batch["states"], 1, 0))
    assert true < 0.5 * shuffled


@pytest.mark.slow
def test_bfloat16_compute_stays_close_and_keeps_float32_parameters(model, params):
    half = make(dtype="bfloat16")
    state = new_state(params, optax.sgd(0.1))
    step = make_train_step(half, optax.sgd(0.1), **RATES)
    after, _ = jax.eval_shape(step, state, NOTHING, make_batch(), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    exact, coarse = loss_of(model, params, make_batch()), loss_of(half, params, make_batch())
    assert coarse != exact
    np.testing.assert_allclose(coarse, exact, rtol=2e-2)
