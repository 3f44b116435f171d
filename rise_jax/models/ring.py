"""Ring attention: a sequence lies split over a mesh axis, and keys and values go round it (Liu et al. 2310.01889).

Each device keeps its queries and meets the keys and values of all others, one block at a time, with the softmax carried along
(Milakov and Gimelshein 1805.02867). The backward pass goes round again and recomputes the scores, so that only a device's own
rows and their log-sum-exp are kept. To be called inside jax.shard_map; holds one block of scores, [B, N, S/n, S/n] in fp32.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rise_jax.axes import Array

LOWEST = float(jnp.finfo(jnp.float32).min)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(query: Array, key: Array, value: Array, mask: Array, axis: str) -> Array:
    """Attention of this device's queries [B, S, N, d] to the keys and values [B, L, K, d] of all devices along the mesh axis.

    `mask` [B or 1, L] is True for this device's keys that may be seen; N is a multiple of K. A query that may see no key of any
    device gets zeros.
    """
    return _forward(query, key, value, mask, axis)[0]


def _forward(query, key, value, mask, axis):
    grouped = _group(query, key)
    batch, length, kv_heads, group, width = grouped.shape
    zero = jnp.zeros((batch, kv_heads, group, length), jnp.float32)
    start = jnp.zeros((*zero.shape, width), jnp.float32), jnp.full_like(zero, LOWEST), zero

    def meet(carry, block):
        mixed, highest, total = carry
        key, value, mask = block
        scores = _scores(grouped, key, mask)
        now = jnp.maximum(highest, scores.max(axis=-1))
        weights = jnp.where(_spread(mask), jnp.exp(scores - now[..., None]), 0)
        fade = jnp.exp(highest - now)
        new = jnp.einsum("bkgsl,blkd->bkgsd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return mixed * fade[..., None] + new, now, total * fade + weights.sum(axis=-1)

    def step(carry, _):
        state, block = carry
        return (meet(state, block), _pass_on(block, axis)), None  # the two do not wait for each other

    steps = jax.lax.axis_size(axis) - 1
    (state, block), _ = jax.lax.scan(step, (start, (key, value, mask)), length=steps)
    mixed, highest, total = meet(state, block)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    out = (mixed / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)
    return out, (query, key, value, mask, out, highest + jnp.log(total))


def _backward(axis, kept, cotangent):
    query, key, value, mask, out, logsumexp = kept
    grouped, cotangent = _group(query, key), _group(cotangent, key)
    product = jnp.sum(cotangent.astype(jnp.float32) * _group(out, key).astype(jnp.float32), axis=-1)
    product = product.transpose(0, 2, 3, 1)  # [B, K, G, S]
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def meet(block, to_key, to_value, to_query):
        key, value, mask = block
        weights = jnp.where(_spread(mask), jnp.exp(_scores(grouped, key, mask) - logsumexp[..., None]), 0)
        to_value += einsum("bkgsl,bskgd->blkd", weights.astype(query.dtype), cotangent)
        to_scores = weights * (einsum("bskgd,blkd->bkgsl", cotangent, value) - product[..., None])
        to_scores = (to_scores * query.shape[-1] ** -0.5).astype(query.dtype)
        to_query += einsum("bkgsl,blkd->bskgd", to_scores, key)
        return to_key + einsum("bkgsl,bskgd->blkd", to_scores, grouped), to_value, to_query

    def step(carry, _):
        block, *gradients = carry
        to_key, to_value, to_query = meet(block, *gradients)
        block, to_key, to_value = _pass_on((block, to_key, to_value), axis)
        return (block, to_key, to_value, to_query), None

    zeros = [jnp.zeros(array.shape, jnp.float32) for array in (key, value, grouped)]
    carry, _ = jax.lax.scan(step, ((key, value, mask), *zeros), length=jax.lax.axis_size(axis) - 1)
    to_key, to_value, to_query = meet(*carry)
    to_key, to_value = _pass_on((to_key, to_value), axis)  # home again
    return (
        to_query.reshape(query.shape).astype(query.dtype),
        to_key.astype(key.dtype),
        to_value.astype(value.dtype),
        None,
    )


ring_attention.defvjp(_forward, _backward)


def _group(heads: Array, key: Array) -> Array:
    """[B, S, N, d] -> [B, S, K, N/K, d]"""
    return heads.reshape(*heads.shape[:2], key.shape[2], -1, heads.shape[3])


def _scores(grouped: Array, key: Array, mask: Array) -> Array:
    scores = jnp.einsum("bskgd,blkd->bkgsl", grouped, key, preferred_element_type=jnp.float32)
    return jnp.where(_spread(mask), scores * key.shape[-1] ** -0.5, LOWEST)


def _spread(mask: Array) -> Array:
    return mask[:, None, None, None, :]


def _pass_on(block, axis: str):
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(block, axis, [(i, (i + 1) % size) for i in range(size)])
