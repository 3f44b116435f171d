"""--mode=plan: parameters, memory per device and floating-point operations of a run, said before anything is bought or loaded.

Everything is traced on abstract values: no weights, no device. The mesh is the config's, of as many devices as its sizes multiply to.
docs/plan.md has the formulas.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from rise_jax import known_sizes, memory, sampler
from rise_jax.build import Model
from rise_jax.flops import count_flops, step_flops
from rise_jax.models.attention import Backend
from rise_jax.origin import asks_for_null, check_backbone, check_parts, check_start, check_states
from rise_jax.outline import (
    Outline,
    drawn,
    outline,
    parameters_of,
    sampler_arguments,
    step_arguments,
    text_identity,
)
from rise_jax.pipeline import make_videos
from rise_jax.published import CAPTIONS, PIXELS, check_files, vae_identity
from rise_jax.run_config import read_config
from rise_jax.runs import check_run, has_begun
from rise_jax.sharding import bytes_per_device, check_batch, planned_mesh
from rise_jax.step import sample_losses
from rise_jax.trees import combine
from rise_jax.validate import clip_size, validate

GIB, TERA, MILLION = 2**30, 1e12, 1e6


class Memory(NamedTuple):
    """Bytes per device: what stays, and what is there in one phase only. `scores`: by how much plain attention raises a phase.

    `before`: all that is there at a moment before any of this.
    """

    kept: dict[str, int]
    phases: dict[str, int]
    scores: dict[str, int]
    before: dict[str, int]

    def total(self, *, scores: bool) -> int:
        """At the worst moment; with the scores of plain attention or without."""
        phases = max(size + scores * self.scores[name] for name, size in self.phases.items())
        return max([sum(self.kept.values()) + phases, *self.before.values()])


class Plan(NamedTuple):
    """parameters: part -> (all, trained). step, video: what -> operations, of all devices together."""

    parameters: dict[str, tuple[int, int]]
    training: Memory
    use: Memory
    step: dict[str, int]
    video: dict[str, int]


def plan(config: ConfigDict, workdir: Path) -> int:
    """Prints the plan; the workdir is not touched. Raises ValueError or FileNotFoundError as training would."""
    mesh = planned_mesh(**config.mesh)
    begun = has_begun(workdir)
    origin = None if begun else check_start(config.run.init_from, config.run.preset)
    if origin:
        check_run(origin)
    outlined = checked_outline(config, begun, origin)
    if origin:
        meta, vae = check_states(origin, text_identity(config.model)), config.model.vae.path
        check_backbone(origin, meta, config.model, vae_identity(vae) if vae == PIXELS or Path(vae).exists() else None)
    if not begun:
        theirs = parameters_of(ConfigDict(read_config(origin)["model"]), outlined.text.width) if origin else {}
        check_parts(config, outlined.model.abstract, theirs, origin)
    check_batch(config.run.batch_size, mesh, config.run.accumulate)
    backend = Backend(config.model.attention, sequence=config.model.sequence)
    backend.route(config.model.dit.heads, mesh.shape["context"], mesh.shape["tensor"])
    print(describe(config, mesh, outlined, make_plan(config, mesh, outlined)), flush=True)
    return 0


def checked_outline(config: ConfigDict, begun: bool = False, origin: Path | None = None) -> Outline:
    """The outline of a config that `validate` and `check_files` accept; of published files that are not here only known sizes count.

    `begun`: whether the run has a checkpoint; `origin`: the run that it starts from.
    """
    model = config.model
    published = [model.dit.path, model.vae.path, model.native.path]
    published += [model.null] if model.null.endswith(".safetensors") else []
    absent = [path for path in published if path and not Path(path).exists()]
    here = ConfigDict(config.to_dict())
    if model.dit.path in absent:
        here.model.dit.path = ""
    validate(here, known_sizes.vae_sizes(model.vae.path)[0])
    asks = dict(null=not begun and asks_for_null(origin, model), calibrate=not (begun or origin))
    check_files(model, absent, **asks)
    return outline(config, **asks)


def make_plan(config: ConfigDict, mesh: AbstractMesh, outlined: Outline) -> Plan:
    """The plan of a valid config for a mesh over whose `data` and `fsdp` axes the batch divides."""
    return Plan(
        parameters(outlined),
        training_memory(config, mesh, outlined),
        use_memory(config, outlined),
        flops_of_step(config, outlined),
        flops_of_video(config, outlined),
    )


def parameters(outlined: Outline) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, those of them that are trained)."""
    parts = {"text model": (_count(outlined.text.params), 0)}
    for name, title in (("adapter", "adapter"), ("dit", "DiT"), ("null", "null condition")):
        if name in outlined.model.abstract:
            parts[title] = _count(outlined.model.abstract[name]), _count(outlined.trainable.get(name, {}))
    return parts | {"VAE": (_count(outlined.vae), 0)}


def training_memory(config: ConfigDict, mesh: AbstractMesh, outlined: Outline) -> Memory:
    """Of a training step on `mesh`; `run.accumulate` parts of a batch go one after the other."""
    on_device = partial(bytes_per_device, mesh=mesh)
    accumulate = config.run.accumulate
    rows = config.run.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * accumulate)
    state, frozen, batch, _ = step_arguments(config, outlined, rows)
    activations, scores = _activations(config, mesh, outlined, rows)
    kept = {
        "parameters, trained": on_device(state.params),
        "parameters, frozen": on_device(frozen),
        "optimizer": on_device(state.opt_state),
        "EMA": on_device(state.ema),
    }
    video = jax.eval_shape(lambda video: video.astype(jnp.float32), batch["video"])
    phases = {
        "gradients and activations": on_device(state.params) * (1 if accumulate == 1 else 2) + activations,
        "VAE encoding": memory.peak_bytes(outlined.model.encode, outlined.vae, video),
    }
    if config.data.states == "in_step":
        phases["text model's pass"] = memory.peak_bytes(outlined.model.states, frozen, batch)
    scores = dict.fromkeys(phases, 0) | {"gradients and activations": scores}
    return Memory(kept, phases, scores, _before(config, mesh, outlined, state.params, frozen))


def _before(config: ConfigDict, mesh: AbstractMesh, outlined: Outline, trained: dict, frozen: dict) -> dict[str, int]:
    """The moment of the native encoder, which lies over the mesh as the other parameters do; they are there."""
    native = outlined.native
    if native is None:
        return {}
    rows = (CAPTIONS, native.length) if config.model.calibrate else (1, 1)
    ids = jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, jnp.bool_)
    held = {"trained": trained, **frozen, "native": native.params}
    on_device = sum(bytes_per_device(tree, mesh) for tree in held.values())
    work = memory.peak_bytes(native.use, native.params, None, *ids)
    return {"before a new run: parameters and native encoder, in all": on_device + work}


def use_memory(config: ConfigDict, outlined: Outline) -> Memory:
    """Of `sample.batch_size` videos made on one device."""
    model, text, size = outlined.model, outlined.text, config.sample.batch_size
    params, vae, states, mask, _ = sampler_arguments(config, outlined, size)
    latents = _like((2 * size, *_latent_shape(config, model)))
    times = _like((2 * size,))
    context = jax.eval_shape(model.context, params, states, mask, _like((size,)))
    cache = jax.eval_shape(model.kv, params, _like((2 * size, *context.shape[1:])))
    denoise = {flag: memory.peak_bytes(model.dit, params, latents, times, cache, scores=flag) for flag in (False, True)}
    phases = {
        "text: key/value cache": _bytes(text.cache(size)),
        "denoising, with cross-attention's keys and values": _bytes(cache) + denoise[False],
        "VAE decoding": memory.peak_bytes(model.decode, vae, _like((size, *latents.shape[1:]))),
    }
    kept = {"parameters": _bytes(params), "text model": _bytes([text.params, text.prefix]), "VAE": _bytes(vae)}
    scores = dict.fromkeys(phases, 0) | {
        "denoising, with cross-attention's keys and values": denoise[True] - denoise[False]
    }
    return Memory(kept, phases, scores, {})


def flops_of_step(config: ConfigDict, outlined: Outline) -> dict[str, int]:
    """What -> operations of one step of the whole batch."""
    _, frozen, batch, _ = step_arguments(config, outlined, config.run.batch_size)
    text = count_flops(outlined.model.states, frozen, batch)
    vae = count_flops(outlined.model.encode, outlined.vae, _like(batch["video"].shape))
    whole = step_flops(outlined.model, outlined.trainable, frozen, batch)
    return {"text model": text, "VAE encoding": vae, "adapter and DiT, with gradients": whole - text - vae}


def flops_of_video(config: ConfigDict, outlined: Outline) -> dict[str, int]:
    """What -> operations of one video by the config's `sample` group, of a rephrasing as long as `model.llm.max_new` allows."""
    model, text = outlined.model, outlined.text
    arguments = sampler_arguments(config, outlined, 1)
    params, vae, states, mask, _ = arguments
    ids = jax.ShapeDtypeStruct((1, text.prompt), jnp.int32), jax.ShapeDtypeStruct((1, text.prompt), jnp.bool_)
    shape, stepper = _latent_shape(config, model), config.sample.stepper
    times = jax.eval_shape(lambda: sampler.times_for(stepper, config.sample.steps, model.shift))
    make = partial(make_videos, model, shape=shape, stepper=stepper)
    whole = count_flops(make, *arguments, times, _like(()))
    decode = count_flops(model.decode, vae, _like((1, *shape)))

    def condition(params, states, mask, t):
        context = model.context(params, states, mask, t)
        return model.kv(params, jnp.concatenate([context, context]))

    adapter = 0 if model.time_cond else count_flops(condition, params, states, mask, _like((1,)))
    name = "denoising, with the adapter" if model.time_cond else "denoising"
    said = count_flops(text.use, text.params, text.prefix, *ids)
    parts = {"text model": said, "adapter, cross-attention's keys and values": adapter}
    return {key: cost for key, cost in parts.items() if cost} | {name: whole - adapter - decode, "VAE decoding": decode}


def _activations(config: ConfigDict, mesh: AbstractMesh, outlined: Outline, rows: int) -> tuple[int, int]:
    """(bytes per device, those of attention's scores among plain attention's) that the backward pass waits for."""
    kept = _kept(config, outlined, rows)
    within = memory.Bytes(0, 0)
    if config.model.dit.remat != "none":
        everything = ConfigDict(config.to_dict())
        everything.model.dit.remat = "none"
        whole = _kept(everything, outline(everything, text=outlined.text), rows)
        within = memory.Bytes(*((a - b) // config.model.dit.depth for a, b in zip(whole, kept)))
    dit, tensor = config.model.dit, mesh.shape["tensor"]
    divides = dit.heads % tensor == dit.mlp_width % tensor == 0  # where only one does, the larger figure is given
    parts = mesh.shape["context"] * (tensor if divides else 1)
    return kept.other // mesh.shape["context"] + within.other // parts, (kept.scores + within.scores) // parts


def _kept(config: ConfigDict, outlined: Outline, rows: int) -> memory.Bytes:
    _, frozen, batch, _ = step_arguments(config, outlined, rows)

    def loss(trainable, frozen, batch, t, noise, drop):
        params = combine(trainable, frozen["params"])
        return sample_losses(outlined.model, params, frozen, batch, t, noise, drop).mean()

    return memory.kept_bytes(loss, outlined.trainable, frozen, batch, *drawn(config, outlined, rows))


def describe(config: ConfigDict, mesh: AbstractMesh, outlined: Outline, made: Plan) -> str:
    """The plan as text."""
    run, sample, data = config.run, config.sample, config.data
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    filled = [f"; mesh.{name}=-1 counts as 1" for name, size in config.mesh.items() if size == -1]
    clip, video = ("x".join(map(str, size)) for size in (clip_size(data, data), clip_size(sample, data)))
    parts = f"batch {run.batch_size} of {clip} in {run.accumulate} part(s), remat {config.model.dit.remat}"
    blocks = {
        f"{run.stage}, preset {run.preset}; mesh {axes}: {mesh.size} device(s){''.join(filled)}": [],
        "parameters, millions": _parameter_lines(outlined, made.parameters),
        f"memory per device in training, GiB: {parts}": _memory_lines(made.training),
        f"memory in use, GiB: one device, {sample.batch_size} video(s) of {video} at a time": _memory_lines(made.use),
        "operations per training step, TFLOP, all devices together": _flop_lines(made.step),
        f"operations per video, TFLOP: {video}, {sample.steps} steps of {sample.stepper}": _flop_lines(made.video),
    }
    return "\n\n".join("\n".join([title, *lines]) for title, lines in blocks.items())


def _parameter_lines(outlined: Outline, parts: dict[str, tuple[int, int]]) -> list[str]:
    lines = []
    for name, sizes in (parts | {"all": tuple(map(sum, zip(*parts.values())))}).items():
        count, trained = (size / MILLION for size in sizes)
        lines.append(f"  {name:<24}{count:12,.2f}{trained:12,.2f} trained   {outlined.notes.get(name, '')}".rstrip())
    if outlined.native:
        size, note = _count(outlined.native.params) / MILLION, outlined.native.note
        lines.append(f"  {'native encoder':<24}{size:12,.2f}   on the devices once, when a run is new; {note}")
    return lines


def _memory_lines(made: Memory) -> list[str]:
    line = lambda name, size: f"  {name:<56}{size / GIB:12,.3f}"
    lines = [line(name, size) for name, size in (made.before | made.kept).items()]
    lines += [line(f"then: {name}", size) for name, size in made.phases.items()]
    lines.append(line("at most, attention by a kernel (cudnn, splash)", made.total(scores=False)))
    return [*lines, line("at most, plain attention (xla)", made.total(scores=True))]


def _flop_lines(parts: dict[str, int]) -> list[str]:
    whole = sum(parts.values())
    lines = [f"  {name:<56}{cost / TERA:14,.5g}{cost / whole:10.2%}" for name, cost in parts.items()]
    return [*lines, f"  {'all':<56}{whole / TERA:14,.5g}"]


def _latent_shape(config: ConfigDict, model: Model) -> tuple[int, ...]:
    return model.latent_shape(clip_size(config.sample, config.data))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
