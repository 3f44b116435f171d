"""What blocks compute again changes no number, and saves what it says it saves."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rise_jax.models.attention import XLA, Backend
from rise_jax.models.dit import DiT
from rise_jax.models.remat import REMAT, check_remat

SIZES = dict(channels=4, patch=(1, 2, 2), heads=2, width=24, mlp_width=40, depth=6, d_ctx=6, text_len=5)
BATCH = 32  # more than a test of numbers needs: what is kept for the backward pass has to outweigh the parameters


def loss_of(remat, backend=XLA):
    draw = lambda shape, seed: jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype("f4"))
    latents, context, t = draw((BATCH, 2, 6, 4, 4), 0), draw((BATCH, 3, 6), 1), jnp.linspace(0.1, 1, BATCH)
    module = nnx.eval_shape(lambda: DiT(rngs=nnx.Rngs(params=jax.random.key(0)), remat=remat, backend=backend, **SIZES))
    graph, params = nnx.split(module, nnx.Param)
    params = jax.tree.map(lambda leaf: 0.3 * draw(leaf.shape, leaf.size), params)

    def loss(params):
        dit = nnx.merge(graph, params)
        return jnp.mean(dit(latents, t, dit.kv(context)) ** 2)

    return loss, params


@functools.cache
def compiled(remat):
    loss, params = loss_of(remat)
    return jax.jit(jax.value_and_grad(loss)).lower(params).compile(), params


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMAT[1:])
def test_every_policy_gives_the_same_loss_and_gradients(remat):
    step, params = compiled("none")
    loss, gradients = step(params)
    other, other_gradients = compiled(remat)[0](params)
    assert loss > 0 and abs(loss - other) <= 1e-6 * loss
    for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True):
        assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()


def test_memory_falls_in_the_order_of_the_names():
    """A CPU's pinned memory is its memory, so the last two are equal here."""
    sizes = [compiled(remat)[0].memory_analysis().temp_size_in_bytes for remat in REMAT]
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * 1.1 * sizes[2]
    assert sizes[2] > 1.1 * sizes[3] >= 1.1 * sizes[4]


@pytest.mark.slow
def test_offload_moves_one_value_out_and_one_back_on_an_accelerator():
    """Lowered for CUDA, which this machine does not have: the input of a block, in the scan of each direction."""
    sent = re.findall(r'_xla_buffer_placement = "(\w+)"}} : \(tensor<([^>]*)>', lowered("offload", "cuda"))
    tokens = "32x12x24xf32"
    assert sent == [("pinned_host", tokens), ("device", tokens)]
    assert "annotate_device_placement" not in lowered("blocks", "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "kernels"), [("dots", 3), ("attention", 3), ("blocks", 4)])
def test_attention_runs_again_only_where_its_results_are_not_kept(remat, kernels):
    """Lowered for TPUs, which this machine does not have: two kernels backward, and forward one, or another for the second time."""
    assert lowered(remat, "tpu", Backend("splash", "tpu")).count("@tpu_custom_call") == kernels


def lowered(remat, platform, backend=XLA):
    loss, params = loss_of(remat, backend)
    return jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=(platform,)).as_text()


def test_offload_is_refused_by_name_where_there_is_no_pinned_memory():
    class Chip:
        device_kind = "Chip 3"

        def addressable_memories(self):
            return [SimpleNamespace(kind="device")]

    check_remat("blocks", Chip())
    check_remat("offload", jax.devices()[0])
    with pytest.raises(
        ValueError,
        match="model.dit.remat='offload' needs memory of kind 'pinned_host', and Chip 3 has device; nearest: blocks",
    ):
        check_remat("offload", Chip())
