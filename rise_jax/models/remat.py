"""What stacked blocks keep for the backward pass and what they compute again, by name.

none       everything is kept: most memory
dots       the results of products with weights and of attention are kept; norms and activations are computed again
attention  the input of each block and the results of its attention are kept; all but attention is computed again
blocks     the input of each block is kept and the block is computed again: a forward pass more (4 instead of 3 of its size in all)
offload    as blocks, with the inputs in pinned memory of the host: what is left on the device does not grow with depth

Attention keeps what its kernel returns, statistics of the softmax included. The back end xla has no such kernel: its scores are
computed again, and only the mixture is kept.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from rise_jax.models.attention import KERNELS, MIXED

REMAT = ("none", "dots", "attention", "blocks", "offload")
BLOCK_INPUT = "block_input"
HOST = "pinned_host"


def recomputed(body: Callable, remat: str) -> Callable:
    """`body(carry, layer)` of a scan over blocks under one of REMAT. Raises KeyError for another name."""
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    kept = {
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, _attention),
        "attention": _attention,
        "blocks": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst=HOST,
        ),
    }

    def named(carry, layer):
        return body(jax.tree.map(lambda leaf: checkpoint_name(leaf, BLOCK_INPUT), carry), layer)

    return jax.checkpoint(named, prevent_cse=False, policy=kept[remat])


def _attention(primitive, *operands, **params) -> bool:
    """A policy of jax.checkpoint: keeps what attention returns."""
    return primitive.name in KERNELS or params.get("name") == MIXED


def check_remat(remat: str, device: jax.Device) -> None:
    """Raises ValueError where `device` cannot do what `remat` asks for.

    A CPU has pinned memory by name; it is the memory that everything is in, so there `offload` is `blocks`.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if remat == "offload" and HOST not in kinds:
        raise ValueError(
            f"model.dit.remat='offload' needs memory of kind {HOST!r}, and {device.device_kind} has {', '.join(kinds)}; "
            "nearest: blocks"
        )
