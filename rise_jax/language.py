"""The frozen LLM at the host's side: texts in, states out, in fixed-size batches of few shapes.

`teach` gives training its states (teacher-forced on given rephrasings), `rephrase` gives use its own (decoded). Both keep the
instruction's keys and values, computed once.
"""

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rise_jax import rephrase
from rise_jax.data.sources import Text, TooLong
from rise_jax.models.llm import make_llm
from rise_jax.padding import left_pad, right_pad
from rise_jax.sharding import batch_ways, put_parameters, put_rows, replicated
from rise_jax.text import Instruction, Prompter
from rise_jax.utf8 import read_utf8
from rise_jax.weights import load_llm

INSTRUCTIONS = Path(__file__).parent / "instructions"
BATCH = 32  # texts per call
WIDTHS = 8  # padded lengths are multiples of this: few shapes to compile, little padding to compute


class Rephrasings(NamedTuple):
    """What conditions n videos: states float32 [n, L, d_llm], mask bool [n, L], the ids of the tokens that the states belong to
    (no end token), and the texts that were written; None where the prompt itself is what conditions."""

    states: np.ndarray
    mask: np.ndarray
    tokens: list[list[int]]
    texts: list[str | None]


class Pair(NamedTuple):
    """A prompt and the token ids of its rephrasing: those of a given text, or the very ids that the LLM wrote.

    Where nothing is rephrased, they are the prompt's own.

    Ids, because encoding a decoded text again may give other ones, and with them other states than in use.
    """

    prompt: str
    tokens: list[int]


class Language:
    """A frozen LLM with its instruction. `max_prompt` and `max_new` are the token budgets of a prompt and of its rephrasing.

    It is the `condition_kinds.Condition` called rephrase.
    """

    condition = "rephrase"
    writes = True
    group, budget = "llm", "max_new"

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
        rules: str | None = None,
        mesh: Mesh | None = None,
    ):
        """`instruction` is the name of a shipped file ("scenes", "default") or the path of one's own; `rules` stand in for its text.

        `layer` says whose states condition the video, counted as in `LLMConfig.layer_index`; ValueError for one that is not there.
        `final_norm` puts an inner layer's behind the LLM's final norm.
        `mesh` is what the parameters and the texts of a call are spread over.
        """
        loaded = load_llm(path, jnp.dtype(dtype))
        if rules is None:
            file = instruction_file(instruction)
            spoken, self.rules = Instruction.read(file), read_utf8(file)
        else:
            spoken, self.rules = Instruction.parse(rules, instruction), rules
        self.prompter = Prompter(loaded.tokenizer, spoken, max_prompt)
        self.max_new = self.length = max_new
        self.width = loaded.config.width
        self.layer = loaded.config.layer_index(layer)
        self.llm, _ = make_llm(replace(loaded.config, norm_inner=final_norm), jnp.dtype(dtype))
        self.mesh = mesh
        self.params = put_parameters(loaded.params, mesh)
        self.identity = identity_of(
            self.condition,
            loaded.identity["sha256"],
            dtype,
            rules=self.rules,
            layer=self.layer,
            depth=loaded.config.depth,
            final_norm=final_norm,
        )
        self._teach = jax.jit(partial(rephrase.teacher_forced, self.llm, layer=self.layer), **gathered(mesh))
        self._decode = jax.jit(
            partial(rephrase.rephrase, self.llm, layer=self.layer),
            static_argnames=("max_new", "eos", "pad", "temperature"),
            **gathered(mesh),
        )

    @cached_property
    def prefix(self) -> rephrase.Past:
        """Keys and values of the instruction, batch 1."""
        ids = np.asarray(self.prompter.prefix_ids, np.int32)
        return jax.jit(partial(rephrase.encode_prefix, self.llm), **gathered(self.mesh))(self.params, ids)

    def check(self, text: Text) -> None:
        """Raises ValueError for a prompt or a given rephrasing over its budget."""
        self.prompter.prompt_ids(text.prompt)
        if text.rephrased is not None:
            self.pair(text)

    def pair(self, text: Text) -> Pair:
        """A text whose rephrasing is given. Raises ValueError when that has more tokens than `max_new`."""
        ids = self.prompter.rephrased_ids(text.rephrased)
        if len(ids) > self.max_new:
            raise TooLong(
                f"a rephrased caption has {len(ids)} tokens, model.llm.max_new={self.max_new} is the limit; "
                f"raise it to {len(ids)} or shorten the caption: {text.rephrased[:80]!r} ...",
                len(ids),
            )
        return Pair(text.prompt, ids)

    def tokens(self, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """Padded ids and masks: what the step needs to compute states itself. Raises ValueError for a prompt over its budget."""
        prompts = [self.prompter.prompt_ids(pair.prompt) for pair in pairs]
        answers = [pair.tokens for pair in pairs]
        prompt_ids, prompt_mask = left_pad(prompts, self.prompter.width, self._pad)
        rephrased_ids, rephrased_mask = right_pad(answers, self.max_new, self._pad)
        return dict(
            prompt_ids=prompt_ids, prompt_mask=prompt_mask, rephrased_ids=rephrased_ids, states_mask=rephrased_mask
        )

    def teach(self, pairs: Sequence[Pair], *, progress=iter) -> tuple[np.ndarray, np.ndarray]:
        """Teacher-forced states float32 [n, max_new, d_llm] and mask bool [n, max_new]."""
        table = self.tokens(pairs)
        prompt_lengths, lengths = table["prompt_mask"].sum(1), table["states_mask"].sum(1)
        order = np.lexsort((lengths, rounded(prompt_lengths)))
        states = np.zeros((len(pairs), self.max_new, self.width), np.float32)
        size = batch_size(self.mesh, len(pairs))
        for start in progress(range(0, len(pairs), size)):
            rows = order[start : start + size]
            padded = np.resize(rows, size)
            p = min(rounded(prompt_lengths[rows].max()), self.prompter.width)
            r = min(rounded(lengths[rows].max()), self.max_new)
            batch = (
                table["prompt_ids"][padded, -p:],
                table["prompt_mask"][padded, -p:],
                table["rephrased_ids"][padded, :r],
                table["states_mask"][padded, :r],
            )
            states[rows, :r] = np.asarray(
                self._teach(self.params, self.prefix, *put_rows(batch, self.mesh)), np.float32
            )[: len(rows)]
        return states, table["states_mask"]

    def rephrase(
        self, prompts: Sequence[str], *, temperature: float = 0.0, seeds: Sequence[int] | None = None, progress=iter
    ) -> Rephrasings:
        """Decodes a rephrasing of every prompt; greedy at temperature 0, else drawn with one seed per prompt.

        Raises ValueError for an empty prompt or one over its budget.
        """
        states, tokens = [], []
        for array, said in self._decoded(prompts, temperature, seeds, progress):
            states.append(np.asarray(array.astype(jnp.float32))[: len(said)])
            tokens += said
        _, mask = right_pad(tokens, self.max_new, self._pad)
        return Rephrasings(np.concatenate(states), mask, tokens, [self.prompter.text(ids) for ids in tokens])

    def write(
        self, prompts: Sequence[str], *, temperature: float = 0.0, seeds: Sequence[int] | None = None, progress=iter
    ) -> tuple[list[list[int]], list[str]]:
        """As `rephrase`: the tokens and the texts alone. The states of a few thousand prompts are gigabytes."""
        batches = self._decoded(prompts, temperature, seeds, progress)
        tokens = [ids for _, said in batches for ids in said]
        return tokens, [self.prompter.text(ids) for ids in tokens]

    def _decoded(self, prompts, temperature, seeds, progress) -> Iterator[tuple[jax.Array, list[list[int]]]]:
        """Per batch, in the prompts' order: states [size, max_new, d_llm], which stay on the device, and the ids of n <= size rows."""
        ids = [self.prompter.prompt_ids(prompt) for prompt in prompts]
        seeds = np.asarray(seeds if seeds is not None else np.zeros(len(ids)), np.uint32)
        p = min(rounded(max(map(len, ids))), self.prompter.width)
        size = batch_size(self.mesh, len(ids))
        for start in progress(range(0, len(ids), size)):
            rows = np.arange(start, min(start + size, len(ids)))
            padded = np.resize(rows, size)
            batch = left_pad([ids[i] for i in padded], p, self._pad)
            out = self._decode(
                self.params,
                self.prefix,
                *put_rows(batch, self.mesh),
                max_new=self.max_new,
                eos=tuple(self.prompter.stop),
                pad=self._pad,
                temperature=temperature,
                keys=_keys(put_rows(seeds[padded], self.mesh)) if temperature > 0 else None,
            )
            tokens, mask = (np.asarray(array)[: len(rows)] for array in (out.tokens, out.mask))
            yield out.states, [row[keep].tolist() for row, keep in zip(tokens, mask)]

    def states_in_step(self, frozen: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
        """For the step: (states, mask) from `tokens` rows in the batch and {"llm": params, "prefix": ...} in `frozen`."""
        states = rephrase.teacher_forced(
            self.llm,
            frozen["llm"],
            frozen["prefix"],
            batch["prompt_ids"],
            batch["prompt_mask"],
            batch["rephrased_ids"],
            batch["states_mask"],
            layer=self.layer,
        )
        return jax.lax.stop_gradient(states).astype(jnp.float32), batch["states_mask"]

    @property
    def _pad(self) -> int:
        return self.prompter.tokenizer.pad


def identity_of(
    condition: str,
    sha256: str | None,
    dtype: str,
    *,
    rules: str | None = None,
    layer: int = -1,
    depth: int = -1,
    final_norm: bool = False,
) -> dict:
    """JSON of what the states depend on, for fingerprints and checkpoints. Paths may differ between machines, so they are left out.

    `rules` are the instruction's text, where there is one; `layer` is absent where it is the last of `depth`, which is
    always behind the final norm; so is a `sha256` that is not known.
    """
    identity = {"dtype": dtype, "align": "predictor" if condition == Language.condition else "token"}
    identity |= {"sha256": sha256} if sha256 else {}
    identity |= {"condition": condition} if condition != Language.condition else {}
    identity |= {"instruction": hashlib.sha256(rules.encode()).hexdigest()} if rules is not None else {}
    if layer != depth:
        identity |= {"layer": layer} | ({"final_norm": True} if final_norm else {})
    return identity


def instruction_file(name: str) -> Path:
    """Of `model.llm.instruction`: the name of a shipped one, or a path. Raises FileNotFoundError with the nearest name."""
    file = INSTRUCTIONS / f"{name}.txt" if name in shipped_instructions() else Path(name)
    if not file.is_file():
        near = difflib.get_close_matches(name, shipped_instructions(), n=1, cutoff=0.0)[0]
        raise FileNotFoundError(f"model.llm.instruction={name!r} is no file; nearest of those shipped: {near}")
    return file


def shipped_instructions() -> list[str]:
    """The names that `model.llm.instruction` may give instead of a path."""
    return sorted(path.stem for path in INSTRUCTIONS.glob("*.txt"))


def batch_size(mesh: Mesh | None, texts: int = BATCH) -> int:
    """Rows per call for so many texts: BATCH at most, the same for every device that they are split over."""
    ways = batch_ways(mesh)
    return -(-min(texts, max(BATCH, ways)) // ways) * ways


def gathered(mesh: Mesh | None) -> dict:
    """Options of jax.jit for results that every process reads."""
    return {} if mesh is None else {"out_shardings": replicated(mesh)}


@jax.jit
def _keys(seeds):
    return jax.vmap(jax.random.key)(seeds)


def states_in_batch(frozen: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """For the step: (states, mask) that were computed before and came with the batch."""
    return batch["states"], batch["states_mask"]


def differing(theirs: dict, ours: dict) -> list[str]:
    """The names in which two identities differ, in order."""
    return [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]


def rounded(length):
    """Up to a multiple of WIDTHS; int or array."""
    return -(-length // WIDTHS) * WIDTHS
