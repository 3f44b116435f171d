"""From a config to pure functions over parameter trees. The graph definitions of the modules never leave this file.

What is wrong with a config is said by validate.py, before any of this.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from rise_jax.condition_kinds import Condition, open_text
from rise_jax.models.adapter import calibrate, make_adapter
from rise_jax.models.dit import DiT, fit_context
from rise_jax.models.vae import VAES


@dataclasses.dataclass(frozen=True)
class Model:
    """Pure functions over one tree {"adapter": ..., "dit": ...}; the LLM and the VAE are frozen and kept apart."""

    abstract: dict  # ShapeDtypeStructs of the tree
    init: Callable  # key -> tree
    calibrate: Callable  # (tree, states, mask) -> tree whose adapter standardises such states
    context: Callable  # (params, states, mask, t) -> [B, text_len, d_ctx]: adapter output, zero-padded
    null: Callable  # params -> [1, text_len, d_ctx]: the learned condition of an empty prompt
    kv: Callable  # (params, context) -> cross-attention keys and values of every block
    dit: Callable  # (params, latents, t, kv) -> prediction
    encode: Callable  # video in [-1, 1] -> latents
    decode: Callable  # latents -> video in [-1, 1]
    latent_shape: Callable  # (T, H, W) -> (F, H', W', C)
    states: Callable  # (frozen, batch) -> (states, mask): cached in the batch, or the LLM teacher-forced in the step
    prediction: str
    shift: float
    time_cond: bool  # the context depends on t: recomputed in every sampler step


def _split(make: Callable[[nnx.Rngs], nnx.Module]):
    """(graph definition, abstract nested dict, init function) of a module whose leaves are all Params."""
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=jax.random.key(0)))), nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise TypeError(f"only Params may be leaves, found {jax.tree.map(jnp.shape, rest)}")

    def init(key):
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(params=key)), nnx.Param, ...)[1])

    return graph, nnx.to_pure_dict(params), init


def language_from(model: ConfigDict) -> Condition:
    """What conditions the video, by a config's `model` group. Configs from before there was a choice have no `condition`."""
    return open_text(model.condition if "condition" in model else "rephrase", **model.llm)


def model_from(model: ConfigDict, d_llm: int, states: Callable) -> Model:
    """The model that a config's `model` group describes, for an LLM of width `d_llm`; `states` as in `build_model`."""
    return build_model(
        d_llm=d_llm,
        adapter=model.adapter.to_dict(),
        dit=model.dit.to_dict(),
        vae=model.vae,
        dtype=model.dtype,
        prediction=model.prediction,
        shift=model.shift,
        states=states,
    )


def build_model(
    *,
    d_llm: int,
    adapter: dict,
    dit: dict,
    vae: str,
    dtype: str,
    prediction: str,
    shift: float,
    states: Callable,
) -> Model:
    """Keyword arguments are the config's `model` group; `adapter` and `dit` go to the modules as they are.

    `states(frozen, batch) -> (states [B, L, d_llm], mask [B, L])` says where the LLM's states come from.
    """
    dtype = jnp.dtype(dtype)
    d_ctx, text_len = adapter["d_ctx"], dit["text_len"]
    coder = VAES[vae]()
    adapter_graph, adapter_abstract, adapter_init = _split(
        lambda rngs: make_adapter(d_llm=d_llm, dtype=dtype, rngs=rngs, **adapter)
    )
    dit_graph, dit_abstract, dit_init = _split(
        lambda rngs: DiT(channels=coder.channels, d_ctx=d_ctx, dtype=dtype, rngs=rngs, **dit)
    )

    def init(key):
        adapter_key, dit_key = jax.random.split(key)
        return {"adapter": adapter_init(adapter_key), "dit": dit_init(dit_key)}

    def context(params, states, mask, t):
        tokens, _ = nnx.merge(adapter_graph, params["adapter"])(states, mask, t)
        return fit_context(tokens.astype(jnp.float32), text_len)

    def null(params):
        return fit_context(params["adapter"]["null"].astype(jnp.float32), text_len)

    def latent_shape(size):
        frames, height, width = size
        stride = coder.space_stride
        return (frames - 1) // coder.time_stride + 1, height // stride, width // stride, coder.channels

    return Model(
        abstract={"adapter": adapter_abstract, "dit": dit_abstract},
        init=init,
        calibrate=lambda params, states, mask: params | {"adapter": calibrate(params["adapter"], states, mask)},
        context=context,
        null=null,
        kv=lambda params, tokens: nnx.merge(dit_graph, params["dit"]).kv(tokens),
        dit=lambda params, latents, t, kv: nnx.merge(dit_graph, params["dit"])(latents, t, kv),
        encode=coder.encode,
        decode=coder.decode,
        latent_shape=latent_shape,
        states=states,
        prediction=prediction,
        shift=shift,
        time_cond=adapter["time_cond"] != "off",
    )
