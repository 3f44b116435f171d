import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rise_jax.optim import decayed, ema_decay, make_optimizer, make_schedule
from rise_jax.trees import named_leaves


def step_once(optimizer, params, gradients):
    state = optimizer.init(params)
    updates, _ = optimizer.update(gradients, state, params)
    return jax.tree.map(np.asarray, updates)


def test_warm_up_is_linear_then_constant():
    schedule = make_schedule(0.8, warmup=4)
    assert [round(float(schedule(step)), 6) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    assert float(make_schedule(0.8)(0)) == pytest.approx(0.8)


def test_decay_is_linear_between_its_steps_and_ends_at_one_percent():
    schedule = make_schedule(1.0, decay_from=10, decay_until=20)
    assert [round(float(schedule(step)), 4) for step in (0, 10, 15, 20, 999)] == [1.0, 1.0, 0.505, 0.01, 0.01]


@pytest.mark.slow
def test_first_adam_step_by_hand():
    """After one step the bias-corrected moments are g and g^2, so the update is -rate * (sign(g) + decay * w)."""
    params = {"kernel": jnp.full((1, 2), 10.0), "bias": jnp.full((2,), 10.0)}
    gradients = {"kernel": jnp.array([[0.1, -0.1]]), "bias": jnp.array([0.1, -0.1])}
    updates = step_once(make_optimizer(0.01, weight_decay=0.5), params, gradients)
    np.testing.assert_allclose(updates["kernel"], [[-0.01 * (1 + 5), -0.01 * (-1 + 5)]], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [-0.01, 0.01], rtol=1e-5)


def test_clipping_scales_the_whole_gradient_to_the_norm():
    """Two different gradients of one direction, both above the limit, leave the same second moments: 0.1^2 scaled."""
    params = {"a": {"kernel": jnp.zeros((1, 1))}, "b": {"kernel": jnp.zeros((1, 1))}}
    gradients = {"a": {"kernel": jnp.array([[30.0]])}, "b": {"kernel": jnp.array([[40.0]])}}
    optimizer = make_optimizer(1.0, clip=0.5, b1=0.9)
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moments = {name: float(leaf.squeeze()) for name, leaf in named_leaves(state).items() if "/mu/" in name}
    first, second = (value for _, value in sorted(moments.items()))
    assert (first, second) == (pytest.approx(0.1 * 0.3), pytest.approx(0.1 * 0.4))


@pytest.mark.slow
def test_only_kernels_and_embeddings_decay_also_when_stacked():
    stacked = {
        "blocks": {
            "query": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))},
            "norm": {"scale": jnp.ones((3, 4))},
        },
        "tokens": {"embedding": jnp.ones((7, 4))},
        "registers": jnp.ones((8, 4)),
    }
    chosen = [name for name, leaf in named_leaves(decayed(stacked)).items() if leaf]
    assert sorted(chosen) == ["blocks/query/kernel", "tokens/embedding"]
    updates = step_once(make_optimizer(0.1, weight_decay=0.1), stacked, jax.tree.map(jnp.zeros_like, stacked))
    moved = [name for name, leaf in named_leaves(updates).items() if np.any(leaf != 0)]
    assert sorted(moved) == ["blocks/query/kernel", "tokens/embedding"]


def test_update_matches_torch_adamw():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 2)).astype("f4"), rng.normal(size=(5, 3, 2)).astype("f4") * 0.1
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer_theirs = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.3)
    params, optimizer = {"kernel": jnp.asarray(start)}, make_optimizer(0.05, weight_decay=0.3, clip=1e9, b2=0.99)
    state = optimizer.init(params)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        optimizer_theirs.step()
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_muon_makes_the_updates_of_block_kernels_orthogonal_layer_by_layer():
    """Every singular value of an update is near rate * 0.5 * sqrt(larger side) (arXiv 2502.16982, equation 4 has 0.2)."""
    rng = np.random.default_rng(0)
    params = {"dit": {"blocks": {"up": {"kernel": jnp.zeros((3, 8, 20))}}}}
    gradients = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * [[[0.1]], [[1]], [[5]]], "f4"), params
    )
    update = step_once(make_optimizer(0.01, kind="muon"), params, gradients)["dit"]["blocks"]["up"]["kernel"]
    singular = np.linalg.svd(update, compute_uv=False) / (0.01 * 0.5 * 20**0.5)
    assert singular.min() > 0.6 and singular.max() < 1.3
    before = np.linalg.svd(np.asarray(gradients["dit"]["blocks"]["up"]["kernel"]), compute_uv=False)
    assert before.max() / before.min() > 10


@pytest.mark.slow
def test_muon_leaves_what_is_no_block_kernel_to_adam():
    params = {
        "dit": {
            "blocks": {"up": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}},
            "patch_in": {"kernel": jnp.ones((3, 3))},
        }
    }
    gradients = jax.tree.map(jnp.ones_like, params)
    updates = named_leaves(step_once(make_optimizer(0.01, weight_decay=0.5, kind="muon"), params, gradients))
    nadam = optax.chain(optax.clip_by_global_norm(1.0), optax.nadam(0.01, b2=0.99))
    adam = named_leaves(step_once(nadam, params, gradients))
    for name in ("dit/blocks/up/bias", "dit/patch_in/kernel"):
        np.testing.assert_allclose(updates[name], adam[name], rtol=1e-6)
    still = step_once(make_optimizer(0.01, weight_decay=0.5, kind="muon"), params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(still["dit"]["blocks"]["up"]["kernel"], -0.005, rtol=1e-5)


def test_ema_decay_warms_up_to_its_limit():
    assert [round(float(ema_decay(step, 0.999)), 4) for step in (0, 8, 90, 10**6)] == [0.1, 0.5, 0.91, 0.999]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(learning_rate=0.0), "learning_rate=0.0 must be > 0"),
        (dict(learning_rate=1.0, warmup=-1), "warmup=-1 must be >= 0"),
        (dict(learning_rate=1.0, kind="mion"), "unknown optimizer kind 'mion' .nearest: muon"),
        (dict(learning_rate=1.0, clip=0), "clip=0 must be > 0"),
        (dict(learning_rate=1.0, weight_decay=-0.1), "weight_decay=-0.1 must be >= 0"),
        (dict(learning_rate=1.0, warmup=9, decay_from=5, decay_until=20), r"need warmup \(9\) <= decay_from"),
        (dict(learning_rate=1.0, decay_from=20, decay_until=10), "decay_from=20, decay_until=10"),
        (dict(learning_rate=1.0, decay_from=20), "decay_from=20 needs decay_until > 20"),
    ],
)
def test_wrong_settings_are_refused_with_their_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**arguments)
