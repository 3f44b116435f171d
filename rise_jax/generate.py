"""--mode=generate: prompts -> mp4 (PNG for one frame), the rephrased texts with their seeds, and one contact sheet."""

import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from rise_jax.pipeline import Pipeline
from rise_jax.validate import validate
from rise_jax.video import contact_sheet, write_file, write_png, write_video


def generate(config: ConfigDict, workdir: Path) -> int:
    """Writes into WORKDIR/samples: NNN.mp4 or NNN.png per prompt, samples.jsonl, contact_sheet.png. The model is the workdir's run."""
    validate(config)
    prompts = read_prompts(config.sample.prompts)
    pipe = Pipeline.from_run(workdir)
    sample = config.sample
    pipe.config.sample.batch_size = sample.batch_size
    out = pipe(
        prompts,
        seed=sample.seed,
        steps=sample.steps,
        guidance=sample.guidance,
        stepper=sample.stepper,
        frames=sample.frames,
        height=sample.height,
        width=sample.width,
        temperature=sample.temperature,
    )
    folder = workdir / "samples"
    records = []
    for i, (prompt, rephrased, seed, video) in enumerate(zip(prompts, out.rephrased, out.seeds, out.videos)):
        name = f"{i:03d}.png" if len(video) == 1 else f"{i:03d}.mp4"
        if len(video) == 1:
            write_png(folder / name, video[0])
        else:
            write_video(folder / name, video, config.data.fps)
        records.append({"file_name": name, "prompt": prompt, "rephrased": rephrased, "seed": seed})
        print(f"{folder / name}  seed {seed}\n  prompt:    {prompt}\n  rephrased: {rephrased}", flush=True)
    write_file(
        folder / "samples.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    )
    write_png(folder / "contact_sheet.png", contact_sheet(out.videos, prompts, out.rephrased))
    print(f"{len(prompts)} samples and contact_sheet.png are in {folder}")
    return 0


def read_prompts(prompts: str) -> list[str]:
    """A file with one prompt a line, or a text, several joined by '||'. Raises ValueError for an empty one, naming its place."""
    if not prompts.strip():
        raise ValueError(
            'no prompt given: --config.sample.prompts="a text", several joined by ||, or a file with one a line'
        )
    if os.path.isfile(prompts):  # False for a text too long to be a name, where Path.is_file raises
        lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()] or read_prompts("")
    found = [part.strip() for part in prompts.split("||")]
    for number, prompt in enumerate(found, 1):
        if not prompt:
            raise ValueError(f"prompt {number} of {len(found)} is empty: {prompts!r}")
    return found
