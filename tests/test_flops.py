"""Operations counted on traces: small cases by hand, the published formula of the DiT, and JAX's own gradient as second opinion."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from ml_collections import ConfigDict

from rise_jax.build import model_from
from rise_jax.flops import count_flops, gradient_flops, step_flops
from rise_jax.language import states_in_batch
from rise_jax.models.dit import abstract_dit
from rise_jax.step import sample_losses
from rise_jax.trees import combine, partition

D_LLM, TOKENS, BATCH = 16, 5, 2


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda x, w: x @ w, [(2, 3), (3, 5)], 2 * 2 * 3 * 5),
        (lambda x, w: jnp.einsum("bij,bkj->bik", x, w), [(4, 2, 3), (4, 5, 3)], 2 * 4 * 2 * 3 * 5),
        (
            lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME"),
            [(1, 3, 8, 9), (5, 3, 2, 2)],
            2 * 8 * 9 * 5 * 3 * 4,
        ),
        (
            lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 1), "VALID", feature_group_count=2),
            [(1, 4, 9, 9), (6, 2, 3, 3)],
            2 * 4 * 7 * 6 * 2 * 9,
        ),
        (lambda x, w: jax.lax.scan(lambda c, _: (c @ w, c), x, None, length=7)[0], [(2, 3), (3, 3)], 7 * 2 * 2 * 9),
        (lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w), [(2, 3), (3, 3)], 2 * 2 * 2 * 9),
        (lambda x, w: jax.jit(jax.checkpoint(jnp.matmul))(x, w) + jnp.exp(x).sum(), [(2, 3), (3, 5)], 60),
        (lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x) @ w, [(2, 3), (3, 5)], 60),
    ],
)
def test_counts_by_hand(function, shapes, expected):
    assert count_flops(function, *(like(*shape) for shape in shapes)) == expected


def test_a_product_in_a_while_loop_is_refused():
    with pytest.raises(ValueError, match="while"):
        count_flops(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x), like(3, 3))


def test_gradients_by_hand():
    """(x w) v: products of 2*2*3*5 and 2*2*5*7 operations."""
    first, second = 2 * 2 * 3 * 5, 2 * 2 * 5 * 7
    x, w, v = like(2, 3), like(3, 5), like(5, 7)
    assert gradient_flops(lambda p: (p[0] @ p[1] @ p[2]).sum(), [x, w, v]) == 3 * (first + second)
    assert gradient_flops(lambda x, w, v: (x @ w @ v).sum(), x, w, v) == 2 * first + 2 * second
    assert gradient_flops(lambda w, x, v: (x @ w @ v).sum(), w, x, v) == 2 * first + 2 * second
    assert gradient_flops(lambda v, x, w: (x @ w @ v).sum(), v, x, w) == first + 2 * second
    stopped = lambda v, x, w: (x @ w @ jax.lax.stop_gradient(v)).sum() + v.sum()
    assert gradient_flops(stopped, v, x, w) == first + second


def test_what_varies_in_a_later_turn_of_a_scan_varies_in_all():
    """c_0 is fixed and c_1 = c_0 a w is not: JAX's own scan hands the gradient of its carry through every turn."""
    body = lambda c, w: (c @ jnp.ones((3, 3)) @ w, None)
    loss = lambda ws: jax.lax.scan(body, jnp.ones((2, 3)), ws)[0].sum()
    assert gradient_flops(loss, like(4, 3, 3)) == 4 * (2 * 2 * 9 * 2 + 2 * 2 * 9 * 3)
    assert count_flops(jax.grad(loss), like(4, 3, 3)) == gradient_flops(loss, like(4, 3, 3))


def test_work_in_shard_map_is_that_of_all_devices_without_repetitions():
    mesh = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=False)
    assert count_flops(product, like(8, 3), like(3, 5)) == 2 * 8 * 3 * 5
    both = jax.shard_map(
        jnp.matmul,
        mesh=mesh,
        in_specs=(PartitionSpec(("data", "tensor")), whole),
        out_specs=PartitionSpec(("data", "tensor")),
        check_vma=False,
    )
    assert count_flops(both, like(8, 3), like(3, 5)) == 2 * 8 * 3 * 5


def test_a_kernel_of_attention_counts_as_plain_attention():
    batch, heads, queries, keys, width = 3, 2, 256, 512, 128
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((queries, keys))] * heads)
    splash = jax.vmap(splash_attention_kernel.make_splash_mha_single_device(mask))
    q, kv = like(batch, heads, queries, width), like(batch, heads, keys, width)
    turned = lambda x: x.swapaxes(1, 2)
    plain = lambda q, k, v: jax.nn.dot_product_attention(turned(q), turned(k), turned(v))
    assert count_flops(splash, q, kv, kv) == count_flops(plain, q, kv, kv) == 4 * batch * heads * queries * keys * width
    for trained in ((True, False, False), (False, False, True), (True, True, True)):
        parts = [x for x, flag in zip((q, kv, kv), trained) if flag]

        def call(function, parts, trained=trained):
            rest = iter(parts)
            return function(*(next(rest) if flag else jnp.zeros(x.shape) for x, flag in zip((q, kv, kv), trained)))

        assert gradient_flops(lambda p, c=call: c(splash, p), parts) == gradient_flops(
            lambda p, c=call: c(plain, p), parts
        )


def test_an_unknown_kernel_is_refused():
    def double(x_ref, o_ref):
        o_ref[...] = 2 * x_ref[...]

    with pytest.raises(ValueError, match="pallas_call is not attention"):
        count_flops(pl.pallas_call(double, out_shape=like(8, 128)), like(8, 128))


# ---- the models ----

DIT = dict(width=48, mlp_width=80, heads=4, depth=3, patch=(1, 2, 2), text_len=8)


@functools.cache
def model(states=states_in_batch, **dit):
    sizes = dict(
        adapter=dict(kind="refiner", d_ctx=16, width=16, depth=1, heads=2, registers=2, time_cond="off"),
        dit=dict(path="") | DIT | dit,
        vae=dict(path="pixels"),
        null="learned",
        trainable=(".",),
        dtype="float32",
        prediction="data",
        shift=1.0,
    )
    return model_from(ConfigDict(sizes), D_LLM, states)


def batch(frames=5):
    return dict(
        video=like(BATCH, frames, 8, 8, 3, dtype=jnp.uint8),
        states=like(BATCH, TOKENS, D_LLM),
        states_mask=like(BATCH, TOKENS, dtype=jnp.bool_),
        index=like(BATCH, dtype=jnp.int32),
        weight=like(BATCH),
        step=like(dtype=jnp.int32),
    )


@pytest.mark.slow
def test_the_dit_by_the_published_formula():
    """Wan's blocks, by hand: 8 S D^2 + 4 S^2 D + 4 S D M + 4 S D^2 + 4 L D^2 + 4 S L D each, and what stands around them."""
    channels, d_ctx, frequencies = 12, 16, 256
    sizes = dict(channels=channels, d_ctx=d_ctx, **DIT)
    params = abstract_dit(**sizes)
    built = model()
    width, mlp, text = DIT["width"], DIT["mlp_width"], DIT["text_len"]
    tokens, values = 2 * 4 * 4, channels * 4
    kv = lambda params, context: built.kv({"dit": params}, context)
    inputs = like(1, 2, 8, 8, channels), like(1)
    cache = jax.eval_shape(kv, params, like(1, text, d_ctx))
    blocks = DIT["depth"] * (
        12 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * mlp + 4 * tokens * text * width
    )
    ends = 2 * tokens * values * width * 2
    time = 2 * (frequencies * width + width * width + 6 * width * width)
    assert (
        count_flops(lambda *args: built.dit({"dit": args[0]}, *args[1:]), params, *inputs, cache)
        == blocks + ends + time
    )
    keys = DIT["depth"] * 4 * text * width**2
    assert count_flops(kv, params, like(1, text, d_ctx)) == keys + 2 * text * (d_ctx * width + width * width)


STAGES = {
    "everything": (".",),
    "adapter": ("^adapter/",),
    "motion": ("^adapter/", "cross_attn/(key|value)/", "/low_rank_"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_a_step_counts_what_its_gradient_computes(stage):
    """Counted on the program that JAX's own gradient makes, where nothing is computed twice (no remat)."""
    plain, again = model(low_rank=2), model(low_rank=2, remat="blocks")
    trainable, rest = partition(plain.abstract, STAGES[stage])
    frozen = {"params": rest, "vae": {}}

    def loss(trainable, rest, batch, t, noise, drop):
        params = combine(trainable, rest)
        return sample_losses(plain, params, {"vae": {}}, batch, t, noise, drop).sum()

    drawn = like(BATCH), like(BATCH, *plain.latent_shape((5, 8, 8))), like(BATCH, dtype=jnp.bool_)
    computed = count_flops(jax.value_and_grad(loss), trainable, rest, batch(), *drawn)
    assert step_flops(plain, trainable, frozen, batch()) == computed
    assert step_flops(again, trainable, frozen, batch()) == computed, "blocks that are computed again count once"


def test_a_wholly_trained_model_costs_three_forward_passes_almost():
    built = model()
    trainable, _ = partition(built.abstract, ".")
    forward = step_flops(built, {}, {"params": built.abstract, "vae": {}}, batch())
    total = step_flops(built, trainable, {"params": {}, "vae": {}}, batch())
    inputs = 2 * BATCH * (2 * 4 * 4 * 48 * 48 + 256 * 48)  # noisy latents and times need no gradient
    assert total == 3 * forward - inputs


def test_in_step_states_are_counted_once():
    """By a frozen product in front of the model, as the LLM is."""
    trainable, _ = partition(model().abstract, ".")
    frozen = {"params": {}, "vae": {}, "llm": like(D_LLM, D_LLM)}
    built = model(lambda frozen, batch: (batch["states"] @ frozen["llm"], batch["states_mask"]))
    llm = 2 * BATCH * TOKENS * D_LLM**2
    assert step_flops(built, trainable, frozen, batch()) == step_flops(model(), trainable, frozen, batch()) + llm
