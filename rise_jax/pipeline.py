"""Prompt -> video in Python: what --mode=generate and --mode=evaluate call.

pipe = Pipeline.from_run("runs/stage2-tiny")  # or Pipeline.from_export(FOLDER)
out = pipe(["a cat running"], seed=0)        # out.videos uint8 [B, T, H, W, 3], out.rephrased list of texts
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rise_jax import flow, runs, sampler
from rise_jax.build import Model, language_from
from rise_jax.condition_kinds import Condition
from rise_jax.exported import read_export
from rise_jax.language import Rephrasings
from rise_jax.processes import gathered
from rise_jax.published import load_vae, open_vae
from rise_jax.validate import check_clip
from rise_jax.video import to_uint8


class Output(NamedTuple):
    """videos uint8 [B, T, H, W, 3]; the rephrasing that conditioned each (None where the prompt itself did); the seed that makes
    each again, alone or in any batch."""

    videos: np.ndarray
    rephrased: list[str | None]
    seeds: list[int]


class Pipeline:
    """A trained run, ready to make videos. `sample` holds the defaults of steps, guidance, stepper and size."""

    def __init__(self, model: Model, params: dict, vae: dict, language: Condition, config: ConfigDict):
        """`params` are the model's parameters, `vae` those of its VAE."""
        self.model, self.language, self.config = model, language, config
        self.params, self.vae = jax.device_put(params), jax.device_put(vae)
        self._sample = jax.jit(partial(make_videos, model), static_argnames=("shape", "stepper"))

    @classmethod
    def from_run(cls, workdir: str | Path) -> "Pipeline":
        """The newest checkpoint of a run, with its EMA parameters. Raises FileNotFoundError where there is none."""
        run, language, vae = open_run(Path(workdir))
        return cls(run.model, run.params, vae, language, run.config)

    @classmethod
    def from_export(cls, folder: str | Path, llm: str | Path | None = None) -> "Pipeline":
        """What --mode=export wrote: the same videos as from the run itself. `llm` is the LLM's path, where it lies elsewhere.

        Raises FileNotFoundError naming missing files, ValueError where LLM, adapter, DiT and VAE do not belong together.
        """
        return cls(*read_export(Path(folder), llm and str(llm)))

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

        Raises ValueError for an empty prompt, one over the token budget, or a size that does not fit the model.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("no prompt given: write at least one")
        defaults = self.config.sample
        temperature = defaults.temperature if temperature is None else temperature
        seeds = [seed + i for i in range(len(prompts))]
        rephrasings = self.language.rephrase(prompts, temperature=temperature, seeds=seeds)
        videos = self.render(
            rephrasings,
            seeds,
            steps=steps,
            guidance=guidance,
            stepper=stepper,
            frames=frames,
            height=height,
            width=width,
        )
        return Output(videos, rephrasings.texts, seeds)

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
        chosen = {name: self.config.sample[name] if value is None else value for name, value in given.items()}
        size = (chosen["frames"], chosen["height"], chosen["width"])
        faults = check_clip(*size, self.model.patch, open_vae(self.config.model.vae.path), "sample")
        if faults:
            raise ValueError("; ".join(faults))
        times = sampler.times_for(chosen["stepper"], chosen["steps"], self.model.shift)
        ways, own = jax.process_count(), jax.process_index()
        limit = min(self.config.sample.batch_size, -(-len(seeds) // ways))
        videos = []
        for start in range(0, len(seeds), limit * ways):
            rows = np.arange(start, min(start + limit * ways, len(seeds)))
            padded = np.resize(rows, (ways, limit))[own]
            video = self._sample(
                self.params,
                self.vae,
                rephrasings.states[padded],
                rephrasings.mask[padded],
                jnp.asarray(seeds, jnp.int32)[padded],
                times,
                chosen["guidance"],
                shape=self.model.latent_shape(size),
                stepper=chosen["stepper"],
            )
            videos.append(gathered(np.asarray(video))[: len(rows)])
        return np.concatenate(videos)


def open_run(workdir: Path) -> tuple[runs.Run, Condition, dict]:
    """(run, its LLM, its VAE's parameters). FileNotFoundError where there is no run, ValueError when LLM or VAE are others now."""
    config = ConfigDict(runs.read_config(workdir))
    language = language_from(config.model)
    run = runs.read_run(workdir, language.width)
    runs.check_heard(str(workdir), run.meta["llm"], language.identity)
    vae, identity = load_vae(config.model.vae.path)
    runs.check_vae(str(workdir), run.meta["vae"], identity)
    return run, language, vae


def make_videos(model: Model, params, vae, states, mask, seeds, times, guidance, *, shape, stepper):
    """States [B, L, d_llm] and their mask -> videos uint8 [B, T, H, W, 3]; pure, to be jitted.

    `shape` is that of one video's latents: their noise comes from the seeds int32 [B] alone. `params` and `vae` as in Pipeline,
    `times` and `stepper` as in sampler.py. One scan over the times, then decoding.
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

    return to_uint8(model.decode(vae, sampler.sample(sampler.guide(velocity, guidance), noise, times, stepper)))
