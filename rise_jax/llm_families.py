"""Which published families the decoder covers, and what their files say about them: config.json and GGUF headers -> LLMConfig.

Everything that is missing or that the decoder does not have is said in one ValueError.
"""

import math
from collections.abc import Callable

import numpy as np

from rise_jax.models.llm import rope_frequencies
from rise_jax.models.llm_config import LLMConfig

# What all models of a family share, beyond Llama.
OPTIONS: dict[str, dict] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma3": {"qk_norm": True, "post_norms": True, "activation": "gelu_tanh"},
}
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",  # its text part
}
# config.json leaves out what equals the default of transformers' config class.
DEFAULTS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma3": dict(
        vocab_size=262_208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        sliding_window_pattern=6,
    ),
}
# Settings for which the decoder has one value; absent or null is that value.
ONLY = {
    "llama": dict(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_interleaved=False),
    "qwen2": dict(hidden_act="silu", use_sliding_window=False, use_mrope=False),
    "qwen3": dict(hidden_act="silu", attention_bias=False, use_sliding_window=False),
    "gemma3": dict(
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        use_bidirectional_attention=False,
    ),
}
ROPES = {"llama": ("default", "llama3"), "qwen2": ("default",), "qwen3": ("default",), "gemma3": ("default", "linear")}
LAYER_TYPES = ("full_attention", "sliding_attention")


class _Settings:
    """Values by key; what is missing (a 1 stands in for it) or not supported is collected until `check`."""

    def __init__(self, values: dict, lacks: str):
        self.values, self.lacks = values, lacks
        self.missing: list[str] = []
        self.unsupported: list[str] = []

    def need(self, key: str):
        if self.values.get(key) is None:
            self.missing.append(key)
            return 1
        return self.values[key]

    def get(self, key: str, default):
        value = self.values.get(key)
        return default if value is None else value

    def only(self, key: str, value, *supported):
        if value not in supported:
            self.unsupported.append(f"{key}={value!r} (supported: {' or '.join(map(repr, supported))})")

    def check(self, where: str) -> None:
        faults = [f"not supported: {', '.join(self.unsupported)}"] if self.unsupported else []
        faults += [f"{self.lacks} {', '.join(self.missing)}"] if self.missing else []
        if faults:
            raise ValueError(f"{where}: {'; '.join(faults)}")


def folder_family(settings: dict, where: str) -> str:
    """The family of a config.json; ValueError for an unknown architecture."""
    architectures = settings.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise ValueError(f"{where}: architectures={architectures} is not supported; known: {list(ARCHITECTURES)}")
    return ARCHITECTURES[architectures[0]]


def folder_config(settings: dict, where: str) -> LLMConfig:
    """What a config.json says, in transformers' spelling before and since its version 5.

    ValueError names what is missing, and what this decoder does not have.
    """
    try:
        return _folder_config(settings, where)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: a setting has a type or a size that no model has ({error})") from error


def _folder_config(settings: dict, where: str) -> LLMConfig:
    family = folder_family(settings, where)
    outer = {key: settings[key] for key in ("tie_word_embeddings", "quantization_config") if key in settings}
    found = _Settings({**DEFAULTS[family], **settings.get("text_config", settings), **outer}, "it lacks")
    found.only("quantization_config", found.get("quantization_config", None), None)
    for key, value in ONLY[family].items():
        found.only(key, found.get(key, value), value)
    width, heads = found.need("hidden_size"), found.need("num_attention_heads")
    head_width = found.get("head_dim", width // heads)
    ropes = {**found.get("rope_parameters", {})}
    flat = {**({} if family == "gemma3" else ropes), **found.get("rope_scaling", {})}
    if family == "gemma3":
        more = _gemma3(found, width, ropes.get("sliding_attention") or {})
        flat = {**(ropes.get("full_attention") or {}), **flat}
    else:
        for kind in sorted(set(found.get("layer_types", ()))):
            found.only("layer_types", kind, "full_attention")
        more = {}
    base = float(flat.get("rope_theta") or found.get("rope_theta", 1e6 if family == "gemma3" else 1e4))
    config = LLMConfig(
        vocab=found.need("vocab_size"),
        width=width,
        mlp_width=found.need("intermediate_size"),
        depth=found.need("num_hidden_layers"),
        heads=heads,
        kv_heads=found.get("num_key_value_heads", heads),
        head_width=head_width,
        rope_base=base,
        rope_divisors=_divisors(found, flat, ROPES[family], base, head_width),
        norm_eps=found.get("rms_norm_eps", 1e-6),
        tied=found.get("tie_word_embeddings", False),
        **OPTIONS[family],
        **more,
    )
    found.check(where)
    return config


def _gemma3(found: _Settings, width: int, local_rope: dict) -> dict:
    depth, period = found.need("num_hidden_layers"), found.need("sliding_window_pattern")
    types = found.get("layer_types", [LAYER_TYPES[(i + 1) % period > 0] for i in range(depth)])
    found.only("len(layer_types)", len(types), depth)
    for kind in sorted(set(types)):
        found.only("layer_types", kind, *LAYER_TYPES)
    found.only("rope_parameters.sliding_attention.rope_type", local_rope.get("rope_type", "default"), "default")
    return dict(
        embed_scale=width**0.5,
        query_scale=found.need("query_pre_attn_scalar") ** -0.5,
        local=tuple(kind == "sliding_attention" for kind in types),
        window=found.need("sliding_window"),
        local_rope_base=float(local_rope.get("rope_theta") or found.get("rope_local_base_freq", 1e4)),
    )


def _divisors(found: _Settings, rope: dict, kinds: tuple, base: float, head_width: int) -> tuple[float, ...]:
    """`rope_divisors` of a `rope_scaling` (or `rope_parameters`) entry."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    found.only("rope_type", kind, *kinds)
    found.only("partial_rotary_factor", rope.get("partial_rotary_factor") or found.get("partial_rotary_factor", 1), 1)
    if kind not in kinds or kind == "default":
        return ()
    make, names = SCALINGS[kind]
    rope = {"original_max_position_embeddings": found.get("max_position_embeddings", None), **rope}
    missing = [f"rope_scaling.{name}" for name in names if rope.get(name) is None]
    found.missing += missing
    return () if missing else make(base, head_width, *(rope[name] for name in names))


def linear_divisors(base: float, head_width: int, factor: float) -> tuple[float, ...]:
    """Every position divided by `factor` (arXiv 2306.15595)."""
    return (float(factor),) * (head_width // 2)


def llama3_divisors(
    base: float, head_width: int, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Llama 3.1's scaling: wavelengths above `original` / low are stretched by `factor`, those below `original` / high not at all.

    Between the two the frequencies are mixed linearly in `original` / wavelength (`apply_scaling` in Meta's llama-models).
    """
    # In fp32, in transformers' order: published models have these roundings, and they grow with the position.
    frequencies = rope_frequencies(head_width, base)
    wavelengths = np.float32(2 * math.pi) / frequencies
    kept = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    mixed = (1 - kept) * frequencies / np.float32(factor) + kept * frequencies
    stretched = np.where(wavelengths > original / low, frequencies / np.float32(factor), mixed)
    scaled = np.where(wavelengths < original / high, frequencies, stretched)
    return tuple((frequencies.astype(np.float64) / scaled).tolist())


SCALINGS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "linear": (linear_divisors, ("factor",)),
    "llama3": (
        llama3_divisors,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}


def gguf_family(fields: dict, where: str) -> str:
    """The family of a GGUF header; ValueError for an unknown architecture."""
    architecture = fields.get("general.architecture")
    if architecture not in OPTIONS:
        raise ValueError(
            f"{where}: architecture {architecture!r} is not supported; known: {', '.join(map(repr, OPTIONS))}"
        )
    return architecture


def gguf_config(fields: dict, divisors: tuple[float, ...], tied: bool, where: str) -> LLMConfig:
    """What a GGUF header (llama.cpp's convert_hf_to_gguf.py) says; `divisors` are the tensor `rope_freqs.weight`."""
    family = gguf_family(fields, where)
    found = _Settings(fields, "the header lacks")
    key = f"{family}.{{}}".format
    width, heads = found.need(key("embedding_length")), found.need(key("attention.head_count"))
    head_width = found.get(key("attention.key_length"), found.get(key("rope.dimension_count"), width // heads))
    found.only(key("rope.dimension_count"), found.get(key("rope.dimension_count"), head_width), head_width)
    scaling, scalable = key("rope.scaling.type"), ("none", "linear") if family == "gemma3" else ("none",)
    found.only(scaling, found.get(scaling, "none"), *scalable)
    if found.get(scaling, "none") == "linear":
        divisors = linear_divisors(0, head_width, found.need(key("rope.scaling.factor")))
    config = LLMConfig(
        vocab=len(found.get("tokenizer.ggml.tokens", ())),
        width=width,
        mlp_width=found.need(key("feed_forward_length")),
        depth=found.need(key("block_count")),
        heads=heads,
        kv_heads=found.get(key("attention.head_count_kv"), heads),
        head_width=head_width,
        rope_base=found.get(key("rope.freq_base"), 10_000.0),
        rope_divisors=divisors,
        norm_eps=found.need(key("attention.layer_norm_rms_epsilon")),
        tied=tied,
        **OPTIONS[family],
        **(_gemma3_of_gguf(found, key, width, heads, head_width) if family == "gemma3" else {}),
    )
    found.need("tokenizer.ggml.tokens")
    found.check(where)
    return config


def _gemma3_of_gguf(found: _Settings, key: Callable, width: int, heads: int, head_width: int) -> dict:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        found.only(key(name), found.get(key(name), None), None)
    depth, pattern = found.need(key("block_count")), found.get(key("attention.sliding_window_pattern"), 6)
    local = [(i + 1) % pattern > 0 for i in range(depth)] if isinstance(pattern, int) else pattern
    # The header does not have query_pre_attn_scalar: llama.cpp, too, knows the 27B model by its depth.
    scalar = width / heads if depth == 62 else head_width
    return dict(
        embed_scale=width**0.5,
        query_scale=scalar**-0.5,
        local=tuple(map(bool, local)),
        window=found.need(key("attention.sliding_window")),
        local_rope_base=found.get(key("rope.freq_base_swa"), 10_000.0),
    )
