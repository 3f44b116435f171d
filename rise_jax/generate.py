"""--mode=generate: prompts -> mp4 (PNG for one frame), the rephrased texts with their seeds, and one sheet, of one run or several."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rise_jax import run_config, runs
from rise_jax.build import backend_from, describe_attention
from rise_jax.condition_kinds import CONDITIONS, check_prompts
from rise_jax.data.sources import nearest
from rise_jax.models.attention import Backend
from rise_jax.origin import check_states
from rise_jax.outline import text_identity
from rise_jax.pipeline import Output, Pipeline
from rise_jax.processes import is_first
from rise_jax.published import vae_identity
from rise_jax.sharding import describe, make_mesh
from rise_jax.sheets import comparison_sheet, contact_sheet
from rise_jax.utf8 import read_utf8
from rise_jax.validate import check_use, clip_size
from rise_jax.video import write_file, write_png, write_video
from rise_jax.workdir import set_aside

PICTURED = 64  # prompts on the contact sheet: a picture of hundreds takes gigabytes, and viewers refuse it
SUFFIXES = (".txt", ".md", ".csv", ".json", ".jsonl")  # of files, whatever they hold


class Made(NamedTuple):
    """What one run made of the prompts. `folder`: where its files go below the samples, "" for the workdir's own run; `fps`: the rate
    that its clips had."""

    name: str
    folder: str
    condition: str
    output: Output
    fps: float

    @property
    def title(self) -> str:
        return f"{self.condition}: {self.name}"


def generate(config: ConfigDict, workdir: Path, paths: Mapping[str, str] = MappingProxyType({})) -> int:
    """Writes into WORKDIR/samples: NNN.mp4 or NNN.png per prompt, samples.jsonl, contact_sheet.png. The model is the workdir's run;
    `paths` as in Pipeline.from_run. Of `config`, the groups sample and mesh, the back ends of attention and the VAE's tile are used.

    Every run of `sample.beside` makes the same prompts with the same seeds, kept in N-NAME/ there; contact_sheet.png then has a
    column per run. Where files of theirs are gone, those of the workdir's run are tried. Nothing is written before all is made; the
    folder of an earlier call is then set aside (`set_aside`).
    """
    prompts = read_prompts(config.sample.prompts)
    workdirs = read_workdirs(config.sample.beside, workdir)
    own = run_config.config_at(workdir, paths).model
    places = [paths, *(run_config.moved_paths(folder, own) for folder in workdirs[1:])]
    check_runs(workdirs, config, prompts, places)
    mesh, backend = make_mesh(**config.mesh), backend_from(config.model)
    print(f"{describe(mesh)}, {describe_attention(config.model, backend, mesh)}", flush=True)
    made = [
        _make(config, prompts, folder, number, mesh, backend, place)
        for number, (folder, place) in enumerate(zip(workdirs, places))
    ]
    if not is_first():
        return 0
    samples = workdir / "samples"
    set_aside(samples)
    records = [record for run in made for record in _write(run, samples, prompts)]
    write_file(
        samples / "samples.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    )
    write_png(samples / "contact_sheet.png", sheet_of(made, prompts))
    part = f" (the first {PICTURED} prompts)" if len(prompts) > PICTURED else ""
    print(f"{len(records)} samples and contact_sheet.png{part} are in {samples}")
    return 0


def _make(
    config: ConfigDict,
    prompts: list[str],
    workdir: Path,
    number: int,
    mesh: Mesh,
    backend: Backend,
    paths: Mapping[str, str],
) -> Made:
    tile = config.model.vae.get("tile", 0)
    pipe = Pipeline.from_run(workdir, paths=paths, mesh=mesh, backend=backend, tile=tile)
    sample = config.sample
    pipe.config.sample.batch_size = sample.batch_size
    output = pipe(
        prompts,
        seed=sample.seed,
        steps=sample.steps,
        guidance=sample.guidance,
        stepper=sample.stepper,
        **dict(zip(("frames", "height", "width"), clip_size(sample, pipe.config.data))),
        temperature=sample.temperature,
    )
    name = workdir.resolve().name
    return Made(name, f"{number}-{name}" if number else "", pipe.language.condition, output, pipe.config.data.fps)


def _write(made: Made, samples: Path, prompts: list[str]) -> list[dict]:
    records = []
    rows = zip(prompts, made.output.rephrased, made.output.seeds, made.output.videos)
    for i, (prompt, rephrased, seed, video) in enumerate(rows):
        name = os.path.join(made.folder, f"{i:03d}.{'png' if len(video) == 1 else 'mp4'}")
        if len(video) == 1:
            write_png(samples / name, video[0])
        else:
            write_video(samples / name, video, made.fps)
        texts = {"condition": made.condition, "prompt": prompt, "rephrased": rephrased}
        records.append({"file_name": name, "run": made.name, **texts, "seed": seed})
        said = "" if rephrased is None else f"\n  rephrased: {rephrased}"
        print(f"{samples / name}  seed {seed}, {made.title}\n  prompt:    {prompt}{said}", flush=True)
    return records


def sheet_of(made: list[Made], prompts: list[str]) -> np.ndarray:
    prompts = prompts[:PICTURED]
    videos = [run.output.videos[:PICTURED] for run in made]
    rephrased = [run.output.rephrased[:PICTURED] for run in made]
    if len(made) == 1:
        return contact_sheet(videos[0], prompts, rephrased[0])
    return comparison_sheet(videos, [run.title for run in made], prompts, rephrased)


def read_prompts(prompts: str) -> list[str]:
    """A file with one prompt a line, or a text, several joined by '||'.

    Raises ValueError for an empty one, naming its place, and FileNotFoundError for what can only be meant as a file.
    """
    if not prompts.strip():
        raise ValueError(
            'no prompt given: --config.sample.prompts="a text", several joined by ||, or a file with one a line'
        )
    if os.path.isfile(prompts):  # False for a text too long to be a name, where Path.is_file raises
        lines = read_utf8(prompts).splitlines()
        return [line.strip() for line in lines if line.strip()] or read_prompts("")
    if Path(prompts).suffix in SUFFIXES and not any(map(str.isspace, prompts)):
        near = nearest(Path(prompts).name, os.listdir(Path(prompts).parent) if Path(prompts).parent.is_dir() else [])
        raise FileNotFoundError(f"sample.prompts={prompts!r} is no file{near}")
    found = [part.strip() for part in prompts.split("||")]
    for number, prompt in enumerate(found, 1):
        if not prompt:
            raise ValueError(f"prompt {number} of {len(found)} is empty: {prompts!r}")
    return found


def check_runs(workdirs: list[Path], config: ConfigDict, prompts: list[str], places: list[Mapping[str, str]]) -> None:
    """Raises ValueError, naming the run, where `config` asks for what its model cannot do (`check_use`), a prompt is none for its text
    model, or that or its VAE is another than in training; FileNotFoundError for what is not there.

    The first run's own parts are looked at when it is loaded, which is before it makes anything.
    """
    for number, folder in enumerate(workdirs):
        run = run_config.config_at(folder, places[number])
        try:
            check_use(config, run)
            if number:
                _check_beside(run.model, folder, prompts)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{folder}: {error}") from error


def _check_beside(model: ConfigDict, folder: Path, prompts: list[str]) -> None:
    check_prompts(model.condition, prompts, model[CONDITIONS[model.condition].group])
    meta = check_states(folder, text_identity(model), "it")
    runs.check_vae("it", meta["vae"], vae_identity(model.vae.path))


def read_workdirs(beside: str, workdir: Path) -> list[Path]:
    """`workdir` and the folders of `sample.beside`, several joined by '||', none for ''.

    Raises FileNotFoundError for a folder without a checkpoint of a run, ValueError for an empty name or one named twice.
    """
    parts = [part.strip() for part in beside.split("||")] if beside.strip() else []
    if "" in parts:
        raise ValueError(f"workdir {parts.index('') + 1} of {len(parts)} in sample.beside is empty: {beside!r}")
    folders = [workdir, *map(Path, parts)]
    places = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if places[number] in places[:number]:
            raise ValueError(f"sample.beside={beside!r} names {folder} twice, or names the --workdir: name other runs")
        runs.check_run(folder)
    return folders
