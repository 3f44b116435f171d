"""The paper's own setting at the size of a test: a backbone of someone else's, frozen, and the real embedded LLM.

Stage 0 makes the backbone (prompts encoded, nothing rephrased) and exports it to diffusers' layout. Stage 1 trains a new adapter on it
and nothing else; stage 2 the adapter and the backbone's motion. Everything through the command line,
on 64 pictures of one scene each, and in stage 2 on a few clips.
"""

import hashlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import wan
from diffusers import WanTransformer3DModel
from folders import write_metadata
from quick import QUICK

from rise_jax import Pipeline, flow, runs
from rise_jax.data.attributes import BACKGROUNDS, COLOURS, SHAPES, SIZES, STILL, Scene, Thing
from rise_jax.data.drawing import render
from rise_jax.export import export
from rise_jax.step import sample_losses
from rise_jax.trees import named_leaves
from rise_jax.video import read_video, write_png, write_video
from rise_jax.weights import EMBEDDED_SHA256

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SAMPLES, SIZE, WIDTH = 64, 16, 576  # pictures, pixels, width of the embedded LLM
PROMPT, NEW, REGISTERS = 18, 16, 2  # tokens: a picture's prompt has 12, its caption 11
TEXT_LEN = PROMPT + REGISTERS
TIMES = (0.98, 0.99, 0.998)  # below, a picture of few pixels can be read through the noise
SMALL = dict(
    model__adapter=dict(d_ctx=32, width=32, depth=1, heads=2, registers=REGISTERS),
    model__dit=dict(width=48, mlp_width=96, heads=2, depth=2, patch=(1, 4, 4), text_len=TEXT_LEN, unroll=False),
    model__llm=dict(max_prompt=PROMPT, max_new=NEW),
    data=dict(source="folder", height=SIZE, width=SIZE),
    sample=dict(steps=4, batch_size=2),
    run=dict(steps=70, batch_size=32, save_every=1000),
    optim=dict(kind="adamw", learning_rate=4e-3, decay_from=35, decay_until=70, time_mean=2.0),
)
PROMPTS = ["small red circle, white background", "large blue square, black background"]


class Runs(NamedTuple):
    """Workdirs of the three stages, the folder of stage 0's export, the hash of its files before stage 1, and what generate said."""

    stage0: Path
    stage1: Path
    stage2: Path
    backbone: Path
    before: dict[str, str]
    said: list[dict]


def draw(folder, frames, count):
    """Pictures, or clips of a still scene, of every background, colour, shape and size, shuffled, the first of 90."""
    rng = np.random.default_rng(0)
    scenes = list(product(BACKGROUNDS, COLOURS, SHAPES, SIZES))
    rows = []
    for i, n in enumerate(rng.permutation(len(scenes))[:count]):
        background, colour, shape, size = scenes[n]
        name, thing = f"{i:02d}.{'png' if frames == 1 else 'mp4'}", f"{size} {colour} {shape}"
        video = render(Scene((Thing(shape, colour, size, STILL),), background), frames, SIZE, SIZE, rng)
        folder.mkdir(exist_ok=True)
        write_png(folder / name, video[0]) if frames == 1 else write_video(folder / name, video, 8.0)
        texts = dict(
            prompt=f"{thing}, {background} background", rephrased=f"A {thing} on a plain {background} background."
        )
        rows.append({"file_name": name, "split": "train", **texts})
    write_metadata(folder, rows)
    return folder


def main(config, workdir, mode="train", **overrides):
    """main.py with sizes of SMALL and further groups of overrides; generate is compiled as it is for users."""
    groups = {name: SMALL.get(name, {}) | overrides.get(name, {}) for name in {*SMALL, *overrides}}
    flags = [
        f"--config.{group.replace('__', '.')}.{name}={value}"
        for group, values in groups.items()
        for name, value in values.items()
    ]
    environment = os.environ | {
        "XLA_FLAGS": "" if mode == "generate" else QUICK,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "PYTHONPATH": str(ROOT / "tests" / "fixtures" / "without_torch"),
    }
    done = subprocess.run(
        [sys.executable, "main.py", f"--config=configs/{config}", f"--workdir={workdir}", f"--mode={mode}", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pictures, clips = draw(folder / "pictures", 1, SAMPLES), draw(folder / "clips", 5, 4)
    stage0 = main("stage0.py:tiny_images", folder / "stage0", data=dict(path=pictures), optim=dict(drop=0.2))
    assert export(None, stage0) == 0
    backbone = stage0 / "export"
    before = hashes(backbone)
    parts = dict(model=dict(null=backbone / "null.safetensors"), model__dit=SMALL["model__dit"] | dict(path=backbone))
    stage1 = main("stage1.py:tiny_frozen", folder / "stage1", data=dict(path=pictures), **parts)
    parts["model__dit"] |= dict(low_rank=2)
    stage2 = main(
        "stage2.py:tiny_frozen",
        folder / "stage2",
        data=dict(path=clips, frames=5),
        sample=dict(frames=5),
        run=dict(steps=3, batch_size=4, init_from=stage1),
        **parts,
    )
    sample = dict(frames=5, prompts="||".join(PROMPTS))
    main("stage2.py:tiny_frozen", stage2, "generate", sample=sample, model__dit=parts["model__dit"])
    said = [json.loads(line) for line in (stage2 / "samples" / "samples.jsonl").read_text().splitlines()]
    return Runs(stage0, stage1, stage2, backbone, before, said)


def bits(leaves):
    return {name: np.asarray(leaf).tobytes() for name, leaf in leaves.items()}


def leaves_of(workdir):
    return bits(named_leaves(runs.read_run(workdir, WIDTH).params))


def meta_of(workdir):
    return runs.read_run(workdir, WIDTH).meta


def losses(workdir, pictures):
    """Mean loss over samples and TIMES, at the same noise, with a picture's own caption, with another's, and with none."""
    run = runs.read_run(workdir, WIDTH)
    videos = jnp.stack([read_video(pictures / f"{i:02d}.png")[0] for i in range(SAMPLES)])
    with np.load(workdir / "states.npz") as saved:
        states, mask = saved["states"], saved["mask"]
    assert len(states) == SAMPLES
    noise = flow.draw_noise(
        flow.sample_keys(jax.random.key(1), 0, jnp.arange(SAMPLES)), run.model.latent_shape((1, SIZE, SIZE))
    )

    @jax.jit
    def at(params, states, mask, t, drop):
        batch = dict(video=videos, states=states, states_mask=mask)
        times, drops = jnp.full(SAMPLES, t), jnp.full(SAMPLES, drop)
        return sample_losses(run.model, params, {"vae": {}}, batch, times, noise, drops).mean()

    mean = lambda states, mask, drop: float(np.mean([at(run.params, states, mask, t, drop) for t in TIMES]))
    order = np.roll(np.arange(SAMPLES), 1)
    return dict(
        own=mean(states, mask, False), other=mean(states[order], mask[order], False), null=mean(states, mask, True)
    )


def test_stage_1_keeps_every_frozen_byte(left):
    """The files, the leaves read from them, and the LLM; what trained is the adapter alone, and a new one."""
    assert hashes(left.backbone) == left.before
    before, after = leaves_of(left.stage0), leaves_of(left.stage1)
    frozen = {name for name in after if not name.startswith("adapter/")}
    assert {name for name in frozen if name.startswith("dit/")} == {x for x in before if x.startswith("dit/")}
    assert [name for name in frozen - {"null/embedding"} if after[name] != before[name]] == []
    assert after["null/embedding"] == before["adapter/null"]
    provenance = meta_of(left.stage1)["provenance"]
    assert {provenance[name].split()[0] for name in frozen} == {"file"}
    assert {provenance[name] for name in after.keys() - frozen} == {"random"}
    assert {meta_of(workdir)["llm"]["sha256"] for workdir in left[:3]} == {EMBEDDED_SHA256}
    assert [meta_of(workdir)["llm"].get("condition") for workdir in left[:3]] == ["encode", None, None]


def test_64_samples_are_heard_through_a_frozen_backbone(left):
    """The adapter's condition explains the pictures far better than none does, and another picture's explains them no better."""
    found = losses(left.stage1, left.stage1.parent / "pictures")
    print(found)
    assert found["own"] < 0.7 * found["null"]
    assert found["other"] > found["null"]


def test_stage_2_moves_its_patterns_and_nothing_else(left):
    before, after = leaves_of(left.stage1), leaves_of(left.stage2)
    moving = lambda name: (
        name.startswith("adapter/") or "cross_attn/key/" in name or "cross_attn/value/" in name or "/low_rank_" in name
    )
    moved = {name for name in after if after[name] != before.get(name)}
    assert moved == {name for name in after if moving(name)}
    new = {name for name in after if "/low_rank_" in name}
    assert len(new) == 8 and before.keys() == after.keys() - new
    assert hashes(left.backbone) == left.before


def test_generate_says_what_it_heard(left):
    assert [record["prompt"] for record in left.said] == PROMPTS
    assert "red circle" in left.said[0]["rephrased"] and "blue square" in left.said[1]["rephrased"]
    assert read_video(left.stage2 / "samples" / "000.mp4")[0].shape == (5, SIZE, SIZE, 3)


def test_the_end_is_exported_and_diffusers_loads_it(left):
    assert export(None, left.stage2) == 0
    run = runs.read_run(left.stage2, WIDTH)
    model = WanTransformer3DModel.from_pretrained(left.stage2 / "export" / "transformer")
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, *run.model.latent_shape((5, SIZE, SIZE)))).astype("f4")
    t, context = np.array([0.3, 0.95], "f4"), rng.normal(size=(2, TEXT_LEN, 32)).astype("f4")
    with torch.no_grad():
        theirs = wan.forward_torch(model, *map(torch.tensor, (latents, t, context)), TEXT_LEN)

    @jax.jit
    def forward(params, latents, t, context):
        with jax.default_matmul_precision("highest"):
            return run.model.dit(params, latents, t, run.model.kv(params, context))

    assert wan.relative(forward(run.params, latents, t, context), theirs) < 1e-5
    pipe = Pipeline.from_export(left.stage2 / "export")
    heard = pipe.language.rephrase(PROMPTS)
    assert heard.texts == [record["rephrased"] for record in left.said]
    ours = Pipeline(run.model, run.params, pipe.vae, pipe.language, pipe.config)
    other, videos = (each.render(heard, [0, 1]) for each in (pipe, ours))
    assert np.abs(other.astype(int) - videos.astype(int)).max() <= 1
