"""One row per named size: what `--config=configs/stage1.py:NAME` selects. Every stage reads the same row.

A row holds model sizes (keyword arguments of the modules, passed on as they are) and the values that belong to a size: clip size,
batch, learning rate. `tiny` and `small` train everything but the LLM from scratch, on rendered scenes unless told otherwise.
"""

import difflib

PRESETS = {
    # 2 CPU cores; docs/tiny.md has the trials behind these numbers.
    "tiny": dict(
        adapter=dict(kind="refiner", d_ctx=128, width=128, depth=2, heads=4, registers=4, time_cond="off"),
        dit=dict(
            width=128, mlp_width=512, heads=4, depth=6, patch=(1, 4, 4), text_len=36, coordinates=True, unroll=True
        ),
        llm=dict(path="embedded", instruction="scenes", dtype="float32", max_prompt=64, max_new=32, layer=-1),
        dtype="float32",
        frames=9,
        height=24,
        width=24,
        texts=1000,
        states="cached",
        optimizer="muon",
        stage1=dict(steps=2000, batch_size=16, learning_rate=2e-3, decay=(1000, 2000)),
        stage2=dict(steps=4000, batch_size=16, learning_rate=2e-3, decay=(2000, 4000)),
    ),
    # One 80-140 GiB GPU: a 0.2 B DiT on 17-frame clips of 64 px.
    "small": dict(
        adapter=dict(kind="refiner", d_ctx=768, width=1024, depth=4, heads=16, registers=4, time_cond="off"),
        dit=dict(width=768, mlp_width=3072, heads=12, depth=16, patch=(1, 4, 4), text_len=128, coordinates=True),
        llm=dict(path="embedded", instruction="scenes", dtype="bfloat16", max_prompt=96, max_new=96, layer=-1),
        dtype="bfloat16",
        frames=17,
        height=64,
        width=64,
        texts=1000,
        states="cached",
        optimizer="adamw",
        stage1=dict(steps=20_000, batch_size=256, learning_rate=3e-4, decay=(10_000, 20_000)),
        stage2=dict(steps=40_000, batch_size=64, learning_rate=2e-4, decay=(20_000, 40_000)),
    ),
}


def preset(name: str) -> dict:
    """The row called `name`; an unknown name raises ValueError with the nearest one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown preset {name!r}: did you mean {near[0]!r}? Known presets: {', '.join(PRESETS)}")
    return PRESETS[name]
