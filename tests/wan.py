"""Tiny video transformers for the tests: ours, diffusers', and the two fed alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from rise_jax.models.dit import DiT, coordinate_channels
from rise_jax.trees import named_leaves, nested
from rise_jax.weights_wan import STEM, wan_table

TINY = dict(channels=4, patch=(1, 2, 2), heads=2, head_width=12, mlp_width=40, depth=2, d_ctx=6, text_len=5)
GRID = (2, 3, 2)  # tokens in time, height, width


def sizes_of(config):
    """Keyword arguments of DiT: its width is heads times head width."""
    sizes = dict(config)
    return sizes | dict(width=sizes["heads"] * sizes.pop("head_width"))


def build(**config):
    """(graph definition, abstract tree)"""
    module = nnx.eval_shape(lambda: DiT(rngs=nnx.Rngs(params=jax.random.key(0)), **sizes_of(config)))
    graph, abstract, rest = nnx.split(module, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "only Params may be leaves"
    return graph, nnx.to_pure_dict(abstract)


def build_torch(
    channels, patch, heads, head_width, mlp_width, depth, d_ctx, text_len, coordinates=False, noise=0.1, seed=0
):
    """diffusers' model, random, with `noise` on top so that nothing stays at 0 or 1."""
    torch.manual_seed(seed)
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
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model


def tree_of(named, abstract, patch):
    """Tensors by diffusers' names -> our nested dict of numpy arrays."""
    table = wan_table(abstract, patch, "diffusers")
    assert set(table) == set(named)
    leaves = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in named_leaves(abstract).items()}
    for name, place in table.items():
        leaves[place.path][... if place.layer is None else place.layer] = place.inward(named[name].numpy())
    return nested(leaves)


def make_inputs(channels, patch, d_ctx, context_length, grid=GRID, **_):
    """latents, t in [0, 1], context"""
    rng = np.random.default_rng(0)
    size = [tokens * p for tokens, p in zip(grid, patch, strict=True)]
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


def equations(program):
    """Every equation of a trace, those of inner programs too."""
    for equation in program.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(value, "eqns"):
                yield from equations(getattr(value, "jaxpr", value))


def random_params(abstract, scale=0.3):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), abstract)


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max()


def read_tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in safetensors.numpy.load_file(file).items()}


def write_tensors(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / f"{STEM}.safetensors")


def bits(tree):
    return {
        path: (leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in named_leaves(tree).items()
    }
