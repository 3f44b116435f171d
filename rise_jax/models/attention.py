"""The attention of every model but the LLM's cached one: one function, three back ends, one device or a mesh.

xla     everywhere. Writes out the scores: [B, N, S, L].
cudnn   CUDA GPUs since Ampere: flash attention. bfloat16 or float16, heads of at most 128 in steps of 8.
splash  TPUs: flash attention (splash.py).

On a mesh that is current (jax.set_mesh) the flash kernels run in jax.shard_map, each device on its own samples, heads and queries.
`self_attention` is for sequences that lie split over the mesh's context axis: keys and values then never gather on one device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rise_jax.axes import Array, Bool, Float, typed
from rise_jax.models.ring import ring_attention
from rise_jax.models.splash import splash
from rise_jax.sharding import BATCH_AXES, current_mesh, fitted

NAMES = ("auto", "xla", "cudnn", "splash")
SEQUENCES = ("auto", "ulysses", "ring")
NATIVE = {"cuda": "cudnn", "tpu": "splash"}  # what `auto` tries first, by platform; the rest have xla
CUDNN_WIDTH = 128  # cuDNN's limit before Hopper
CUDNN_CAPABILITY = 8.0  # compute capability, Ampere's, from which cuDNN has flash attention
# Primitives that are attention: splash's and cuDNN's, and which axis of their keys counts tokens.
KERNELS = {"pallas_call": -2, "dot_product_attention_fwd_wrapper": 1}
MIXED = "attention_mixed"  # the name of what xla returns, for jax.checkpoint


@dataclass(frozen=True)
class Backend:
    """How attention is computed. Static and hashable: modules keep it beside their sizes.

    name: of NAMES; auto takes the platform's own where it can, else xla. platform: 'cpu', 'cuda', 'tpu' or another.
    sequence: of SEQUENCES, for `self_attention` on a mesh with context > 1. ulysses (2309.14509) trades heads for places before and
    after, and needs heads that divide over context x tensor; ring (ring.py) needs nothing; auto takes ulysses where it can.
    """

    name: str = "xla"
    platform: str = "cpu"
    sequence: str = "auto"

    @classmethod
    def here(cls, name: str = "auto", sequence: str = "auto") -> "Backend":
        """For the devices of this process. Where they have no back end of their own, auto is xla."""
        device = jax.devices()[0]
        other = "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"
        platform = other if device.platform == "gpu" else device.platform
        if platform == "cuda" and float(device.compute_capability) < CUDNN_CAPABILITY:
            platform = f"cuda of compute capability {device.compute_capability}"  # another, as far as attention goes
        return cls("xla" if name == "auto" and platform not in NATIVE else name, platform, sequence)

    def pick(self, dtype, head_width: int, mask_shape: tuple[int, ...] | None = None) -> str:
        """xla, cudnn or splash for such an input. Raises ValueError when a back end asked for by name cannot do it, and why."""
        if self.name == "xla":
            return "xla"
        if self.name == "auto":
            name = NATIVE.get(self.platform, "xla")
            return "xla" if obstacle(name, self.platform, dtype, head_width, mask_shape) else name
        reason = obstacle(self.name, self.platform, dtype, head_width, mask_shape)
        if reason:
            works = Backend("auto", self.platform).pick(dtype, head_width, mask_shape)
            raise ValueError(
                f"model.attention={self.name!r} {reason}; nearest: {works} (or auto, which chooses by itself)"
            )
        return self.name

    def route(self, heads: int, context: int, tensor: int) -> str:
        """ulysses or ring, for so many heads of keys. Raises ValueError when ulysses is asked for by name and they do not divide, and
        when a flash kernel is asked for by name and would have to go round a ring."""
        share = heads // tensor if heads % tensor == 0 else heads
        if share % context == 0 and (self.sequence != "ring" or context == 1):
            return "ulysses"
        if self.sequence == "ulysses":
            fit = ", ".join(str(size) for size in range(1, share + 1) if share % size == 0)
            raise ValueError(
                f"model.sequence='ulysses': {heads} heads do not divide over mesh.context={context} x mesh.tensor={tensor}; "
                f"contexts that do: {fit}; or model.sequence=ring"
            )
        if self.name not in ("auto", "xla"):
            raise ValueError(
                f"model.attention={self.name!r} does not go round a ring, which has its own arithmetic; nearest: "
                "model.attention=auto, or a mesh.context over which heads divide"
            )
        return "ring"


XLA = Backend()


def obstacle(name: str, platform: str, dtype, head_width: int, mask_shape: tuple[int, ...] | None = None) -> str | None:
    """Why the back end `name` cannot compute attention of such queries, as the end of a sentence; None where it can."""
    if name == "xla":
        return None
    needed = next(where for where, native in NATIVE.items() if native == name)
    if platform != needed:
        since = (
            f" from compute capability {CUDNN_CAPABILITY}" if platform.startswith("cuda") and name == "cudnn" else ""
        )
        return f"runs on {needed} only{since}, and this is {platform}"
    if mask_shape is not None and mask_shape[1:3] != (1, 1):
        return f"masks keys only, and this mask {list(mask_shape)} differs between heads or queries"
    if name == "cudnn":
        return cudnn_obstacle(dtype, head_width)
    return None


def cudnn_obstacle(dtype, head_width: int) -> str | None:
    """What of `obstacle` holds for cudnn on any machine."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, and this is {jnp.dtype(dtype).name}"
    if head_width > CUDNN_WIDTH or head_width % 8:
        near = min(max(8 * round(head_width / 8), 8), CUDNN_WIDTH)
        return f"needs a head width of at most {CUDNN_WIDTH} in steps of 8, and this is {head_width} (nearest: {near})"
    return None


@typed
def attention(
    query: Float[Array, "B S N d"],
    key: Float[Array, "B L K d"],
    value: Float[Array, "B L K d"],
    mask: Bool[Array, "#B #N #S L"] | None = None,
    backend: Backend = XLA,
) -> Float[Array, "B S N d"]:
    """Scaled dot-product attention, softmax in fp32; N must be a multiple of K (grouped queries). True in `mask` attends.

    Every query must be left at least one key. Raises ValueError as `Backend.pick`.
    """
    name = backend.pick(query.dtype, query.shape[-1], None if mask is None else mask.shape)
    mesh = current_mesh()
    if name == "xla":
        return checkpoint_name(jax.nn.dot_product_attention(query, key, value, mask=mask), MIXED)
    keys_mask = None if mask is None else mask[:, 0, 0]
    if mesh.empty:
        return _kernel(name)(query, key, value, keys_mask)
    batch, tensor = _batch(query, mesh), _tensor(key, mesh)
    own = fitted(query.shape, (batch, "context", tensor, None), mesh)
    whole = fitted(key.shape, (batch, None, tensor, None), mesh)
    return _on_each(_kernel(name), mesh, own, whole, None)(query, key, value, keys_mask)


@typed
def self_attention(
    query: Float[Array, "B S N d"],
    key: Float[Array, "B S K d"],
    value: Float[Array, "B S K d"],
    mask: Bool[Array, "#B 1 1 S"] | None = None,
    backend: Backend = XLA,
) -> Float[Array, "B S N d"]:
    """`attention` of a sequence to itself, which lies split over the current mesh's context axis if that is larger than 1.

    Raises ValueError for a length that does not divide over the context axis (pad it, and mask what was added), and for a
    `backend` that cannot do what it says.
    """
    mesh = current_mesh()
    ways = 1 if mesh.empty else mesh.shape["context"]
    if ways == 1:
        return attention(query, key, value, mask, backend)
    length = query.shape[1]
    if length % ways:
        below = length // ways * ways
        near = f"{below} or {below + ways}" if below else f"{ways}"
        raise ValueError(f"a sequence of {length} does not divide over mesh.context={ways}; nearest: {near}")
    tensor = _tensor(key, mesh)
    own = fitted(query.shape, (_batch(query, mesh), "context", tensor, None), mesh)
    keys_mask = None if mask is None else mask[:, 0, 0]
    if backend.route(key.shape[2], ways, mesh.shape["tensor"]) == "ulysses":
        name = backend.pick(query.dtype, query.shape[-1], None if mask is None else mask.shape)
        return _on_each(partial(_ulysses, _kernel(name)), mesh, own, own, None)(query, key, value, keys_mask)
    keys_mask = jnp.ones((1, length), bool) if keys_mask is None else keys_mask
    return _on_each(partial(ring_attention, axis="context"), mesh, own, own, "context")(query, key, value, keys_mask)


def _ulysses(kernel: Callable, query, key, value, mask):
    """All places of a share of the heads, instead of a share of the places of all heads; then back."""
    gather = partial(jax.lax.all_to_all, axis_name="context", split_axis=2, concat_axis=1, tiled=True)
    scatter = partial(jax.lax.all_to_all, axis_name="context", split_axis=1, concat_axis=2, tiled=True)
    return scatter(kernel(gather(query), gather(key), gather(value), mask))


def _on_each(kernel: Callable, mesh, queries, keys, mask_axis: str | None) -> Callable:
    """`kernel` on every device's part; a mask of one row serves all samples."""

    def call(query, key, value, mask):
        arguments, specs = (query, key, value), (queries, keys, keys)
        if mask is not None:
            arguments += (mask,)
            specs += (fitted(mask.shape, (queries[0] if mask.shape[0] > 1 else None, mask_axis), mesh),)
        inner = kernel if mask is not None else lambda *arrays: kernel(*arrays, None)
        # check_vma: neither Pallas kernels nor the ring's scan say over which axes their results vary.
        return jax.shard_map(inner, in_specs=specs, out_specs=queries, check_vma=False)(*arguments)

    return call


def _kernel(name: str) -> Callable:
    """(query, key, value, mask [B or 1, L] or None) -> mixed, on one device."""
    return {"xla": _xla, "cudnn": partial(by_length, implementation="cudnn"), "splash": splash}[name]


def _xla(query, key, value, mask):
    mask = None if mask is None else mask[:, None, None]
    return checkpoint_name(jax.nn.dot_product_attention(query, key, value, mask=mask), MIXED)


def by_length(query: Array, key: Array, value: Array, mask: Array | None, *, implementation: str) -> Array:
    """Attention for kernels that know no mask but a number of keys: those that may be seen are brought to the front.

    The order of keys does not matter to attention. As an additive bias, which cuDNN would take, the mask would be [B, 1, S, L].
    """
    attend = partial(jax.nn.dot_product_attention, query, implementation=implementation)
    if mask is None:
        return attend(key, value)
    mask = jnp.broadcast_to(mask, key.shape[:2])
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :, None, None]
    key, value = (jnp.take_along_axis(array, order, axis=1) for array in (key, value))
    return attend(key, value, key_value_seq_lengths=mask.sum(axis=1, dtype=jnp.int32))


def _batch(query: Array, mesh):
    return fitted(query.shape[:1], (BATCH_AXES,), mesh)[0]


def _tensor(key: Array, mesh) -> str | None:
    return fitted(key.shape[2:3], ("tensor",), mesh)[0]
