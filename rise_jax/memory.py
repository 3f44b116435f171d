"""Memory that a function needs beside its arguments and results, from its trace: no device, no compilation.

(1) A training step holds its gradients and the activations that its backward pass waits for:

    activations = kept                                    without remat
    activations = kept + (kept without remat - kept) / depth      with remat

    kept = bytes of what `jax.vjp` of the loss hands from forward to backward pass and that grows with the batch. A block that is
    recomputed keeps its input alone, until its turn comes: then all that one block keeps without remat.

(2) A forward pass holds the values that are still to be read, at the worst moment, in the order of the program.

Neither knows what a compiler fuses, or of buffers that are taken over. Against XLA's own figure for a CPU, (1) was within 15 % for
the preset `tiny` (tests/test_plan.py).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from rise_jax.flops import inner_programs


def kept_bytes(loss: Callable, params: Any, *args: Any) -> int:
    """What the backward pass of `loss(params, *args)` with respect to `params` waits for, parameters among it included."""
    residuals = jax.eval_shape(lambda params, *args: jax.vjp(lambda p: loss(p, *args), params)[1], params, *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


def peak_bytes(function: Callable, *args: Any) -> int:
    """(2), without arguments and results of `function(*args)`."""
    return _peak(jax.make_jaxpr(function)(*args).jaxpr)


def _peak(program: core.Jaxpr) -> int:
    results = set(map(id, program.outvars))
    last = {id(value): i for i, equation in enumerate(program.eqns) for value in equation.invars}
    ends: dict[int, list] = {}
    live = peak = 0
    for i, equation in enumerate(program.eqns):
        within = max(map(_peak, inner_programs(equation)), default=0)
        made = [value for value in equation.outvars if id(value) not in results]
        live += sum(map(_bytes, made))
        peak = max(peak, live + within)
        for value in made:
            ends.setdefault(last.get(id(value), i), []).append(value)
        live -= sum(map(_bytes, ends.pop(i, ())))
    return peak


def _bytes(value) -> int:
    aval = value.aval
    return aval.size * aval.dtype.itemsize if hasattr(aval, "dtype") else 0
