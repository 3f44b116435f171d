"""Folders of the published sizes and layouts with random weights: docs/published.md can then be walked through without a download.

    python -m benchmarks.published_folders FOLDER

writes Wan2.1-T2V-1.3B-Diffusers (DiT 1.4 B and umT5-XXL 5.7 B in bfloat16, VAE 0.13 B in float32) and Qwen2.5-1.5B-Instruct, 18 GB in
all, with a file of at most 4 GiB in memory at a time. The tokenizers are small ones: neither model understands a word, but every
byte is read and every shape is real.
"""

import argparse
import json
from pathlib import Path

import tokenizers
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, UMT5Config, UMT5EncoderModel

SHARD = 4 << 30  # bytes
QWEN = dict(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=2,
)
UMT5 = dict(
    vocab_size=256384,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    pad_token_id=0,
    eos_token_id=1,
)
DIT = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def random_like(name: str, meta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Norms' scales are 1, else a spread that keeps activations at 1, and T5's queries small, since it does not scale its scores."""
    if (meta.ndim == 1 and name.endswith("weight")) or name.endswith("gamma"):
        return torch.ones(meta.shape, dtype=dtype)
    narrower = UMT5["d_kv"] ** 0.5 if name.endswith("SelfAttention.q.weight") else 1
    return torch.randn(meta.shape, dtype=dtype) / meta[0].numel() ** 0.5 / narrower


def write(folder: Path, stem: str, make, config: dict, dtype: torch.dtype, tied: tuple[str, ...] = ()) -> None:
    """`make` on the meta device gives names and shapes; `tied` names are in no file, as transformers leaves them out."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        meta = {name: tensor for name, tensor in make().state_dict().items() if name not in tied}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shards, size = [[]], 0
    for name, tensor in meta.items():
        size += tensor.numel() * dtype.itemsize
        if size > SHARD and shards[-1]:
            shards, size = [*shards, []], tensor.numel() * dtype.itemsize
        shards[-1].append(name)
    where = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        save_file({name: random_like(name, meta[name], dtype) for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    print(
        f"{folder}: {sum(t.numel() for t in meta.values()) / 1e9:.2f} B parameters, {len(shards)} file(s)", flush=True
    )


def write_tokenizer(folder: Path, special: dict[str, str], template: str | None) -> None:
    """Bytes, after the special tokens in the order given."""
    folder.mkdir(exist_ok=True)
    tokens = [*special.values(), *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special.values()))
    backend.save(str(folder / "tokenizer.json"))
    named = {name: token for name, token in special.items() if name.endswith("_token")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    wan, qwen, bf16 = folder / "Wan2.1-T2V-1.3B-Diffusers", folder / "Qwen2.5-1.5B-Instruct", torch.bfloat16
    weights = "diffusion_pytorch_model"
    with torch.device("meta"):
        parts = WanTransformer3DModel(**DIT), AutoencoderKLWan()
    dit, vae = ({"_class_name": type(part).__name__, **part.config} for part in parts)
    write(wan / "transformer", weights, lambda: WanTransformer3DModel(**DIT), dit, bf16)
    write(wan / "vae", weights, AutoencoderKLWan, vae, torch.float32)
    config = UMT5Config(**UMT5, architectures=["UMT5EncoderModel"])
    tied = ("encoder.embed_tokens.weight",)
    write(wan / "text_encoder", "model", lambda: UMT5EncoderModel(config), config.to_dict(), bf16, tied)
    write_tokenizer(wan / "tokenizer", dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>"), None)
    config = Qwen2Config(**QWEN, architectures=["Qwen2ForCausalLM"])
    write(qwen, "model", lambda: Qwen2ForCausalLM(config), config.to_dict(), bf16, ("lm_head.weight",))
    chat = dict(pad_token="<|endoftext|>", start="<|im_start|>", eos_token="<|im_end|>")
    write_tokenizer(qwen, chat, CHAT)


if __name__ == "__main__":
    main()
