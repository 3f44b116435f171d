"""Meshes, and one table of path rules that says how each leaf lies on one.

Rules match the end of a path, so Adam's moments and the EMA lie as their parameters do.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rise_jax.trees import path_name

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")

# (pattern, mesh axes of the trailing array axes); the first match wins, leading axes (stacked layers) stay whole.
RULES = (
    (r"(^|/)(query|key|value|up|gate)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(query|key|value|up|gate)/bias$", ("tensor",)),
    (r"(^|/)(out|down)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)embedding$", ("tensor", "fsdp")),
    (r"(^|/)kernel$", ("fsdp", None)),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh with axes data, fsdp, context, tensor over all devices (or `devices`); one size may be -1: what is left.

    Raises ValueError with both numbers, and the nearest choice that fits, when the sizes do not fill the devices.
    """
    devices = list(devices or jax.devices())
    sizes, free = _checked(data, fsdp, context, tensor)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(_misfit(sizes, fixed, len(devices)))
    if free:
        sizes[free[0]] = len(devices) // fixed
    # Auto, said explicitly: make_mesh defaults to Explicit axes, under which plain matmuls of sharded weights raise
    # ShardingTypeError; with Auto the compiler places what the rules leave open.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def planned_mesh(data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> AbstractMesh:
    """The mesh of as many devices as the sizes multiply to, none of which has to be here; a size of -1 counts as 1.

    Raises ValueError for sizes below 1, and for more than one of -1.
    """
    sizes, _ = _checked(data, fsdp, context, tensor)
    filled = tuple(1 if size == -1 else size for size in sizes.values())
    return AbstractMesh(filled, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def bytes_per_device(tree: Any, mesh: Mesh | AbstractMesh) -> int:
    """What one device holds of a tree (arrays or ShapeDtypeStructs) placed by `shardings`."""
    held = lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(held, tree, shardings(tree, mesh))))


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The tree's leaves (arrays or ShapeDtypeStructs) as NamedShardings by RULES; leaves without a rule are replicated.

    An array axis that the mesh axis does not divide stays whole.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path_name(path), leaf.shape, mesh)), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis split over data and fsdp, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def current_mesh() -> AbstractMesh:
    """The mesh of jax.set_mesh at trace time; `.empty` without one."""
    return jax.sharding.get_abstract_mesh()


def place_tokens(x: jax.Array) -> jax.Array:
    """Activations [B, S, ...] inside jit: samples over data and fsdp, places over context. As they are without a mesh."""
    return _place(x, (BATCH_AXES, "context"))


def place_samples(x: jax.Array) -> jax.Array:
    """Activations [B, ...] inside jit: samples over data and fsdp, the rest whole. As they are without a mesh."""
    return _place(x, (BATCH_AXES,))


def place_whole(x: jax.Array) -> jax.Array:
    """An array inside jit: all of it on every device. As it is without a mesh."""
    return _place(x, ())


def sequence_padding(length: int) -> int:
    """Places to add to a sequence so that it divides over the current mesh's context axis; 0 without a mesh."""
    mesh = current_mesh()
    return 0 if mesh.empty else -length % mesh.shape["context"]


def fitted(shape: Sequence[int], axes: Sequence[Any], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`axes` (a mesh axis, several, or None per array axis) without those whose size does not divide the array's."""

    def fits(size, axis):
        names = (axis,) if isinstance(axis, str) else axis or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    return PartitionSpec(*[axis if fits(size, axis) else None for size, axis in zip(shape, axes)])


def batch_ways(mesh: Mesh | None) -> int:
    """Over how many devices samples are split; 1 without a mesh."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES) if mesh else 1


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh, accumulate: int = 1) -> None:
    """Raises ValueError, naming the nearest sizes that fit, when the `accumulate` parts of a batch do not divide over data x fsdp."""
    ways = batch_ways(mesh) * accumulate
    if batch_size < 1 or batch_size % ways:
        below = batch_size // ways * ways
        nearest = f"{below} or {below + ways}" if below > 0 else f"{ways}"
        parts = f" times run.accumulate={accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"run.batch_size={batch_size} does not divide over mesh.data={mesh.shape['data']} x "
            f"mesh.fsdp={mesh.shape['fsdp']} = {ways // accumulate} devices{parts}; nearest: {nearest}. "
            f"To use more devices than samples, split their tokens: {_fewer_samples(batch_size // accumulate, mesh)}"
        )


def process_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch that this process's devices hold, ascending: what it has to load.

    Processes that differ along context or tensor alone hold the same rows. Rows need not be consecutive: on a torus, neighbours
    on the mesh may belong to other hosts.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays -> global arrays on the mesh, split by `batch_sharding`; each process passes its `process_rows`."""
    sharding, ways = batch_sharding(mesh), batch_ways(mesh)
    own = process_rows(ways, mesh)

    def put(rows):
        each = len(rows) // len(own)

        def part(index):
            first = np.searchsorted(own, (index[0].start or 0) // each) * each
            return rows[first : first + each]

        return jax.make_array_from_callback((each * ways, *rows.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)


def put_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Host arrays [B, ...] that every process has whole -> split over data and fsdp, whole where B does not divide.

    Without a mesh they are returned as they are.
    """
    if mesh is None:
        return tree
    split = lambda rows: NamedSharding(mesh, fitted(rows.shape, (BATCH_AXES,), mesh))
    return put(tree, jax.tree.map(split, tree))


def put_parameters(tree: Any, mesh: Mesh | None) -> Any:
    """Host arrays that every process has whole -> by RULES, each device its part; without a mesh, the default device."""
    return jax.device_put(tree) if mesh is None else put(tree, shardings(tree, mesh))


def describe(mesh: Mesh) -> str:
    """'mesh data=4, fsdp=2, context=1, tensor=1 of 8 devices (cpu)'"""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"mesh {sizes} of {mesh.size} device{'s' * (mesh.size > 1)} ({mesh.devices.flat[0].device_kind})"


def _checked(*sizes: int) -> tuple[dict[str, int], list[str]]:
    """(size of every axis, the axes to be filled: one at most)"""
    named = dict(zip(AXES, sizes))
    wrong = {name: size for name, size in named.items() if size < 1 and size != -1}
    if wrong:
        raise ValueError(
            f"mesh sizes must be >= 1, or -1 to fill from the devices; got {_describe(wrong)}; nearest: "
            f"{_describe(dict.fromkeys(wrong, 1))}"
        )
    free = [name for name, size in named.items() if size == -1]
    if len(free) > 1:
        nearest = {free[0]: -1} | dict.fromkeys(free[1:], 1)
        raise ValueError(
            f"only one mesh axis may be -1; got {_describe(dict.fromkeys(free, -1))}; nearest: {_describe(nearest)}"
        )
    return named, free


def put(tree: Any, targets: Any) -> Any:
    """Arrays that every process holds whole -> arrays with the shardings `targets`, a tree like it; nothing is communicated.

    (`jax.device_put` to other processes' devices gathers the values of all, to compare them.) Global arrays are moved as they are.
    """

    def place(leaf, target):
        if target.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
            return jax.device_put(leaf, target)
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, target, lambda index: value[index])

    return jax.tree.map(place, tree, targets)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    for pattern, axes in RULES:
        if re.search(pattern, name) and len(shape) >= len(axes):
            return fitted(shape, (None,) * (len(shape) - len(axes)) + axes, mesh)
    return PartitionSpec()


def _place(x: jax.Array, axes: tuple) -> jax.Array:
    mesh = current_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, fitted(x.shape, axes, mesh))


def _fewer_samples(batch_size: int, mesh: Mesh) -> str:
    """The mesh with as much of data x fsdp moved to context as leaves a divisor of the batch; data gives first."""
    ways, others = math.gcd(max(batch_size, 1), batch_ways(mesh)), mesh.size // batch_ways(mesh)
    fsdp = math.gcd(mesh.shape["fsdp"], ways)
    sizes = dict(data=ways // fsdp, fsdp=fsdp, context=mesh.size * mesh.shape["context"] // (ways * others))
    return _describe(sizes)


def _misfit(sizes: dict[str, int], fixed: int, devices: int) -> str:
    given = {name: size for name, size in sizes.items() if size != -1}

    def distance(choice: tuple[int, ...]) -> float:
        return sum(abs(math.log(choice[AXES.index(name)] / size)) for name, size in given.items())

    nearest = dict(zip(AXES, min(_factorings(devices, len(AXES)), key=distance)))
    verb = "does not divide" if -1 in sizes.values() else "is not"
    nearest = _describe({name: nearest[name] for name in given})
    return f"{_describe(given)}: the product {fixed} {verb} the number of devices, {devices}; nearest: {nearest}"


def _factorings(total: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (total,)
        return
    for first in (size for size in range(1, total + 1) if total % size == 0):
        yield from ((first, *rest) for rest in _factorings(total // first, count - 1))


def _describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
