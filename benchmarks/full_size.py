"""What a GPU or TPU does with a preset, on random parameters of its sizes: a training step, a video, and the LLM's decoding.

    python -m benchmarks.full_size --config=configs/stage2.py:wan_1_3b --config.run.batch_size=1 --remats=none,dots,blocks,offload \\
        --attentions=xla,auto --parts=step,video,text [--rounds=10] [--config.data.frames=81] [--config.mesh.fsdp=8 ...]

No published file is needed. Every line: median seconds over the rounds, TFLOP/s and MFU per device by `rise_jax/flops.py`, and the
memory that the compiler asks for per device. A video is timed at `sample.steps` and at half of them: the difference is denoising
alone. Text: tokens per second, and the bytes of parameters read per second, which the memory's bandwidth limits. Stage 1 trains the
adapter alone; `--config.model.trainable='(".",)'` everything.
"""

import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from rise_jax import sampler
from rise_jax.build import backend_from, describe_attention
from rise_jax.flops import count_flops, step_flops
from rise_jax.models.remat import REMAT
from rise_jax.outline import Outline, outline, sampler_arguments, step_arguments
from rise_jax.pipeline import make_videos
from rise_jax.sharding import batch_sharding, describe, make_mesh, replicated, shardings
from rise_jax.step import make_train_step
from rise_jax.throughput import peak_tflops
from rise_jax.validate import clip_size

CONFIG = config_flags.DEFINE_config_file("config", "configs/stage2.py:wan_1_3b", "configs/STAGE.py:PRESET")
REMATS = flags.DEFINE_list("remats", ["blocks"], f"of {', '.join(REMAT)}")
ATTENTIONS = flags.DEFINE_list("attentions", ["auto"], "of auto, xla, cudnn, splash")
PARTS = flags.DEFINE_list("parts", ["step"], "of step, video, text")
ROUNDS = flags.DEFINE_integer("rounds", 10, "timed runs of each", lower_bound=2)


def main(_) -> None:
    config = CONFIG.value
    mesh = make_mesh(**config.mesh)
    print(f"{describe(mesh)}, jax {jax.__version__}, median of {ROUNDS.value}")
    print(f"{'':40}{'compile s':>10}{'seconds':>10}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}")
    with jax.set_mesh(mesh):
        for attention in ATTENTIONS.value:
            for remat in REMATS.value if "step" in PARTS.value else []:
                time_step(changed(config, attention, remat), mesh)
            if "video" in PARTS.value:
                time_video(changed(config, attention, "none"), mesh)
        if "text" in PARTS.value:
            time_text(config, mesh)


def changed(config: ConfigDict, attention: str, remat: str) -> ConfigDict:
    config = ConfigDict(config.to_dict())
    config.model.attention, config.model.dit.remat = attention, remat
    return config


def time_step(config: ConfigDict, mesh) -> None:
    outlined, name = named(config, mesh)
    state, frozen, batch, _ = step_arguments(config, outlined, config.run.batch_size)
    flops = step_flops(outlined.model, state.params, frozen, batch)
    rates = {name: config.optim[name] for name in ("drop", "time_mean", "time_std", "ema")}
    step = make_train_step(outlined.model, outlined.optimizer, accumulate=config.run.accumulate, **rates)
    state, frozen = (drawn(tree, shardings(tree, mesh)) for tree in (state, frozen))
    rows = drawn(batch, {name: batch_sharding(mesh) if batch[name].ndim else replicated(mesh) for name in batch})
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    compiled, seconds = compiled_in(jitted, state, frozen, rows, jax.random.key(0))

    def run():
        nonlocal state
        state, metrics = compiled(state, frozen, rows, jax.random.key(0))
        jax.block_until_ready(metrics)

    report(f"step, {config.model.dit.remat}, {name}", compiled, seconds, median(run), flops)


def time_video(config: ConfigDict, mesh) -> None:
    outlined, name = named(config, mesh)
    sample, model = config.sample, outlined.model
    params, vae, states, mask, seeds = sampler_arguments(config, outlined, sample.batch_size)
    shape = model.latent_shape(clip_size(sample, config.data))
    trees = [drawn(tree, shardings(tree, mesh)) for tree in (params, vae)]
    rows = [drawn(array, replicated(mesh)) for array in (states, mask, seeds)]
    for steps in (sample.steps, max(sample.steps // 2, 1)):
        times = sampler.times_for(sample.stepper, steps, model.shift)
        function = partial(make_videos, model, shape=shape, stepper=sample.stepper)
        arguments = *trees, *rows, times, sample.guidance
        compiled, seconds = compiled_in(jax.jit(function), *arguments)
        took = median(lambda run=compiled, given=arguments: jax.block_until_ready(run(*given)))
        report(f"{steps} steps and decoding, {name}", compiled, seconds, took, count_flops(function, *arguments))


def time_text(config: ConfigDict, mesh) -> None:
    text, size = outline(config).text, config.sample.batch_size
    rows = jax.ShapeDtypeStruct((size, text.prompt), jnp.int32), jax.ShapeDtypeStruct((size, text.prompt), jnp.bool_)
    arguments = [drawn(tree, shardings(tree, mesh)) for tree in (text.params, text.prefix, *rows)]
    compiled, seconds = compiled_in(jax.jit(text.use), *arguments)
    took = median(lambda: jax.block_until_ready(compiled(*arguments)))
    report(f"text of {size} prompts, {text.length} tokens", compiled, seconds, took, count_flops(text.use, *arguments))
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0])) * text.length / took / 1e9
    print(f"{'':4}{size * text.length / took:.0f} tokens/s, {read:.0f} GB/s of parameters")


def named(config: ConfigDict, mesh) -> tuple[Outline, str]:
    backend = backend_from(config.model)
    return outline(config, backend), describe_attention(config.model, backend, mesh)


def drawn(tree, targets):
    """Values of every shape: small normal numbers, True, zeros; made where they are to lie."""

    def value(leaf, key):
        if leaf.dtype == jnp.bool_:
            return jnp.ones(leaf.shape, bool)
        small = jnp.issubdtype(leaf.dtype, jnp.floating)
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) if small else jnp.zeros(leaf.shape, leaf.dtype)

    make = lambda key: jax.tree.map(lambda leaf: value(leaf, key), tree)
    # threefry for hundreds of leaves takes longer to compile than the model
    return jax.jit(make, out_shardings=targets)(jax.random.key(0, impl="unsafe_rbg"))


def compiled_in(jitted, *arguments) -> tuple[jax.stages.Compiled, float]:
    began = time.perf_counter()
    return jitted.lower(*arguments).compile(), time.perf_counter() - began


def median(run) -> float:
    """Seconds of one run, after one that warms up."""
    times = []
    for _ in range(ROUNDS.value + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def report(name: str, compiled, compile_seconds: float, seconds: float, flops: int) -> None:
    tflops = flops / seconds / jax.device_count() / 1e12
    peak = peak_tflops(jax.devices()[0].device_kind)
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    share = f"{tflops / peak:7.1%}" if peak else f"{'-':>7}"
    gib = (held - memory.alias_size_in_bytes) / 2**30
    print(f"{name:40}{compile_seconds:10.1f}{seconds:10.3f}{tflops:9.2f}{share}{gib:7.2f}", flush=True)


if __name__ == "__main__":
    app.run(main)
