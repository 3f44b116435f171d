"""Stage 0: a video model from scratch, for stage 1 to be frozen when no published one is used. Trains everything but the LLM.

    python main.py --config=configs/stage0.py:tiny_images            # single frames first: stage 1 needs a model of images too
    python main.py --config=configs/stage0.py                        # then clips; starts from runs/stage0_images-tiny when it is there
    python main.py --config=configs/stage0.py --mode=export          # runs/stage0-tiny/export
    python main.py --config=configs/stage1.py:tiny_frozen            # the adapter alone, on that
    python main.py --config=configs/stage2.py:tiny_frozen

The condition is what a text encoder gives (`encode`: the LLM's states of the prompt itself, nothing rephrased), so stage 1 starts as
with a published model: on a text space of someone else's, with a new adapter. Steps, rates and cost are those of the same preset's
stages 1 (images) and 2 (clips) from scratch: docs/tiny.md.
"""

from ml_collections import ConfigDict

from configs import stage1, stage2
from configs.presets import BACKBONES

IMAGES = "_images"


def get_config(preset: str = "tiny") -> ConfigDict:
    """`preset` names a row without a backbone of its own; with `_images` behind it, the run on single frames."""
    size, images = (preset or "tiny").removesuffix(IMAGES), preset.endswith(IMAGES)
    config = (stage1 if images else stage2).get_config(size)
    if size not in BACKBONES:
        raise ValueError(
            f"preset {size!r} has a backbone, {config.model.dit.path}; stage 0 makes one: use {' or '.join(BACKBONES)}"
        )
    config.run.stage = "stage0_images" if images else "stage0"
    config.run.init_from = "" if images else "stage0_images"
    config.model.condition = "encode"
    return config
