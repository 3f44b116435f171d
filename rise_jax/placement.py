"""Published tensors <-> leaves of a parameter tree, by a table: streamed in leaf by leaf, written out shard by shard.

Published models keep one tensor per layer, (out, in); here the layers of a leaf are stacked and kernels are (in, out).
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from rise_jax.tensor_folder import DTYPES, TensorFolder
from rise_jax.trees import named_leaves, nested

SHARD_BYTES = 5 * 10**9  # per file, diffusers' own limit
ALIGNMENT = 64  # bytes; a cache line, too
THREADS = 4  # that read layers of a leaf side by side


@dataclass(frozen=True)
class Place:
    """Where a published tensor goes: path in the tree, layer of a stacked leaf (None where it is not), and its published form.

    plain: as it is here. matrix: transposed. row: with one more axis, of size 1, in front. conv: [D, C, pt, ph, pw] over disjoint
    patches, which is the matrix [pt*ph*pw*C, D]. kernel: [out, in, *window] of a convolution, here [*window, in, out].
    """

    path: str
    layer: int | None = None
    form: str = "plain"
    patch: tuple[int, int, int] = (1, 1, 1)

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """The published shape, for a leaf of shape `leaf`."""
        own = leaf if self.layer is None else leaf[1:]
        if self.form == "conv":
            return (own[1], own[0] // int(np.prod(self.patch)), *self.patch)
        if self.form == "kernel":
            return (own[-1], own[-2], *own[:-2])
        return {"plain": own, "matrix": own[::-1], "row": (1, *own)}[self.form]

    def inward(self, value: np.ndarray) -> np.ndarray:
        """Published form -> that of the tree; a view wherever numpy can make one."""
        if self.form == "conv":
            return value.transpose(2, 3, 4, 1, 0).reshape(-1, len(value))
        if self.form == "kernel":
            return np.moveaxis(value, (0, 1), (-1, -2))
        return {"plain": value, "matrix": value.T, "row": value[0]}[self.form]

    def outward(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `inward`."""
        if self.form == "conv":
            return value.reshape(*self.patch, -1, value.shape[1]).transpose(4, 3, 0, 1, 2)
        if self.form == "kernel":
            return np.moveaxis(value, (-1, -2), (0, 1))
        return {"plain": value, "matrix": value.T, "row": value[None]}[self.form]


def check(abstract: dict, table: Mapping[str, Place], folder: TensorFolder, ignored: tuple[str, ...] = ()) -> None:
    """ValueError lists every tensor that is missing, left over, of the wrong shape or of a dtype that is not read here.

    Tensors whose names start with one of `ignored` may be there or not.
    """
    leaves, found = named_leaves(abstract), folder.tensors
    expected = {name: place.shape(leaves[place.path].shape) for name, place in table.items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [
        f"left over: {name} {tensor.shape}"
        for name, tensor in found.items()
        if name not in expected and not name.startswith(ignored)
    ]
    both = [(name, found[name], shape) for name, shape in expected.items() if name in found]
    problems += [
        f"wrong shape: {name} is {tensor.shape}, expected {shape}"
        for name, tensor, shape in both
        if tensor.shape != shape
    ]
    problems += [
        f"wrong dtype: {name} is {tensor.dtype}, readable: {', '.join(DTYPES)}"
        for name, tensor, _ in both
        if tensor.dtype not in DTYPES
    ]
    if problems:
        raise ValueError(
            f"{folder.path} does not fit the model ({len(problems)} problems):\n  " + "\n  ".join(problems)
        )


def stream(abstract: dict, table: Mapping[str, Place], folder: TensorFolder, shardings: dict | None = None) -> dict:
    """Reads the leaves of `abstract` (shapes and dtypes) as jax Arrays, each straight to its sharding; None: the default device.

    The host holds one part of one leaf at a time, as large as a device wants it, and THREADS layers of the file. Largest leaves come
    first, so that the peak falls where little else is loaded. Run `check` before.
    """
    sources: dict[str, dict] = {}
    for name, place in table.items():
        sources.setdefault(place.path, {})[place.layer] = (name, place)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = named_leaves(shardings) if shardings is not None else {}
    arrays = {}
    for path, leaf in sorted(named_leaves(abstract).items(), key=lambda item: -item[1].size * item[1].dtype.itemsize):
        read = partial(_read, folder, sources[path], leaf)
        arrays[path] = _distribute(leaf.shape, targets.get(path, one), read)
    return nested({path: arrays[path] for path in named_leaves(abstract)})


def _distribute(shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable) -> jax.Array:
    """`read(index)` once per distinct part, each part on its devices before the next is read.

    (jax.make_array_from_callback holds the parts of all devices at once, and reads replicas again.)
    """
    groups: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        cuts = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape))
        groups.setdefault(cuts, []).append(device)
    arrays = []
    for cuts, devices in groups.items():
        part = read(tuple(slice(*cut) for cut in cuts))
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read(folder: TensorFolder, layers: dict, leaf: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part of a leaf that `index` (slices with both ends, in the tree's own axes) cuts out."""
    part = _aligned([cut.stop - cut.start for cut in index], leaf.dtype)
    if None in layers:
        _copy(folder, layers[None], index, part)
    else:
        copy = lambda layer, row: _copy(folder, layers[layer], index[1:], row)
        with ThreadPoolExecutor(THREADS) as pool:  # numpy copies without Python's lock
            list(pool.map(copy, range(index[0].start, index[0].stop), part))
    return part


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An array that begins where XLA on CPU wants one to: `jax.device_put` then takes its memory over, and does not copy it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _copy(folder: TensorFolder, source: tuple[str, Place], index: tuple[slice, ...], target: np.ndarray) -> None:
    name, place = source
    value = folder.view(name)
    if place.form == "matrix":
        _turn(value[index[::-1]], target)
    else:
        target[...] = place.inward(value)[index]
    folder.release(name)


def _turn(value: np.ndarray, target: np.ndarray) -> None:
    """target[...] = value.T (any number of axes), in blocks that fill a cache line of target, and are cast before they are turned.

    At once, numpy takes 2 to 3 times as long (8960 x 1536, CPU), and far longer where it has to round to bf16.
    """
    rows = ALIGNMENT // target.itemsize
    for start in range(0, len(value), rows):
        block = slice(start, start + rows)
        target[..., block] = value[block].astype(target.dtype, copy=False).T


def save(
    tree: dict, table: Mapping[str, Place], folder: Path, stem: str, settings: dict, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json and `stem`.safetensors, or shards of at most `shard_bytes` (one tensor at least) with an index.

    Tensors keep the dtypes of their leaves. Raises FileExistsError for a folder that already holds such weights.
    """
    folder = Path(folder)
    if old := sorted(folder.glob(f"{stem}*.safetensors*")):
        raise FileExistsError(f"{folder} already holds {old[0].name}: choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    leaves = named_leaves(tree)
    sizes = {name: _bytes(leaves[place.path], place) for name, place in table.items()}
    shards = _shards(sizes, shard_bytes)
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [f"{stem}.safetensors"]
    for file, names in zip(files, shards):
        tensors = {name: _published(leaves[table[name].path], table[name]) for name in names}
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
    _write_json(folder / "config.json", settings)


def _published(leaf: Any, place: Place) -> np.ndarray:
    value = np.asarray(leaf if place.layer is None else leaf[place.layer])
    return np.ascontiguousarray(place.outward(value))


def _bytes(leaf: Any, place: Place) -> int:
    return leaf.dtype.itemsize * leaf.size // (1 if place.layer is None else len(leaf))


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
