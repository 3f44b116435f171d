"""Runs as training leaves them, with random parameters everywhere and no step made: for tests of what reads a run."""

from noisy import noise

from rise_jax.build import language_from, model_from
from rise_jax.checkpoint import Checkpoints
from rise_jax.language import states_in_batch
from rise_jax.optim import make_optimizer
from rise_jax.published import load_vae
from rise_jax.runs import RANDOM
from rise_jax.step import new_state
from rise_jax.trees import named_leaves
from rise_jax.workdir import write_config


def write_run(config, workdir):
    """A run on random parameters, all of them trainable, at step 1."""
    language = language_from(config.model)
    params = noise(model_from(config.model, language.width, states_in_batch).abstract, spread=0.25)
    meta = {
        "config": config.to_dict(),
        "provenance": dict.fromkeys(named_leaves(params), RANDOM),
        "llm": language.identity,
        "vae": load_vae(config.model.vae.path)[1],
    }
    workdir.mkdir(parents=True)
    write_config(workdir, config.to_dict())
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, new_state(params, make_optimizer(1.0, kind=config.optim.kind)), meta)
    return workdir
