"""Text <-> token ids: tokenizer, chat template, and the instruction with its examples. No torch, no device arrays.

The model reads chat(instruction, prompt). Its first part is the same for every prompt (`Prompter.prefix_ids`), so its keys and
values are computed once; the rest (`Prompter.prompt_ids`) ends where the answer begins.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.sandbox
import tokenizers

from rise_jax.data.sources import TooLong
from rise_jax.settings import CHAT_TEMPLATE, check_values
from rise_jax.tensor_folder import parsed
from rise_jax.utf8 import read_utf8

LOG = logging.getLogger(__name__)
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # what else a tokenizer is made of
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # where a chat template may stand


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level or SentencePiece tokenizer with its control tokens and chat template (None for a base model).

    `leading` are ids that open every text outside a template (the model's BOS, where it wants one). `eos` may hold several ids.
    `source` is what messages call the file that the template came from.
    """

    backend: tokenizers.Tokenizer
    eos: tuple[int, ...]
    pad: int
    bos: int | None = None
    leading: tuple[int, ...] = ()
    template: str | None = None
    source: str = "the tokenizer"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens written in it become one id each, none is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def control(self) -> dict[int, str]:
        """Control tokens by id."""
        return {id: token.content for id, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def render(self, messages: list[dict[str, str]]) -> str:
        """Chat text of `messages` (role, content) by the model's own template, ending where the assistant's answer begins.

        ValueError for a template that cannot be used, or raises an error itself.
        """
        bos, eos = (self.backend.id_to_token(id) if id is not None else "" for id in (self.bos, self.eos[0]))
        # Qwen3 would think before it answers.
        options = dict(add_generation_prompt=True, enable_thinking=False)
        try:
            return self._chat.render(messages=messages, bos_token=bos, eos_token=eos, **options)
        except Exception as error:  # a template is a program, and may fail as one
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{self.source}: the chat template cannot be used ({told})") from error

    @cached_property
    def _chat(self) -> jinja2.Template:
        # strftime_now stays undefined: templates then use their fixed date, and the same prompt gives the same tokens every day.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        return environment.from_string(self.template)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system message."""
        messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": "a"}]
        try:
            return _MARK in self.render(messages)
        except ValueError:
            return False

    @classmethod
    def from_folder(cls, folder: Path | str, eos: Sequence[int] = ()) -> "Tokenizer":
        """From the tokenizer files of a Hugging Face folder; `eos` adds end tokens that only its configs name."""
        from transformers import AutoTokenizer  # seconds to import, and the embedded model does without

        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}: a Hugging Face folder needs it")
        for name in BESIDE:
            if (folder / name).is_file():
                check_values(parsed(folder / name), {"chat_template": CHAT_TEMPLATE}, f"{folder}/{name}")
        try:
            loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            template = loaded.get_chat_template() if loaded.chat_template else None  # of several, the one for chats
        except Exception as error:  # a damaged file surfaces as almost any error of the library
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{file} cannot be read as a tokenizer ({told}): download it again") from error
        ends = tuple(dict.fromkeys(id for id in (loaded.eos_token_id, *eos) if id is not None))
        if not ends:
            raise ValueError(f"{folder}: the tokenizer names no end token (eos_token)")
        pad = ends[0] if loaded.pad_token_id is None else loaded.pad_token_id
        backend = loaded.backend_tokenizer
        backend.no_truncation()  # a file may ask for either, and transformers does as it says
        backend.no_padding()
        bare, dressed = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        leading = tuple(dressed[: dressed.index(bare[0])])
        source = folder / next((name for name in TEMPLATES if (folder / name).is_file()), "tokenizer.json")
        return cls(backend, ends, pad, loaded.bos_token_id, leading, template, str(source))


def _raise(message: str):
    raise jinja2.TemplateError(message)


@dataclass(frozen=True)
class Instruction:
    """What the model is told: a rule, and examples as (prompt, caption). `source` is what messages call the file it came from."""

    rule: str
    examples: tuple[tuple[str, str], ...]
    source: str = field(default="this program", compare=False)

    @classmethod
    def read(cls, path: Path | str) -> "Instruction":
        """`parse` of a text file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no instruction file at {path}")
        return cls.parse(read_utf8(path), str(path))

    @classmethod
    def parse(cls, text: str, path: str) -> "Instruction":
        """The rule first, then examples as lines `prompt: ...` each followed by `caption: ...`.

        Blank lines are free. ValueError names the `path` that the text came from and the line of a mistake.
        """
        rule: list[str] = []
        marked: list[tuple[str, str]] = []
        for number, line in enumerate(text.splitlines(), 1):
            mark, _, text = (part.strip() for part in line.partition(":"))
            if mark in ("prompt", "caption"):
                marked.append(_marked(path, number, mark, text, marked))
            elif line.strip() and marked:
                raise ValueError(
                    f"{path}, line {number}: after the first example only 'prompt:' and 'caption:' lines may follow"
                )
            elif line.strip():
                rule.append(line.strip())
        if not rule:
            raise ValueError(f"{path}, line 1: the file must open with the rule that the model is to follow")
        if marked and marked[-1][0] == "prompt":
            raise ValueError(f"{path}, line {number}: 'prompt:' has no 'caption:'")
        texts = [text for _, text in marked]
        return cls("\n".join(rule), tuple(zip(texts[::2], texts[1::2])), path)


def _marked(path: str, number: int, mark: str, text: str, before: list) -> tuple[str, str]:
    if not text:
        raise ValueError(f"{path}, line {number}: '{mark}:' is empty")
    expected = "caption" if before and before[-1][0] == "prompt" else "prompt"
    if mark != expected:
        raise ValueError(f"{path}, line {number}: '{mark}:' stands where a '{expected}:' line is due")
    return mark, text


class Prompter:
    """Prompts and captions -> ids, under one instruction. `prefix_ids + prompt_ids(text)` are the ids of the whole chat text.

    Models without a chat template get the plain few-shot layout, whose answers end at a line break.
    """

    def __init__(self, tokenizer: Tokenizer, instruction: Instruction, max_prompt: int):
        """`max_prompt` is the most tokens a user's prompt itself may have.

        ValueError for a chat template that does not give every message once, or an instruction that holds a control token.
        """
        for text in (instruction.rule, *sum(instruction.examples, ())):
            _checked(tokenizer, text, f"instruction of {instruction.source}")
        self.tokenizer, self.instruction, self.max_prompt = tokenizer, instruction, max_prompt
        self.chat = tokenizer.template is not None
        if not self.chat:
            LOG.warning("%s holds no chat template: the LLM is shown the instruction as plain text", tokenizer.source)
        head, self._tail = self._around_prompt()
        encoding = tokenizer.backend.encode(head, add_special_tokens=False)
        # The cut stands behind a control token, which no merge crosses (without a template: behind the last example).
        ends = [end for id, (_, end) in zip(encoding.ids, encoding.offsets) if id in tokenizer.control]
        cut = max(ends, default=0) if self.chat else head.rindex("\nprompt:")
        self._head = head[cut:]
        self.prefix_ids: list[int] = [*([] if self.chat else tokenizer.leading), *tokenizer.encode(head[:cut])]
        #: Tokens of layout around the user's own in `prompt_ids`.
        self.overhead = len(tokenizer.encode(self._head)) + len(tokenizer.encode(self._tail))

    @property
    def width(self) -> int:
        """The most tokens `prompt_ids` can return: what a static prompt length must hold."""
        return self.max_prompt + self.overhead

    @cached_property
    def stop(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        if self.chat:  # what the template closes an answer with may be named in none of the files
            example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
            behind = self.tokenizer.encode(self.tokenizer.render(example).partition(_MARK)[2])
            closing = [id for id in behind if id in self.tokenizer.control][:1]
            return tuple(dict.fromkeys((*self.tokenizer.eos, *closing)))
        breaks = [self.tokenizer.encode(text) for text in ("\n", "\n\n")]
        return (*self.tokenizer.eos, *(ids[0] for ids in breaks if len(ids) == 1))

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of the rest of the chat behind `prefix_ids`, up to where the answer begins.

        ValueError for an empty prompt, one of more than `max_prompt` tokens, by itself or here, or one that holds a control token.
        """
        text = text.strip()
        bare_prompt_ids(self.tokenizer, text, self.max_prompt)
        if self.chat:
            whole, cut = self.tokenizer.encode(self._whole(text)), len(self.prefix_ids)
            assert whole[:cut] == self.prefix_ids, f"the chat text of {text!r} cannot be cut"
            ids = whole[cut:]
        else:
            ids = self.tokenizer.encode(self._head + text + self._tail)
        # "EMAIL" is one token, " EMAIL" two: what stands before a prompt may cost it some.
        _check_length(text, len(ids) - self.overhead, self.max_prompt)
        return ids

    def rephrased_ids(self, text: str) -> list[int]:
        """Ids of a given answer, encoded apart from the chat, without the end token. ValueError as for `prompt_ids`, length aside."""
        text = _checked(self.tokenizer, text, "caption")
        return self.tokenizer.encode(text if self.chat else f" {text}")

    def text(self, ids: Sequence[int]) -> str:
        """The answer that `ids` spell."""
        return self.tokenizer.decode(ids).strip()

    def _around_prompt(self) -> list[str]:
        parts = self._whole(_MARK).split(_MARK)
        if len(parts) != 2:
            raise ValueError(
                f"{self.tokenizer.source}: the chat template writes the prompt {len(parts) - 1} times, 1 is due"
            )
        return parts

    def _whole(self, prompt: str) -> str:
        if not self.chat:
            shots = [f"\nprompt: {short}\ncaption: {long}\n" for short, long in self.instruction.examples]
            return f"{self.instruction.rule}\n{''.join(shots)}\nprompt: {prompt}\ncaption:"
        turns: list[dict[str, str]] = []
        for short, long in self.instruction.examples:
            turns += [{"role": "user", "content": f"Prompt: {short}"}, {"role": "assistant", "content": long}]
        turns.append({"role": "user", "content": f"Prompt: {prompt}"})
        if self.tokenizer.takes_system:
            return self.tokenizer.render([{"role": "system", "content": self.instruction.rule}, *turns])
        turns[0] = {"role": "user", "content": f"{self.instruction.rule}\n\n{turns[0]['content']}"}
        return self.tokenizer.render(turns)


_MARK = "@@the prompt@@"


def bare_prompt_ids(tokenizer: Tokenizer, text: str, max_prompt: int) -> list[int]:
    """Ids of a user's prompt by itself, without layout.

    ValueError for an empty prompt, one of more than `max_prompt` tokens, or one that holds a control token.
    """
    text = _checked(tokenizer, text, "prompt")
    ids = tokenizer.encode(text)
    _check_length(text, len(ids), max_prompt)
    return ids


def _check_length(text: str, count: int, limit: int) -> None:
    if count > limit:
        told = f"the prompt has {count} tokens, at most {limit} are allowed (model.llm.max_prompt); it is never cut"
        raise TooLong(f"{told}: {text[:80]!r} ...", count)


def _checked(tokenizer: Tokenizer, text: str, what: str) -> str:
    text = text.strip()
    if not text:
        raise ValueError(f"the {what} is empty: write at least one word")
    found = [token for token in tokenizer.control.values() if token in text]
    if found:
        raise ValueError(f"the {what} holds the language model's control token {found[0]!r}: {text[:80]!r}")
    return text
