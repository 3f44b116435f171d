"""Greedy decoding of the embedded LLM in fp32, 64 new tokens: tokens per second against transformers + torch on the same cores.

    python -m benchmarks.llm_decode [--runs=7] [--batches=1,8]

All decoders take turns, so that they see the same machine; the table gives medians of whole calls (reading the prompt, then 64
tokens), and how many of the tokens are those of torch. "scan" and "unrolled" are the two ways of `rephrase` to run the layers.
Needs the packages of tests/requirements.txt and an otherwise idle machine: torch suffers most from busy neighbours.
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

NEW, PREFIX, PROMPT = 64, 1, 31  # tokens; a shared prefix that long gives nobody an advantage


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


def ours(loaded: LoadedLLM, ids: np.ndarray, unroll: bool):
    """A function that decodes `ids` and returns the tokens."""
    llm, _ = make_llm(loaded.config)
    params = loaded.params
    prefix = jax.jit(partial(encode_prefix, llm))(params, jnp.asarray(ids[0, :PREFIX]))
    decode = jax.jit(partial(rephrase, llm, max_new=NEW, eos=(), pad=0, unroll=unroll))
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
    loaded = loaded._replace(params=jax.device_put(loaded.params))
    rng = np.random.default_rng(0)
    print(
        f"{NEW} new tokens after {PREFIX + PROMPT}, fp32, {torch.get_num_threads()} cores, median of {options.runs} runs"
    )
    print(f"{'batch':>5} {'decoder':>10} {'tokens/s':>9} {'ratio':>6} {'equal':>7}")
    for batch in map(int, options.batches.split(",")):
        shared = np.tile(rng.integers(20, loaded.config.vocab, PREFIX), (batch, 1))
        ids = np.concatenate([shared, rng.integers(20, loaded.config.vocab, (batch, PROMPT))], axis=1)
        decoders = dict(torch=theirs(model, ids), scan=ours(loaded, ids, False), unrolled=ours(loaded, ids, True))
        tokens = {name: decode() for name, decode in decoders.items()}  # compiles and warms up
        times = [{name: seconds(decode) for name, decode in decoders.items()} for _ in range(options.runs)]
        rates = {name: batch * NEW / statistics.median(run[name] for run in times) for name in decoders}
        for name, rate in rates.items():
            equal = (tokens[name] == tokens["torch"]).mean()
            print(f"{batch:5d} {name:>10} {rate:9.1f} {rate / rates['torch']:6.2f} {equal:7.1%}", flush=True)


if __name__ == "__main__":
    main()
