"""A run by its shapes alone: the model, and abstract values of all that a training step or a sampler takes. Loads no weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rise_jax import known_sizes, rephrase
from rise_jax.build import Model, model_from
from rise_jax.condition_kinds import CONDITIONS
from rise_jax.language import identity_of, instruction_file, states_in_batch
from rise_jax.models.attention import XLA, Backend
from rise_jax.models.llm import make_llm
from rise_jax.models.t5 import make_t5
from rise_jax.models.wan_vae import WanVAE
from rise_jax.optim import make_optimizer
from rise_jax.published import LEARNED, NATIVE
from rise_jax.step import new_state
from rise_jax.text import Instruction, Prompter, Tokenizer
from rise_jax.trees import partition
from rise_jax.utf8 import read_utf8
from rise_jax.weights import EMBEDDED, EMBEDDED_PACKAGE, open_weights
from rise_jax.weights_t5 import encoder_folder

LETTERS = 4  # of an English instruction per token, about


class Text(NamedTuple):
    """What conditions the video. Trees are of ShapeDtypeStructs."""

    params: dict
    prefix: Any  # the instruction's keys and values; None where there is no instruction
    width: int
    length: int  # states per text
    prompt: int  # tokens per prompt, what its layout adds included where the tokenizer is here
    rows: Callable  # batch size -> the rows from which a training step computes states
    states: Callable  # (frozen, batch) -> (states, mask), in a training step
    use: Callable  # (params, prefix, ids, mask) -> states of prompts in use
    cache: Callable  # batch size -> the key/value cache in use, beside the prefix
    note: str  # where the sizes are from


class Outline(NamedTuple):
    """Trees are of ShapeDtypeStructs. `notes`: part -> where its sizes are from. `native`: the encoder that a new run
    asks for its null condition or its calibration; None where it asks for neither."""

    model: Model
    text: Text
    vae: dict
    native: Text | None
    optimizer: Any
    trainable: dict
    frozen: dict  # of the model's own leaves
    notes: dict[str, str]


def outline(
    config: ConfigDict, backend: Backend = XLA, text: Text | None = None, *, null: bool = True, calibrate: bool = True
) -> Outline:
    """Sizes are read from the files that the config names; where these are not here, they are the published ones (known_sizes.py).

    `backend` is that of the model's attention; `text` spares reading the text model's files again;
    `null` and `calibrate` as for `published.check_files`.

    Raises ValueError for an LLM that is neither here nor known by its name, a native encoder of another width than the DiT's
    context, and whatever `validate` would.
    """
    vae, vae_note = known_sizes.vae_sizes(config.model.vae.path)
    text = text or (_native(config) if config.model.condition == NATIVE else _llm(config))
    notes = {"text model": text.note, "DiT": _dit_note(config.model.dit.path), "VAE": vae_note}
    asked = (null and config.model.null == NATIVE) or (calibrate and config.model.calibrate)
    native = _native(config) if asked else None
    if native and native.width != config.model.adapter.d_ctx:
        place = f"{config.model.native.path} ({native.note})"
        raise ValueError(f"model.adapter.d_ctx={config.model.adapter.d_ctx}, but {native.width} in {place}")
    states = text.states if config.data.states == "in_step" else states_in_batch
    model = model_from(_with_null(config.model), text.width, states, vae=vae, backend=backend)
    trainable, frozen = partition(model.abstract, list(config.model.trainable))
    return Outline(
        model=model,
        text=text,
        vae=vae.abstract if isinstance(vae, WanVAE) else {},
        native=native,
        optimizer=make_optimizer(1.0, kind=config.optim.kind),  # its rates change no shape
        trainable=trainable,
        frozen=frozen,
        notes=notes,
    )


def parameters_of(model: ConfigDict, width: int) -> dict:
    """The abstract parameters that a config's `model` group means on an LLM of this width, whether its files are here or not."""
    vae = known_sizes.vae_sizes(model.vae.path)[0]
    return model_from(_with_null(model), width, states_in_batch, vae=vae).abstract


def text_identity(model: ConfigDict) -> dict:
    """The identity (`language.identity_of`) of what conditions the video, without the hash of files that are not here.

    Those that are here are read as a whole.
    """
    condition = model.condition
    settings = model[CONDITIONS[condition].group]
    if condition == NATIVE:
        here = settings.path and Path(settings.path).exists()
        return identity_of(condition, encoder_folder(settings.path).sha256() if here else None, settings.dtype)
    rules = read_utf8(instruction_file(settings.instruction)) if CONDITIONS[condition].writes else None
    sizes = known_sizes.llm_sizes(settings.path)[0]
    layer = sizes.layer_index(settings.get("layer", -1))
    sha256 = open_weights(settings.path).sha256() if _is_here(settings.path) else None
    final_norm = settings.get("final_norm", False)
    return identity_of(
        condition,
        sha256,
        settings.dtype,
        rules=rules,
        layer=layer,
        depth=sizes.depth,
        final_norm=final_norm,
    )


def step_arguments(config: ConfigDict, outlined: Outline, size: int) -> tuple:
    """(state, frozen, batch, key): what a training step takes, for `size` clips."""
    data, text = config.data, outlined.text
    frozen = {"params": outlined.frozen, "vae": outlined.vae}
    batch = dict(
        video=_like((size, data.frames, data.height, data.width, 3), jnp.uint8),
        index=_like((size,), jnp.int32),
        weight=_like((size,)),
        step=_like((), jnp.int32),
    )
    if data.states == "in_step":
        frozen |= {"llm": text.params, "prefix": text.prefix}
        batch |= text.rows(size)
    else:
        batch |= dict(states=_like((size, text.length, text.width)), states_mask=_like((size, text.length), jnp.bool_))
    state = jax.eval_shape(partial(new_state, optimizer=outlined.optimizer), outlined.trainable)
    return state, frozen, batch, jax.eval_shape(lambda: jax.random.key(0))


def drawn(config: ConfigDict, outlined: Outline, size: int) -> tuple:
    """(times, noise, dropped conditions): what `step.sample_losses` takes beside the batch."""
    shape = outlined.model.latent_shape((config.data.frames, config.data.height, config.data.width))
    return _like((size,)), _like((size, *shape)), _like((size,), jnp.bool_)


def sampler_arguments(config: ConfigDict, outlined: Outline, size: int) -> tuple:
    """(params, vae, states, mask, seeds): what `pipeline.make_videos` takes before the times, for `size` videos."""
    rows = size, outlined.text.length
    states = _like((*rows, outlined.text.width)), _like(rows, jnp.bool_)
    return outlined.model.abstract, outlined.vae, *states, _like((size,), jnp.int32)


def _llm(config: ConfigDict) -> Text:
    settings, condition = config.model.llm, config.model.condition
    sizes, note = known_sizes.llm_sizes(settings.path)
    norm_inner = settings.get("final_norm", False)
    llm, params = make_llm(replace(sizes, norm_inner=norm_inner), jnp.dtype(settings.dtype))
    layer = sizes.layer_index(settings.get("layer", -1))
    length = settings[CONDITIONS[condition].budget]
    tokens = lambda size, length: (_like((size, length), jnp.int32), _like((size, length), jnp.bool_))
    tokenizer = open_weights(settings.path).tokenizer() if _is_here(settings.path) else None
    prefix, prompt = None, settings.max_prompt
    if CONDITIONS[condition].writes:
        told, around = _chat_lengths(settings, tokenizer)
        prefix = jax.eval_shape(partial(rephrase.encode_prefix, llm), params, _like((told,), jnp.int32))
        prompt += around

    def states(frozen, batch):
        if condition == "rephrase":
            names = ("prompt_ids", "prompt_mask", "rephrased_ids", "states_mask")
            made = rephrase.teacher_forced(
                llm, frozen["llm"], frozen["prefix"], *(batch[x] for x in names), layer=layer
            )
        else:
            made = rephrase.encoded(llm, frozen["llm"], batch["encoded_ids"], batch["states_mask"], layer=layer)
        return jax.lax.stop_gradient(made).astype(jnp.float32), batch["states_mask"]

    def rows(size):
        ids, mask = tokens(size, length)
        if condition != "rephrase":
            return dict(encoded_ids=ids, states_mask=mask)
        prompt_ids, prompt_mask = tokens(size, prompt)
        return dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, rephrased_ids=ids, states_mask=mask)

    def use(params, prefix, ids, mask):
        if prefix is None:
            return rephrase.encoded(llm, params, ids, mask, layer=layer)
        written = rephrase.rephrase(
            llm, params, prefix, ids, mask, max_new=settings.max_new, eos=(0,), pad=0, layer=layer
        )
        if condition == "rephrase":
            return written.states
        return rephrase.encoded(llm, params, written.tokens, written.mask, layer=layer)

    def cache(size):
        room = prompt + settings.max_new if prefix else 0
        return _like((2, sizes.depth, size, sizes.kv_heads, room, sizes.head_width), jnp.dtype(settings.dtype))

    return Text(params, prefix, sizes.width, length, prompt, rows, states, use, cache, note)


def _native(config: ConfigDict) -> Text:
    settings = config.model.native
    sizes, note = known_sizes.native_sizes(settings.path)
    encoder, params = make_t5(sizes, jnp.dtype(settings.dtype))
    use = lambda params, prefix, ids, mask: encoder(params)(ids, mask)

    def states(frozen, batch):
        made = use(frozen["llm"], None, batch["encoded_ids"], batch["states_mask"])
        return jax.lax.stop_gradient(made).astype(jnp.float32), batch["states_mask"]

    def rows(size):
        shape = size, settings.length
        return dict(encoded_ids=_like(shape, jnp.int32), states_mask=_like(shape, jnp.bool_))

    return Text(params, None, sizes.width, settings.length, settings.length, rows, states, use, lambda size: [], note)


def _with_null(model: ConfigDict) -> ConfigDict:
    """A null condition in a file that is not here counts as the native one: its length alone is unknown."""
    if model.null in (LEARNED, NATIVE) or Path(model.null).exists():
        return model
    return ConfigDict(model.to_dict() | {"null": NATIVE})


def _is_here(llm: str) -> bool:
    return find_spec(EMBEDDED_PACKAGE) is not None if llm == EMBEDDED else Path(llm).exists()


def _chat_lengths(settings: ConfigDict, tokenizer: Tokenizer | None) -> tuple[int, int]:
    """Tokens of an instruction in the LLM's chat, and of the layout around a prompt behind it.

    Where its tokenizer is not here: about, a token per LETTERS letters, and none.
    """
    file = instruction_file(settings.instruction)
    instruction = Instruction.read(file)
    if tokenizer is None:
        return max(1, len(read_utf8(file)) // LETTERS), 0
    prompter = Prompter(tokenizer, instruction, settings.max_prompt)
    return len(prompter.prefix_ids), prompter.overhead


def _dit_note(path: str) -> str:
    if not path:
        return "by the config"
    return f"by the config, which {path} must fit" if Path(path).exists() else f"by the config; {path} is not here"


def _like(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
