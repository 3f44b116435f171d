"""--mode=plan: parameters, memory per device and floating-point operations of a run, said before anything is bought or loaded.

Everything is traced on abstract values: no weights, no device. The mesh is the config's, of as many devices as its sizes multiply to.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from rise_jax import known_sizes, memory, rephrase, sampler
from rise_jax.build import model_from
from rise_jax.flops import count_flops
from rise_jax.outline import Outline, outline, random_key
from rise_jax.pipeline import make_videos
from rise_jax.sharding import bytes_per_device, check_batch, planned_mesh
from rise_jax.step import sample_losses
from rise_jax.validate import validate

GIB, TERA = 2**30, 1e12


class Plan(NamedTuple):
    """parameters: part -> (all, trained). training, use: what -> bytes per device. step, video: what -> operations."""

    parameters: dict[str, tuple[int, int]]
    training: dict[str, int]
    use: dict[str, int]
    step: dict[str, int]
    video: dict[str, int]


def plan(config: ConfigDict, workdir: Path) -> int:
    """Prints the plan; the workdir is not touched."""
    here = ConfigDict(config.to_dict())
    if not Path(config.model.dit.path).exists():
        here.model.dit.path = ""
    validate(here, known_sizes.vae_sizes(config.model.vae.path)[0])
    mesh = planned_mesh(**config.mesh)
    check_batch(config.run.batch_size, mesh)
    outlined = outline(config)
    print(_text(config, mesh, outlined, make_plan(config, mesh, outlined)), flush=True)
    return 0


def make_plan(config: ConfigDict, mesh: AbstractMesh, outlined: Outline) -> Plan:
    """The plan of a valid config for a mesh whose `data` and `fsdp` axes the batch divides over."""
    return Plan(
        parameters(outlined),
        training_memory(config, mesh, outlined),
        use_memory(config, outlined),
        step_flops(config, outlined),
        video_flops(config, outlined),
    )


def parameters(outlined: Outline) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, those of them that are trained)."""
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    parts = {"LLM": (size(outlined.llm_params), 0)}
    for name, title in (("adapter", "adapter"), ("dit", "DiT"), ("null", "null condition")):
        if name in outlined.model.abstract:
            parts[title] = size(outlined.model.abstract[name]), size(outlined.trainable.get(name, {}))
    parts["VAE"] = size(outlined.vae_params), 0
    return parts | ({"native encoder": (size(outlined.native), 0)} if outlined.native else {})
