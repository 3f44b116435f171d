"""--mode=evaluate: how well a run does on held-out prompts, as evaluation.json and a picture.

Videos are made as a user makes them: from the short prompt, with the LLM's own rephrasing, where the run's condition has one. They are
scored against the prompt, never against the rephrasing. The held-out loss is teacher-forced, at fixed times and fixed noise; it comes
first, so that what is wrong with clips and texts is told before any video is made.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from ml_collections import ConfigDict

from rise_jax import metrics, run_config
from rise_jax.build import backend_from, describe_attention
from rise_jax.condition_kinds import Condition
from rise_jax.conditions import complete, rephrased
from rise_jax.data.attributes import Scene
from rise_jax.data.loader import make_loader
from rise_jax.data.open import open_source
from rise_jax.data.sources import Source, Text
from rise_jax.language import gathered
from rise_jax.pipeline import Pipeline, open_run
from rise_jax.processes import check_agreed, is_first
from rise_jax.runs import Run
from rise_jax.sharding import batch_ways, describe, make_mesh, put_rows
from rise_jax.sheets import contact_sheet
from rise_jax.step import make_eval_step
from rise_jax.trees import named_leaves, tree_sha256
from rise_jax.validate import check_use, clip_size
from rise_jax.video import write_png
from rise_jax.workdir import set_aside, write_json

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.97)
CLIPS = 32  # of the held-out loss, and texts of its scenes, whatever sample.count and sample.batch_size are
PICTURED = 12  # videos in the picture
UNHEARD = 32  # prompts whose videos are also made from zeroed states, the first ones
_BESIDE = {"shuffled": "shuffled", "zeroed": "zeroed", "kept_by_rephrasing": "kept by the rephrasing"}


def evaluate(config: ConfigDict, workdir: Path, paths: Mapping[str, str] = MappingProxyType({})) -> int:
    """Writes WORKDIR/evaluation.json and evaluation.png for the run in WORKDIR; `sample.count` held-out prompts of its data. Those of
    an earlier call are set aside (`set_aside`).

    `paths` as in Pipeline.from_run. Of `config`, the groups sample and mesh, the back ends of attention, the VAE's tile, data.max_bad
    and run.seed (which prompts of the scenes are held out for it) are used.
    """
    own = run_config.config_at(workdir, paths)
    check_use(config, own)
    source = _held_out(own.data, config.sample.count, config.run.seed)
    measured = _held_out(own.data, CLIPS, config.run.seed) if own.data.source == "scenes" else source
    run, pipe = _opened(config, workdir, paths)
    prompts = [text.prompt for text in source.texts[: config.sample.count]]
    check_heldout([Text(prompt, None) for prompt in prompts], pipe.language)
    seeds = [config.sample.seed + i for i in range(len(prompts))]
    settings = {name: config.sample[name] for name in ("steps", "guidance", "stepper")}
    settings |= dict(zip(("frames", "height", "width"), clip_size(config.sample, pipe.config.data)))

    losses = heldout_loss(pipe, measured, workdir, config.sample.batch_size, config.data.max_bad)
    heard = rephrased(prompts, pipe.language, temperature=config.sample.temperature, seeds=seeds)
    videos = pipe.render(heard, seeds, **settings)
    result = _identity(run) | {
        "condition": pipe.language.condition,
        "prompts": len(prompts),
        "prompts_seed": config.run.seed,
        "seeds": [seeds[0], seeds[-1]],
        "sample": settings | {"temperature": config.sample.temperature},
        "heldout_loss": losses,
        "flicker": float(np.mean([metrics.flicker(video) for video in videos])),
        "motion_energy": float(np.mean([metrics.motion_energy(video) for video in videos])),
    }
    if pipe.config.data.source == "scenes":
        deaf = heard._replace(states=np.zeros_like(heard.states[:UNHEARD]), mask=heard.mask[:UNHEARD])
        unheard = pipe.render(deaf, seeds[:UNHEARD], **settings)
        scenes = [scorable(scene, settings["frames"]) for scene in source.scenes[: len(prompts)]]
        result |= {"zeroed_prompts": len(unheard)} | scene_scores(videos, unheard, heard.texts, scenes)
    if not is_first():
        return 0
    set_aside(workdir / "evaluation.json", workdir / "evaluation.png")
    write_json(workdir / "evaluation.json", result)
    write_png(workdir / "evaluation.png", contact_sheet(videos[:PICTURED], prompts[:PICTURED], heard.texts[:PICTURED]))
    _print(result, workdir)
    return 0


def _opened(config: ConfigDict, workdir: Path, paths: Mapping[str, str]) -> tuple[Run, Pipeline]:
    mesh, backend = make_mesh(**config.mesh), backend_from(config.model)
    print(f"{describe(mesh)}, {describe_attention(config.model, backend, mesh)}", flush=True)
    run, language, vae = open_run(workdir, paths, mesh, backend, config.model.vae.get("tile", 0))
    run.config.sample.batch_size = config.sample.batch_size
    return run, Pipeline(run.model, run.params, vae, language, run.config, mesh)


def _identity(run: Run) -> dict:
    """What is measured: the step, the hash of its EMA as in summary.json, the data. All processes must call it."""
    ema = {name: leaf for name, leaf in named_leaves(run.params).items() if name in run.trained}
    data = {name: run.config.data[name] for name in ("source", "path")}
    return {"step": run.step, "ema_sha256": tree_sha256(ema), "data": data}


def check_heldout(texts: Sequence[Text], language: Condition) -> None:
    """Raises ValueError for texts that the run's model cannot take: how many, the first one, and what its user can do."""
    faults = {}
    for text in dict.fromkeys(texts):
        try:
            language.check(text)
        except ValueError as error:
            faults[text] = str(error).partition("; ")[0]  # what follows is advice for training
    if not faults:
        return
    first, fault = next(iter(faults.items()))
    raise ValueError(
        f"{len(faults)} of {len({*texts})} held-out texts cannot be used with this run, the first, {first.prompt[:80]!r}: {fault}. "
        "Shorten or mend them, or leave their rows out of the held-out split; of scenes, another run.seed holds out others"
    )


def scorable(scene: Scene, frames: int) -> Scene:
    """The scene as far as so many frames can show what was asked for: a single picture shows no direction."""
    return scene if frames > 1 else replace(scene, asked=scene.asked - {"direction"})


def scene_scores(videos, unheard, rephrased, scenes) -> dict:
    """Shares of right attributes: of the videos, against their neighbours' prompts (shuffled; absent for one video), without states,
    of the rephrasings.

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
        **({"shuffled": shares(shuffled)} if len(scenes) > 1 else {}),
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


def heldout_loss(pipe: Pipeline, source: Source, workdir: Path, batch_size: int, max_bad: float) -> dict:
    """Denoising loss per time on CLIPS held-out clips, all where there are fewer: with their own states, with another clip's
    (shuffled; absent where all have one text) and with none.

    `batch_size` of them go through the model at a time. Clips that cannot be read do not count; RuntimeError above the share `max_bad`
    of them, or where none can be read. ValueError for texts as in `check_heldout`.
    """
    clips = _read(source, workdir / "quarantine.jsonl", max_bad)
    check_agreed(clips["index"].tolist(), "which held-out clips can be read")
    texts = [source.texts[i] for i in clips.pop("text")]
    check_heldout(texts, pipe.language)
    states, mask = pipe.language.teach(complete(texts, pipe.language, workdir / "captions-heldout.jsonl"))
    given = {"true": (states, mask)}
    if len({*texts}) > 1:
        given["shuffled"] = np.roll(states, 1, axis=0), np.roll(mask, 1, axis=0)
    given["zeroed"] = np.zeros_like(states), mask
    step = jax.jit(_at_times(make_eval_step(pipe.model)), **gathered(pipe.mesh))
    losses = {
        name: _in_parts(step, pipe, clips | {"states": array, "states_mask": keep}, batch_size).mean(0).tolist()
        for name, (array, keep) in given.items()
    }
    return {"clips": len(texts), "times": list(TIMES), **losses}


def _read(source: Source, quarantine: Path, max_bad: float) -> dict[str, np.ndarray]:
    """The rows `video`, `index` and `text` of the clips that can be read."""
    count = min(CLIPS, len(source))
    # Few at a time: the loader's threads share them. Of an odd number the last is followed by one of them again.
    loader = make_loader(
        source, batch_size=2, seed=0, quarantine_file=quarantine, max_bad=max_bad, process=jax.process_index()
    )
    batches = list(itertools.islice(loader, -(-count // 2)))
    rows = {name: np.concatenate([batch[name] for batch in batches])[:count] for name in batches[0]}
    read = rows.pop("weight") > 0
    if not read.any():
        raise RuntimeError(f"none of {count} held-out clips can be read: see {quarantine}")
    return {name: values[read] for name, values in rows.items()} | {"index": rows["index"][read].astype(np.int32)}


def _at_times(eval_step: Callable) -> Callable:
    return lambda params, vae, rows: eval_step(params, {"params": {}, "vae": vae}, rows, TIMES, jax.random.key(0))


def _in_parts(step: Callable, pipe: Pipeline, rows: dict[str, np.ndarray], size: int) -> np.ndarray:
    """step(params, vae, rows) for rows [n, ...], `size` at a time, or as many more as the devices take at once."""
    count, ways = len(rows["index"]), batch_ways(pipe.mesh)
    size = -(-min(size, count) // ways) * ways
    parts = []
    for start in range(0, count, size):
        padded = np.resize(np.arange(start, min(start + size, count)), size)
        part = put_rows({name: value[padded] for name, value in rows.items()}, pipe.mesh)
        with pipe.on_mesh():
            parts.append(np.asarray(step(pipe.params, pipe.vae, part))[: count - start])
    return np.concatenate(parts)


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
        f"{workdir / 'evaluation.json'} and .png: step {result['step']}, {result['prompts']} held-out prompts, "
        f"seeds {first} to {last}",
        flush=True,
    )
