"""One row per named size or published model: what `--config=configs/stage1.py:NAME` selects. Every stage reads the same row.

A row holds model sizes (keyword arguments of the modules, passed on as they are) and the values that belong to a size: clip size,
batch, learning rate, and `dit.remat`, what blocks compute again in the backward pass (models/remat.py).
`tiny` and `small` train everything but the LLM from scratch, on rendered scenes unless told otherwise.
`tiny_frozen` and `small_frozen` adapt the backbone of that size that stage 0 made and exported. The `wan` rows adapt published
weights: Wan2.1-T2V in diffusers' layout, and Qwen2.5-1.5B-Instruct, in folders of these names or where model.dit.path,
model.vae.path and model.llm.path say.
"""

import difflib

# What trains on a backbone that is there: the adapter in stage 1, and with it how the backbone hears and moves in stage 2.
ADAPTER = dict(trainable=("^adapter/",), drop=0.0)  # dropped conditions would send the adapter no gradient
MOTION = dict(trainable=("^adapter/", "cross_attn/(key|value)/", "/low_rank_"), drop=0.1)


def _wan(size: str, **dit) -> dict:
    """Sizes: Wan2.1 `wan/configs/wan_t2v_*.py`; rates: proposals after LaVi-Bridge, ELLA and AnimateDiff, see docs/method.md."""
    folder = f"Wan2.1-T2V-{size}-Diffusers"
    return dict(
        model=dict(
            adapter=dict(kind="refiner", d_ctx=4096, width=1024, depth=4, heads=16, registers=4, time_cond="off"),
            dit=dict(path=folder, patch=(1, 2, 2), text_len=512, remat="attention", low_rank=0) | dit,
            llm=dict(
                path="Qwen2.5-1.5B-Instruct",
                instruction="default",
                dtype="bfloat16",
                max_prompt=250,
                max_new=256,
                layer=-1,
                final_norm=False,
            ),
            vae=dict(path=folder),
            null="native",
            native=dict(path=folder, length=508, dtype="bfloat16"),  # and the registers: text_len in all
            dtype="bfloat16",
            prediction="velocity",
            shift=5.0,
        ),
        data=dict(source="folder", height=480, width=832, fps=16.0, states="in_step", texts=0),
        optim=dict(kind="adamw", warmup=500, b2=0.999, ema=0.9999, time_std=1.0),
        sample=dict(steps=50, guidance=6.0, stepper="unipc", batch_size=1),
        frames=17,
        stage1=dict(steps=20_000, batch_size=256, learning_rate=1e-4, decay=(0, 0)) | ADAPTER,
        stage2=dict(steps=20_000, batch_size=64, learning_rate=5e-5, decay=(0, 0), low_rank=32) | MOTION,
    )


BACKBONES = ("tiny", "small")  # sizes that stage 0 makes backbones of


def _frozen(name: str) -> dict:
    """The row called `name` on what `--config=configs/stage0.py:NAME --mode=export` left."""
    row, export = PRESETS[name], f"runs/stage0-{name}/export"
    dit = row["model"]["dit"] | dict(path=export, low_rank=0)
    model = row["model"] | dict(dit=dit, null=f"{export}/null.safetensors")
    return row | dict(model=model, stage1=row["stage1"] | ADAPTER, stage2=row["stage2"] | MOTION | dict(low_rank=8))


PRESETS = {
    # 2 CPU cores; docs/tiny.md has the trials behind these numbers.
    "tiny": dict(
        model=dict(
            adapter=dict(kind="refiner", d_ctx=128, width=128, depth=2, heads=4, registers=4, time_cond="off"),
            dit=dict(
                path="",
                width=128,
                mlp_width=512,
                heads=4,
                depth=6,
                patch=(1, 4, 4),
                text_len=68,  # whatever the condition: prompts of 64 tokens and the registers
                coordinates=True,
                remat="none",
                unroll=True,
            ),
            llm=dict(
                path="embedded",
                instruction="scenes",
                dtype="float32",
                max_prompt=64,
                max_new=32,
                layer=-1,
                final_norm=False,
            ),
            native=dict(path="", length=64, dtype="float32"),
            dtype="float32",
        ),
        data=dict(height=24, width=24, texts=1000, states="cached"),
        optim=dict(kind="muon"),
        sample={},
        frames=9,
        stage1=dict(steps=2000, batch_size=16, learning_rate=2e-3, decay=(1000, 2000)),
        stage2=dict(steps=8000, batch_size=16, learning_rate=2e-3, decay=(4000, 8000)),
    ),
    # One 80-140 GiB GPU: a 0.2 B DiT on 17-frame clips of 64 px, 50 GiB at most.
    "small": dict(
        model=dict(
            adapter=dict(kind="refiner", d_ctx=768, width=1024, depth=4, heads=16, registers=4, time_cond="off"),
            dit=dict(
                path="",
                width=768,
                mlp_width=3072,
                heads=12,
                depth=16,
                patch=(1, 4, 4),
                text_len=128,
                coordinates=True,
                remat="dots",
                unroll=False,
            ),
            llm=dict(
                path="embedded",
                instruction="scenes",
                dtype="bfloat16",
                max_prompt=96,
                max_new=96,
                layer=-1,
                final_norm=False,
            ),
            native=dict(path="", length=124, dtype="bfloat16"),
            dtype="bfloat16",
        ),
        data=dict(height=64, width=64, texts=1000, states="cached"),
        optim=dict(kind="adamw"),
        sample={},
        frames=17,
        stage1=dict(steps=20_000, batch_size=256, learning_rate=3e-4, decay=(10_000, 20_000)),
        stage2=dict(steps=40_000, batch_size=64, learning_rate=2e-4, decay=(20_000, 40_000)),
    ),
    "wan_1_3b": _wan("1.3B", width=1536, mlp_width=8960, heads=12, depth=30),
    "wan_14b": _wan("14B", width=5120, mlp_width=13824, heads=40, depth=40),
}
PRESETS |= {f"{name}_frozen": _frozen(name) for name in BACKBONES}


def preset(name: str) -> dict:
    """The row called `name`; an unknown name raises ValueError with the nearest one."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ValueError(f"unknown preset {name!r}: did you mean {near[0]!r}? Known presets: {', '.join(PRESETS)}")
    return PRESETS[name]
