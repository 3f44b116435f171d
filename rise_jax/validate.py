"""What can be known to be wrong from the config alone, said before any device is touched.

Every fault has the value, the limit and the nearest valid choice.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from ml_collections import ConfigDict

from rise_jax.condition_kinds import CONDITIONS
from rise_jax.data.open import source_fault
from rise_jax.data.scenes import MAX_TEXTS
from rise_jax.flow import PREDICTIONS
from rise_jax.models.adapter import KINDS, TIME_CONDS
from rise_jax.models.attention import NAMES, SEQUENCES, cudnn_obstacle
from rise_jax.models.remat import REMAT
from rise_jax.models.vae import Pixels
from rise_jax.models.wan_vae import WanVAE
from rise_jax.optim import KINDS as OPTIMIZERS
from rise_jax.profiling import window_fault
from rise_jax.published import dit_faults, open_vae
from rise_jax.sampler import STEPPERS


def validate(config: ConfigDict, vae: Pixels | WanVAE | None = None) -> None:
    """Raises one ValueError that lists every fault of the config. `vae` stands in for the one at `model.vae.path`."""
    vae = vae or open_vae(config.model.vae.path)
    if faults := [*_counts(config.model)]:  # nothing else can be worked out with these
        raise ValueError("the config cannot be run:\n" + "\n".join(f"  {fault}" for fault in faults))
    faults = [*_choices(config), *_sampling(config.sample), *_ranges(config), *_run_parts(config.run)]
    faults += [*_schedule(config.optim), *_backends(config.model), *_patterns(config.model.trainable)]
    faults += [*_model_sizes(config.model, vae), *_calibration(config.model), *_clip_sizes(config, vae)]
    texts = _scene_texts(config.data.source, "data.texts", config.data.texts)
    if faults := [*faults, *texts, *tile_faults(config.model.vae.get("tile", 0), vae)]:
        raise ValueError("the config cannot be run:\n" + "\n".join(f"  {fault}" for fault in faults))


def check_use(config: ConfigDict, run: ConfigDict) -> None:
    """Raises one ValueError that lists every fault of what generate and evaluate take from a command's config, for a run's model."""
    model = run.model.copy_and_resolve_references()
    model.update(attention=config.model.attention, sequence=config.model.sequence)
    size, vae = clip_size(config.sample, run.data), open_vae(model.vae.path)
    others = {"data": {"max_bad": config.data.max_bad}, "run": {"seed": config.run.seed}}
    faults = [*sample_faults(config.sample), *_ranges(ConfigDict(others)), *_seed_of_run(config.run)]
    faults += [*_backends(model), *check_clip(*size, model.dit.patch, vae, "sample")]
    faults += _scene_texts(run.data.source, "sample.count", config.sample.count)
    if faults := [*faults, *tile_faults(config.model.vae.get("tile", 0), vae)]:
        raise ValueError("; ".join(faults))


def clip_size(sample: ConfigDict, data: ConfigDict) -> tuple[int, int, int]:
    """(frames, height, width) of videos that are made: where `sample` says 0, those of the clips that were trained on."""
    return tuple(sample[name] or data[name] for name in ("frames", "height", "width"))


def sample_faults(sample: ConfigDict) -> list[str]:
    """Faults of a `sample` group that can be seen without a model."""
    return [*_sampling(sample), *_ranges(ConfigDict({"sample": sample}))]


def check_clip(
    frames: int, height: int, width: int, patch: tuple[int, int, int], vae: Pixels | WanVAE, where: str
) -> list[str]:
    """Faults of a clip size for a model; `where` is the config group it stands in, 'data' or 'sample'."""
    faults = []
    if frames < 1 or frames % vae.time_stride != 1:
        near = max(vae.time_stride * round((frames - 1) / vae.time_stride), 0) + 1
        faults.append(f"{where}.frames={frames} is not {vae.time_stride}n+1; nearest: {near}")
    for name, size, cells in (("height", height, patch[1]), ("width", width, patch[2])):
        faults += _divides(
            f"{where}.{name}",
            size,
            f"the patch times the VAE's stride, {cells} x {vae.space_stride}",
            cells * vae.space_stride,
        )
    return faults


def tile_faults(tile: int, vae: Pixels | WanVAE) -> Iterable[str]:
    """Faults of a `model.vae.tile`."""
    if tile and isinstance(vae, Pixels):
        yield f"model.vae.tile={tile}: the VAE 'pixels' has nothing to save by tiles; nearest: 0"
    elif tile < 0 or tile % vae.space_stride:
        stride = vae.space_stride
        near = max(round(tile / stride), 1) * stride
        yield f"model.vae.tile={tile} is not a multiple of {stride}; nearest: {near}, or 0: whole frames"


def _counts(model: ConfigDict) -> Iterable[str]:
    """Faults of the model's sizes one by one."""
    dit, adapter = model.dit, model.adapter
    ones = {f"model.dit.{name}": dit[name] for name in ("width", "mlp_width", "heads", "depth", "text_len")}
    ones |= {f"model.adapter.{name}": adapter[name] for name in ("d_ctx", "width", "depth", "heads") if name in adapter}
    ones |= {"model.llm.max_prompt": model.llm.max_prompt, "model.llm.max_new": model.llm.max_new}
    ones["model.native.length"] = model.native.length
    noughts = {"model.adapter.registers": adapter.registers, "model.dit.low_rank": dit.get("low_rank", 0)}
    for least, sizes in ((1, ones), (0, noughts)):
        for key, value in sizes.items():
            if value < least:
                yield f"{key}={value} must be at least {least}; nearest: {least}"
    if len(dit.patch) != 3 or not all(isinstance(size, int) and size >= 1 for size in dit.patch):
        yield f"model.dit.patch={tuple(dit.patch)} must be three sizes >= 1: frames, rows, columns; nearest: (1, 2, 2)"


def _patterns(trainable: Iterable) -> Iterable[str]:
    if not trainable:
        yield "model.trainable=() trains nothing; nearest: ('.',), everything"
    for pattern in trainable:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            yield f"model.trainable={pattern!r} is no pattern ({error}); nearest: '^adapter/'"


def _calibration(model: ConfigDict) -> Iterable[str]:
    if model.calibrate and model.adapter.kind == "identity":
        yield f"model.calibrate={model.calibrate!r}: the adapter 'identity' has no output to calibrate; nearest: ''"


def _choices(config: ConfigDict) -> Iterable[str]:
    choices = {
        "model.condition": (config.model.condition, CONDITIONS),
        "model.adapter.kind": (config.model.adapter.kind, KINDS),
        "model.adapter.time_cond": (config.model.adapter.time_cond, TIME_CONDS),
        "model.dtype": (config.model.dtype, ("float32", "bfloat16")),
        "model.llm.dtype": (config.model.llm.dtype, ("float32", "bfloat16")),
        "model.vae.dtype": (config.model.vae.get("dtype", "float32"), ("float32", "bfloat16")),
        "model.native.dtype": (config.model.native.dtype, ("float32", "bfloat16")),
        "model.dit.remat": (config.model.dit.get("remat", "none"), REMAT),
        "model.prediction": (config.model.prediction, PREDICTIONS),
        "optim.kind": (config.optim.kind, OPTIMIZERS),
        "data.states": (config.data.states, ("cached", "in_step")),
    }
    for key, (value, valid) in choices.items():
        yield from _choice(key, value, valid)
    if fault := source_fault(config.data.source, config.data.path):
        yield fault


def _sampling(sample: ConfigDict) -> Iterable[str]:
    yield from _choice("sample.stepper", sample.stepper, STEPPERS)
    yield from _at_most("sample.seed", sample.seed, 2**31 - 1_000_000)  # prompts have one each, counted up from here


def _choice(key: str, value: Any, valid: Collection[str]) -> Iterable[str]:
    if value not in valid:
        near = difflib.get_close_matches(str(value), list(valid), n=1, cutoff=0.0)[0]
        yield f"{key}={value!r} is unknown (nearest: {near}); valid: {', '.join(valid)}"


# (keys of each group, what their numbers must be, in words, the nearest one of a wrong number)
RANGES: tuple[tuple[dict[str, str], Callable, str, Callable], ...] = (
    (
        dict(run="steps batch_size accumulate save_every keep", sample="steps batch_size count"),
        lambda value: value >= 1,
        "at least 1",
        lambda value: "; nearest: 1",
    ),
    (
        dict(
            run="seed",
            data="texts workers",
            optim="warmup weight_decay decay_from decay_until",
            sample="seed temperature",
        ),
        lambda value: value >= 0,
        "at least 0",
        lambda value: "; nearest: 0",
    ),
    (
        dict(model="shift", data="fps", optim="learning_rate clip time_std"),
        lambda value: value > 0,
        "above 0",
        lambda value: "",
    ),
    (
        dict(optim="b2"),  # at 1 Adam's second moments stay 0, and its correction of them divides by 0
        lambda value: 0 <= value < 1,
        "at least 0 and below 1",
        lambda value: "",
    ),
    (
        dict(data="max_bad", optim="drop ema"),
        lambda value: 0 <= value <= 1,
        "from 0 to 1",
        lambda value: f"; nearest: {min(max(value, 0), 1)}",
    ),
)


def _ranges(config: ConfigDict) -> Iterable[str]:
    infinite = {key: value for key, value in _numbers(config) if not math.isfinite(value)}
    yield from (f"{key}={value} must be a finite number" for key, value in infinite.items())
    for groups, fits, words, near in RANGES:
        for key, value in _named(config, groups):
            if key not in infinite and not fits(value):
                yield f"{key}={value} must be {words}{near(value)}"


def _numbers(config: ConfigDict) -> Iterable[tuple[str, float]]:
    groups = {group: " ".join(config.get(group, {})) for group in ("model", "data", "optim", "sample")}
    return ((key, value) for key, value in _named(config, groups) if isinstance(value, float))


def _named(config: ConfigDict, groups: dict[str, str]) -> Iterable[tuple[str, Any]]:
    """(key, value) of those names of each group that are there: an export has a part of them."""
    for group, names in groups.items():
        there = [name for name in names.split() if name in config.get(group, {})]
        yield from ((f"{group}.{name}", config[group][name]) for name in there)


def _at_most(key: str, value: int, limit: int, where: str = "") -> Iterable[str]:
    if value > limit:
        yield f"{key}={value} must be at most {limit}{where}; nearest: {limit}"


def _seed_of_run(run: ConfigDict) -> Iterable[str]:
    yield from _at_most("run.seed", run.seed, 2**32 - 1)


def _scene_texts(source: str, key: str, count: int) -> Iterable[str]:
    """Faults of a number of texts that RANGES lets pass."""
    if source == "scenes":
        yield from _at_most(key, count, MAX_TEXTS, " with data.source=scenes")
        if key == "data.texts" and count == 0:
            yield "data.texts=0 must be at least 1 with data.source=scenes; nearest: 1"


def _schedule(optim: ConfigDict) -> Iterable[str]:
    start, end = max(optim.decay_from, optim.warmup), optim.decay_until
    if (optim.decay_from or end) and not optim.warmup <= optim.decay_from < end:
        yield (
            f"optim.decay_from={optim.decay_from} and optim.decay_until={end}: the rate rises for optim.warmup={optim.warmup} steps, "
            f"then falls from the one step to the other; nearest: {start} and {max(end, start + 1)}, or 0 and 0 for no fall"
        )


def _run_parts(run: ConfigDict) -> Iterable[str]:
    yield from _seed_of_run(run)
    if run.accumulate > 0:
        yield from _divides("run.batch_size", run.batch_size, f"run.accumulate={run.accumulate}", run.accumulate)
    if fault := window_fault(run.profile, run.steps):
        yield fault


def _model_sizes(model: ConfigDict, vae: Pixels | WanVAE) -> Iterable[str]:
    dit, adapter = model.dit, model.adapter
    yield from dit_faults(model, vae.channels)
    yield from _divides("model.dit.width", dit.width, f"model.dit.heads={dit.heads}", dit.heads)
    if dit.width % dit.heads == 0 and dit.width // dit.heads % 2:
        yield (
            f"model.dit.width={dit.width} over {dit.heads} heads gives an odd head width {dit.width // dit.heads}; "
            f"rotary pairs need an even one; nearest width: {dit.width + dit.heads}"
        )
    if adapter.kind == "identity" and adapter.registers:
        yield f"model.adapter.registers={adapter.registers}: the adapter 'identity' adds none; nearest: 0"
    if adapter.kind in ("refiner", "resampler"):
        yield from _divides("model.adapter.width", adapter.width, f"model.adapter.heads={adapter.heads}", adapter.heads)
    if dit.patch[0] != 1:
        near = (1, *dit.patch[1:])
        yield f"model.dit.patch={tuple(dit.patch)}: the time patch must be 1, the VAE folds time already; nearest: {near}"
    if model.condition not in CONDITIONS:
        return
    kind = CONDITIONS[model.condition]
    states = model[kind.group][kind.budget]
    tokens = adapter.get("latents", 64) if adapter.kind == "resampler" else states
    if adapter.registers + tokens > dit.text_len:
        yield (
            f"model.dit.text_len={dit.text_len} cannot hold {adapter.registers} registers and {tokens} tokens; "
            f"nearest: {adapter.registers + tokens}, or, where the DiT is a published one, "
            f"model.{kind.group}.{kind.budget}={dit.text_len - adapter.registers}"
        )


def _backends(model: ConfigDict) -> Iterable[str]:
    yield from _choice("model.attention", model.attention, NAMES)
    yield from _choice("model.sequence", model.sequence, SEQUENCES)
    parts = {"dit": model.dit} | ({"adapter": model.adapter} if model.adapter.kind in ("refiner", "resampler") else {})
    for name, part in parts.items():
        reason = cudnn_obstacle(model.dtype, part.width // part.heads) if model.attention == "cudnn" else None
        if reason:
            yield f"model.attention='cudnn' {reason} in model.{name}; nearest: xla (or auto, which chooses by itself)"


def _clip_sizes(config: ConfigDict, vae: Pixels | WanVAE) -> Iterable[str]:
    sizes = {"data": tuple(config.data[name] for name in ("frames", "height", "width"))}
    if (size := clip_size(config.sample, config.data)) != sizes["data"]:
        sizes["sample"] = size
    for where, size in sizes.items():
        yield from check_clip(*size, config.model.dit.patch, vae, where)


def _divides(name: str, size: int, by: str, divisor: int) -> Iterable[str]:
    if size < 1 or size % divisor:
        near = max(round(size / divisor), 1) * divisor
        yield f"{name}={size} is not a multiple of {by}; nearest: {near}"
