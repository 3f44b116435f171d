"""Prompt -> video in Python: what --mode=generate and --mode=evaluate call.

pipe = Pipeline.from_run("runs/stage2-tiny")  # or Pipeline.from_export(FOLDER)
out = pipe(["a cat running"], seed=0)        # out.videos uint8 [B, T, H, W, 3], out.rephrased list of texts
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rise_jax import flow, run_config, runs, sampler
from rise_jax.build import Model, in_tiles, language_from
from rise_jax.condition_kinds import Condition
from rise_jax.conditions import rephrased
from rise_jax.exported import read_export
from rise_jax.language import Rephrasings, gathered
from rise_jax.models.attention import Backend
from rise_jax.origin import check_states
from rise_jax.published import load_vae, open_vae
from rise_jax.sharding import batch_ways, put_parameters, put_rows, shardings
from rise_jax.validate import check_clip, clip_size, sample_faults, tile_faults
from rise_jax.video import to_uint8

LOG = logging.getLogger(__name__)


class Output(NamedTuple):
    """videos uint8 [B, T, H, W, 3]; the rephrasing that conditioned each (None where the prompt itself did); the seed that makes
    each again, alone or in any batch."""

    videos: np.ndarray
    rephrased: list[str | None]
    seeds: list[int]


class Pipeline:
    """A trained run, ready to make videos. `sample` holds the defaults of steps, guidance, stepper and size."""

    def __init__(
        self,
        model: Model,
        params: dict,
        vae: dict,
        language: Condition,
        config: ConfigDict,
        mesh: Mesh | None = None,
    ):
        """`params` are the model's parameters, `vae` those of its VAE; all go over the mesh, or on one device without one."""
        self.model, self.language, self.config, self.mesh = model, language, config, mesh
        self.params, self.vae = (put_parameters(tree, mesh) for tree in (params, vae))
        self._sample = jax.jit(partial(make_videos, model), static_argnames=("shape", "stepper"), **gathered(mesh))

    @classmethod
    def from_run(
        cls,
        workdir: str | Path,
        *,
        paths: Mapping[str, str] | None = None,
        mesh: Mesh | None = None,
        backend: Backend | None = None,
        tile: int = 0,
    ) -> "Pipeline":
        """The newest checkpoint of a run, with its EMA parameters. Raises FileNotFoundError where there is none.

        `paths` says where files of the model lie that were elsewhere in training, such as {"llm": "/models/Qwen3-0.6B"}; its keys
        are among `run_config.PARTS`. ValueError where they are others.

        `mesh` (sharding.make_mesh) spreads parameters and videos over devices; `backend` of attention is by default this
        platform's. Neither has to be that of training. `tile` is the side, in pixels, of the pieces in which a Wan VAE decodes:
        less memory, the same video; 0: as in training.
        """
        run, language, vae = open_run(Path(workdir), paths or {}, mesh, backend, tile)
        return cls(run.model, run.params, vae, language, run.config, mesh)

    @classmethod
    def from_export(
        cls,
        folder: str | Path,
        llm: str | Path | None = None,
        *,
        mesh: Mesh | None = None,
        backend: Backend | None = None,
        tile: int = 0,
    ) -> "Pipeline":
        """What --mode=export wrote: the same videos as from the run itself. `llm` is the LLM's path, where it lies elsewhere;
        `mesh`, `backend` and `tile` as for `from_run`.

        Raises FileNotFoundError naming missing files, ValueError where LLM, adapter, DiT and VAE do not belong together.
        """
        export = read_export(Path(folder), llm and str(llm), mesh, backend or Backend.here())
        return cls(*export._replace(model=_pieced(export.model, export.config, tile)), mesh)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        stepper: str | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        temperature: float | None = None,
    ) -> Output:
        """One video per prompt; video i takes seed + i. What is None takes the run's own `sample` value.

        Raises ValueError for an empty prompt, one over the token budget, a size that does not fit the model, or a setting that
        --config.sample would refuse.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("no prompt given: write at least one")
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {number} of {len(prompts)} is no text: {prompt!r}")
        given = dict(steps=steps, guidance=guidance, stepper=stepper, frames=frames, height=height, width=width)
        sample = settled(self.config.sample, given | dict(seed=seed, temperature=temperature))
        check_size(self.config, sample)
        seeds = [sample.seed + i for i in range(len(prompts))]
        rephrasings = rephrased(prompts, self.language, temperature=sample.temperature, seeds=seeds)
        return Output(self.render(rephrasings, seeds, **given), rephrasings.texts, seeds)

    def render(
        self,
        rephrasings: Rephrasings,
        seeds: Sequence[int],
        *,
        steps=None,
        guidance=None,
        stepper=None,
        frames=None,
        height=None,
        width=None,
    ) -> np.ndarray:
        """Videos uint8 [B, T, H, W, 3] of states that are there already; settings as in `__call__`.

        Several processes each make a part, and all get all of it: all must call it, with the same arguments.
        """
        given = dict(steps=steps, guidance=guidance, stepper=stepper, frames=frames, height=height, width=width)
        sample = settled(self.config.sample, given)
        size = check_size(self.config, sample)
        seeds = np.asarray(seeds, np.int32)
        times = sampler.times_for(sample.stepper, sample.steps, self.model.shift)
        ways = batch_ways(self.mesh)
        limit = -(-min(sample.batch_size, len(seeds)) // ways) * ways
        if len(seeds) < ways:
            LOG.info(
                "%d videos leave %d of %d devices without one: a larger mesh.context shares each",
                len(seeds),
                ways - len(seeds),
                ways,
            )
        videos = []
        for start in range(0, len(seeds), limit):
            count = min(limit, len(seeds) - start)
            padded = np.resize(np.arange(start, start + count), limit)
            rows = put_rows((rephrasings.states[padded], rephrasings.mask[padded], seeds[padded]), self.mesh)
            with self.on_mesh():
                video = self._sample(
                    self.params,
                    self.vae,
                    *rows,
                    times,
                    sample.guidance,
                    shape=self.model.latent_shape(size),
                    stepper=sample.stepper,
                )
            videos.append(np.asarray(video)[:count])
        return np.concatenate(videos)

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """While active, the pipeline's mesh is the current one."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()


def _pieced(model: Model, config: ConfigDict, tile: int) -> Model:
    """With another `tile` than that of training, where there is one."""
    if faults := [*tile_faults(tile, open_vae(config.model.vae.path))]:
        raise ValueError(faults[0])
    return in_tiles(model, tile) if tile else model


def settled(sample: ConfigDict, given: Mapping[str, Any]) -> ConfigDict:
    """A `sample` group with what is `given` in place of its own, None aside. Raises ValueError for values that are none."""
    settings = sample.copy_and_resolve_references()
    for name, value in given.items():
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        try:
            settings.update({} if value is None else {name: value})
        except TypeError as error:
            kind = type(sample[name]).__name__
            raise ValueError(f"sample.{name}={value!r} is no {kind}, such as {sample[name]!r}") from error
    if faults := sample_faults(settings):
        raise ValueError("; ".join(faults))
    return settings


def check_size(config: ConfigDict, sample: ConfigDict) -> tuple[int, int, int]:
    """(frames, height, width) of a `sample` group (see `clip_size`). ValueError where they do not fit the model of a run's config."""
    size = clip_size(sample, config.data)
    faults = check_clip(*size, config.model.dit.patch, open_vae(config.model.vae.path), "sample")
    if faults:
        raise ValueError("; ".join(faults))
    return size


def open_run(
    workdir: Path, paths: Mapping[str, str], mesh: Mesh | None = None, backend: Backend | None = None, tile: int = 0
) -> tuple[runs.Run, Condition, dict]:
    """(run, its LLM, its VAE's parameters), spread over the mesh, or on one device; `paths` and `tile` as in Pipeline.from_run.

    FileNotFoundError where there is no run, ValueError when LLM or VAE are others now.
    """
    config = run_config.config_at(workdir, paths)
    runs.check_run(workdir)
    place = mesh and partial(shardings, mesh=mesh)
    language = language_from(config.model, mesh=mesh)
    meta = check_states(workdir, language.identity, str(workdir))
    run = runs.read_run(workdir, language.width, place, backend or Backend.here(), paths)
    vae, identity = load_vae(config.model.vae.path, place)
    runs.check_vae(str(workdir), meta["vae"], identity)
    model = _pieced(run.model, run.config, tile)
    run.config.model.vae.tile = tile or run.config.model.vae.get("tile", 0)
    return run._replace(model=model), language, vae


def make_videos(model: Model, params, vae, states, mask, seeds, times, guidance, *, shape, stepper):
    """Videos uint8 [B, T, H, W, 3]: `make_latents`, then decoding. Pure, to be jitted; `vae` as in Pipeline."""
    latents = make_latents(model, params, states, mask, seeds, times, guidance, shape=shape, stepper=stepper)
    return to_uint8(model.decode(vae, latents))


def make_latents(model: Model, params, states, mask, seeds, times, guidance, *, shape, stepper) -> jax.Array:
    """Latents [B, *shape] for states [B, L, d_llm] and their mask: noise from the seeds int32 [B] alone, one scan over `times`.

    `params` as in Pipeline, `times` and `stepper` as in sampler.py.
    """
    noise = sampler.initial_noise(jax.random.key(0), seeds, shape)
    null = model.null(params)

    def keys_and_values(t):
        context = model.context(params, states, mask, t)
        return model.kv(params, jnp.concatenate([context, jnp.broadcast_to(null, context.shape)]))

    kv = None if model.time_cond else keys_and_values(None)

    def velocity(x, t):
        now = keys_and_values(t[: len(states)]) if model.time_cond else kv
        return flow.to_velocity(model.dit(params, x, t, now), x, t, model.prediction)

    return sampler.sample(sampler.guide(velocity, guidance), noise, times, stepper)
