"""A small random umT5 encoder in a folder, for tests of what uses one."""

import json
from pathlib import Path

import tokenizers
import torch
from transformers import UMT5Config, UMT5EncoderModel


def write_umt5(folder: Path, width: int) -> Path:
    """A random encoder with a word-level tokenizer whose end token is 1."""
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=8, d_model=width, d_kv=4, d_ff=24, num_layers=2, num_heads=3, pad_token_id=0, eos_token_id=1
    )
    UMT5EncoderModel(config).save_pretrained(folder)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    return folder
