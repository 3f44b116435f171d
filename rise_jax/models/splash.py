"""The TPU's flash attention (JAX's splash attention kernel), for any length, head width and key mask."""

import jax
import jax.numpy as jnp

from rise_jax.axes import Array

LANES = 128  # the kernel works on multiples of this, in length and head width
BLOCK = 512  # rows at a time


def splash(query: Array, key: Array, value: Array, mask: Array | None = None, *, interpret: bool = False) -> Array:
    """Attention of [B, S, N, d] over [B, L, K, d]; `mask` [B or 1, L] is True for keys that may be seen.

    What is padded here (lengths to whole blocks, heads to whole lanes) is masked and cut off again. `interpret` runs the kernel
    on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # a twentieth of all imports, and needed on TPUs alone

    (batch, length, heads, width), keys = query.shape, key.shape[1]
    block, key_block = (min(BLOCK, _up(size, LANES)) for size in (length, keys))
    query = _heads_first(query * width**-0.5, _up(length, block))
    key, value = (_heads_first(array, _up(keys, key_block)) for array in (key, value))
    segments = None
    if mask is not None or key.shape[2] != keys:
        mask = jnp.ones((1, keys), bool) if mask is None else mask
        mask = jnp.broadcast_to(jnp.pad(mask, ((0, 0), (0, key.shape[2] - keys))), (batch, key.shape[2]))
        visible = jnp.ones((batch, query.shape[2]), jnp.int32)  # queries see keys of their own segment alone
        segments = splash_attention.SegmentIds(q=visible, kv=mask.astype(jnp.int32))
    everything = splash_attention.FullMask((query.shape[2], key.shape[2]))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([everything] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=key_block,
            block_q_dkv=block,
            block_kv_dkv=key_block,
            block_q_dq=block,
            block_kv_dq=key_block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    out = jax.vmap(kernel)(query, key, value, segments)
    return out[:, :, :length, :width].swapaxes(1, 2)


def _heads_first(x: Array, length: int) -> Array:
    """[B, L, N, d] -> [B, N, length, d rounded up to whole lanes], zeros behind."""
    padding = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, _up(x.shape[3], LANES) - x.shape[3]))
    return jnp.pad(x, padding).swapaxes(1, 2)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
