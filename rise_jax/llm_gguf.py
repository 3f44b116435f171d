"""What a GGUF header (llama.cpp's convert_hf_to_gguf.py) says of a model: header -> LLMConfig."""

from collections.abc import Callable

from rise_jax.llm_families import OPTIONS
from rise_jax.llm_ropes import linear_divisors
from rise_jax.models.llm_config import LLMConfig
from rise_jax.settings import ABOVE_0, EVEN, Kind, check_settings, only, raise_faults, whole

TOKENS = "tokenizer.ggml.tokens"
PATTERN = Kind(
    "must be a whole number >= 1, or a list of true and false",
    lambda value: whole().fits(value) if not isinstance(value, list) else {*map(type, value)} == {bool},
)
# What is read of a header, behind the family's name and a dot.
KINDS = {
    "embedding_length": whole(),
    "feed_forward_length": whole(),
    "block_count": whole(),
    "attention.head_count": whole(),
    "attention.head_count_kv": whole(),
    "attention.key_length": EVEN,
    "attention.layer_norm_rms_epsilon": ABOVE_0,
    "rope.dimension_count": EVEN,
    "rope.freq_base": ABOVE_0,
    "rope.scaling.type": only("none"),
    "rope.scaling.factor": ABOVE_0,
}
GEMMA3 = {
    "rope.scaling.type": only("none", "linear"),
    "rope.freq_base_swa": ABOVE_0,
    "attention.sliding_window": whole(),
    "attention.sliding_window_pattern": PATTERN,
    "attn_logit_softcapping": only(None),
    "final_logit_softcapping": only(None),
}
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
    return architecture


def gguf_config(fields: dict, divisors: tuple[float, ...], tied: bool, where: str) -> LLMConfig:
    """What a header says; `divisors` are the tensor `rope_freqs.weight`.

    ValueError lists what is missing or not supported.
    """
    family = gguf_family(fields, where)
    key, gemma = f"{family}.{{}}".format, family == "gemma3"
    kinds = {key(name): kind for name, kind in (KINDS | (GEMMA3 if gemma else {})).items()}
    found = {name: fields[name] for name in (*kinds, TOKENS) if name in fields}
    linear = found.get(key("rope.scaling.type")) == "linear"
    needed = [*NEEDED, *(["attention.sliding_window"] if gemma else []), *(["rope.scaling.factor"] if linear else [])]
    check_settings(found, kinds, where, free=(TOKENS,), needed=[*map(key, needed), TOKENS])
    get = lambda name, default=None: found.get(key(name), default)
    width, heads = get("embedding_length"), get("attention.head_count")
    turned = get("rope.dimension_count")
    head_width = get("attention.key_length", turned or width // heads)
    if turned not in (None, head_width):
        raise_faults([f"not supported: {key('rope.dimension_count')}={turned} (supported: {head_width})"], where)
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
