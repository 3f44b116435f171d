"""Runs causal layers over a video piece by piece, with the result of one whole run: over time in chunks, over space in tiles."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rise_jax.axes import Array
from rise_jax.models.wan_vae_blocks import Past


def over_time(call: Callable[[Array, Past], Array], x: Array, step: int) -> Array:
    """`call(chunk, past)` on the first frame of x [B, T, H, W, C], then on `step` frames at a time, in one scan.

    What is held beside x and the result does not grow with T. A last chunk shorter than `step` runs by itself.
    """
    past = Past()
    results = [call(x[:, :1], past)]
    after, x = past.after, x[:, 1:]
    count = x.shape[1] // step

    def body(frames, chunk):
        past = Past(frames)
        result = call(chunk, past)
        return past.after, result

    if count:
        chunks = x[:, : count * step].reshape(x.shape[0], count, step, *x.shape[2:])
        after, parts = jax.lax.scan(body, after, jnp.moveaxis(chunks, 1, 0))
        parts = jnp.moveaxis(parts, 0, 1)
        results.append(parts.reshape(parts.shape[0], -1, *parts.shape[3:]))
    if x.shape[1] > count * step:
        results.append(body(after, x[:, count * step :])[1])
    return jnp.concatenate(results, axis=1)


def in_tiles(
    call: Callable[[Array], Array], x: Array, *, tile: int | None, halo: int, inside: int, outside: int
) -> Array:
    """`call` on one square window of x [B, T, H, W, C] after the other, joined without seams. None runs x as a whole.

    `tile` and `halo` count cells, of `inside` x `inside` places in x and `outside` x `outside` in the result. A window is a tile
    and `halo` cells on every side, which must be as far as `call` sees; where the frame ends sooner, the window ends with it, so
    that layers pad there, and only there, as they do in a whole run. Memory follows the window, time its share that is halo.
    """
    cells = np.array(x.shape[2:4]) // inside
    if tile is None or all(cells <= tile):
        return call(x)
    size, window = np.minimum(tile, cells), np.minimum(tile + 2 * halo, cells)
    rows, columns = (np.minimum(np.arange(0, n, side), n - side) for n, side in zip(cells, size))
    corners = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)

    def body(result, corner):
        start = jnp.clip(corner - halo, 0, cells - window)
        part = call(_window(x, start * inside, window * inside))
        part = _window(part, (corner - start) * outside, size * outside)
        row, column = corner * outside
        return jax.lax.dynamic_update_slice(result, part, (0, 0, row, column, 0)), None

    shape = jax.eval_shape(call, x)
    return jax.lax.scan(body, jnp.zeros(shape.shape, shape.dtype), corners)[0]


def _window(x: Array, start: Array, size: np.ndarray) -> Array:
    """The `size` (height, width) places of x [B, T, H, W, C] from `start` (row, column) on."""
    shape = (*x.shape[:2], *(int(n) for n in size), x.shape[4])
    return jax.lax.dynamic_slice(x, (0, 0, start[0], start[1], 0), shape)
