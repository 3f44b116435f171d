"""Tiny random models of every published family, with torch's answers. Large weights make attention sharp, and norms have their own."""

from collections.abc import Callable
from functools import cache, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from rise_jax.models.llm import make_llm
from rise_jax.weights import LoadedLLM
from tests import llama

VOCAB = 320
SIZES = dict(
    vocab_size=VOCAB,
    intermediate_size=72,
    num_hidden_layers=3,
    max_position_embeddings=8192,
    eos_token_id=1,
    bos_token_id=0,
    pad_token_id=2,
    attn_implementation="eager",
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def ropes(factor: float = 4.0, local: float = 60.0) -> dict:
    """Gemma's, by layer type."""
    return {
        "full_attention": {"rope_type": "linear", "factor": factor, "rope_theta": 800.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


# Head counts: 3 on 1, 7 on 1, 5 on 5, 6 on 2; heads and tied embeddings vary; sequences outgrow window and first context.
SETTINGS = {
    "llama": dict(
        hidden_size=48, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=False, rope_parameters=LLAMA3
    ),
    "qwen2": dict(
        hidden_size=56,
        num_attention_heads=7,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    ),
    "qwen3": dict(
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=12,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 900.0},
    ),
    "gemma3": dict(
        hidden_size=36,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        query_pre_attn_scalar=24,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=ropes(),
    ),
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}


def tiny(family: str, **changes) -> transformers.PreTrainedModel:
    config, model = CLASSES[family]
    # Rotary frequencies in double precision: torch's fp32 powers differ between CPUs, by 1e-4 rad at position 3000.
    with mock.patch.object(torch, "float", torch.float64):
        made = model(config(**{**SIZES, **SETTINGS[family], **changes})).eval()
    randomise(made, centre=0.0 if family == "gemma3" else 1.0)
    return made


def folders(tmp_path_factory) -> Callable:
    """family -> (torch model, its folder), each made once."""

    @cache
    def make(family):
        model = tiny(family)
        return model, llama.save(model, tmp_path_factory.mktemp(family))

    return make


def randomise(model: torch.nn.Module, centre: float) -> None:
    """Normal weights, those of norms around `centre`."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(centre if "norm" in name else 0.0, 0.2)


def reader(loaded: LoadedLLM, dtype=jnp.float32):
    """(ids, positions) -> (states of all layers [depth + 1, B, L, D], logits [B, L, V]) as float32, compiled."""
    llm, _ = make_llm(loaded.config, dtype)

    @jax.jit
    def apply(params, ids, positions):
        model = llm(params)
        positions = jnp.broadcast_to(positions, ids.shape)
        states, _ = model(ids, jnp.ones(ids.shape, bool), positions, keep=range(loaded.config.depth + 1))
        return states.astype(jnp.float32), model.logits(states[-1])

    return partial(apply, loaded.params)


def answers(model, ids, positions=None) -> tuple[np.ndarray, np.ndarray]:
    """torch's (hidden states of all layers, logits)."""
    positions = None if positions is None else torch.tensor(positions)[None]
    with torch.no_grad():
        found = model(torch.tensor(ids), position_ids=positions, output_hidden_states=True)
    return torch.stack(found.hidden_states).float().numpy(), found.logits.float().numpy()


def parity(found, expected) -> float:
    """max|a - b| / max|b|"""
    expected = np.asarray(expected)
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
