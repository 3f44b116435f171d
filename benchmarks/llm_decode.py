"""The embedded LLM in fp32 against transformers + torch on the same cores: reading 128 tokens, and greedy decoding of 64 new ones.

    python -m benchmarks.llm_decode [--runs=7] [--batches=1,8]

All take turns, so that they see the same machine; the tables give medians of whole calls (decoding: reading the prompt, then 64
tokens) in tokens per second, and how many of the decoded tokens are those of torch. "scan" and "unrolled" are the two ways of
`rephrase` to run the layers.
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
from rise_jax.rephrase import encode_prefix, encoded, rephrase
from rise_jax.weights import LLAMA, LoadedLLM, load_llm

NEW, PREFIX, PROMPT = 64, 1, 31  # tokens; a shared prefix that long gives nobody an advantage
READ = 128


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


def readers(loaded: LoadedLLM, model: transformers.LlamaForCausalLM, ids: np.ndarray) -> dict:
    """One pass over `ids` up to the final states, for both."""
    llm, _ = make_llm(loaded.config)
    read = jax.jit(partial(encoded, llm))
    rows, mask, tensor = jnp.asarray(ids), jnp.ones(ids.shape, bool), torch.tensor(ids)
    return dict(
        torch=lambda: model.model(tensor).last_hidden_state.numpy(),
        rise_jax=lambda: np.asarray(read(loaded.params, rows, mask)),
    )


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
    batches = [int(batch) for batch in options.batches.split(",")]
    print(f"fp32, {torch.get_num_threads()} cores, median of {options.runs} runs")
    print(f"reading {READ} tokens\n{'batch':>5} {'reader':>10} {'tokens/s':>9} {'time':>6}")
    for batch in batches:
        ids = rng.integers(20, loaded.config.vocab, (batch, READ))
        times, _ = take_turns(readers(loaded, model, ids), options.runs)
        for name, time_taken in times.items():
            print(
                f"{batch:5d} {name:>10} {batch * READ / time_taken:9.1f} {time_taken / times['torch']:6.2f}", flush=True
            )
    print(
        f"{NEW} new tokens after {PREFIX + PROMPT}\n{'batch':>5} {'decoder':>10} {'tokens/s':>9} {'rate':>6} {'equal':>7}"
    )
    for batch in batches:
        shared = np.tile(rng.integers(20, loaded.config.vocab, PREFIX), (batch, 1))
        ids = np.concatenate([shared, rng.integers(20, loaded.config.vocab, (batch, PROMPT))], axis=1)
        decoders = dict(torch=theirs(model, ids), scan=ours(loaded, ids, False), unrolled=ours(loaded, ids, True))
        times, tokens = take_turns(decoders, options.runs)
        for name, time_taken in times.items():
            equal = (tokens[name] == tokens["torch"]).mean()
            rate, ratio = batch * NEW / time_taken, times["torch"] / time_taken
            print(f"{batch:5d} {name:>10} {rate:9.1f} {ratio:6.2f} {equal:7.1%}", flush=True)


def take_turns(functions: dict, runs: int) -> tuple[dict, dict]:
    """Median seconds and results of each, after one call that compiles and warms up."""
    results = {name: function() for name, function in functions.items()}
    times = [{name: seconds(function) for name, function in functions.items()} for _ in range(runs)]
    return {name: statistics.median(run[name] for run in times) for name in functions}, results


if __name__ == "__main__":
    main()
