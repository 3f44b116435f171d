"""From a config to pure functions over parameter trees. The graph definitions of the modules never leave this file.

What is wrong with a config is said by validate.py, before any of this.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rise_jax.condition_kinds import CONDITIONS, Condition, open_text
from rise_jax.models.adapter import calibrate, make_adapter
from rise_jax.models.attention import XLA, Backend
from rise_jax.models.dit import DiT, fit_context
from rise_jax.models.vae import Pixels
from rise_jax.models.wan_vae import WanVAE
from rise_jax.published import LEARNED, null_shape, open_vae
from rise_jax.trees import named_leaves, nested, partition
from rise_jax.weights_wan import KEPT_FP32


@dataclasses.dataclass(frozen=True)
class Model:
    """Pure functions over one tree {"adapter": ..., "dit": ...}, and "null" where the null condition is a published one.

    The LLM and the VAE are frozen and kept apart.
    """

    abstract: dict  # ShapeDtypeStructs of the tree
    init: Callable  # key -> tree, all of it random
    calibrate: Callable  # (tree, states, mask) -> tree whose adapter standardises such states
    context: Callable  # (params, states, mask, t) -> [B, text_len, d_ctx]: adapter output, zero-padded
    null: Callable  # params -> [1, text_len, d_ctx]: the condition of "no prompt", learned or published
    kv: Callable  # (params, context) -> cross-attention keys and values of every block
    dit: Callable  # (params, latents, t, kv) -> prediction
    encode: Callable  # (VAE parameters, video in [-1, 1]) -> latents
    decode: Callable  # (VAE parameters, latents) -> video in [-1, 1]
    latent_shape: Callable  # (T, H, W) -> (F, H', W', C)
    patch: tuple[int, int, int]  # latent frames, rows and columns of a token
    states: Callable  # (frozen, batch) -> (states, mask): cached in the batch, or the LLM teacher-forced in the step
    prediction: str
    shift: float
    time_cond: bool  # the context depends on t: recomputed in every sampler step


@cache
def _split(module: Callable[..., nnx.Module], /, **sizes):
    """(graph definition, abstract nested dict, init function) of `module(rngs=..., **sizes)`, whose leaves are all Params.

    Tracing one takes a second: a start that needs it several times does so once.
    """
    make = partial(module, **sizes)
    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: make(rngs=nnx.Rngs(params=jax.random.key(0)))), nnx.Param, ...
    )
    if jax.tree.leaves(rest):
        raise TypeError(f"only Params may be leaves, found {jax.tree.map(jnp.shape, rest)}")

    def init(key):
        return nnx.to_pure_dict(nnx.split(make(rngs=nnx.Rngs(params=key)), nnx.Param, ...)[1])

    return graph, nnx.to_pure_dict(params), init


def language_from(model: ConfigDict, rules: str | None = None, mesh: Mesh | None = None) -> Condition:
    """What conditions the video, by a config's `model` group; `rules` stand in for the text of the instruction.

    Its parameters lie over the mesh; without one, on the default device.
    """
    settings = model[CONDITIONS[model.condition].group]
    return open_text(model.condition, mesh=mesh, **settings, **({} if rules is None else {"rules": rules}))


def backend_from(model: ConfigDict) -> Backend:
    """How a config's `model` group wants attention computed, on the devices of this process."""
    return Backend.here(model.attention, model.sequence)


def describe_attention(model: ConfigDict, backend: Backend, mesh: Mesh) -> str:
    """'attention xla', or 'attention cudnn, ulysses over context'. ValueError as `Backend.route` and `pick`."""
    heads, context = model.dit.heads, mesh.shape["context"]
    route = backend.route(heads, context, mesh.shape["tensor"])
    name = "xla" if context > 1 and route == "ring" else backend.pick(model.dtype, model.dit.width // heads)
    return f"attention {name}" + (f", {route} over context" if context > 1 else "")


def model_from(
    model: ConfigDict, d_llm: int, states: Callable, vae: Pixels | WanVAE | None = None, *, backend: Backend = XLA
) -> Model:
    """The model that a config's `model` group describes, for an LLM of width `d_llm`.

    `states(frozen, batch) -> (states [B, L, d_llm], mask [B, L])` says where the LLM's states come from; `vae` stands in for
    the one at `model.vae.path`. `backend` is that of attention. The files of a published DiT are not touched.

    Raises ValueError for a back end that cannot compute the DiT's attention here, naming one that can.
    """
    dtype = jnp.dtype(model.dtype)
    dit, adapter = model.dit.to_dict(), model.adapter.to_dict()
    backend.pick(dtype, dit["width"] // dit["heads"])
    published = dit.pop("path")
    d_ctx, text_len = adapter["d_ctx"], dit["text_len"]
    coder = vae or open_vae(model.vae.path)
    coding = _coding(model.vae) if isinstance(coder, WanVAE) else {}
    learned = model.null == LEARNED
    dit["patch"] = tuple(dit["patch"])
    adapter_graph, adapter_abstract, adapter_init = _split(
        make_adapter, d_llm=d_llm, learned_null=learned, dtype=dtype, backend=backend, **adapter
    )
    dit_graph, dit_abstract, dit_init = _split(
        DiT, channels=coder.channels, d_ctx=d_ctx, dtype=dtype, backend=backend, **dit
    )
    abstract = {"adapter": adapter_abstract, "dit": dit_abstract}
    if not learned:
        shape = null_shape(model)
        abstract["null"] = {"embedding": jax.ShapeDtypeStruct(shape, jnp.float32)}
    if published:
        abstract = _with_dtypes(abstract, list(model.trainable), dtype)

    def init(key):
        adapter_key, dit_key = jax.random.split(key)
        tree = {"adapter": adapter_init(adapter_key), "dit": dit_init(dit_key)}
        return tree if learned else tree | {"null": {"embedding": jnp.zeros(shape)}}

    def context(params, states, mask, t):
        tokens, _ = nnx.merge(adapter_graph, params.get("adapter", {}))(states, mask, t)
        return fit_context(tokens.astype(jnp.float32), text_len)

    def null(params):
        value = params["adapter"]["null"] if learned else params["null"]["embedding"]
        return fit_context(value.astype(jnp.float32), text_len)

    def latent_shape(size):
        frames, height, width = size
        stride = coder.space_stride
        return (frames - 1) // coder.time_stride + 1, height // stride, width // stride, coder.channels

    return Model(
        abstract=abstract,
        init=init,
        calibrate=lambda params, states, mask: params | {"adapter": calibrate(params.get("adapter", {}), states, mask)},
        context=context,
        null=null,
        kv=lambda params, tokens: nnx.merge(dit_graph, params["dit"]).kv(tokens),
        dit=lambda params, latents, t, kv: nnx.merge(dit_graph, params["dit"])(latents, t, kv),
        encode=partial(coder.encode, **coding),
        decode=partial(coder.decode, **coding),
        latent_shape=latent_shape,
        patch=dit["patch"],
        states=states,
        prediction=model.prediction,
        shift=model.shift,
        time_cond=adapter["time_cond"] != "off",
    )


def in_tiles(model: Model, tile: int) -> Model:
    """The same model with a Wan VAE that works in pieces of `tile` pixels, which changes nothing beyond rounding."""
    encode, decode = (partial(call, tile=tile) for call in (model.encode, model.decode))
    return dataclasses.replace(model, encode=encode, decode=decode)


def _coding(vae: ConfigDict) -> dict:
    """What WanVAE's encode and decode take beside their input, by the settings of `model.vae`."""
    return {"dtype": jnp.dtype(vae.get("dtype", "float32")), "tile": vae.get("tile", 0) or None}


def _with_dtypes(abstract: dict, trainable: list[str], dtype) -> dict:
    """Frozen leaves of a published DiT are kept in the dtype they are used in; what trains, and what Wan keeps so, in fp32."""
    trained = named_leaves(partition(abstract, trainable)[0])

    def leaf_dtype(name, leaf):
        kept = name in trained or not name.startswith("dit/") or re.search(KEPT_FP32, name)
        return leaf if kept else jax.ShapeDtypeStruct(leaf.shape, dtype)

    return nested({name: leaf_dtype(name, leaf) for name, leaf in named_leaves(abstract).items()})
