"""--mode=evaluate: how well a run does on held-out prompts, as evaluation.json and a picture.

Videos are made as a user makes them: from the short prompt, with the LLM's own rephrasing, where the run's condition has one. They are
scored against the prompt, never against the rephrasing. The held-out loss is teacher-forced, at fixed times and fixed noise.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from ml_collections import ConfigDict

from rise_jax import metrics, run_config
from rise_jax.build import backend_from, describe_attention
from rise_jax.conditions import complete
from rise_jax.data.loader import make_loader
from rise_jax.data.open import open_source
from rise_jax.language import gathered
from rise_jax.pipeline import Pipeline
from rise_jax.processes import is_first
from rise_jax.sharding import describe, make_mesh, put_rows
from rise_jax.sheets import contact_sheet
from rise_jax.step import make_eval_step
from rise_jax.validate import check_use, clip_size
from rise_jax.video import write_png
from rise_jax.workdir import set_aside, write_json

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)
PICTURED = 12  # videos in the picture
UNHEARD = 32  # prompts whose videos are also made from zeroed states, the first ones
_BESIDE = {"shuffled": "shuffled", "zeroed": "zeroed", "kept_by_rephrasing": "kept by the rephrasing"}


def evaluate(config: ConfigDict, workdir: Path, paths: Mapping[str, str] = MappingProxyType({})) -> int:
    """Writes WORKDIR/evaluation.json and evaluation.png for the run in WORKDIR; `sample.count` held-out prompts of its data. Those of
    an earlier call are set aside (`set_aside`).

    `paths` as in Pipeline.from_run. Of `config`, the groups sample and mesh, the back ends of attention, the VAE's tile, data.max_bad
    and run.seed (which prompts of the scenes are held out for it) are used.
    """
    check_use(config, run_config.config_at(workdir, paths))
    mesh, backend = make_mesh(**config.mesh), backend_from(config.model)
    print(f"{describe(mesh)}, {describe_attention(config.model, backend, mesh)}", flush=True)
    tile = config.model.vae.get("tile", 0)
    pipe = Pipeline.from_run(workdir, paths=paths, mesh=mesh, backend=backend, tile=tile)
    source = _held_out(pipe.config.data, config.sample.count, config.run.seed)
    prompts = [text.prompt for text in source.texts[: config.sample.count]]
    seeds = [config.sample.seed + i for i in range(len(prompts))]
    settings = {name: config.sample[name] for name in ("steps", "guidance", "stepper")}
    settings |= dict(zip(("frames", "height", "width"), clip_size(config.sample, pipe.config.data)))

    heard = pipe.language.rephrase(prompts, temperature=config.sample.temperature, seeds=seeds)
    videos = pipe.render(heard, seeds, **settings)
    result = {
        "condition": pipe.language.condition,
        "prompts": len(prompts),
        "seeds": [seeds[0], seeds[-1]],
        "sample": settings | {"temperature": config.sample.temperature},
        "heldout_loss": heldout_loss(pipe, source, workdir, config.sample.batch_size, config.data.max_bad),
        "flicker": float(np.mean([metrics.flicker(video) for video in videos])),
        "motion_energy": float(np.mean([metrics.motion_energy(video) for video in videos])),
    }
    if pipe.config.data.source == "scenes":
        deaf = heard._replace(states=np.zeros_like(heard.states[:UNHEARD]), mask=heard.mask[:UNHEARD])
        unheard = pipe.render(deaf, seeds[:UNHEARD], **settings)
        result |= {"zeroed_prompts": len(unheard)} | scene_scores(
            videos, unheard, heard.texts, source.scenes[: len(prompts)]
        )
    if not is_first():
        return 0
    set_aside(workdir / "evaluation.json", workdir / "evaluation.png")
    write_json(workdir / "evaluation.json", result)
    write_png(workdir / "evaluation.png", contact_sheet(videos[:PICTURED], prompts[:PICTURED], heard.texts[:PICTURED]))
    _print(result, workdir)
    return 0


def scene_scores(videos, unheard, rephrased, scenes) -> dict:
    """Shares of right attributes: of the videos, against their neighbours' prompts (shuffled), without states, of the rephrasings.

    videos: B clips uint8 [T, H, W, 3]; unheard: the first of them made without states; rephrased: B texts, or None where nothing
    is rephrased; scenes: what the B prompts asked for.
    """
    scores = [metrics.score(video, scene) for video, scene in zip(videos, scenes)]
    shuffled = [metrics.score(video, scene) for video, scene in zip(videos, np.roll(np.array(scenes, object), 1))]
    zeroed = [metrics.score(video, scene) for video, scene in zip(unheard, scenes)]
    kept = [metrics.kept(text, scene) for text, scene in zip(rephrased, scenes) if text is not None]
    two = [len(scene.things) == 2 for scene in scenes]
    return {
        "attribute_accuracy": shares(scores),
        "intervals": intervals(scores),
        "one_thing": shares([score for score, pair in zip(scores, two) if not pair]),
        "two_things": shares([score for score, pair in zip(scores, two) if pair]),
        "shuffled": shares(shuffled),
        "zeroed": shares(zeroed),
        **_kept(kept),
        "by_language": by_language(scores, kept, [scene.language for scene in scenes]),
    }


def by_language(scores: list[dict[str, bool]], kept: list[dict[str, bool]], languages: list[str]) -> dict[str, dict]:
    """{language: number of prompts, and shares of right attributes of their videos and of their rephrasings, where there are any}."""
    rows = {language: np.flatnonzero(np.array(languages) == language) for language in sorted({*languages})}
    return {
        language: {
            "prompts": len(chosen),
            "attribute_accuracy": shares([scores[i] for i in chosen]),
            **_kept([kept[i] for i in chosen if kept]),
        }
        for language, chosen in rows.items()
    }


def _kept(scores: list[dict[str, bool]]) -> dict:
    return {"kept_by_rephrasing": shares(scores)} if scores else {}


def shares(scores: list[dict[str, bool]]) -> dict[str, float]:
    """Share of True per attribute, among the scores that have it."""
    return {name: float(np.mean(column)) for name, column in _columns(scores).items()}


def intervals(scores: list[dict[str, bool]]) -> dict[str, list[float]]:
    """[low, high, n] per attribute: 95 % Wilson interval and the number of prompts that asked for it."""
    return {name: [*metrics.wilson(sum(column), len(column)), len(column)] for name, column in _columns(scores).items()}


def heldout_loss(pipe: Pipeline, source, workdir: Path, batch_size: int, max_bad: float) -> dict:
    """Denoising loss per time on held-out clips, with their own states, with another clip's, and with none.

    Clips that cannot be read do not count; RuntimeError above the share `max_bad` of them, or where none can be read.
    """
    size, quarantine = min(batch_size, len(source)), workdir / "quarantine.jsonl"
    loader = make_loader(
        source,
        batch_size=size,
        seed=0,
        quarantine_file=quarantine,
        max_bad=max_bad,
        process=jax.process_index(),
    )
    batch = next(loader)
    read = int(batch["weight"].sum())
    if not read:
        raise RuntimeError(f"none of {size} held-out clips can be read: see {quarantine}")
    pairs = complete([source.texts[i] for i in batch["text"]], pipe.language, workdir / "captions-heldout.jsonl")
    states, mask = pipe.language.teach(pairs)
    step = jax.jit(partial(_mean_loss, make_eval_step(pipe.model)), **gathered(pipe.mesh))
    given = {
        "true": (states, mask),
        "shuffled": (np.roll(states, 1, axis=0), np.roll(mask, 1, axis=0)),
        "zeroed": (np.zeros_like(states), mask),
    }
    clips = {"video": batch["video"], "weight": batch["weight"], "index": batch["index"].astype(np.int32)}
    batches = {
        name: put_rows(clips | {"states": array, "states_mask": keep}, pipe.mesh)
        for name, (array, keep) in given.items()
    }
    with pipe.on_mesh():
        losses = {name: np.asarray(step(pipe.params, pipe.vae, rows)).tolist() for name, rows in batches.items()}
    return {"clips": read, "times": list(TIMES), **losses}


def _mean_loss(eval_step, params, vae, batch):
    losses = eval_step(params, {"params": {}, "vae": vae}, batch, TIMES, jax.random.key(0))
    weight = batch["weight"][:, None]
    return (losses * weight).sum(0) / weight.sum()


def _held_out(data: ConfigDict, count: int, seed: int):
    names = ("source", "path", "frames", "height", "width", "fps")
    return open_source(**{name: data[name] for name in names}, split="heldout", texts=count, seed=seed)


def _columns(scores):
    names = dict.fromkeys(name for score in scores for name in score)
    return {name: [score[name] for score in scores if name in score] for name in names}


def _print(result: dict, workdir: Path) -> None:
    if "attribute_accuracy" in result:
        for name, share in result["attribute_accuracy"].items():
            low, high, n = result["intervals"][name]
            others = ", ".join(f"{title} {result[key][name]:.2f}" for key, title in _BESIDE.items() if key in result)
            print(f"{name:>11}: {share:.3f}  [{low:.2f}, {high:.2f}] of {n} prompts; {others}")
        for language, part in result["by_language"].items():
            kept = part.get("kept_by_rephrasing")
            said = f"; {_BESIDE['kept_by_rephrasing']} {kept['all']:.2f}" if kept else ""
            print(f"{language:>11}: all {part['attribute_accuracy']['all']:.3f} of {part['prompts']} prompts{said}")
    losses = result["heldout_loss"]
    print("held-out loss: " + ", ".join(f"t={t}: {loss:.4f}" for t, loss in zip(losses["times"], losses["true"])))
    first, last = result["seeds"]
    print(
        f"{workdir / 'evaluation.json'} and .png: {result['prompts']} held-out prompts, seeds {first} to {last}",
        flush=True,
    )
