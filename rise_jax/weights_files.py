"""Readers of published weight files: GGUF (llama.cpp) and Hugging Face folders (config.json, safetensors, tokenizer)."""

import dataclasses
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import safetensors

from rise_jax.gguf_tokenizer import check_ids, tokenizer_from_gguf
from rise_jax.llm_families import folder_config, folder_family
from rise_jax.llm_gguf import gguf_config, gguf_family
from rise_jax.models.llm_config import LLMConfig
from rise_jax.settings import check_values, ids_below
from rise_jax.tensor_folder import AGAIN, DTYPES, not_default, parsed, pickles_in, sha256_of, shard_names
from rise_jax.text import Tokenizer

ROPE_FREQS = "rope_freqs.weight"  # Llama 3's divisors of the rotary frequencies: a setting, not a parameter
TEXT_PART = ("language_model.model.", "model.language_model.")  # "model." of a multimodal model's text part
NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
NEEDED = "a Hugging Face folder needs it"
GENERATION = "generation_config.json"  # names end tokens, too
SPELLED = "Hi, 2 cats!\n  ÉÅ 猫"  # its ids show what beside tokenizer.json has a say in tokenizing
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class _Reader(gguf.GGUFReader):
    """With the file as a plain array over the mapping: each slice of a memmap, and a vocabulary takes 250,000, runs Python code."""

    @property
    def data(self) -> np.ndarray:
        return self._plain

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._plain = mapped.view(np.ndarray)


class GGUFFile:
    """One .gguf file; quantised tensors are dequantised one at a time, on reading."""

    kind = "gguf"

    def __init__(self, path: Path):
        """FileNotFoundError when there is no file, ValueError when it cannot be parsed or is cut short."""
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"no GGUF file at {path}")
        try:
            reader = _Reader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # a damaged header surfaces as almost any error of the parser
            raise ValueError(f"{path} cannot be read as GGUF ({type(error).__name__}: {error}); {AGAIN}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.unreadable: dict[str, str] = {}  # every type of the format can be dequantised
        self.names = {name: self._shape(name) for name in self._tensors if name != ROPE_FREQS}

    @property
    def family(self) -> str:
        """ValueError for an unknown architecture."""
        return gguf_family(self._fields, str(self.path))

    def config(self) -> LLMConfig:
        """ValueError names the architecture, or every field, that is missing or not supported."""
        divisors = tuple(self.read(ROPE_FREQS).tolist()) if ROPE_FREQS in self._tensors else ()
        config = gguf_config(self._fields, divisors, "output.weight" not in self.names, str(self.path))
        check_ids(self._fields, str(self.path))
        return config

    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_gguf(self._fields, str(self.path))

    def read(self, name: str) -> np.ndarray:
        """fp32 values in torch order (out, in)."""
        tensor = self._tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self._shape(name))

    def sha256(self) -> str:
        return sha256_of([self.path])

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in self._tensors[name].shape[::-1])


class FolderFile:
    """A Hugging Face folder with one model.safetensors, or shards named by model.safetensors.index.json."""

    kind = "huggingface"

    def __init__(self, path: Path):
        """FileNotFoundError for a missing config or weight file, ValueError for one that cannot be parsed or is cut short, or for a
        config that names an unknown architecture, or settings that this decoder does not have."""
        self.path = path
        self._settings = self._json("config.json")
        self._config = folder_config(self._settings, f"{path}/config.json")
        self._generation = self._json(GENERATION) if (path / GENERATION).is_file() else {}
        ends = {"eos_token_id": ids_below(self._config.vocab)}
        for name, settings in {"config.json": self._settings, GENERATION: self._generation}.items():
            check_values(settings, ends, f"{path}/{name}")
        self._shards = {name: self._open(name) for name in self._shard_names()}
        stored = [(key, shard) for shard in self._shards.values() for key in shard.keys()]  # noqa: SIM118 (safe_open is no dict)
        self._owner = {_text_name(key): (key, shard) for key, shard in stored if _text_name(key)}
        self.names = {name: tuple(shard.get_slice(key).get_shape()) for name, (key, shard) in self._owner.items()}
        stored_as = {name: shard.get_slice(key).get_dtype() for name, (key, shard) in self._owner.items()}
        self.unreadable = {name: dtype for name, dtype in stored_as.items() if dtype not in DTYPES}
        # Some tied models are saved with a copy of the embeddings as head; one that differs counts, as in transformers.
        self._own_head = HEAD in self.names and not (self._config.tied and self._equal(HEAD, EMBEDDING))
        if self._config.tied and not self._own_head:
            self.names.pop(HEAD, None)

    @property
    def family(self) -> str:
        return folder_family(self._settings, f"{self.path}/config.json")

    def config(self) -> LLMConfig:
        return dataclasses.replace(self._config, tied=self._config.tied and not self._own_head)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        settings = {**(self._settings.get("text_config") or {}), **self._settings, **self._generation}
        ends = settings.get("eos_token_id")
        found = Tokenizer.from_folder(self.path, ends if isinstance(ends, list) else [ends])
        check_vocabulary(found, self._config.vocab, f"{self.path}/tokenizer.json")
        return found

    def read(self, name: str) -> np.ndarray:
        """Values in the file's dtype (bf16 as ml_dtypes) and torch order (out, in)."""
        key, shard = self._owner[name]
        return shard.get_tensor(key)

    def sha256(self) -> str:
        """Over all that states depend on: weight files, tokenizer.json, and what is used of the other files."""
        told = self.tokenizer()
        tokens = dict(
            added={id: token.content for id, token in told.backend.get_added_tokens_decoder().items()},
            spelled=told.encode(SPELLED),
            bos=told.bos,
            eos=told.eos,
            leading=told.leading,
            template=told.template,
        )
        files = [self.path / name for name in (*sorted(self._shards), "tokenizer.json")]
        return sha256_of(files, {"config": not_default(self.config()), "tokens": tokens})

    def _shard_names(self) -> list[str]:
        index = "model.safetensors.index.json"
        if (self.path / index).is_file():
            return shard_names(self.path / index)
        return ["model.safetensors"]

    def _equal(self, first: str, second: str) -> bool:
        if self.names[first] != self.names.get(second) or {first, second} & self.unreadable.keys():
            return False
        slices = [shard.get_slice(key) for key, shard in (self._owner[first], self._owner[second])]
        rows = self.names[first][0]
        cuts = [slice(start, min(start + (1 << 14), rows)) for start in range(0, rows, 1 << 14)]  # little memory
        return all(np.array_equal(*(part[cut] for part in slices)) for cut in cuts)

    def _open(self, name: str):
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}: {pickles_in(self.path, 'model') or NEEDED}")
        try:
            return safetensors.safe_open(path, "numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}); {AGAIN}") from error

    def _json(self, name: str) -> dict:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"no {name} in {self.path}: {pickles_in(self.path, 'model') or NEEDED}")
        return parsed(path)


def check_vocabulary(tokenizer: Tokenizer, count: int, where: str) -> None:
    """ValueError for a tokenizer whose texts hold ids beyond an embedding of `count` rows.

    Control tokens beyond it pass unless they are put into texts here: Gemma's tokenizer has one for images.
    """
    ids = {word: id for word, id in tokenizer.backend.get_vocab().items() if id not in tokenizer.control}
    named = {"eos_token": max(tokenizer.eos), "pad_token": tokenizer.pad}
    named["bos_token"] = max((*tokenizer.leading, tokenizer.bos or 0))
    largest = max(ids, key=ids.get, default="")
    for what, id in {repr(largest): ids.get(largest, 0), **named}.items():
        if id >= count:
            raise ValueError(
                f"{where}: {what} has the number {id}, but the model knows 0 to {count - 1}: it is another model's tokenizer"
            )


def _text_name(key: str) -> str | None:
    """A tensor's name in a text model; None for one that the text needs nothing of."""
    if key.startswith(NOT_TEXT) or key.endswith("rotary_emb.inv_freq"):  # a table that old Llama files carry along
        return None
    for prefix in TEXT_PART:
        key = f"model.{key.removeprefix(prefix)}" if key.startswith(prefix) else key
    return key.removeprefix("language_model.")
