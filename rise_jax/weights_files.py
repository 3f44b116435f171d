"""Readers of published weight files: GGUF (llama.cpp) and Hugging Face folders (config.json, safetensors, tokenizer)."""

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import safetensors

from rise_jax.models.llm import LLMConfig
from rise_jax.text import Tokenizer

AGAIN = "the file is damaged or incomplete: download it again"


class GGUFFile:
    """One .gguf file; quantised tensors are dequantised one at a time, on reading."""

    kind = "gguf"

    def __init__(self, path: Path):
        """FileNotFoundError when there is no file, ValueError when it cannot be parsed or is cut short."""
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"no GGUF file at {path}")
        try:
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # a damaged header surfaces as almost any error of the parser
            raise ValueError(f"{path} cannot be read as GGUF ({type(error).__name__}: {error}); {AGAIN}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.names = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in self._tensors.items()}

    def config(self) -> LLMConfig:
        """ValueError for an architecture other than llama, or a missing field."""
        architecture = self._fields.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{self.path}: architecture {architecture!r} is not supported; known: 'llama'")
        width, heads = self._field("llama.embedding_length"), self._field("llama.attention.head_count")
        scaling = self._field("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise ValueError(f"{self.path}: llama.rope.scaling.type={scaling!r} is not supported")
        return LLMConfig(
            vocab=len(self._field("tokenizer.ggml.tokens")),
            width=width,
            mlp_width=self._field("llama.feed_forward_length"),
            depth=self._field("llama.block_count"),
            heads=heads,
            kv_heads=self._field("llama.attention.head_count_kv", heads),
            head_width=self._field("llama.rope.dimension_count", width // heads),
            rope_base=self._field("llama.rope.freq_base", 10_000.0),
            norm_eps=self._field("llama.attention.layer_norm_rms_epsilon"),
            tied="output.weight" not in self.names,
        )

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self._fields)

    def read(self, name: str) -> np.ndarray:
        """fp32 values in torch order (out, in)."""
        tensor = self._tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.names[name])

    def sha256(self) -> str:
        return _sha256([self.path])

    def _field(self, key: str, default=None):
        value = self._fields.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: the header lacks {key}")
        return value


class FolderFile:
    """A Hugging Face folder with one model.safetensors, or shards named by model.safetensors.index.json."""

    kind = "huggingface"

    def __init__(self, path: Path):
        """FileNotFoundError for a missing config or weight file, ValueError for one that cannot be parsed or is cut short."""
        self.path = path
        self._settings = self._json("config.json")
        self._shards = {name: self._open(name) for name in self._shard_names()}
        self._owner = {key: shard for shard in self._shards.values() for key in shard.keys()}  # noqa: SIM118 (safe_open is no dict)
        self.names = {key: tuple(shard.get_slice(key).get_shape()) for key, shard in self._owner.items()}

    def config(self) -> LLMConfig:
        """ValueError names every setting that this decoder does not have."""
        settings = self._settings
        if settings.get("architectures") != ["LlamaForCausalLM"]:
            raise ValueError(
                f"{self.path}/config.json: architectures={settings.get('architectures')} is not supported; known: ['LlamaForCausalLM']"
            )
        rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        found = {
            "hidden_act": (settings.get("hidden_act", "silu"), "silu"),
            "attention_bias": (settings.get("attention_bias", False), False),
            "mlp_bias": (settings.get("mlp_bias", False), False),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        }
        wrong = [f"{key}={value!r} (supported: {only!r})" for key, (value, only) in found.items() if value != only]
        if wrong:
            raise ValueError(f"{self.path}/config.json: not supported: {', '.join(wrong)}")
        try:
            heads, width = settings["num_attention_heads"], settings["hidden_size"]
            return LLMConfig(
                vocab=settings["vocab_size"],
                width=width,
                mlp_width=settings["intermediate_size"],
                depth=settings["num_hidden_layers"],
                heads=heads,
                kv_heads=settings.get("num_key_value_heads") or heads,
                head_width=settings.get("head_dim") or width // heads,
                rope_base=float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0),
                norm_eps=settings.get("rms_norm_eps", 1e-6),
                tied=settings.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise ValueError(f"{self.path}/config.json lacks {error.args[0]!r}") from error

    def tokenizer(self) -> Tokenizer:
        generation = self._json("generation_config.json") if (self.path / "generation_config.json").is_file() else {}
        ends = generation.get("eos_token_id", self._settings.get("eos_token_id"))
        return Tokenizer.from_folder(self.path, ends if isinstance(ends, list) else [ends])

    def read(self, name: str) -> np.ndarray:
        """Values in the file's dtype (bf16 as ml_dtypes) and torch order (out, in)."""
        return self._owner[name].get_tensor(name)

    def sha256(self) -> str:
        return _sha256([self.path / name for name in sorted(self._shards)])

    def _shard_names(self) -> list[str]:
        index = "model.safetensors.index.json"
        if (self.path / index).is_file():
            return sorted(set(self._json(index)["weight_map"].values()))
        return ["model.safetensors"]

    def _open(self, name: str):
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}: a Hugging Face folder needs it")
        try:
            return safetensors.safe_open(path, "numpy")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}); {AGAIN}") from error

    def _json(self, name: str) -> dict:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"no {name} in {self.path}: a Hugging Face folder needs it")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); {AGAIN}") from error


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
