"""Floating-point operations of a function, counted on its trace: no device, no compilation, and no second description of a model."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable, *args: Any) -> int:
    """Two per multiply-add of every matrix product and convolution in `function(*args)`; `args` may be abstract.

    Everything else is left out: a few per cent at most. The body of a scan counts as often as it runs, what `jax.checkpoint` computes
    again counts again, and of a `cond` the dearest branch counts. A convolution's zeros outside its input count like any input.
    Raises ValueError for a loop whose length only its values say.
    """
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr: core.Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        outputs, *_ = params["dimension_numbers"].rhs_spec
        kernel = equation.invars[1].aval
        return 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[outputs]
    inner = [_of(program) for program in inner_programs(equation)]
    if name == "while" and any(inner):
        raise ValueError("a while loop's operations cannot be counted: how often it runs is not known from the trace")
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def inner_programs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs within an equation of a trace: bodies, branches and called functions."""
    is_program = lambda value: isinstance(value, core.Jaxpr | core.ClosedJaxpr)
    for value in jax.tree.leaves(equation.params, is_leaf=is_program):
        if is_program(value):
            yield getattr(value, "jaxpr", value)
