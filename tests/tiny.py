"""A language model of a few thousand random parameters in a Hugging Face folder, or a GGUF file, with a short instruction, and a
config that uses them: tests of the whole run."""

import importlib
import json
from pathlib import Path

import gguf
import jax
import numpy as np
import tokenizers
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from configs import stage1, stage2
from rise_jax.gguf_tokenizer import CONTROL, NORMAL
from rise_jax.weights import LLAMA

WIDTH, MLP, DEPTH, HEADS, KV_HEADS = 16, 32, 2, 2, 1
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

INSTRUCTION = (
    "Say more.\n\nprompt: green circle\ncaption: A green circle on a plain black background.\n"  # a token per byte
)


def write_llm(folder: Path, seed: int = 0, ends: bool = False, width: int = WIDTH) -> Path:
    """Byte-level Llama with tied embeddings and a chat template; its instruction is in instruction.txt.

    It writes until its budget is spent, or, with `ends`, until it draws an end: that may be at once, which is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|start|>", "<|end|>"]
    vocab = {token: id for id, token in enumerate([*specials, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(specials)
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    (folder / "config.json").write_text(
        json.dumps(
            dict(
                architectures=["LlamaForCausalLM"],
                model_type="llama",
                vocab_size=len(vocab),
                hidden_size=width,
                intermediate_size=MLP,
                num_hidden_layers=DEPTH,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                head_dim=width // HEADS,
                rms_norm_eps=1e-5,
                rope_theta=10000.0,
                tie_word_embeddings=True,
                hidden_act="silu",
                max_position_embeddings=4096,
                eos_token_id=backend.token_to_id("<|end|>"),
            )
        )
    )
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5
    embedding = 0.1 * draw(len(vocab), width)  # small beside what the layers add: else it repeats the last token
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(width, np.float32)}
    if not ends:  # a row of zeros has logit 0, and some other row has more
        blanks = backend.encode("".join(filter(str.isspace, map(chr, range(128))))).ids
        tensors["model.embed_tokens.weight"][[*blanks, *map(backend.token_to_id, specials)]] = 0
    kv = width // HEADS * KV_HEADS
    for i in range(DEPTH):
        layer = f"model.layers.{i}"
        for name, shape in (("q", (width, width)), ("k", (kv, width)), ("v", (kv, width)), ("o", (width, width))):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = draw(*shape)
        for name, shape in (("gate", (MLP, width)), ("up", (MLP, width)), ("down", (width, MLP))):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = np.ones(width, np.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "instruction.txt").write_text(INSTRUCTION)
    return folder


def as_gguf(folder: Path) -> Path:
    """What `write_llm` wrote, in one file in the same folder: read without transformers, whose import takes a tenth of a start.

    The same model with the same ids; two zero bytes are one more token.
    """
    settings = json.loads((folder / "config.json").read_text())
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    specials = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
    named = {id: word for word, id in backend.get_vocab().items()} | specials
    ids = range(settings["vocab_size"])
    zero = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\0")[0][0]
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*(named.get(id, f"<unused {id}>") for id in ids), 2 * zero])
    writer.add_token_types([*(CONTROL if id in specials else NORMAL for id in ids), NORMAL])
    writer.add_token_merges([f"{zero} {zero}"])  # one at least
    writer.add_eos_token_id(backend.token_to_id("<|end|>"))
    writer.add_pad_token_id(backend.token_to_id("<|pad|>"))
    writer.add_chat_template(TEMPLATE)
    names = dict(LLAMA.values())
    for name, value in load_file(folder / "model.safetensors").items():
        layer = name.split(".")[2] if ".layers." in name else ""
        value = np.pad(value, ((0, 1), (0, 0))) if "embed" in name else value
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp's order of rotary rows
            value = value.reshape(-1, 2, WIDTH // HEADS // 2, WIDTH).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names[name.replace(f".{layer}.", ".{}.") if layer else name].format(layer), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def on_one_device(tree):
    """The shardings of a tree that lies on the first device."""
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)


def tiny_config(stage: int, llm: Path, **overrides):
    """configs/stage1.py or stage2.py with a model of a few thousand parameters; overrides are dotted keys with '.' as '__'."""
    config = (stage1 if stage == 1 else stage2).get_config("tiny")
    instruction = str((llm.parent if llm.suffix == ".gguf" else llm) / "instruction.txt")
    config.model.llm = dict(
        path=str(llm), instruction=instruction, dtype="float32", max_prompt=160, max_new=160, layer=-1
    )
    config.model.adapter.update(d_ctx=16, width=16, depth=1, heads=2, registers=2)
    config.model.dit.update(width=24, mlp_width=32, heads=2, depth=2, patch=(1, 8, 8), text_len=164, unroll=False)
    config.data.update(texts=6, height=16, width=16)
    config.run.update(steps=4, batch_size=4, save_every=2, init_from="")
    config.sample.update(steps=2, batch_size=4, count=4)
    config.optim.update(warmup=2, kind="adamw")  # Muon over 8 devices takes half a minute to compile
    for name, value in overrides.items():
        group, key = name.rsplit("__", 1)
        target = config
        for part in group.split("__"):
            target = target[part]
        target[key] = value
    return config


def preset_config(stage: str, preset: str, **changes):
    """configs/STAGE.py:PRESET; changes as in `tiny_config`."""
    config = importlib.import_module(f"configs.{stage}").get_config(preset)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def tiny_flags(stage: int, llm: Path, **overrides) -> list[str]:
    """The flags of main.py that make the config `tiny_config(stage, llm, **overrides)`."""
    config = (stage1 if stage == 1 else stage2).get_config("tiny")
    changed = {
        name: value
        for name, value in leaves(tiny_config(stage, llm, **overrides)).items()
        if value != leaves(config).get(name)
    }
    return [f"--config=configs/stage{stage}.py", *(f"--config.{name}={value}" for name, value in changed.items())]


def leaves(group, prefix=""):
    """{dotted key: value} of a config."""
    found = {}
    for name, value in group.items():
        nested = isinstance(value, (dict, ConfigDict))
        found |= leaves(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found
