"""The embedded LLM in fp32 against transformers + torch on the same cores: reading 128 tokens, and greedy decoding of 64 new ones.

    python -m benchmarks.llm_decode [--runs=10] [--batches=1,8]

All take turns, so that they see the same machine; the tables give medians of whole calls (decoding: reading the prompt, then 64
tokens) in tokens per second, their ratio to torch's, what compiling took once (tracing included), and how many of the decoded
tokens are torch's. "rise_jax" is what language.py does, layers in a scan.
Needs the packages of tests/requirements.txt and an otherwise idle machine: torch suffers most from busy neighbours.
"""

import argparse
import statistics
import time
from collections.abc import Callable
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
OURS, THEIRS = "rise_jax", "transformers"


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


def compiled(function: Callable, *arguments) -> tuple[Callable, float]:
    """(a call of `function` on these arguments, seconds of tracing and compiling it)"""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: program(*arguments), time.perf_counter() - start


def readers(loaded: LoadedLLM, model: transformers.LlamaForCausalLM, ids: np.ndarray) -> tuple[dict, dict]:
    """Name -> a call that reads `ids` up to the final states, and name -> seconds of compiling."""
    llm, _ = make_llm(loaded.config)
    read, taken = compiled(partial(encoded, llm), loaded.params, jnp.asarray(ids), jnp.ones(ids.shape, bool))
    tensor = torch.tensor(ids)
    calls = {OURS: lambda: np.asarray(read()), THEIRS: lambda: model.model(tensor).last_hidden_state.numpy()}
    return calls, {OURS: taken}


def decoders(loaded: LoadedLLM, model: transformers.LlamaForCausalLM, ids: np.ndarray) -> tuple[dict, dict]:
    """Name -> a call that continues `ids` and returns the new tokens, and name -> seconds of compiling."""
    llm, _ = make_llm(loaded.config)
    prefix = jax.jit(partial(encode_prefix, llm))(loaded.params, jnp.asarray(ids[0, :PREFIX]))
    prompt = jnp.asarray(ids[:, PREFIX:])
    arguments = loaded.params, prefix, prompt, jnp.ones(prompt.shape, bool)
    decode, taken = compiled(partial(rephrase, llm, max_new=NEW, eos=(), pad=0), *arguments)
    return {OURS: lambda: np.asarray(decode().tokens), THEIRS: theirs(model, ids)}, {OURS: taken}


def theirs(model: transformers.LlamaForCausalLM, ids: np.ndarray) -> Callable:
    """A function that decodes `ids` by transformers and returns the new tokens."""
    rows = torch.tensor(ids)
    settings = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, eos_token_id=None)
    mask = torch.ones_like(rows)

    def decode():
        return model.generate(rows, attention_mask=mask, **settings)[:, rows.shape[1] :].numpy()

    return decode


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def take_turns(functions: dict, runs: int) -> tuple[dict, dict]:
    """Median seconds and results of each, after one call that warms up."""
    results = {name: function() for name, function in functions.items()}
    times = [{name: seconds(function) for name, function in functions.items()} for _ in range(runs)]
    return {name: statistics.median(run[name] for run in times) for name in functions}, results


def report(batch: int, tokens: int, calls: dict, taken: dict, runs: int) -> None:
    """A line of the table for each of `calls`, which work through `tokens` per row."""
    times, results = take_turns(calls, runs)
    for name, time_taken in times.items():
        result, expected = results[name], results[THEIRS]
        equal = f"{(result == expected).mean():.1%}" if result.dtype.kind == "i" else ""
        once = f"{taken[name]:.1f}" if name in taken else ""
        rate, ratio = batch * tokens / time_taken, times[THEIRS] / time_taken
        print(f"{batch:5d} {name:>13} {rate:9.1f} {ratio:6.2f} {once:>10} {equal:>7}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="timed calls of each, taking turns (default: 10)")
    parser.add_argument("--batches", default="1,8")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    loaded = load_llm("embedded")
    model = to_torch(loaded)
    loaded = loaded._replace(params=jax.device_put(loaded.params))
    rng = np.random.default_rng(0)
    batches = [int(batch) for batch in options.batches.split(",")]
    print(f"fp32, {torch.get_num_threads()} cores, median of {options.runs} runs")
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
    columns = f"{'batch':>5} {'':>13} {'tokens/s':>9} {'rate':>6} {'compile s':>10} {'equal':>7}"
    print(f"reading {READ} tokens\n{columns}")
    for batch in batches:
        ids = rng.integers(20, loaded.config.vocab, (batch, READ))
        report(batch, READ, *readers(loaded, model, ids), options.runs)
    print(f"{NEW} new tokens after {PREFIX + PROMPT}\n{columns}")
    for batch in batches:
        shared = np.tile(rng.integers(20, loaded.config.vocab, PREFIX), (batch, 1))
        ids = np.concatenate([shared, rng.integers(20, loaded.config.vocab, (batch, PROMPT))], axis=1)
        report(batch, NEW, *decoders(loaded, model, ids), options.runs)


if __name__ == "__main__":
    main()
