"""Greedy decoding of the embedded LLM in fp32, 64 new tokens: tokens per second against transformers + torch on the same cores.

    python benchmarks/llm_decode.py [--runs=7] [--batches=1,8]

Runs of the two alternate, so that both see the same machine; the table gives medians, and both must choose the same tokens.
Needs the packages of tests/requirements.txt.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from rise_jax.models.llm import make_llm
from rise_jax.rephrase import encode_prefix, rephrase
from rise_jax.weights import LLAMA, LoadedLLM, load_llm

NEW, PREFIX, PROMPT = 64, 96, 24  # tokens


def to_torch(loaded: LoadedLLM) -> transformers.LlamaForCausalLM:
    """The same weights as a torch model."""
    config = loaded.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=True,
        )
    )
    own = model.state_dict()
    for path, (name, _) in LLAMA.items():
        if path.startswith("head/"):
            continue
        leaf = loaded.params
        for part in path.split("/"):
            leaf = leaf[part]
        for i, layer in enumerate(leaf) if "{}" in name else [(None, leaf)]:
            own[name.format(i)].copy_(torch.tensor(layer.T if path.endswith("kernel") else layer))
    return model.eval()


def ours(loaded: LoadedLLM, ids: np.ndarray):
    """A function that decodes `ids` behind the cached prefix and returns the tokens."""
    llm, _ = make_llm(loaded.config)
    params = jax.device_put(loaded.params)
    prefix = jax.jit(partial(encode_prefix, llm))(params, jnp.asarray(ids[0, :PREFIX]))
    decode = jax.jit(partial(rephrase, llm, max_new=NEW, eos=(), pad=0))
    prompt = jnp.asarray(ids[:, PREFIX:])
    return lambda: np.asarray(decode(params, prefix, prompt, jnp.ones(prompt.shape, bool)).tokens)


def theirs(model: transformers.LlamaForCausalLM, ids: np.ndarray):
    """The same for transformers."""
    rows = torch.tensor(ids)
    settings = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, eos_token_id=None)
    mask = torch.ones_like(rows)

    def decode():
        return model.generate(rows, attention_mask=mask, **settings)[:, rows.shape[1] :].numpy()

    return decode


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--batches", default="1,8")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    loaded = load_llm("embedded")
    model = to_torch(loaded)
    rng = np.random.default_rng(0)
    print(
        f"{'batch':>5} {'rise_jax tok/s':>15} {'torch tok/s':>12} {'ratio':>6}   ({NEW} new tokens, {PREFIX} + {PROMPT} read)"
    )
    for batch in map(int, options.batches.split(",")):
        shared = np.tile(rng.integers(20, loaded.config.vocab, PREFIX), (batch, 1))
        ids = np.concatenate([shared, rng.integers(20, loaded.config.vocab, (batch, PROMPT))], axis=1)
        pair = ours(loaded, ids), theirs(model, ids)
        first, second = (decode() for decode in pair)  # compiles and warms up
        equal = (first == second).mean()
        times = [[seconds(decode) for decode in pair] for _ in range(options.runs)]
        jax_rate, torch_rate = (batch * NEW / statistics.median(column) for column in zip(*times))
        print(f"{batch:5d} {jax_rate:15.1f} {torch_rate:12.1f} {jax_rate / torch_rate:6.2f}   equal tokens {equal:.1%}")


if __name__ == "__main__":
    main()
