"""Sizes of a model's frozen parts without their weights: from the files a config names, or, where these are not here, as published.

Each function returns (sizes, where they are from).
"""

import difflib
from functools import partial
from pathlib import Path

from rise_jax.llm_families import OPTIONS
from rise_jax.models.llm_config import LLMConfig
from rise_jax.models.t5 import T5Config
from rise_jax.models.vae import Pixels
from rise_jax.models.wan_vae import WanVAE
from rise_jax.published import PIXELS, open_vae
from rise_jax.weights import EMBEDDED, checked_llm
from rise_jax.weights_t5 import encoder_folder, t5_config

_qwen2 = partial(LLMConfig, vocab=151_936, head_width=128, **OPTIONS["qwen2"])
_qwen3 = partial(LLMConfig, vocab=151_936, heads=16, kv_heads=8, head_width=128, **OPTIONS["qwen3"])
_llama3 = partial(LLMConfig, vocab=128_256, kv_heads=8)
_smollm2 = partial(LLMConfig, vocab=49_152, head_width=64)

# The config.json of each, by the name it is published under, "-Instruct" left out. What is no size, as the rotary base, is left out.
LLMS = {
    "Qwen2.5-0.5B": _qwen2(width=896, mlp_width=4864, depth=24, heads=14, kv_heads=2, head_width=64),
    "Qwen2.5-1.5B": _qwen2(width=1536, mlp_width=8960, depth=28, heads=12, kv_heads=2),
    "Qwen2.5-3B": _qwen2(width=2048, mlp_width=11_008, depth=36, heads=16, kv_heads=2),
    "Qwen2.5-7B": _qwen2(vocab=152_064, width=3584, mlp_width=18_944, depth=28, heads=28, kv_heads=4, tied=False),
    "Qwen3-0.6B": _qwen3(width=1024, mlp_width=3072, depth=28),
    "Qwen3-1.7B": _qwen3(width=2048, mlp_width=6144, depth=28),
    "SmolLM2-135M": _smollm2(width=576, mlp_width=1536, depth=30, heads=9, kv_heads=3),
    "SmolLM2-360M": _smollm2(width=960, mlp_width=2560, depth=32, heads=15, kv_heads=5),
    "SmolLM2-1.7B": _smollm2(width=2048, mlp_width=8192, depth=24, heads=32, kv_heads=32),
    "Llama-3.2-1B": _llama3(width=2048, mlp_width=8192, depth=16, heads=32, head_width=64),
    "Llama-3.2-3B": _llama3(width=3072, mlp_width=8192, depth=28, heads=24, head_width=128),
}
EMBEDDED_LLM = "SmolLM2-135M"
UMT5_XXL = T5Config(
    vocab=256_384, width=4096, mlp_width=10_240, depth=24, heads=64, head_width=64, shared_bias=False
)  # what Wan 2.1 was trained with: Wan2.1 `wan/modules/t5.py`


def llm_sizes(path: str) -> tuple[LLMConfig, str]:
    """Of `model.llm.path`. ValueError for weights that `load_llm` would refuse, or a path that is not there and whose name is none of
    LLMS."""
    if path == EMBEDDED:
        return LLMS[EMBEDDED_LLM], f"those of {EMBEDDED_LLM}-Instruct"
    if Path(path).exists():
        return checked_llm(path)[1], f"from {path}"
    name = Path(path).name.removesuffix("-Instruct")
    if name not in LLMS:
        near = difflib.get_close_matches(name, LLMS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"model.llm.path={path!r} is not here, and its name tells no sizes; nearest: {near}; known: {', '.join(LLMS)}"
        )
    return LLMS[name], f"by its name: {path} is not here"


def vae_sizes(path: str) -> tuple[Pixels | WanVAE, str]:
    """Of `model.vae.path`."""
    if path == PIXELS:
        return Pixels(), "no parameters"
    if Path(path).exists():
        return open_vae(path), f"from {path}"
    return WanVAE(), f"Wan 2.1's: {path} is not here"


def native_sizes(path: str) -> tuple[T5Config, str]:
    """Of `model.native.path`. FileNotFoundError for an empty one."""
    if not path:
        raise FileNotFoundError("model.native.path='' names no encoder")
    if Path(path).exists():
        return t5_config(encoder_folder(path)), f"from {path}"
    return UMT5_XXL, f"umT5-XXL's: model.native.path={path!r} is not here"
