"""Prompt tokens -> states of the rephrased tokens: teacher-forced for training, decoded with a cache for use.

One index convention (`predictor`): with H[p] the final-normed state after reading token p, the state of rephrased token y_i is the
one that emits it, H[P - 1 + i], for P tokens of instruction and prompt. Both paths leave out the state of the end token.
`layer` takes the states of another layer after the same tokens (`LLMConfig.layer_index`).

`encoded` is what the method is compared with: a text read by itself, the states *after* each of its tokens.
`llm` is a function from parameters to the model (`models.llm.make_llm`); all functions are pure, with static shapes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rise_jax.axes import Array, Bool, Float, Int, PyTree, typed
from rise_jax.models.llm import LLM, Past


class Rephrased(NamedTuple):
    """states [B, R, D], tokens int32 [B, R], mask bool [B, R]; states are zero and tokens are padding where mask is False."""

    states: Array
    tokens: Array
    mask: Array


@typed
def encode_prefix(llm: Callable, params: PyTree, prefix_ids: Int[Array, " L"]) -> Past:
    """Keys and values of the tokens that all prompts share (the instruction), batch 1; computed once."""
    ids = prefix_ids[None]
    return llm(params)(ids, jnp.ones(ids.shape, bool), jnp.arange(ids.shape[1])[None])[1]


@typed
def teacher_forced(
    llm: Callable,
    params: PyTree,
    prefix: Past,
    prompt_ids: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    rephrased_ids: Int[Array, "B R"],
    rephrased_mask: Bool[Array, "B R"],
    *,
    layer: int = -1,
) -> Float[Array, "B R D"]:
    """States that emit given rephrased tokens, in one parallel pass; zero where `rephrased_mask` is False.

    Prompts are padded on the left, rephrased tokens (without the end token) on the right.
    """
    # The last rephrased token is not read: the state it leaves emits the end token.
    ids = jnp.concatenate([prompt_ids, rephrased_ids[:, :-1]], axis=1)
    mask = jnp.concatenate([prompt_mask, rephrased_mask[:, :-1]], axis=1)
    states, _ = llm(params)(ids, mask, _positions(prefix, mask), (prefix,), keep=(layer,))
    return jnp.where(rephrased_mask[..., None], states[0, :, prompt_ids.shape[1] - 1 :], 0)


@typed
def encoded(
    llm: Callable,
    params: PyTree,
    ids: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    *,
    leading: Sequence[int] = (),
    layer: int = -1,
) -> Float[Array, "B L D"]:
    """States H[p] after each token of texts that are read by themselves, behind `leading` ids (BOS) only; zero where `mask` is False.

    Texts are padded on the right.
    """
    start = jnp.broadcast_to(jnp.asarray(leading, jnp.int32), (len(ids), len(leading)))
    ids = jnp.concatenate([start, ids], axis=1)
    read = jnp.pad(mask, ((0, 0), (len(leading), 0)), constant_values=True)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    states, _ = llm(params)(ids, read, positions, keep=(layer,))
    return jnp.where(mask[..., None], states[0, :, len(leading) :], 0)


@typed
def rephrase(
    llm: Callable,
    params: PyTree,
    prefix: Past,
    prompt_ids: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    *,
    max_new: int,
    eos: Sequence[int],
    pad: int,
    layer: int = -1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    keys: Array | None = None,
) -> Rephrased:
    """Continues left-padded prompts by at most `max_new` tokens and keeps the state that emitted each one.

    Greedy at temperature 0. Otherwise `keys` [B] holds one random key per row (fold the row's global index into one key), so that
    a row's tokens do not depend on how rows are packed in batches. `repetition_penalty` (CTRL, arXiv 1909.05858, section 4.1) counts
    generated tokens only, never the prompt's.
    """
    if temperature > 0 and keys is None:
        raise ValueError(
            f"temperature={temperature} draws tokens and needs keys, one per row; use temperature=0 for greedy"
        )
    model = llm(params)
    batch, prompt_width = prompt_ids.shape
    keep = (-1, layer)  # what the next token is drawn from, and what conditions the video
    states, past = model(prompt_ids, prompt_mask, _positions(prefix, prompt_mask), (prefix,), keep=keep)
    past = past.extended(max_new)
    start = prefix.mask.shape[1] + prompt_mask.sum(axis=1)
    choose = _Chooser(model, tuple(eos), pad, temperature, top_p, repetition_penalty, keys)
    first = choose(states[:, :, -1], jnp.zeros(batch, bool), choose.nothing_seen(batch), 0)

    def step(carry, i):
        picked, past = carry
        read = lambda: _read_one(model, picked.token, start + i, (prefix, past), keep)
        # Once every row has ended nothing is read any more. The cache is written outside: a branch would copy it.
        skip = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(read))
        states, new = jax.lax.cond(picked.done.all(), skip, read)
        following = choose(states, picked.done, picked.seen, i + 1)
        return (following, past.written(new, prompt_width + i)), following.emitted

    _, rest = jax.lax.scan(step, (first, past), jnp.arange(max_new - 1))
    return Rephrased(*(jnp.concatenate([a[None], b]).swapaxes(0, 1) for a, b in zip(first.emitted, rest)))


class _Picked(NamedTuple):
    token: Array
    done: Array
    seen: Array
    emitted: tuple


class _Chooser:
    """States [2, B, D], the final and the asked ones -> next token of every row, by the settings of `rephrase`."""

    def __init__(self, model: LLM, eos, pad, temperature, top_p, repetition_penalty, keys):
        self.model, self.eos, self.pad = model, eos, pad
        self.temperature, self.top_p, self.repetition_penalty, self.keys = temperature, top_p, repetition_penalty, keys

    def nothing_seen(self, batch: int) -> Array:
        return jnp.zeros((batch, self.model.config.vocab if self.repetition_penalty != 1.0 else 0), bool)

    def __call__(self, states, done, seen, i) -> _Picked:
        final, asked = states
        logits = self.model.logits(final)
        if self.repetition_penalty != 1.0:
            penalised = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = jnp.where(seen, penalised, logits)
        token = self._draw(logits, i).astype(jnp.int32)
        done = done | jnp.isin(token, jnp.array(self.eos))
        token = jnp.where(done, self.pad, token)
        if self.repetition_penalty != 1.0:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        return _Picked(token, done, seen, (jnp.where(done[:, None], 0, asked), token, ~done))

    def _draw(self, logits, i):
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        logits = nucleus(logits / self.temperature, self.top_p)
        return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, i), row))(self.keys, logits)


def nucleus(logits: Array, top_p: float) -> Array:
    """Keeps the fewest most likely tokens whose probability reaches `top_p`, the others get -inf (arXiv 1904.09751, section 3.1)."""
    if top_p >= 1.0:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    threshold = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def _positions(prefix: Past, mask: Array) -> Array:
    return prefix.mask.shape[1] + jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def _read_one(model: LLM, token: Array, position: Array, past: tuple[Past, ...], keep) -> tuple[Array, Past]:
    mask = jnp.ones((len(token), 1), bool)
    states, new = model(token[:, None], mask, position[:, None], past, keep=keep)
    return states[:, :, 0], new
