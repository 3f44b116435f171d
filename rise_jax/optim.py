"""AdamW or Muon with warm-up, global-norm clipping and an optional linear decay.

Every schedule is a function of the absolute step and not of the length of the run: a longer run repeats a shorter one.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from rise_jax.trees import path_name

# After the decay the rate stays here, so that a run that goes on still learns.
FLOOR = 0.01
KINDS = ("adamw", "muon")
MUON_RMS = 0.5  # of a Muon update per unit of learning rate; AdamW's is 0.2 to 0.4 (arXiv 2502.16982, section 2.2)
HIDDEN = re.compile(r"(/blocks/.*|/text_(up|down)|/project_in)/kernel$")


def make_schedule(
    learning_rate: float, warmup: int = 0, decay_from: int = 0, decay_until: int = 0
) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of the update made at a 0-based step.

    Linear to `learning_rate` over `warmup` steps (the first update gets 1/warmup of it), constant, then linear from
    step `decay_from` to 1 % of it at `decay_until` and after.

    decay_until = 0 means no decay. Raises ValueError when the rate is not positive or the three steps are out of order.
    """
    if learning_rate <= 0:
        raise ValueError(f"learning_rate={learning_rate} must be > 0")
    if warmup < 0:
        raise ValueError(f"warmup={warmup} must be >= 0 steps")
    if decay_until and not warmup <= decay_from < decay_until:
        raise ValueError(
            f"decay_from={decay_from}, decay_until={decay_until}: need warmup ({warmup}) <= decay_from < decay_until, "
            "or decay_until=0 for no decay"
        )
    if decay_from and not decay_until:
        raise ValueError(f"decay_from={decay_from} needs decay_until > {decay_from}; 0 for both means no decay")

    def schedule(step: jax.Array) -> jax.Array:
        factor = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        if decay_until:
            done = jnp.clip((step - decay_from) / (decay_until - decay_from), 0.0, 1.0)
            factor = factor * (1 - done * (1 - FLOOR))
        return learning_rate * factor

    return schedule


def make_optimizer(
    learning_rate: float,
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    *,
    kind: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.99,
    decay_from: int = 0,
    decay_until: int = 0,
) -> optax.GradientTransformation:
    """AdamW or Muon after clipping the gradient's global norm to `clip`; the schedule is `make_schedule`'s.

    Weight decay (a fraction of learning_rate * weight per step) acts on matrices only, see `decayed`. 'muon' makes the
    momentum of every hidden matrix orthogonal (Jordan et al. 2024; scaled as in arXiv 2502.16982) and leaves every
    other leaf, see `orthogonalised`, to Adam with Nesterov momentum (optax's choice) and no weight decay; `b1` and `b2` are
    Adam's.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown optimizer kind {kind!r} (nearest: {near}); valid: {', '.join(KINDS)}")
    if clip <= 0:
        raise ValueError(f"clip={clip} must be > 0 (a global gradient norm; 1.0 is usual)")
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay} must be >= 0")
    schedule = make_schedule(learning_rate, warmup, decay_from, decay_until)
    if kind == "adamw":
        rule = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    else:
        rule = muon(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=orthogonalised,
            adam_b1=b1,
            adam_b2=b2,
            adam_learning_rate=schedule,
        )
    return optax.chain(optax.clip_by_global_norm(clip), rule)


def orthogonalised(params: Any) -> Any:
    """Tree of the axes of every hidden kernel, None elsewhere: first and last layers, time layers and vectors are Adam's."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if HIDDEN.search(path_name(path)) else None
        ),
        params,
    )


def decayed(params: Any) -> Any:
    """Tree of bools: True for kernels and embeddings. By name, because a stack of layers gives a bias two axes too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).rpartition("/")[2] in ("kernel", "embedding"), params
    )


def ema_decay(step: jax.Array, decay: float) -> jax.Array:
    """min(decay, (1 + step) / (10 + step)): an average that forgets the start quickly, after `step` updates."""
    return jnp.minimum(decay, (1 + step) / (10 + step))
