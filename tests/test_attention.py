"""Attention: every back end and every way to spread it over devices gives what the plain one gives, masks and gradients included."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from rise_jax.build import describe_attention
from rise_jax.models import attention as attention_module
from rise_jax.models.attention import XLA, Backend, attention, by_length, obstacle, self_attention
from rise_jax.models.splash import splash
from rise_jax.sharding import make_mesh

TPU = Backend("splash", "tpu")


def inputs(samples, queries, keys, heads, kv_heads, width, dtype=np.float32):
    """(query, key, value, mask [B, L]); every row of the mask has visible keys, at no particular place."""
    rng = np.random.default_rng(queries + keys)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    mask = rng.random((samples, keys)) < 0.6
    mask[:, rng.integers(keys)] = True
    heads = (heads, width), (kv_heads, width), (kv_heads, width)
    return *(draw(samples, size, *tail) for size, tail in zip((queries, keys, keys), heads)), jnp.asarray(mask)


def plain(query, key, value, mask):
    """Written out in fp64, softmax and all."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    scores = np.einsum("bsnd,blnd->bnsl", query, key) / query.shape[-1] ** 0.5
    scores = scores if mask is None else np.where(np.asarray(mask)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnsl,blnd->bsnd", weights / weights.sum(-1, keepdims=True), value)


def with_gradients(call, *arrays):
    """[output, gradients] of a weighted sum of the output's squares."""

    def loss(query, key, value, mask):
        out = call(query, key, value, mask)
        return jnp.sum(jnp.square(out) * jnp.arange(1, out.shape[-1] + 1)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [out, *gradients]


def assert_same(found, expected, bound=5e-6):
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= bound * np.abs(np.asarray(b)).max()


def spread(mask):
    return None if mask is None else mask[:, None, None]


def reference(query, key, value, mask):
    return attention(query, key, value, spread(mask))


@pytest.mark.slow
def test_the_reference_is_attention():
    *arrays, mask = inputs(2, 5, 7, 4, 2, 8)
    for kept in (None, mask):
        assert_same([reference(*arrays, kept)], [plain(*arrays, kept)], 1e-6)


# ---- splash ----


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "masked"), [((2, 130, 130, 2, 2, 24), False), ((2, 4, 200, 4, 2, 8), True)])
def test_splash_is_exact_with_padding_masks_grouped_queries_and_gradients(sizes, masked):
    *arrays, mask = inputs(*sizes)
    mask = mask if masked else None
    found = with_gradients(partial(splash, interpret=True), *arrays, mask)
    assert_same(found, with_gradients(reference, *arrays, mask))


def test_splash_runs_in_many_blocks():
    *arrays, mask = inputs(1, 3, 1100, 1, 1, 8)
    assert_same([jax.jit(partial(splash, interpret=True))(*arrays, mask)], [plain(*arrays, mask)])


def tpu_kernels(call, *arrays):
    """Number of Pallas kernels in the program of the gradient for a TPU."""
    gradient = jax.grad(lambda *args: call(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    lowered = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("tpu_custom_call")


@pytest.mark.parametrize("sizes", [None, (2, 1, 2, 2)])
def test_splash_compiles_for_tpus_alone_and_on_a_mesh(sizes):
    *arrays, mask = inputs(2, 64, 20, 4, 4, 64, jnp.bfloat16)
    call = lambda query, key, value, mask: attention(query, key, value, spread(mask), Backend("auto", "tpu"))
    with jax.set_mesh(make_mesh(*sizes)) if sizes else jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert tpu_kernels(call, *arrays, mask) == tpu_kernels(call, *arrays, None) == 3  # forward, dq, dkv


def test_ulysses_runs_splash_on_tpus_and_the_ring_does_not():
    *arrays, mask = inputs(2, 64, 64, 4, 4, 64, jnp.bfloat16)
    call = lambda name, sequence: lambda q, k, v, m: self_attention(q, k, v, spread(m), Backend(name, "tpu", sequence))
    with jax.set_mesh(make_mesh(2, 1, 4, 1)):
        assert tpu_kernels(call("splash", "auto"), *arrays, mask) == 3
        assert tpu_kernels(call("auto", "ring"), *arrays, mask) == 0
        with pytest.raises(ValueError, match="'splash' does not go round a ring.*nearest: model.attention=auto"):
            tpu_kernels(call("splash", "ring"), *arrays, mask)


@pytest.mark.slow
def test_a_kernel_on_a_mesh_gives_every_device_its_samples_heads_and_queries(monkeypatch):
    monkeypatch.setattr(attention_module, "splash", partial(splash, interpret=True))
    *arrays, mask = inputs(2, 4, 20, 4, 2, 8)
    mask = spread(mask)
    with jax.set_mesh(make_mesh(2, 1, 2, 2)):
        out = jax.jit(lambda *args: attention(*args, TPU))(*arrays, mask)
    assert_same([out], [attention(*arrays, mask)])
    assert {shard.data.shape for shard in out.addressable_shards} == {(1, 2, 2, 8)}


# ---- cudnn ----


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_as_a_number_of_keys_is_exact(masked):
    *arrays, mask = inputs(3, 5, 9, 4, 2, 8)
    mask = mask if masked else None
    assert not masked or not np.array_equal(mask, np.sort(mask)[:, ::-1]), "the mask should have holes"
    found = with_gradients(partial(by_length, implementation="xla"), *arrays, mask)
    assert_same(found, with_gradients(reference, *arrays, mask), 1e-6)


def test_auto_takes_the_platforms_own_where_it_can():
    pick = lambda platform, *rest: Backend("auto", platform).pick(*rest)
    assert pick("cuda", "bfloat16", 128) == pick("cuda", "float16", 64, (2, 1, 1, 7)) == "cudnn"
    assert pick("cuda", "float32", 128) == pick("cuda", "bfloat16", 136) == pick("cuda", "bfloat16", 20) == "xla"
    assert pick("cuda", "bfloat16", 64, (1, 1, 7, 7)) == pick("tpu", "bfloat16", 64, (1, 4, 1, 7)) == "xla"
    assert pick("tpu", "float32", 20, (2, 1, 1, 7)) == "splash"
    assert pick("cpu", "bfloat16", 64) == pick("rocm", "bfloat16", 64) == "xla"
    assert Backend.here().platform == "cpu" and Backend.here().pick("bfloat16", 64) == "xla"


@pytest.mark.parametrize(("capability", "taken"), [("7.5", "xla"), ("8.0", "cudnn"), ("10.0", "cudnn")])
def test_gpus_before_ampere_have_no_flash_attention_of_cudnn(monkeypatch, capability, taken):
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = SimpleNamespace(platform="gpu", compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert Backend.here().pick("bfloat16", 64) == taken
    if taken == "xla":
        with pytest.raises(ValueError, match=r"only from compute capability 8.0, and this is .* 7.5; nearest: xla"):
            Backend.here("cudnn").pick("bfloat16", 64)


def test_a_flash_kernel_that_would_go_round_a_ring_is_refused_before_anything_is_made(tmp_path):
    """Heads that do not divide, or a ring asked for; not where nothing lies over several devices."""
    mesh = make_mesh(1, 1, 4, 1, devices=jax.devices()[:4])
    model = tiny_config(1, tmp_path).model
    for name, sequence, heads in (("cudnn", "ring", 4), ("splash", "auto", 3)):
        model.dit.heads = heads
        platform = {"cudnn": "cuda", "splash": "tpu"}[name]
        with pytest.raises(ValueError, match=f"{name}' does not go round a ring.*nearest: model.attention=auto"):
            describe_attention(model, Backend(name, platform, sequence), mesh)
        assert Backend(name, platform, sequence).route(heads, 1, 1) == "ulysses"


@pytest.mark.parametrize(
    ("backend", "call", "message"),
    [
        (Backend("cudnn", "cpu"), ("bfloat16", 64), "='cudnn' runs on cuda only, and this is cpu; nearest: xla"),
        (Backend("splash", "cuda"), ("bfloat16", 64), "='splash' runs on tpu only, and this is cuda; nearest: cudnn"),
        (Backend("cudnn", "tpu"), ("float32", 64), "='cudnn' runs on cuda only, and this is tpu; nearest: splash"),
        (Backend("cudnn", "cuda"), ("float32", 64), "needs bfloat16 or float16, and this is float32; nearest: xla"),
        (Backend("cudnn", "cuda"), ("bfloat16", 20), r"steps of 8, and this is 20 \(nearest: 16\); nearest: xla"),
        (Backend("cudnn", "cuda"), ("bfloat16", 256), r"at most 128 .*this is 256 \(nearest: 128\)"),
        (Backend("splash", "tpu"), ("bfloat16", 64, (1, 1, 5, 7)), r"masks keys only.*\[1, 1, 5, 7\].*nearest: xla"),
    ],
)
def test_what_cannot_be_had_says_why_and_what_works(backend, call, message):
    with pytest.raises(ValueError, match=message):
        backend.pick(*call)
    assert obstacle("xla", backend.platform, *call) is None


def test_an_impossible_back_end_stops_the_trace():
    query = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    with pytest.raises(ValueError, match="model.attention='cudnn' runs on cuda only"):
        jax.eval_shape(lambda *args: attention(*args, None, Backend("cudnn", "cpu")), query, query, query)


# ---- a sequence over several devices ----

SPREAD = [  # mesh, Backend.sequence, heads, heads of keys, masked
    ((2, 1, 4, 1), "auto", 4, 4, True),  # Ulysses
    ((1, 2, 2, 2), "ulysses", 8, 4, False),
    ((1, 1, 8, 1), "auto", 3, 3, True),  # ring
    ((2, 1, 2, 2), "ring", 4, 2, True),
    ((1, 1, 4, 2), "ring", 4, 4, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "sequence", "heads", "kv_heads", "masked"), SPREAD)
def test_a_sequence_over_several_devices_is_exact(sizes, sequence, heads, kv_heads, masked):
    *arrays, mask = inputs(2, 24, 24, heads, kv_heads, 8)
    mask = mask if masked else None
    with jax.set_mesh(make_mesh(*sizes)):
        call = lambda q, k, v, m: self_attention(q, k, v, spread(m), Backend(sequence=sequence))
        found = with_gradients(call, *arrays, mask)
    assert {shard.data.shape[1] for shard in found[0].addressable_shards} == {24 // sizes[2]}
    assert_same(found, with_gradients(reference, *arrays, mask))


def communication(sequence, heads):
    query = jax.ShapeDtypeStruct((2, 24, heads, 8), jnp.float32)
    with jax.set_mesh(make_mesh(2, 1, 2, 2)):
        call = jax.jit(lambda *args: self_attention(*args, None, Backend(sequence=sequence)))
        text = call.lower(query, query, query).as_text()
    return "all_to_all" in text, "collective_permute" in text


def test_heads_that_divide_go_by_ulysses_others_round_the_ring():
    assert communication("auto", 4) == communication("ulysses", 4) == (True, False)
    assert communication("auto", 6) == communication("ring", 4) == (False, True)


@pytest.mark.slow
def test_the_ring_passes_over_devices_without_visible_keys():
    """All keys of one device masked; and a sample that sees nothing at all, which gets zeros and finite gradients."""
    *arrays, mask = inputs(2, 16, 16, 2, 2, 8)
    mask = mask.at[:, :4].set(False).at[0, 5].set(True).at[1].set(False)
    with jax.set_mesh(make_mesh(2, 1, 4, 1)):
        call = lambda q, k, v, m: self_attention(q, k, v, spread(m), Backend(sequence="ring"))
        found = with_gradients(call, *arrays, mask)
    first = lambda arrays: [array[:1] for array in arrays]
    assert_same(first(found), with_gradients(reference, *first(arrays), mask[:1]))
    for array in found:
        np.testing.assert_array_equal(array[1], 0)


@pytest.mark.parametrize(
    ("length", "heads", "sequence", "message"),
    [
        (22, 4, "auto", "a sequence of 22 does not divide over mesh.context=4; nearest: 20 or 24"),
        (
            24,
            6,
            "ulysses",
            "6 heads do not divide over mesh.context=4 x mesh.tensor=1; contexts that do: 1, 2, 3, 6; or .*ring",
        ),
    ],
)
def test_what_does_not_fit_the_context_is_refused(length, heads, sequence, message):
    query = jax.ShapeDtypeStruct((2, length, heads, 8), jnp.float32)
    with jax.set_mesh(make_mesh(2, 1, 4, 1)), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *args: self_attention(*args, None, Backend(sequence=sequence)), query, query, query)


def test_without_a_mesh_self_attention_is_attention():
    *arrays, mask = inputs(2, 6, 6, 2, 2, 8)
    found = self_attention(*arrays, spread(mask), Backend(sequence="ring"))
    np.testing.assert_array_equal(found, attention(*arrays, spread(mask), XLA))
