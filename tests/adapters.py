"""Small adapters and inputs for them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rise_jax.models.adapter import KINDS, make_adapter

D_LLM, D_CTX, WIDTH = 12, 6, 8
SIZES = dict(refiner=dict(depth=2, heads=2), resampler=dict(depth=2, heads=2, latents=5), mlp={})
TRAINED = [kind for kind in KINDS if kind != "identity"]
EVERY = [(kind, time_cond) for kind in TRAINED for time_cond in ("off", "adaln")]


@functools.partial(jax.jit, static_argnums=0)
def apply(graph, params, *args):
    return nnx.merge(graph, params)(*args)


class Built(NamedTuple):
    """An adapter as the program holds it: a graph and a nested dict of arrays."""

    graph: nnx.GraphDef
    params: dict

    def __call__(self, *args):
        return apply(self.graph, self.params, *args)


def init(kind, **options):
    options = dict(d_llm=D_LLM, d_ctx=D_CTX, width=WIDTH) | SIZES[kind] | options
    return make_adapter(kind, rngs=nnx.Rngs(params=jax.random.key(0)), **options)


def make(kind, **options):
    """As it starts."""
    graph, params = nnx.split(init(kind, **options), nnx.Param)
    return Built(graph, nnx.to_pure_dict(params))


@functools.cache
def make_noisy(kind, **options):
    """With random parameters everywhere, so that no zero init hides anything."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: init(kind, **options)), nnx.Param)
    rng = np.random.default_rng(9)
    params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), nnx.to_pure_dict(abstract))
    return Built(graph, params)


def named(tree):
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def inputs(*lengths, pad_to=7):
    states = 50 * jax.random.normal(jax.random.key(1), (len(lengths), pad_to, D_LLM))
    mask = jnp.arange(pad_to) < jnp.array(lengths)[:, None]
    return states, mask, jnp.linspace(0.1, 0.9, len(lengths))


def counted(kind, **options):
    module = nnx.eval_shape(lambda: make_adapter(kind, rngs=nnx.Rngs(params=jax.random.key(0)), **options))
    _, params, rest = nnx.split(module, nnx.Param, ...)
    assert not jax.tree.leaves(rest), "only Params may be leaves"
    return sum(leaf.size for leaf in jax.tree.leaves(params))
