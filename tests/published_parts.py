"""The tiny parts of a published model for the tests: a pipeline's folder as diffusers writes it, an LLM, a null condition."""

import numpy as np
import safetensors.numpy
import wan
import wan_vae
from tiny import on_one_device, tiny_config, write_llm

from rise_jax.build import model_from
from rise_jax.language import states_in_batch
from rise_jax.runs import initial_parameters

SIZES = dict(channels=5, patch=(1, 2, 2), heads=2, head_width=12, mlp_width=32, depth=2, d_ctx=16, text_len=164)


def write_files(folder):
    wan.build_torch(**SIZES).save_pretrained(folder / "wan" / "transformer")
    wan_vae.reference(wan_vae.SMALL).save_pretrained(folder / "wan" / "vae")
    null = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
    safetensors.numpy.save_file({"null": null}, folder / "null.safetensors")
    write_llm(folder / "llm")
    return folder


def config_of(files, stage=1, **overrides):
    """The adapter alone is trained, on the tiny published parts."""
    config = tiny_config(stage, files / "llm", data__frames=5, run__steps=2, run__batch_size=8, data__texts=3)
    config.model.dit.update(path=str(files / "wan"), patch=SIZES["patch"], coordinates=False, low_rank=0)
    config.model.vae.path = str(files / "wan")
    config.model.update(null=str(files / "null.safetensors"), trainable=("^adapter/",), prediction="velocity")
    config.optim.update(drop=0.0, learning_rate=0.1)
    config.sample.update(frames=5)
    for name, value in overrides.items():
        group, key = name.split("__")
        (config.model.dit if group == "dit" else config[group])[key] = value
    return config


def null_of(config, source):
    """The null condition that a run with this config starts with from the run `source`."""
    model = model_from(config.model, source.config.model.adapter.d_ctx, states_in_batch)
    heard = np.zeros((1, 2, 16), np.float32), np.ones((1, 2), bool)
    return np.asarray(
        initial_parameters(model, config, source, source.meta["llm"], heard, on_one_device).tree["null"]["embedding"]
    )
