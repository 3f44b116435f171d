"""The presets of published size on abstract values, no memory: training step and sampler trace, and lower for CPU, CUDA and TPU."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from rise_jax import sampler
from rise_jax.outline import outline, sampler_arguments, step_arguments
from rise_jax.pipeline import make_videos
from rise_jax.plan import parameters
from rise_jax.sharding import batch_sharding, make_mesh, replicated, shardings
from rise_jax.step import make_train_step
from rise_jax.trees import named_leaves
from rise_jax.validate import clip_size

pytestmark = pytest.mark.slow

PLATFORMS = ("cpu", "cuda", "tpu")
# Wan2.1's and umT5's checkpoints, Qwen2.5-1.5B's config: what their files hold.
DIT = {"wan_1_3b": 1_418_996_800, "wan_14b": 14_288_491_584}
LLM, VAE, UMT5 = 1_543_714_304, 126_892_531, 5_680_910_336
LOW_RANK = {"wan_1_3b": 30 * 4 * 2 * 1536 * 32, "wan_14b": 40 * 4 * 2 * 5120 * 32}
RUNS = [(stage, preset) for preset in DIT for stage in ("stage1", "stage2")]


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def described(request):
    """(stage, preset, its config, its outline)"""
    stage, preset = request.param
    config = importlib.import_module(f"configs.{stage}").get_config(preset)
    return stage, preset, config, outline(config)


def lowered(function, *args, **options):
    """The program for all PLATFORMS, and its results' shapes."""
    traced = jax.jit(function, **options).trace(*args)
    return traced.lower(lowering_platforms=PLATFORMS), traced.out_info


def test_sizes_are_the_published_ones(described):
    stage, preset, _, outlined = described
    parts = parameters(outlined)
    trained = {"stage1": 0, "stage2": LOW_RANK[preset]}[stage]
    assert parts["DiT"][0] == DIT[preset] + trained
    assert (parts["text model"][0], parts["VAE"][0]) == (LLM, VAE)
    assert sum(leaf.size for leaf in jax.tree.leaves(outlined.native.params)) == UMT5
    width, depth = {"wan_1_3b": (1536, 30), "wan_14b": (5120, 40)}[preset]
    keys_and_values = depth * 2 * (width * width + width)
    assert parts["DiT"][1] == (trained + keys_and_values if stage == "stage2" else 0)
    assert parts["adapter"][0] == parts["adapter"][1] > 5e7


def test_the_training_step_lowers(described):
    """With the shardings of a mesh that uses every axis but context: the arguments are born on it."""
    _, _, config, outlined = described
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state, frozen, batch, key = step_arguments(config, outlined, config.run.batch_size)
    rows = jax.tree.map(lambda leaf: batch_sharding(mesh) if leaf.shape else replicated(mesh), batch)
    places = shardings(state, mesh), shardings(frozen, mesh), rows, replicated(mesh)
    optim = config.optim
    rates = dict(drop=optim.drop, ema=optim.ema, time_mean=optim.time_mean, time_std=optim.time_std)
    step = make_train_step(outlined.model, outlined.optimizer, **rates)
    options = dict(donate_argnums=0, in_shardings=places, out_shardings=(places[0], None))
    program, (after, metrics) = lowered(step, state, frozen, batch, key, **options)
    assert "stablehlo.while" in program.as_text(), "layers run in a scan"
    assert named_leaves(after).keys() == named_leaves(state).keys()
    assert all(new.shape == old.shape for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state)))
    assert metrics["loss"].shape == ()


def test_the_sampler_lowers(described):
    _, _, config, outlined = described
    sample, model = config.sample, outlined.model
    size = clip_size(sample, config.data)
    times = jax.eval_shape(lambda: sampler.times_for(sample.stepper, sample.steps, model.shift))
    make = partial(make_videos, model, shape=model.latent_shape(size), stepper=sample.stepper)
    guidance = jax.ShapeDtypeStruct((), jnp.float32)
    _, videos = lowered(make, *sampler_arguments(config, outlined, sample.batch_size), times, guidance)
    assert videos.shape == (sample.batch_size, *size, 3) and videos.dtype == jnp.uint8


def test_rephrasing_lowers(described):
    _, _, config, outlined = described
    text, size = outlined.text, config.sample.batch_size
    ids = jax.ShapeDtypeStruct((size, text.prompt), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_)
    _, states = lowered(text.use, text.params, text.prefix, ids, mask)
    assert states.shape == (size, config.model.llm.max_new, 1536)
