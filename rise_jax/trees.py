"""Parameter trees by path: names joined by '/', split and joined by pattern, hashed. Paths are API."""

import difflib
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def path_name(key_path: tuple) -> str:
    """A JAX key path as text: 'adapter/query/kernel', 'opt_state/0/mu/adapter/query/kernel'."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """{path: leaf} in the order of `jax.tree.leaves`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: dict[str, Any]) -> dict:
    """{path: leaf} -> nested dict: the inverse of `named_leaves`."""
    tree: dict = {}
    for name, leaf in leaves.items():
        _insert(tree, name, leaf)
    return tree


def partition(tree: dict, patterns: str | Sequence[str]) -> tuple[dict, dict]:
    """Splits a nested dict into (leaves whose path matches a pattern, all others); `re.search`, so anchor with ^ or $.

    Raises ValueError for a pattern that matches no path and names the nearest ones.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    leaves = named_leaves(tree)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in leaves):
            raise ValueError(
                f"pattern {pattern!r} matches no parameter; nearest: {', '.join(nearest_paths(pattern, leaves))}"
            )
    chosen, others = {}, {}
    for name, leaf in leaves.items():
        _insert(chosen if any(re.search(p, name) for p in patterns) else others, name, leaf)
    return chosen, others


def combine(first: dict, second: dict) -> dict:
    """Joins two nested dicts that share no leaf: the inverse of `partition`. Raises ValueError where both have one."""
    joined = {}
    for name, leaf in [*named_leaves(first).items(), *named_leaves(second).items()]:
        _insert(joined, name, leaf)
    return joined


def nearest_paths(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    """The paths, or leading or trailing parts of paths, most like `pattern`."""
    parts = dict.fromkeys(part for name in names for part in _parts(name))
    words = re.sub(r"[\^$\\()|?*+\[\]]", " ", pattern).split() or [pattern]
    close = [
        match for word in words for match in difflib.get_close_matches(word.strip("/"), parts, n=count, cutoff=0.5)
    ]
    return list(dict.fromkeys(close))[:count] or list(dict.fromkeys(name.split("/")[0] + "/" for name in names))


def tree_sha256(tree: Any) -> str:
    """SHA-256 over the leaves in sorted path order: each adds path, dtype, shape ('2,3') with a zero byte after each of
    the three, then the little-endian C-order bytes of its fp32 value. Leaves come to the host one at a time; those spread over
    several processes are first gathered on every device, so all processes must call it."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        value = _on_host(leaf)
        shape = ",".join(str(size) for size in value.shape)
        digest.update(b"".join(f"{part}\0".encode() for part in (name, value.dtype.name, shape)))
        digest.update(np.ascontiguousarray(value.astype("<f4")).tobytes())
    return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
    whole = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
    return np.asarray(leaf) if whole else multihost_utils.process_allgather(leaf, tiled=True)


def _insert(tree: dict, name: str, leaf: Any) -> None:
    *folders, last = name.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    if last in tree:
        raise ValueError(f"both trees hold {name!r}")
    tree[last] = leaf


def _parts(name: str) -> list[str]:
    words = name.split("/")
    return ["/".join(words[:i]) for i in range(1, len(words) + 1)] + ["/".join(words[i:]) for i in range(1, len(words))]
