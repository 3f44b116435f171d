"""Language models for the tests: the embedded one, loaded once per process, and tiny random ones as Hugging Face folders."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers

from rise_jax.models.llm import make_llm
from rise_jax.weights import LoadedLLM, load_llm

TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SIZES = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
    eos_token_id=1,
    bos_token_id=0,
    pad_token_id=2,
)


@cache
def smollm2(dtype: str = "float32") -> LoadedLLM:
    """The embedded model."""
    loaded = load_llm("embedded", jnp.dtype(dtype))
    return loaded._replace(params=jax.device_put(loaded.params))


def tiny(tied: bool = False, **changes) -> transformers.LlamaForCausalLM:
    """A random Llama whose weights are large enough to make its greedy tokens vary."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    config = transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": tied, "rope_parameters": rope, **changes})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def save(model: transformers.LlamaForCausalLM, folder: Path, *, template: str | None = TEMPLATE, shard: str = "1GB"):
    """Writes `model` and a small byte-level tokenizer as a Hugging Face folder."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<|start|>", "<|end|>", "<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat runs over the hill, the dog and the cat run home"] * 4, trainer)
    names = dict(bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def run(loaded: LoadedLLM, ids: np.ndarray, dtype=jnp.float32) -> tuple[np.ndarray, np.ndarray]:
    """(states of all layers [depth + 1, B, L, D], logits [B, L, V]) of unpadded ids, as float32."""
    llm, _ = make_llm(loaded.config, dtype)

    @jax.jit
    def apply(params, ids):
        model = llm(params)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        states, _ = model(ids, jnp.ones(ids.shape, bool), positions, keep=range(loaded.config.depth + 1))
        return states.astype(jnp.float32), model.logits(states[-1])

    return tuple(np.asarray(array) for array in apply(loaded.params, jnp.asarray(ids)))


def jitted(function, loaded: LoadedLLM, dtype=jnp.float32, **settings):
    """A function of rephrase.py for this model, compiled; it takes what follows `params`."""
    llm, _ = make_llm(loaded.config, dtype)
    return partial(jax.jit(partial(function, llm, **settings)), loaded.params)
