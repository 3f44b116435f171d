"""Memory that a function needs beside its arguments and results, from its trace: no device, no compilation (docs/plan.md).

Neither figure knows what a compiler fuses, or of buffers that are taken over. Scores are told apart, since attention by a kernel
(cuDNN, splash) never has them in memory: every product of two batched arrays, until the next such product, which mixes the values.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from rise_jax.flops import inner_programs


class Bytes(NamedTuple):
    """Of attention's scores and what is made of them, [B, N, S, L], and of all other values."""

    other: int
    scores: int


def kept_bytes(loss: Callable, params: Any, *args: Any) -> Bytes:
    """What the backward pass of `loss(params, *args)` with respect to `params` waits for, the arguments themselves left out."""
    forward = lambda params, *args: jax.vjp(lambda leaves: loss(leaves, *args), params)[1]
    program = jax.make_jaxpr(forward)(params, *args).jaxpr
    scores = _scores(program)
    kept = _variables(program.outvars) - set(program.invars)
    size = lambda wanted: sum(_bytes(var) for var in kept if (var in scores) == wanted)
    return Bytes(size(False), size(True))


def peak_bytes(function: Callable, *args: Any, scores: bool = True) -> int:
    """The values of `function(*args)` that are still to be read, at the worst moment, in the order of the program.

    Arguments and results are left out, and without `scores` those of attention.
    """
    program = jax.make_jaxpr(function)(*args).jaxpr
    return _peak(program, set() if scores else _scores(program))


def _peak(program: core.Jaxpr, free: set[core.Var]) -> int:
    free = free | _variables(program.outvars)
    last = {var: i for i, equation in enumerate(program.eqns) for var in _variables(equation.invars)}
    ends: dict[int, int] = {}
    live = peak = 0
    for i, equation in enumerate(program.eqns):
        within = max((_peak(inner, free) for inner in inner_programs(equation)), default=0)
        for var in set(equation.outvars) - free:
            live += _bytes(var)
            ends[last.get(var, i)] = ends.get(last.get(var, i), 0) + _bytes(var)
        peak = max(peak, live + within)
        live -= ends.get(i, 0)
    return peak


def _scores(program: core.Jaxpr, given: Sequence[bool] = ()) -> set[core.Var]:
    """The variables of a program, and of those within, that hold scores; `given` says which of its inputs do."""
    found = {var for var, flag in zip(program.invars, given) if flag}
    for equation in program.eqns:
        flags = _flags(equation.invars, found)
        inner = inner_programs(equation)
        if equation.primitive.name == "dot_general":
            _, (batched, _) = equation.params["dimension_numbers"]
            found.update(equation.outvars if batched and not any(flags) else ())
        elif inner:
            for body in inner:
                found |= _scores(body, flags[len(flags) - len(body.invars) :])
                out = _flags(body.outvars, found)
                found.update(var for var, flag in zip(equation.outvars, out) if flag)
        elif any(flags):
            found.update(equation.outvars)
    return found


def _flags(atoms: Sequence, found: set[core.Var]) -> list[bool]:
    return [not isinstance(atom, core.Literal) and atom in found for atom in atoms]


def _variables(atoms: Sequence) -> set[core.Var]:
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _bytes(var: core.Var) -> int:
    aval = var.aval
    elsewhere = getattr(aval, "memory_space", None) == jax.memory.Space.Host  # offloaded
    return 0 if elsewhere or not hasattr(aval, "dtype") else aval.size * aval.dtype.itemsize
