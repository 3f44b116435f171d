import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from rise_jax.models.dit import DiT, coordinate_channels, fit_context, patchify, rope_table, unpatchify

# diffusers' name -> path in our tree; `N` stands for the block's number. Linear weights get transposed.
NAMES = {
    "scale_shift_table": "modulation",
    "patch_embedding.weight": "patch_in/kernel",
    "patch_embedding.bias": "patch_in/bias",
    "proj_out": "patch_out",
    "condition_embedder.time_embedder.linear_1": "time_up",
    "condition_embedder.time_embedder.linear_2": "time_down",
    "condition_embedder.time_proj": "time_rows",
    "condition_embedder.text_embedder.linear_1": "text_up",
    "condition_embedder.text_embedder.linear_2": "text_down",
    "blocks.N.scale_shift_table": "blocks/modulation",
    "blocks.N.norm2": "blocks/cross_norm",
    "blocks.N.ffn.net.0.proj": "blocks/up",
    "blocks.N.ffn.net.2": "blocks/down",
} | {
    f"blocks.N.{theirs}.{part}": f"blocks/{ours}/{name}"
    for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for part, name in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "out"),
        ("norm_q", "query_norm"),
        ("norm_k", "key_norm"),
    )
}

CONFIGS = {
    "wan patch": dict(channels=4, patch=(1, 2, 2), heads=2, head_width=12, mlp_width=40, depth=2, d_ctx=6, text_len=5),
    "other patch": dict(
        channels=3, patch=(2, 1, 3), heads=3, head_width=16, mlp_width=24, depth=3, d_ctx=9, text_len=4
    ),
    "coordinates, unrolled": dict(
        channels=4,
        patch=(1, 2, 2),
        heads=2,
        head_width=12,
        mlp_width=40,
        depth=2,
        d_ctx=6,
        text_len=5,
        coordinates=True,
        unroll=True,
    ),
}
GRID = (2, 3, 2)  # tokens in time, height, width


def ours_of(theirs):
    """A torch state or gradient dict -> our nested dict of numpy arrays."""
    layers = {}
    for name, value in theirs.items():
        number = name.split(".")[1] if name.startswith("blocks.") else None
        generic = name.replace(f".{number}.", ".N.", 1)
        path, array = NAMES.get(generic), value.numpy()
        if path is None:  # a module: its weight is a kernel, or the scale of a norm
            module, leaf = generic.rsplit(".", 1)
            path = f"{NAMES[module]}/{'bias' if leaf == 'bias' else 'kernel' if array.ndim == 2 else 'scale'}"
        if array.ndim == 5:  # Conv3d [D, C, pt, ph, pw] over disjoint patches: a matrix
            array = array.transpose(2, 3, 4, 1, 0).reshape(-1, array.shape[0])
        elif path.endswith("modulation"):
            array = array[0]
        elif array.ndim == 2:
            array = array.T
        layers.setdefault(path, []).append(array)
    tree = {}
    for path, arrays in layers.items():
        *parents, leaf = path.split("/")
        node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
        node[leaf] = np.stack(arrays) if path.startswith("blocks/") else arrays[0]
    return tree


def build(channels, patch, heads, head_width, **sizes):
    sizes = sizes | dict(channels=channels, patch=patch, heads=heads, width=heads * head_width)
    module = nnx.eval_shape(lambda: DiT(rngs=nnx.Rngs(params=jax.random.key(0)), **sizes))
    graph, abstract, rest = nnx.split(module, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "only Params may be leaves"
    return graph, nnx.to_pure_dict(abstract)


def build_torch(channels, patch, heads, head_width, mlp_width, depth, d_ctx, text_len, coordinates=False, unroll=False):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=patch,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=channels + 14 * coordinates,
        out_channels=channels,
        text_dim=d_ctx,
        freq_dim=256,
        ffn_dim=mlp_width,
        num_layers=depth,
    )
    for parameter in model.parameters():  # nothing stays at 0 or 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_inputs(channels, patch, d_ctx, context_length, **_):
    rng = np.random.default_rng(0)
    size = [tokens * p for tokens, p in zip(GRID, patch, strict=True)]
    latents = rng.normal(size=(2, *size, channels)).astype("f4")
    return latents, np.array([0.13, 0.92], "f4"), rng.normal(size=(2, context_length, d_ctx)).astype("f4")


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, latents, t, context):
    dit = nnx.merge(graph, params)
    with jax.default_matmul_precision("highest"):
        return dit(latents, t, dit.kv(context))


def forward_torch(model, latents, t, context, text_len):
    """Channels first, times in [0, 1000], text zero-padded and coordinates appended by the caller."""
    if model.config.in_channels > model.config.out_channels:
        places = torch.tensor(coordinate_channels(*latents.shape[1:4]))
        latents = torch.cat([latents, places.expand(len(latents), *places.shape)], dim=-1)
    padding = torch.zeros(len(context), text_len - context.shape[1], context.shape[2])
    output = model(latents.movedim(-1, 1), 1000 * t, torch.cat([context, padding], dim=1), return_dict=False)[0]
    return output.movedim(1, -1)


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_diffusers(config):
    """Output and every gradient, with a context shorter than text_len."""
    model = build_torch(**config)
    graph, abstract = build(**config)
    params = ours_of({name: parameter.detach() for name, parameter in model.named_parameters()})
    assert jax.tree.map(np.shape, params) == jax.tree.map(jnp.shape, abstract)

    inputs = make_inputs(context_length=config["text_len"] - 2, **config)
    latents, t, context = (torch.tensor(x) for x in inputs)
    latents.requires_grad_(), context.requires_grad_()
    theirs = forward_torch(model, latents, t, context, config["text_len"])
    weights = np.random.default_rng(1).normal(size=theirs.shape).astype("f4")
    (theirs * torch.tensor(weights)).sum().backward()

    def weighted(params, latents, context):
        ours = forward(graph, params, latents, inputs[1], context)
        return jnp.sum(weights * ours), ours

    grad = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))
    gradients, ours = grad(params, inputs[0], inputs[2])
    assert relative(ours, theirs.detach()) < 1e-5
    expected = (ours_of({n: p.grad for n, p in model.named_parameters()}), latents.grad.numpy(), context.grad.numpy())
    errors = jax.tree.map(relative, gradients, expected)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def tiny():
    config = CONFIGS["wan patch"]
    graph, abstract = build(**config)
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), abstract)
    return config, graph, params


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


def test_keys_and_values_computed_once_serve_every_time():
    config, graph, params = tiny()
    latents, _, context = make_inputs(context_length=3, **config)
    kv = jax.jit(lambda params, context: nnx.merge(graph, params).kv(context))(params, context)
    call = jax.jit(lambda params, latents, t, kv: nnx.merge(graph, params)(latents, t, kv))
    for t in (np.array([0.1, 0.4], "f4"), np.array([1.0, 0.7], "f4")):
        np.testing.assert_allclose(call(params, latents, t, kv), forward(graph, params, latents, t, context), atol=1e-5)


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


@pytest.mark.parametrize("option", ["remat", "unroll"])
def test_remat_and_unroll_change_no_gradient(option):
    config, graph, params = tiny()
    remat_graph, _ = build(**config | {option: True})
    latents, t, context = make_inputs(context_length=3, **config)
    gradients = [
        jax.jit(jax.grad(lambda params, graph=g: jnp.sum(forward(graph, params, latents, t, context) ** 2)))(params)
        for g in (graph, remat_graph)
    ]
    assert max(jax.tree.leaves(jax.tree.map(relative, *gradients))) < 1e-5


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


def test_starts_at_zero_output():
    config = CONFIGS["wan patch"] | dict(width=24)
    config.pop("head_width")
    inputs = make_inputs(context_length=3, **config)

    @jax.jit
    def fresh(latents, t, context):
        dit = DiT(rngs=nnx.Rngs(params=jax.random.key(0)), **config)
        return dit(latents, t, dit.kv(context))

    output = fresh(*inputs)
    assert output.shape == inputs[0].shape
    np.testing.assert_array_equal(output, 0)
