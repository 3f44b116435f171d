"""Floating-point operations, counted on a trace: no device, no compilation, and no second description of a model.

Two per multiply-add of every matrix product and convolution, attention included; everything else is left out, a few per cent at most.
What is counted is what the mathematics needs, as MFU wants it (PaLM, arXiv 2204.02311, appendix B), not what a run does: a block that
`jax.checkpoint` computes again counts once, and the gradient of a product counts one more product for each of its two factors that
depends on something trained. So a fully trained model costs 3 forward passes, and a frozen one that hands gradients on costs 2 for its
weights and 3 for the scores and mixtures of its attention. A frozen one in front of everything trained costs 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from rise_jax.build import Model
from rise_jax.models.attention import KERNELS
from rise_jax.step import sample_losses
from rise_jax.trees import combine

PRODUCTS = ("dot_general", "conv_general_dilated")


def step_flops(model: Model, trainable: dict, frozen: dict, batch: dict) -> int:
    """Of one training step on `batch`, all devices together: LLM (for states "in_step") and VAE encoding, forward, gradient.

    Arguments as a training step takes them (step.py), arrays or ShapeDtypeStructs; nothing is computed. Optimizer and EMA, a few
    operations per parameter, are left out.
    """
    size = batch["index"].shape[0]
    latents = (size, *model.latent_shape(batch["video"].shape[1:4]))

    def losses(trainable, frozen, batch, t, noise, drop):
        params = combine(trainable, frozen["params"])
        return sample_losses(model, params, frozen, batch, t, noise, drop)

    drawn = (_like((size,)), _like(latents), jax.ShapeDtypeStruct((size,), jnp.bool_))
    return gradient_flops(losses, trainable, frozen, batch, *drawn)


def count_flops(function: Callable, *args: Any) -> int:
    """Of `function(*args)`; `args` may be abstract.

    The body of a scan counts as often as it runs, and of a `cond` the dearest branch counts. A convolution's zeros outside its input
    count like any input. Raises ValueError for a loop whose length only its values say, and for a kernel that does
    not look like attention.
    """
    program = jax.make_jaxpr(function)(*args).jaxpr
    return _count(program, [False] * len(program.invars))[0]


def gradient_flops(function: Callable, trained: Any, *args: Any) -> int:
    """Of `function(trained, *args)` and its gradient with respect to `trained`; otherwise as `count_flops`."""
    program = jax.make_jaxpr(function)(trained, *args).jaxpr
    leaves = len(jax.tree.leaves(trained))
    return _count(program, [i < leaves for i in range(len(program.invars))])[0]


def _count(program: core.Jaxpr, varies: Sequence[bool]) -> tuple[int, list[bool]]:
    """(operations, which results depend on something trained), for a program of whose inputs those in `varies` do."""
    varying = {var for var, flag in zip(program.invars, varies) if flag}
    flags = lambda variables: [not isinstance(var, core.Literal) and var in varying for var in variables]
    total = 0
    for equation in program.eqns:
        cost, out = _of_equation(equation, flags(equation.invars))
        total += cost
        varying.update(var for var, flag in zip(equation.outvars, out) if flag)
    return total, flags(program.outvars)


def _of_equation(equation: core.JaxprEqn, varies: list[bool]) -> tuple[int, list[bool]]:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return _product(equation) * (1 + sum(varies)), [any(varies)]
    if name in KERNELS:
        return _attention_kernel(equation, varies), [any(varies)] * len(equation.outvars)
    if name == "stop_gradient":
        return 0, [False]
    inner = inner_programs(equation)
    if not inner:
        return 0, [any(varies) and jnp.issubdtype(var.aval.dtype, jnp.floating) for var in equation.outvars]
    if name == "scan":
        cost, out = _scan(inner[0], *_consts_and_carry(equation, inner[0]), varies)
        return cost * params["length"], out
    if name == "cond":
        costs, outs = zip(*(_count(branch, varies[1:]) for branch in inner))
        return max(costs), [any(flags) for flags in zip(*outs)]
    if name == "while":
        if any(_count(program, [False] * len(program.invars))[0] for program in inner):
            raise ValueError("a while loop's operations cannot be counted: how often it runs, the trace does not say")
        return 0, [any(varies)] * len(equation.outvars)
    cost, out = _count(inner[0], varies)
    if name == "shard_map":  # written for one device; axes that split nothing only repeat
        specs = jax.tree.leaves((params["in_specs"], params["out_specs"]))
        split = {
            axis for spec in specs for part in spec if part for axis in (part if isinstance(part, tuple) else (part,))
        }
        cost *= math.prod(params["mesh"].shape[axis] for axis in split)
    return cost, out


def _scan(body: core.Jaxpr, consts: int, carry: int, varies: list[bool]) -> tuple[int, list[bool]]:
    """Of one turn; what varies in the carry after some turn counts as varying in all."""
    while True:
        cost, out = _count(body, varies)
        before = varies[consts : consts + carry]
        after = [old or new for old, new in zip(before, out)]
        if after == before:
            return cost, out
        varies = [*varies[:consts], *after, *varies[consts + carry :]]


def _consts_and_carry(scan: core.JaxprEqn, body: core.Jaxpr) -> tuple[int, int]:
    """How many inputs are constant, how many are carried: by shapes, as JAX's versions name them differently."""
    whole = lambda outer, inner: sum(a.aval.shape == b.aval.shape for a, b in zip(outer, inner))
    carry = whole(scan.outvars, body.outvars)  # what is stacked has an axis more
    return whole(scan.invars, body.invars) - carry, carry


def _product(equation: core.JaxprEqn) -> int:
    size = equation.outvars[0].aval.size
    numbers, (left, right) = equation.params["dimension_numbers"], (var.aval for var in equation.invars)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = numbers
        return 2 * size * math.prod(left.shape[axis] for axis in contracted)
    return 2 * size * right.size // right.shape[numbers.rhs_spec[0]]


def _attention_kernel(equation: core.JaxprEqn, varies: list[bool]) -> int:
    """Scores and mixture of attention, masked places included, by the shapes of query, key and value, each [B, .., d]."""
    floats = [(var.aval, flag) for var, flag in zip(equation.invars, varies) if _is_attended(var.aval)]
    if len(floats) < 3:
        raise ValueError(f"the kernel {equation.primitive.name} is not attention: its operations cannot be counted")
    (query, q), (key, k), (_, v) = floats[:3]
    product = 2 * query.size * key.shape[KERNELS[equation.primitive.name]]
    return product * ((1 + q + k) + (1 + (q or k) + v))


def _is_attended(aval: Any) -> bool:
    return len(aval.shape) >= 3 and jnp.issubdtype(aval.dtype, jnp.floating)


def inner_programs(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """The programs within an equation: a body, branches, a called function."""
    programs = (core.Jaxpr, core.ClosedJaxpr)
    leaves = jax.tree.leaves(equation.params, is_leaf=lambda leaf: isinstance(leaf, programs))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if isinstance(leaf, programs)]


def _like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
