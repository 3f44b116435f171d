import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import D_CTX, D_LLM, EVERY, TRAINED, WIDTH, counted, inputs, make, make_noisy, named
from flax import nnx

from rise_jax.models.adapter import ELLA, calibrate, make_adapter

# ---- sizes and paths ----


def test_ella_options_count_as_published():
    assert counted("resampler", d_llm=2048, d_ctx=768, **ELLA) == 66_820_608  # ELLA 2403.05135: 66.82 M


def test_refiner_count_by_arithmetic():
    w, llm, ctx = 1024, 2048, 768
    attention = 4 * (w * w + w)
    mlp = (w * 4 * w + 4 * w) + (4 * w * w + w)
    block = attention + mlp + 2 * 2 * w
    ends = 2 * llm + (llm * w + w) + 2 * w + (w * ctx + ctx) + 2 * ctx
    learned = 4 * w + 5 * ctx  # registers, null
    assert counted("refiner", d_llm=llm, d_ctx=ctx) == 4 * block + ends + learned == 53_285_888


def test_mlp_count_is_lavi_bridge():
    plain = dict(input_norm=False, output_norm=False, registers=0, learned_null=False)
    layers = [(4096, 2432), (2432, 768)]
    expected = sum(2 * a + (a * 8 * a + 8 * a) + (4 * a * b + b) for a, b in layers)
    assert counted("mlp", d_llm=4096, d_ctx=768, **plain) == expected == 228_920_192  # 229 M


@pytest.mark.slow
def test_paths():
    names = set(named(make("refiner").params))
    block = {f"blocks/self_attn/{p}/{leaf}" for p in ("query", "key", "value", "out") for leaf in ("kernel", "bias")}
    block |= {f"blocks/mlp/{p}/{leaf}" for p in ("up", "down") for leaf in ("kernel", "bias")}
    assert block | {"input_norm/scale", "registers", "null", "output_norm/scale", "output_norm/bias"} <= names
    assert make("refiner").params["blocks"]["mlp"]["up"]["kernel"].shape == (2, WIDTH, 4 * WIDTH)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.slow
def test_shapes_and_null(kind):
    states, mask, _ = inputs(7, 3)
    context, context_mask = make(kind, registers=3)(states, mask)
    tokens = 3 + (5 if kind == "resampler" else 7)
    assert context.shape == (2, tokens, D_CTX) and context_mask.shape == (2, tokens)
    assert context_mask[:, :3].all()
    assert make(kind, registers=3).params["null"].shape == (1, 4, D_CTX)
    assert "null" not in make(kind, learned_null=False).params
    if kind != "resampler":
        np.testing.assert_array_equal(context_mask[:, 3:], mask)


@pytest.mark.parametrize("kind", TRAINED)
def test_one_row_of_sizes_serves_every_kind(kind):
    assert counted(kind, d_llm=D_LLM, d_ctx=D_CTX, width=WIDTH, depth=2, heads=2, registers=4, time_cond="off") > 0


# ---- masks, batch, padding ----


@pytest.mark.parametrize(("kind", "time_cond"), EVERY)
@pytest.mark.slow
def test_masked_tokens_change_nothing(kind, time_cond):
    adapter = make_noisy(kind, time_cond=time_cond)
    states, mask, t = inputs(7, 4, 1)
    context, context_mask = adapter(states, mask, t)
    for garbage in (1e6, jnp.nan, jnp.inf):
        other, _ = adapter(jnp.where(mask[..., None], states, garbage), mask, t)
        np.testing.assert_array_equal(context, other)
    np.testing.assert_array_equal(context[~np.asarray(context_mask)], 0)
    moved, _ = adapter(-states, mask, t)  # while the others do change the context
    assert (np.abs(moved - context).max(axis=(1, 2)) > 1e-3).all()


@pytest.mark.parametrize(("kind", "time_cond"), EVERY)
@pytest.mark.slow
def test_batch_and_padding_change_nothing(kind, time_cond):
    adapter = make_noisy(kind, time_cond=time_cond)
    lengths = (3, 7)
    states, mask, t = inputs(*lengths)
    context, context_mask = adapter(states, mask, t)
    for row, length in enumerate(lengths):
        alone, _ = adapter(states[row : row + 1, :length], mask[row : row + 1, :length], t[row : row + 1])
        np.testing.assert_allclose(alone[0], context[row][context_mask[row]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "registers"), [("refiner", 4), ("refiner", 0), ("resampler", 0), ("mlp", 0)])
@pytest.mark.slow
def test_rows_without_a_token_stay_finite(kind, registers):
    adapter = make_noisy(kind, registers=registers)
    states, mask, _ = inputs(0, 3)

    def total(params):
        context, _ = adapter._replace(params=params)(states, mask)
        return jnp.sum(context**2), context

    gradient, context = jax.jit(jax.grad(total, has_aux=True))(adapter.params)
    assert np.isfinite(context).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_bidirectional_and_per_token():
    states, mask, _ = inputs(5, pad_to=5)
    changed = states.at[:, 4].add(30.0)
    for kind, first_moves in (("refiner", True), ("mlp", False)):
        adapter = make_noisy(kind)
        difference = np.abs(adapter(states, mask)[0] - adapter(changed, mask)[0]).max(axis=(0, 2))
        assert (difference[4] > 1e-4) == first_moves  # the first token, behind 4 registers
        assert difference[8] > 1e-4


# ---- inits ----


@pytest.mark.slow
def test_refiner_blocks_start_as_the_identity():
    states, mask, _ = inputs(7, 4)
    deep, shallow = make("refiner", depth=3), make("refiner", depth=1)
    shallow = shallow._replace(params=deep.params | {"blocks": shallow.params["blocks"]})
    np.testing.assert_array_equal(deep(states, mask)[0], shallow(states, mask)[0])
    for name, leaf in named(deep.params).items():
        assert np.any(leaf) != name.endswith(("self_attn/out/kernel", "mlp/down/kernel", "bias")), name


def test_context_starts_at_the_given_mean_and_std():
    mean, std = np.linspace(-2, 3, D_CTX, dtype=np.float32), np.linspace(0.1, 2, D_CTX, dtype=np.float32)
    states, mask, _ = inputs(7, 7, 7)
    plain, calibrated = make("refiner"), make("refiner", mean=mean, std=std)
    np.testing.assert_allclose(calibrated(states, mask)[0], plain(states, mask)[0] * std + mean, atol=1e-5)
    null, plain_null = calibrated.params["null"], plain.params["null"]
    np.testing.assert_allclose(null, plain_null * std + mean, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINED)
def test_scale_of_the_states_does_not_matter(kind):
    adapter = make(kind)
    states, mask, _ = inputs(7, 4)
    np.testing.assert_allclose(adapter(states, mask)[0], adapter(1000 * states, mask)[0], atol=1e-3)


@pytest.mark.parametrize("kind", TRAINED)
def test_time_starts_without_effect_on_norms_and_then_has_one(kind):
    states, mask, t = inputs(7, 4)
    adapter = make(kind, time_cond="adaln")
    if kind != "resampler":  # whose latents take the time from the start, as ELLA's
        np.testing.assert_array_equal(adapter(states, mask, t)[0], adapter(states, mask, 1 - t)[0])
    moved = make_noisy(kind, time_cond="adaln")
    assert np.abs(moved(states, mask, t)[0] - moved(states, mask, 1 - t)[0]).max() > 1e-4


@pytest.mark.parametrize(("kind", "time_cond"), EVERY)
@pytest.mark.slow
def test_gradient_reaches_every_leaf(kind, time_cond):
    adapter = make_noisy(kind, time_cond=time_cond)
    states, mask, t = inputs(7, 4)

    def total(params):
        context, _ = adapter._replace(params=params)(states, mask, t)
        weights = jax.random.normal(jax.random.key(3), context.shape)
        return jnp.sum(weights * context) + jnp.sum(params["null"] ** 2)

    gradient = {name: np.abs(leaf).max() for name, leaf in named(jax.jit(jax.grad(total))(adapter.params)).items()}
    # A key bias adds the same number, q . b, to every logit of a query, and softmax does not see it.
    silent = {name for name in gradient if name.endswith("attn/key/bias")}
    largest = max(gradient.values())
    assert all(gradient[name] < 1e-5 * largest for name in silent)
    assert all(gradient[name] > 1e-5 * largest for name in gradient.keys() - silent), gradient


@pytest.mark.slow
def test_bf16_stays_close_and_keeps_fp32_parameters():
    states, mask, _ = inputs(7, 4)
    for kind in TRAINED:
        exact, _ = make(kind)(states, mask)
        coarse_adapter = make(kind, dtype=jnp.bfloat16)
        coarse, _ = coarse_adapter(states, mask)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(coarse_adapter.params))
        cosine = jnp.sum(exact * coarse) / jnp.linalg.norm(exact) / jnp.linalg.norm(coarse)
        assert 0.999 < cosine < 1 - 1e-9 and np.abs(exact - coarse).max() > 0


# ---- errors ----


def test_errors():
    with pytest.raises(ValueError, match="'perceiver'; valid: refiner, resampler, mlp"):
        make_adapter("perceiver", d_llm=4, d_ctx=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'gate'; valid: off, adaln"):
        make("refiner", time_cond="gate")
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 4; the nearest valid width is 8"):
        make("refiner", width=10, heads=4)
    with pytest.raises(ValueError, match="width 8 must be 6"):
        make("resampler", output_norm=False)
    states, mask, _ = inputs(7, 4)
    with pytest.raises(ValueError, match="needs the diffusion time"):
        make("refiner", time_cond="adaln")(states, mask)


@pytest.mark.slow
def test_calibration_standardises_the_states_it_was_given():
    """Channels of very unequal mean and spread reach the projection with mean 0 and variance 1; padding does not count."""
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(16, 6, 8)) * np.geomspace(0.1, 10, 8) + 5).astype(np.float32)
    mask = np.arange(6) < rng.integers(1, 7, (16, 1))
    states[~mask] = 1e6
    module = make_adapter(
        "refiner", d_llm=8, d_ctx=8, width=8, depth=1, heads=2, rngs=nnx.Rngs(params=jax.random.key(0))
    )
    graph, params = nnx.split(module)
    calibrated = nnx.merge(graph, calibrate(nnx.to_pure_dict(params), jnp.asarray(states), jnp.asarray(mask)))
    normed = np.asarray(calibrated.input_norm(states) + calibrated.input_bias[...])[mask]
    np.testing.assert_allclose(normed.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(normed.std(0), 1, atol=1e-3)


def test_identity_gives_the_states_as_they_are_and_zeros_behind_the_mask():
    states, mask, _ = inputs(7, 3)
    rngs = nnx.Rngs(params=jax.random.key(0))
    adapter = make_adapter("identity", d_llm=states.shape[-1], d_ctx=states.shape[-1], rngs=rngs)
    context, kept = adapter(states, mask)
    np.testing.assert_array_equal(context, np.where(mask[..., None], states, 0))
    np.testing.assert_array_equal(kept, mask)
    assert [*nnx.to_pure_dict(nnx.state(adapter, nnx.Param))] == ["null"]
    with pytest.raises(ValueError, match="states are 8 wide, d_ctx is 6"):
        make_adapter("identity", d_llm=8, d_ctx=6, rngs=rngs)
    with pytest.raises(ValueError, match="registers=2, nearest: 0"):
        make_adapter("identity", d_llm=8, d_ctx=8, registers=2, rngs=rngs)
