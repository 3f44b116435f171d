"""What a GGUF header (llama.cpp's convert_hf_to_gguf.py) says of a model: header -> LLMConfig."""

from collections.abc import Callable

from rise_jax.llm_families import OPTIONS, head_misfits
from rise_jax.llm_ropes import linear_divisors
from rise_jax.models.llm_config import LLMConfig
from rise_jax.settings import ABOVE_0, EVEN, FLAG, Kind, check_settings, only, raise_faults, whole

TOKENS = "tokenizer.ggml.tokens"
PATTERN = Kind(
    "must be a whole number >= 1, or a list of true and false",
    lambda value: whole().fits(value) if not isinstance(value, list) else {*map(type, value)} == {bool},
)
WORDS = Kind(
    "must be a list of one or more texts",
    lambda value: isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value),
)
# What a header may hold behind the family's name and a dot: what is read, and what is there to be one value or changes nothing.
KINDS = {
    "embedding_length": whole(),
    "feed_forward_length": whole(),
    "block_count": whole(),
    "attention.head_count": whole(),
    "attention.head_count_kv": whole(),
    "attention.key_length": EVEN,
    "attention.value_length": EVEN,
    "attention.layer_norm_rms_epsilon": ABOVE_0,
    "attention.causal": only(True),
    "attention.scale": only(None),
    "attention.sliding_window": only(0),
    "expert_count": only(0),
    "expert_used_count": only(0),
    "logit_scale": only(1),
    "tensor_data_layout": only("Meta AI original pth"),
    "context_length": whole(),
    "vocab_size": whole(),
    "rope.dimension_count": EVEN,
    "rope.freq_base": ABOVE_0,
    "rope.scaling.type": only("none"),
    "rope.scaling.factor": ABOVE_0,
    "rope.scaling.attn_factor": only(1),
    "rope.scaling.finetuned": FLAG,
    "rope.scaling.original_context_length": whole(),
    "rope.scale_linear": only(1),
    "pooling_type": whole(0),
}
GEMMA3 = {
    "rope.scaling.type": only("none", "linear"),
    "rope.freq_base_swa": ABOVE_0,
    "attention.sliding_window": whole(),
    "attention.sliding_window_pattern": PATTERN,
    "attn_logit_softcapping": only(None),
    "final_logit_softcapping": only(None),
}
HEADS = ("embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length")
NEEDED = (
    "embedding_length",
    "attention.head_count",
    "feed_forward_length",
    "block_count",
    "attention.layer_norm_rms_epsilon",
)


def gguf_family(fields: dict, where: str) -> str:
    """The family of a GGUF header; ValueError for an unknown architecture."""
    architecture = fields.get("general.architecture")
    if architecture not in OPTIONS:
        raise ValueError(
            f"{where}: architecture {architecture!r} is not supported; known: {', '.join(map(repr, OPTIONS))}"
        )
    if (parts := fields.get("split.count", 1)) > 1:
        raise ValueError(
            f"{where}: one of {parts} parts of a model; join them (`llama-gguf-split --merge`), or give a Hugging Face folder"
        )
    return architecture


def gguf_config(fields: dict, divisors: tuple[float, ...], tied: bool, where: str) -> LLMConfig:
    """What a header says; `divisors` are the tensor `rope_freqs.weight`.

    ValueError lists what is missing or not supported.
    """
    family = gguf_family(fields, where)
    key, gemma = f"{family}.{{}}".format, family == "gemma3"
    kinds = {key(name): kind for name, kind in (KINDS | (GEMMA3 if gemma else {})).items()} | {TOKENS: WORDS}
    found = {name: value for name, value in fields.items() if name == TOKENS or name.startswith(key(""))}
    linear = found.get(key("rope.scaling.type")) == "linear"
    needed = [*NEEDED, *(["attention.sliding_window"] if gemma else []), *(["rope.scaling.factor"] if linear else [])]
    check_settings(found, kinds, where, free=(), needed=[*map(key, needed), TOKENS])
    sizes = (f"{family}.{name}" for name in HEADS)
    raise_faults([*head_misfits(found, *sizes), *_misfits(found, key)], where)
    get = lambda name, default=None: found.get(key(name), default)
    width, heads = get("embedding_length"), get("attention.head_count")
    head_width = get("attention.key_length", width // heads)
    return LLMConfig(
        vocab=len(found[TOKENS]),
        width=width,
        mlp_width=get("feed_forward_length"),
        depth=get("block_count"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_width=head_width,
        rope_base=get("rope.freq_base", 10_000.0),
        rope_divisors=linear_divisors(0, head_width, get("rope.scaling.factor")) if linear else divisors,
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        tied=tied,
        **OPTIONS[family],
        **(_gemma3(get, width, heads, head_width) if gemma else {}),
    )


def _misfits(found: dict, key: Callable) -> list[str]:
    """Sizes of heads that are not one, a scaling of the positions without its type, and a pattern of other layers than there are."""
    head_width = found.get(
        key("attention.key_length"), found[key("embedding_length")] // found[key("attention.head_count")]
    )
    allowed = dict.fromkeys(("attention.value_length", "rope.dimension_count"), head_width)
    if key("rope.scaling.type") not in found:
        allowed["rope.scaling.factor"] = 1
    asked = {key(name): value for name, value in allowed.items()}
    faults = [
        f"not supported: {name}={found[name]} (supported: {value})"
        for name, value in asked.items()
        if found.get(name, value) != value
    ]
    pattern, depth = (key(name) for name in ("attention.sliding_window_pattern", "block_count"))
    if isinstance(kinds := found.get(pattern), list) and len(kinds) != found[depth]:
        faults.append(f"not supported: len({pattern})={len(kinds)} (supported: {depth}={found[depth]})")
    return faults


def _gemma3(get: Callable, width: int, heads: int, head_width: int) -> dict:
    depth, pattern = get("block_count"), get("attention.sliding_window_pattern", 6)
    local = pattern if isinstance(pattern, list) else [(i + 1) % pattern > 0 for i in range(depth)]
    # The header does not have query_pre_attn_scalar: llama.cpp, too, knows the 27B model by its depth.
    scalar = width / heads if depth == 62 else head_width
    return dict(
        embed_scale=width**0.5,
        query_scale=scalar**-0.5,
        local=tuple(local),
        window=get("attention.sliding_window"),
        local_rope_base=get("rope.freq_base_swa", 10_000.0),
    )
