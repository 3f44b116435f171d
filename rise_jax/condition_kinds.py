"""What conditions the video, by `model.condition`: the method and what the paper compares it with, one key apart.

rephrase             the LLM rephrases the prompt; the states that emit the new tokens (language.py; the paper's Figure 1 (c))
encode               the LLM reads the prompt alone; the states at its tokens (Figure 1 (a), with an LLM for the text encoder)
rewrite_then_encode  the LLM rephrases, then reads the new text alone; the states at its tokens (Figure 1 (b))
native               a T5 or umT5 encoder, the published video models' own, reads the prompt (Figure 1 (a))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rise_jax import rephrase
from rise_jax.data.sources import Text, TooLong
from rise_jax.language import Language, Pair, Rephrasings, batch_size, gathered, identity_of, rounded
from rise_jax.models.llm import make_llm
from rise_jax.models.t5 import make_t5
from rise_jax.padding import right_pad
from rise_jax.sharding import put_parameters, put_rows, shardings
from rise_jax.text import bare_prompt_ids
from rise_jax.weights import load_llm, open_weights
from rise_jax.weights_t5 import encoder_folder, load_t5, t5_tokenizer, text_ids


class Condition(Protocol):
    """What training, generate and evaluate ask of a kind. Its constructor takes the config's `model.<group>` and the mesh.

    condition: its name. writes: whether the LLM writes a caption that is missing. budget: the setting in that group that says how
    many states there are at most, `length`. width: of a state. params, prefix: what `states_in_step` needs on the device.
    identity: JSON of all that the states depend on but the texts and `length`. rules: the text of the instruction; None without one.
    """

    condition: str
    writes: bool
    group: str
    budget: str
    length: int
    width: int
    params: dict
    prefix: Any
    identity: dict
    rules: str | None

    def check(self, text: Text) -> None:
        """Raises ValueError for a text of which something that is used is over its budget."""

    def pair(self, text: Text) -> Pair:
        """A text as what is kept of it. Raises ValueError for one over its budget."""

    def tokens(self, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """Padded ids and `states_mask`: the rows of the batch from which `states_in_step` computes states."""

    def teach(self, pairs: Sequence[Pair], *, progress=iter) -> tuple[np.ndarray, np.ndarray]:
        """States float32 [n, length, width] for training, and mask bool [n, length]."""

    def rephrase(
        self, prompts: Sequence[str], *, temperature: float = 0.0, seeds: Sequence[int] | None = None, progress=iter
    ) -> Rephrasings:
        """What conditions the videos of prompts in use. Raises ValueError for an empty prompt or one over its budget."""

    def write(
        self, prompts: Sequence[str], *, temperature: float = 0.0, seeds: Sequence[int] | None = None, progress=iter
    ) -> tuple[list[list[int]], list[str]]:
        """Where it `writes`: the tokens and texts of `rephrase`, without computing or keeping more than they take."""

    def states_in_step(self, frozen: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        """For the step: (states, mask) from `tokens` rows in the batch and {"llm": params, "prefix": prefix} in `frozen`."""


class _Encoded:
    """A frozen model that reads the tokens of each pair by themselves: no instruction, no prompt before them."""

    prefix, rules = None, None

    def __init__(self, encode: Callable, params: dict, *, pad: int, length: int, width: int, mesh: Mesh | None):
        """encode: (params, ids [B, L], mask [B, L]) -> states [B, L, width], zero behind the mask."""
        self.params, self.length, self.width, self._pad = params, length, width, pad
        self.mesh = mesh
        self._encode, self._encode_batch = encode, jax.jit(encode, **gathered(mesh))

    def tokens(self, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """`encoded_ids` int32 and `states_mask` bool [n, length]."""
        ids, mask = right_pad([pair.tokens for pair in pairs], self.length, self._pad)
        return dict(encoded_ids=ids, states_mask=mask)

    def teach(self, pairs: Sequence[Pair], *, progress=iter) -> tuple[np.ndarray, np.ndarray]:
        """States float32 [n, length, width] at the pairs' tokens and mask bool [n, length]."""
        table = self.tokens(pairs)
        lengths = table["states_mask"].sum(1)
        order = np.argsort(lengths, kind="stable")
        states = np.zeros((len(pairs), self.length, self.width), np.float32)
        size = batch_size(self.mesh, len(pairs))
        for start in progress(range(0, len(pairs), size)):
            rows = order[start : start + size]
            padded = np.resize(rows, size)
            r = min(rounded(max(lengths[rows].max(), 1)), self.length)  # a row may hold no token at all
            batch = put_rows((table["encoded_ids"][padded, :r], table["states_mask"][padded, :r]), self.mesh)
            states[rows, :r] = np.asarray(self._encode_batch(self.params, *batch), np.float32)[: len(rows)]
        return states, table["states_mask"]

    def states_in_step(self, frozen: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        """For the step: (states, mask) from `tokens` rows in the batch and {"llm": params} in `frozen`."""
        states = self._encode(frozen["llm"], batch["encoded_ids"], batch["states_mask"])
        return jax.lax.stop_gradient(states).astype(jnp.float32), batch["states_mask"]


class Encode(_Encoded):
    """Nothing is written: the LLM is a text encoder of the user's prompt. `instruction` and `max_new` have no influence."""

    condition = "encode"
    writes = False
    group, budget = "llm", "max_prompt"

    def __init__(
        self,
        *,
        path: str,
        instruction: str,
        dtype: str,
        max_prompt: int,
        max_new: int,
        layer: int = -1,
        final_norm: bool = False,
        mesh: Mesh | None = None,
    ):
        """`layer`, `final_norm` and `mesh` as in `Language`; ValueError for a layer that is not there."""
        loaded = load_llm(path, jnp.dtype(dtype))
        config, self._tokenizer = loaded.config, loaded.tokenizer
        layer = config.layer_index(layer)
        llm, _ = make_llm(replace(config, norm_inner=final_norm), jnp.dtype(dtype))
        encode = partial(rephrase.encoded, llm, leading=loaded.tokenizer.leading, layer=layer)
        sizes = dict(pad=loaded.tokenizer.pad, length=max_prompt, width=config.width)
        super().__init__(encode, put_parameters(loaded.params, mesh), **sizes, mesh=mesh)
        self.identity = identity_of(
            self.condition,
            loaded.identity["sha256"],
            dtype,
            layer=layer,
            depth=config.depth,
            final_norm=final_norm,
        )

    def check(self, text: Text) -> None:
        """Raises ValueError for a prompt over its budget."""
        self.pair(text)

    def pair(self, text: Text) -> Pair:
        """The prompt with its own ids; its caption, given or not, is not looked at."""
        return Pair(text.prompt, bare_prompt_ids(self._tokenizer, text.prompt, self.length))

    def rephrase(
        self, prompts: Sequence[str], *, temperature: float = 0.0, seeds: Sequence[int] | None = None, progress=iter
    ) -> Rephrasings:
        """States of the prompts themselves, without texts: nothing is drawn, so `temperature` and `seeds` change nothing."""
        pairs = [self.pair(Text(prompt, None)) for prompt in prompts]
        states, mask = self.teach(pairs, progress=progress)
        return Rephrasings(states, mask, [pair.tokens for pair in pairs], [None] * len(pairs))


class RewriteThenEncode(_Encoded):
    """Two passes: `Language` writes (training: its caption, or the given one), and the ids of what it wrote are read by themselves."""

    condition = "rewrite_then_encode"
    writes = True
    group, budget = "llm", "max_new"

    def __init__(self, **llm):
        """`llm`: as for `Language`."""
        self._writer = writer = Language(**llm)
        self.rules = writer.rules
        tokenizer = writer.prompter.tokenizer
        encode = partial(rephrase.encoded, writer.llm, leading=tokenizer.leading, layer=writer.layer)
        super().__init__(
            encode, writer.params, pad=tokenizer.pad, length=writer.length, width=writer.width, mesh=writer.mesh
        )
        self.identity = writer.identity | identity_of(self.condition, None, writer.identity["dtype"])

    def check(self, text: Text) -> None:
        """As `Language.check`; the prompt of a given rephrasing is not read."""
        self._writer.check(text) if text.rephrased is None else self.pair(text)

    def pair(self, text: Text) -> Pair:
        """A text whose rephrasing is given. Raises ValueError when that has more tokens than `max_new`."""
        return self._writer.pair(text)

    def rephrase(
        self, prompts: Sequence[str], *, temperature: float = 0.0, seeds: Sequence[int] | None = None, progress=iter
    ) -> Rephrasings:
        """Decodes as `Language.rephrase` does, then encodes the decoded ids."""
        tokens, texts = self.write(prompts, temperature=temperature, seeds=seeds, progress=progress)
        states, mask = self.teach([Pair(*both) for both in zip(prompts, tokens)])
        return Rephrasings(states, mask, tokens, texts)

    def write(
        self, prompts: Sequence[str], *, temperature: float = 0.0, seeds: Sequence[int] | None = None, progress=iter
    ) -> tuple[list[list[int]], list[str]]:
        """As `Language.write`: the first of the two passes."""
        return self._writer.write(prompts, temperature=temperature, seeds=seeds, progress=progress)


class Native(_Encoded):
    """T5 or umT5 reads the user's prompt with its end token; `length` counts that. Nothing is written."""

    condition = "native"
    writes = False
    group, budget = "native", "length"

    def __init__(self, *, path: str, length: int, dtype: str, mesh: Mesh | None = None):
        """`path`: the encoder's folder; `mesh` as in `Language`. FileNotFoundError or ValueError as for `load_t5`."""
        loaded = load_t5(path, jnp.dtype(dtype), mesh and partial(shardings, mesh=mesh))
        make, _ = make_t5(loaded.config, jnp.dtype(dtype))
        encode = lambda params, ids, mask: jnp.where(mask[..., None], make(params)(ids, mask), 0)
        self._tokenizer = loaded.tokenizer
        # Without a mesh, free to follow any, as the LLM's.
        params = loaded.params if mesh else jax.device_put(jax.tree.map(np.asarray, loaded.params))
        sizes = dict(pad=loaded.tokenizer.pad, length=length, width=loaded.config.width)
        super().__init__(encode, params, **sizes, mesh=mesh)
        self.identity = identity_of(self.condition, loaded.source.sha256(), dtype)

    def pair(self, text: Text) -> Pair:
        """The prompt with its own ids. Raises ValueError for an empty prompt, or one over `length`."""
        if not text.prompt.strip():
            raise ValueError("the prompt is empty: write at least one word")
        ids, mask = text_ids(self._tokenizer, [text.prompt], self.length)
        return Pair(text.prompt, ids[0][mask[0]].tolist())

    check, rephrase = Encode.check, Encode.rephrase


#: The values of `model.condition`.
CONDITIONS: dict[str, type[Condition]] = {
    kind.condition: kind for kind in (Language, Encode, RewriteThenEncode, Native)
}


def check_texts(texts: Sequence[Text], condition: Condition) -> None:
    """Raises ValueError for texts that are over a budget, with their number and the longest one; for another fault, at the first."""
    over = []
    for text in texts:
        try:
            condition.check(text)
        except TooLong as error:
            over.append(error)
    if over:
        longest = max(over, key=lambda error: error.tokens)
        raise ValueError(f"{len(over)} of {len(texts)} texts are too long; the longest: {longest}")


def check_prompts(condition: str, prompts: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt that `open_text` of this would refuse in use. Of its files, only the tokenizer is read.

    FileNotFoundError or ValueError for files that are missing or broken.
    """
    path = settings["path"]
    if condition == Native.condition:
        text_ids(t5_tokenizer(path, encoder_folder(path)), prompts, settings["length"])
        return
    tokenizer = open_weights(path).tokenizer()
    for prompt in prompts:
        bare_prompt_ids(tokenizer, prompt, settings["max_prompt"])


def open_text(condition: str, **settings) -> Condition:
    """Loads what a kind of condition needs; `settings` are those of its config group."""
    return CONDITIONS[condition](**settings)
