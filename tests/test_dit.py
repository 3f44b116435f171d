import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rise_jax.models.dit import DiT, coordinate_channels, fit_context, patchify, rope_table, unpatchify
from tests.wan import GRID, TINY, build, equations, forward, make_inputs, random_params, relative, sizes_of


def tiny():
    graph, abstract = build(**TINY)
    return TINY, graph, random_params(abstract)


@pytest.mark.slow
def test_context_is_cut_or_padded_with_zeros_that_are_attended():
    config, graph, params = tiny()
    latents, t, context = make_inputs(context_length=8, **config)
    text_len = config["text_len"]
    padded = np.zeros((2, text_len, config["d_ctx"]), "f4")
    padded[:, :3] = context[:, :3]
    np.testing.assert_array_equal(fit_context(jnp.asarray(context[:, :3]), text_len), padded)
    np.testing.assert_array_equal(fit_context(jnp.asarray(context), text_len), context[:, :text_len])
    cut, short = forward(graph, params, latents, t, context[:, :text_len]), forward(graph, params, latents, t, padded)
    np.testing.assert_allclose(forward(graph, params, latents, t, context), cut, atol=1e-6)
    np.testing.assert_allclose(forward(graph, params, latents, t, context[:, :3]), short, atol=1e-6)

    @jax.jit
    def without_padding(params):
        dit = nnx.merge(graph, params)
        key, value = dit.kv(jnp.asarray(context[:, :3]))
        return dit(jnp.asarray(latents), jnp.asarray(t), (key[:, :, :3], value[:, :, :3]))

    assert relative(without_padding(params), short) > 1e-3


@pytest.mark.slow
def test_keys_and_values_computed_once_serve_every_time():
    config, graph, params = tiny()
    latents, _, context = make_inputs(context_length=3, **config)
    kv = jax.jit(lambda params, context: nnx.merge(graph, params).kv(context))(params, context)
    call = jax.jit(lambda params, latents, t, kv: nnx.merge(graph, params)(latents, t, kv))
    for t in (np.array([0.1, 0.4], "f4"), np.array([1.0, 0.7], "f4")):
        np.testing.assert_allclose(call(params, latents, t, kv), forward(graph, params, latents, t, context), atol=1e-5)


@pytest.mark.slow
def test_samples_do_not_see_each_other():
    config, graph, params = tiny()
    latents, t, context = make_inputs(context_length=3, **config)
    both = forward(graph, params, latents, t, context)
    alone = forward(graph, params, latents[1:], t[1:], context[1:])
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)


def test_coordinates_say_where_a_cell_is():
    """sin and cos of pi/2 and pi times the place, time first: the ends of an axis, its middle, and an axis of one cell."""
    places = coordinate_channels(1, 3, 5)
    assert places.shape == (1, 3, 5, 14)
    half, full = slice(0, 12, 2), slice(1, 12, 2)  # [sin t, sin y, sin x, cos t, cos y, cos x]
    np.testing.assert_allclose(places[0, 0, 2][half], [-1, -1, 0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(places[0, 2, 3][half], [-1, 1, 0.5**0.5, 0, 0, 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(places[0, 2, 3][full], [0, 0, 1, -1, -1, 0], atol=1e-6)
    assert len(np.unique(places.reshape(-1, 14).round(5), axis=0)) == 15


def test_the_last_coordinates_grow_with_time_where_things_move_down_or_right():
    down, right = np.moveaxis(coordinate_channels(3, 3, 3)[..., 12:], -1, 0)
    np.testing.assert_array_equal(down[:, :, 0], [[1, 0, -1], [0, 0, 0], [-1, 0, 1]])
    np.testing.assert_array_equal(right[:, 0], down[:, :, 0])


@pytest.mark.slow
def test_unroll_changes_no_gradient():
    config, graph, params = tiny()
    other_graph, _ = build(**config | {"unroll": True})
    latents, t, context = make_inputs(context_length=3, **config)
    gradients = [
        jax.jit(jax.grad(lambda params, graph=g: jnp.sum(forward(graph, params, latents, t, context) ** 2)))(params)
        for g in (graph, other_graph)
    ]
    assert max(jax.tree.leaves(jax.tree.map(relative, *gradients))) < 1e-5


@pytest.mark.slow
def test_bfloat16_leaves_the_islands_of_wan_in_float32():
    """diffusers keeps time embedder, modulation, norms and rotation in fp32 (`_keep_in_fp32_modules`); softmax is ours to keep."""
    config, _, params = tiny()
    graph, _ = build(**config | {"dtype": jnp.bfloat16})
    latents, t, context = make_inputs(context_length=3, **config)
    width = config["heads"] * config["head_width"]

    def plain(params):
        dit = nnx.merge(graph, params)
        return dit(jnp.asarray(latents), jnp.asarray(t), dit.kv(jnp.asarray(context)))

    trace = jax.make_jaxpr(plain)(params)
    dtypes, products, exact = collections.defaultdict(set), collections.defaultdict(set), []
    for equation in equations(trace.jaxpr):
        first, *others = [variable.aval for variable in equation.invars] or [None]
        if equation.primitive.name == "dot_general" and others[0].ndim == 2:
            products[others[0].shape].add(others[0].dtype.name)
            exact += [others[0].shape] if others[0].dtype == jnp.float32 and is_highest(equation) else []
        elif first is not None:
            dtypes[equation.primitive.name].add(first.dtype.name)
        if equation.primitive.name == "mul" and first.shape == (2, np.prod(GRID), width):
            dtypes["modulation"].add(first.dtype.name)
    for name in ("rsqrt", "cos", "sin", "exp", "modulation"):
        assert dtypes[name] == {"float32"}, name
    module = nnx.eval_shape(lambda: nnx.merge(graph, params))
    norms = [part for _, part in nnx.iter_modules(module) if isinstance(part, nnx.LayerNorm | nnx.RMSNorm)]
    assert [norm.dtype for norm in norms] == [jnp.float32] * 8  # three and four of a block, one at the end
    assert sorted(exact) == sorted(
        [(256, width), (width, width), (width, 6 * width)]
    )  # or TPUs would round them to bf16
    patch, mlp, text = 4 * 4, config["mlp_width"], config["d_ctx"]
    assert products.pop((width, width)) == {"float32", "bfloat16"}  # time, and everything else
    assert {shape for shape, found in products.items() if found == {"float32"}} == {(256, width), (width, 6 * width)}
    assert {shape for shape, found in products.items() if found == {"bfloat16"}} == {
        *((patch, width), (text, width), (width, mlp), (mlp, width), (width, patch))
    }


def is_highest(equation):
    return equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_patchify_round_trip(patch):
    size = [tokens * p for tokens, p in zip(GRID, patch, strict=True)]
    latents = jnp.arange(2 * np.prod(size) * 3.0).reshape(2, *size, 3)
    tokens = patchify(latents, patch)
    assert tokens.shape == (2, np.prod(GRID), np.prod(patch) * 3)
    np.testing.assert_array_equal(unpatchify(tokens, GRID, patch), latents)


def test_patchify_order():
    """One frame of 2 x 4 pixels, one channel, patch 2 x 2: two tokens, each row by row."""
    latents = jnp.array([[0.0, 1, 2, 3], [4, 5, 6, 7]]).reshape(1, 1, 2, 4, 1)
    np.testing.assert_array_equal(patchify(latents, (1, 2, 2)), [[[0, 1, 4, 5], [2, 3, 6, 7]]])


def test_rope_shares_the_pairs_out():
    """Head width 12: 6 pairs, of which height and width get 2 each and time the rest."""
    cos, sin = rope_table(2, 1, 3, 12)
    angles = np.arctan2(sin, cos)
    assert angles.shape == (6, 6)
    last = np.array([1, 0.01, 0, 0, 2, 0.02])  # frame 1, row 0, column 2; frequencies 1 and 10000^(-1/2)
    np.testing.assert_allclose(angles[-1], last, atol=1e-6)
    np.testing.assert_array_equal(angles[0], 0)


@pytest.mark.slow
def test_starts_at_zero_output():
    inputs = make_inputs(context_length=3, **TINY)

    @jax.jit
    def fresh(latents, t, context):
        dit = DiT(rngs=nnx.Rngs(params=jax.random.key(0)), **sizes_of(TINY))
        return dit(latents, t, dit.kv(context))

    output = fresh(*inputs)
    assert output.shape == inputs[0].shape
    np.testing.assert_array_equal(output, 0)
