"""A run by its shapes alone: the model, and abstract values of all that a training step or a sampler takes. Reads no weights."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rise_jax import known_sizes, rephrase
from rise_jax.build import Model, model_from
from rise_jax.language import INSTRUCTIONS, states_in_batch
from rise_jax.models.llm import make_llm
from rise_jax.models.llm_config import LLMConfig
from rise_jax.models.t5 import make_t5
from rise_jax.models.wan_vae import WanVAE
from rise_jax.optim import make_optimizer
from rise_jax.published import NATIVE
from rise_jax.step import new_state
from rise_jax.trees import partition

LETTERS = 4  # per token of an instruction, about, in English


class Outline(NamedTuple):
    """Trees are of ShapeDtypeStructs. `notes`: part -> where its sizes are from. `native` is {} where no native encoder is named."""

    model: Model
    optimizer: Any
    llm: Any  # parameters -> module
    llm_config: LLMConfig
    llm_params: dict
    prefix: rephrase.Past  # keys and values of the instruction
    vae: Any
    vae_params: dict
    native: dict
    trainable: dict
    frozen: dict  # of the model's own leaves
    notes: dict[str, str]

    def step_arguments(self, config: ConfigDict) -> tuple:
        """(state, frozen, batch, key): what a training step takes, the batch of all devices."""
        in_step = {"llm": self.llm_params, "prefix": self.prefix} if config.data.states == "in_step" else {}
        frozen = {"params": self.frozen, "vae": self.vae_params, **in_step}
        return jax.eval_shape(self._state, self.trainable), frozen, self.batch(config), key()

    def batch(self, config: ConfigDict, size: int | None = None) -> dict:
        """What a step takes of `run.batch_size` clips, or of `size`."""
        data, llm = config.data, config.model.llm
        size = size or config.run.batch_size
        if data.states == "in_step":
            texts = dict(
                prompt_ids=_rows(size, llm.max_prompt, jnp.int32),
                prompt_mask=_rows(size, llm.max_prompt, jnp.bool_),
                rephrased_ids=_rows(size, llm.max_new, jnp.int32),
            )
        else:
            texts = dict(states=jax.ShapeDtypeStruct((size, llm.max_new, self.llm_config.width), jnp.float32))
        return texts | dict(
            video=jax.ShapeDtypeStruct((size, data.frames, data.height, data.width, 3), jnp.uint8),
            states_mask=_rows(size, llm.max_new, jnp.bool_),
            index=jax.ShapeDtypeStruct((size,), jnp.int32),
            weight=jax.ShapeDtypeStruct((size,), jnp.float32),
            step=jax.ShapeDtypeStruct((), jnp.int32),
        )

    def params(self) -> dict:
        """The model's whole tree, as the sampler takes it."""
        return self.model.abstract

    def _state(self, trainable: dict):
        return new_state(trainable, self.optimizer)


def outline(config: ConfigDict) -> Outline:
    """Sizes are read from the files that the config names; where these are not here, they are the published ones (known_sizes.py).

    Raises ValueError for an LLM that is neither here nor known by its name.
    """
    llm_config, llm_note = known_sizes.llm_sizes(config.model.llm.path)
    vae, vae_note = known_sizes.vae_sizes(config.model.vae.path)
    notes = {"LLM": llm_note, "VAE": vae_note, "DiT": _dit_note(config.model.dit.path)}
    llm, llm_params = make_llm(llm_config, jnp.dtype(config.model.llm.dtype))
    layer = llm_config.layer_index(config.model.llm.get("layer", -1))

    def states_in_step(frozen, batch):
        names = ("prompt_ids", "prompt_mask", "rephrased_ids", "states_mask")
        rows = (batch[name] for name in names)
        states = rephrase.teacher_forced(llm, frozen["llm"], frozen["prefix"], *rows, layer=layer)
        return jax.lax.stop_gradient(states).astype(jnp.float32), batch["states_mask"]

    native = {}
    if config.model.null == NATIVE:
        native_config, notes["native encoder"] = known_sizes.native_sizes(config.model.native.path)
        native = make_t5(native_config, jnp.bfloat16)[1]
    states = states_in_step if config.data.states == "in_step" else states_in_batch
    model = model_from(config.model, llm_config.width, states, vae=vae)
    trainable, frozen = partition(model.abstract, list(config.model.trainable))
    length = instruction_length(config.model.llm.instruction)
    ids = jax.ShapeDtypeStruct((length,), jnp.int32)
    return Outline(
        model=model,
        optimizer=make_optimizer(1.0, kind=config.optim.kind),  # its rate is no size
        llm=llm,
        llm_config=llm_config,
        llm_params=llm_params,
        prefix=jax.eval_shape(lambda params, ids: rephrase.encode_prefix(llm, params, ids), llm_params, ids),
        vae=vae,
        vae_params=vae.abstract if isinstance(vae, WanVAE) else {},
        native=native,
        trainable=trainable,
        frozen=frozen,
        notes=notes,
    )


def instruction_length(name: str) -> int:
    """Tokens of an instruction, about: a token per LETTERS letters, as its LLM's tokenizer may not be here."""
    file = INSTRUCTIONS / f"{name}.txt"
    file = file if file.is_file() else Path(name)
    return max(1, len(file.read_text(encoding="utf-8")) // LETTERS)


def key() -> jax.ShapeDtypeStruct:
    """Of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _dit_note(path: str) -> str:
    if not path:
        return "from the config"
    return f"from the config, which {path} must fit" if Path(path).exists() else f"from the config: {path} is not here"


def _rows(size: int, length: int, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, length), dtype)
