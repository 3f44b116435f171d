"""Which published families the decoder covers, and what their config.json says about them: settings -> LLMConfig.

Everything that is missing, impossible or unknown is said in one ValueError: an option that the decoder does not have may change what
the model computes.
"""

from collections.abc import Mapping
from typing import Any

from rise_jax.llm_ropes import SCALINGS
from rise_jax.models.llm_config import LLMConfig
from rise_jax.settings import (
    ABOVE_0,
    COMMON,
    EVEN,
    FLAG,
    IDS,
    OBJECT,
    Kind,
    check_settings,
    list_of,
    only,
    raise_faults,
    whole,
)

# What all models of a family share, beyond Llama.
OPTIONS: dict[str, dict] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma3": {"qk_norm": True, "post_norms": True, "activation": "gelu_tanh"},
}
MULTIMODAL = "Gemma3ForConditionalGeneration"  # its text part is read
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    MULTIMODAL: "gemma3",
}
# config.json leaves out what equals the default of transformers' config class.
DEFAULTS = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
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
SIZES = ("hidden_size", "num_attention_heads", "vocab_size", "intermediate_size", "num_hidden_layers")
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPES = {"llama": ("default", "llama3"), "qwen2": ("default",), "qwen3": ("default",), "gemma3": ("default", "linear")}

# Keys of config.json. Where the decoder has one value, absent or null is that value.
KINDS: dict[str, Kind] = {
    **dict.fromkeys((*SIZES, "num_key_value_heads", "max_position_embeddings"), whole()),
    "head_dim": EVEN,
    "rms_norm_eps": ABOVE_0,
    "rope_theta": ABOVE_0,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "partial_rotary_factor": only(1),
    "tie_word_embeddings": FLAG,
    "layer_types": list_of(only("full_attention"), "types"),
    "eos_token_id": IDS,
    "quantization_config": only(None),
    "is_encoder_decoder": only(False),
    "add_cross_attention": only(False),
    "pruned_heads": only({}),
}
_SILU = {"hidden_act": only("silu")}
_NO_WINDOW = {"use_sliding_window": only(False), "sliding_window": whole(0), "max_window_layers": whole(0)}
FAMILIES: dict[str, dict[str, Kind]] = {
    "llama": _SILU
    | {
        "attention_bias": only(False),
        "mlp_bias": only(False),
        "pretraining_tp": only(1),
        "rope_interleaved": only(False),
        "is_llama_config": only(True),
        "sliding_window": only(None),
    },
    "qwen2": _SILU | _NO_WINDOW | {"use_mrope": only(False)},
    "qwen3": _SILU | _NO_WINDOW | {"attention_bias": only(False)},
    "gemma3": {
        "hidden_activation": only("gelu_pytorch_tanh"),
        "hidden_act": only("gelu_pytorch_tanh"),
        "attention_bias": only(False),
        "attn_logit_softcapping": only(None),
        "final_logit_softcapping": only(None),
        "use_bidirectional_attention": only(False),
        "query_pre_attn_scalar": ABOVE_0,
        "sliding_window": whole(),
        "sliding_window_pattern": whole(),
        "rope_local_base_freq": ABOVE_0,
        "layer_types": list_of(only(*LAYER_TYPES), "types"),
        "rope_parameters.full_attention": OBJECT,
        "rope_parameters.sliding_attention": OBJECT,
    },
}
FREE = COMMON | {"is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder"}
IMAGES = (
    "boi_token",
    "eoi_token",
    "image_token",
)  # of a multimodal model: their ids, and what else it has beside the text part
OUTER = {"text_config": OBJECT, "tie_word_embeddings": FLAG, "eos_token_id": IDS, "quantization_config": only(None)}
OUTER_FREE = FREE | {f"{name}_{key}" for name in IMAGES for key in ("id", "index")}
OUTER_FREE |= {"vision_config", "mm_tokens_per_image", "is_encoder_decoder", "add_cross_attention", "pruned_heads"}


def folder_family(settings: dict, where: str) -> str:
    """The family of a config.json; ValueError for an unknown architecture."""
    architectures = settings.get("architectures")
    known = isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in list(ARCHITECTURES)
    if not known:
        raise ValueError(f"{where}: architectures={architectures} is not supported; known: {list(ARCHITECTURES)}")
    return ARCHITECTURES[architectures[0]]


def folder_config(settings: dict, where: str) -> LLMConfig:
    """What a config.json says, in transformers' spelling before and since its version 5.

    ValueError names what is missing or of an impossible value, and every option that this decoder does not have or know.
    """
    family = folder_family(settings, where)
    values = DEFAULTS[family] | _text_settings(settings, where)
    kinds = KINDS | FAMILIES[family] | _rope_kinds(family)
    for key in [key for key, kind in kinds.items() if kind is OBJECT]:
        values |= {f"{key}.{name}": value for name, value in _object(values.get(key)).items()}
    place, rope = _rope(values, family)
    _, names = SCALINGS.get(str(rope.get("rope_type")), SCALINGS["default"])
    needed = [
        *SIZES,
        *(["query_pre_attn_scalar", "sliding_window", "sliding_window_pattern"] if family == "gemma3" else []),
    ]
    lacking = [f"{place}.{name}" for name in names if rope.get(name) is None]
    check_settings(values, kinds, where, free=FREE, needed=[*needed, *lacking])
    values = {key: value for key, value in values.items() if value is not None}
    raise_faults([*_misfits(values), *_rope_misfits(place, rope)], where)
    return _config(family, values, rope)


def _text_settings(settings: dict, where: str) -> dict:
    if settings["architectures"] != [MULTIMODAL]:
        return settings
    check_settings(settings, OUTER, where, free=OUTER_FREE)
    outer = {key: settings[key] for key in ("tie_word_embeddings",) if key in settings}
    return _object(settings.get("text_config")) | outer


def _object(value) -> dict:
    return value if isinstance(value, dict) else {}


def _rope_kinds(family: str) -> dict[str, Kind]:
    """Of the settings within `rope_scaling` and `rope_parameters`; Gemma has the latter by layer type."""
    kinds = {
        "rope_type": only(*ROPES[family]),
        "type": only(*ROPES[family]),
        "rope_theta": ABOVE_0,
        "factor": ABOVE_0,
        "low_freq_factor": ABOVE_0,
        "high_freq_factor": ABOVE_0,
        "original_max_position_embeddings": whole(),
        "partial_rotary_factor": only(1),
    }
    places = ("rope_scaling", "rope_parameters.full_attention" if family == "gemma3" else "rope_parameters")
    found = {f"{place}.{name}": kind for place in places for name, kind in kinds.items()}
    if family == "gemma3":
        local = "rope_parameters.sliding_attention"
        found |= {f"{local}.{name}": kind for name, kind in kinds.items()}
        found |= {f"{local}.{name}": only("default") for name in ("rope_type", "type")}
    return found


def _rope(values: dict, family: str) -> tuple[str, dict]:
    """(where they stand, settings of the rotary positions of layers that are not local)"""
    place = "rope_parameters.full_attention" if family == "gemma3" else "rope_parameters"
    given, older = _object(values.get(place)), _object(values.get("rope_scaling"))
    rope = {"original_max_position_embeddings": values.get("max_position_embeddings"), **given, **older}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return ("rope_scaling" if older else place), rope


def _misfits(values: dict) -> list[str]:
    """Sizes that do not belong together."""
    faults = head_misfits(values, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    depth, types = values["num_hidden_layers"], values.get("layer_types")
    if types and len(types) != depth:
        faults.append(f"not supported: len(layer_types)={len(types)} (supported: num_hidden_layers={depth})")
    return faults


def head_misfits(values: Mapping[str, Any], width: str, heads: str, kv_heads: str, head_width: str) -> list[str]:
    """Numbers and width of heads that do not belong together; `width` and the rest are the keys of the sizes in `values`."""
    faults, count = [], values[heads]
    if head_width not in values and values[width] % (2 * count):
        faults.append(
            f"{width}={values[width]} over {heads}={count} gives no even head width, and {head_width} is not there"
        )
    if count % values.get(kv_heads, count):
        faults.append(f"{heads}={count} is not a multiple of {kv_heads}={values[kv_heads]}")
    return faults


def _rope_misfits(place: str, rope: dict) -> list[str]:
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if rope["rope_type"] != "llama3" or low < high:
        return []
    return [f"not supported: {place}.high_freq_factor={high} (must be above low_freq_factor={low})"]


def _config(family: str, values: dict, rope: dict) -> LLMConfig:
    """Of values that are there and fit."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    head_width = values.get("head_dim", width // heads)
    base = float(rope.get("rope_theta") or values.get("rope_theta", 1e6 if family == "gemma3" else 1e4))
    scale, names = SCALINGS[rope["rope_type"]]
    return LLMConfig(
        vocab=values["vocab_size"],
        width=width,
        mlp_width=values["intermediate_size"],
        depth=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads", heads),
        head_width=head_width,
        rope_base=base,
        rope_divisors=scale(base, head_width, *(rope[name] for name in names)),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        tied=values.get("tie_word_embeddings", False),
        **OPTIONS[family],
        **(_gemma3(values) if family == "gemma3" else {}),
    )


def _gemma3(values: dict) -> dict:
    period = values["sliding_window_pattern"]
    pattern = [LAYER_TYPES[(i + 1) % period > 0] for i in range(values["num_hidden_layers"])]
    local_base = values.get("rope_parameters.sliding_attention.rope_theta") or values.get("rope_local_base_freq", 1e4)
    return dict(
        embed_scale=values["hidden_size"] ** 0.5,
        query_scale=values["query_pre_attn_scalar"] ** -0.5,
        local=tuple(kind == "sliding_attention" for kind in values.get("layer_types", pattern)),
        window=values["sliding_window"],
        local_rope_base=float(local_base),
    )
