"""Stage 2: motion adaptation on videos, from stage 1's trainable leaves (arXiv 2511.04317, Fig. 2b).

    python main.py --config=configs/stage2.py            # starts from runs/stage1-tiny when it is there
    python main.py --config=configs/stage2.py:small

Stage 1 plus what changes: clips of several frames, steps, batch and learning rate. Cost and expected loss of `tiny`: docs/tiny.md.
"""

from ml_collections import ConfigDict

from configs import stage1
from configs.presets import preset as preset_row


def get_config(preset: str = "tiny") -> ConfigDict:
    config = stage1.get_config(preset)
    row = preset_row(config.run.preset)
    config.run.update(stage="stage2", init_from="stage1")
    stage1.set_stage(config, row["stage2"])
    config.data.frames = row["frames"]
    return config
