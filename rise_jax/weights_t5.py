"""The encoder of a published T5 v1.1 or umT5: weights from a Hugging Face folder, and texts as it wants them.

Source of the names: transformers `modeling_t5.py` and `modeling_umt5.py` (Apache-2.0).
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers

from rise_jax.data.sources import TooLong
from rise_jax.models.t5 import T5Config, make_t5
from rise_jax.padding import right_pad
from rise_jax.placement import Place, check, stream
from rise_jax.settings import (
    ABOVE_0,
    COMMON,
    IDS,
    check_settings,
    check_values,
    id_below,
    ids_below,
    only,
    raise_faults,
    whole,
)
from rise_jax.tensor_folder import AGAIN, TensorFolder, not_default, sha256_of
from rise_jax.text import Tokenizer
from rise_jax.trees import named_leaves

# Leaf -> published name; {} stands for a layer's number.
NAMES = {
    "embed/embedding": "shared.weight",
    "final_norm/scale": "encoder.final_layer_norm.weight",
    "position_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "blocks/self_attn/position_bias": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight",
    "blocks/self_attn/query/kernel": "encoder.block.{}.layer.0.SelfAttention.q.weight",
    "blocks/self_attn/key/kernel": "encoder.block.{}.layer.0.SelfAttention.k.weight",
    "blocks/self_attn/value/kernel": "encoder.block.{}.layer.0.SelfAttention.v.weight",
    "blocks/self_attn/out/kernel": "encoder.block.{}.layer.0.SelfAttention.o.weight",
    "blocks/attn_norm/scale": "encoder.block.{}.layer.0.layer_norm.weight",
    "blocks/gate/kernel": "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
    "blocks/up/kernel": "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
    "blocks/down/kernel": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
    "blocks/mlp_norm/scale": "encoder.block.{}.layer.1.layer_norm.weight",
}
TIED = "encoder.embed_tokens.weight"  # a second name of the embedding
IGNORED = ("decoder.", "lm_head.", TIED)  # what else a whole T5's folder holds
# Field of T5Config -> its key in config.json.
SIZES = dict(
    vocab="vocab_size", width="d_model", mlp_width="d_ff", depth="num_layers", heads="num_heads", head_width="d_kv"
)
KINDS = dict.fromkeys(SIZES.values(), whole()) | dict(
    relative_attention_num_buckets=whole(4),  # near and far ones, on either side
    relative_attention_max_distance=whole(),
    layer_norm_epsilon=ABOVE_0,
    feed_forward_proj=only("gated-gelu"),
    dense_act_fn=only("gelu_new"),
    is_gated_act=only(True),
    is_decoder=only(False),
    add_cross_attention=only(False),
    pruned_heads=only({}),
    quantization_config=only(None),
    eos_token_id=IDS,
    pad_token_id=whole(0),
)
# What the encoder does without: the decoder's and old writers' settings, and a name for umT5's biases that nothing reads.
FREE = COMMON | {
    "is_encoder_decoder",
    "num_decoder_layers",
    "tie_word_embeddings",
    "tie_encoder_decoder",
    "scale_decoder_outputs",
    "cross_attention_hidden_size",
    "n_positions",
    "output_past",
    "scalable_attention",
    "gradient_checkpointing",
}


class EncoderFolder(TensorFolder):
    """An encoder's weights. `given` is the path that was asked for: the tokenizer may lie beside them or in the pipeline around."""

    def __init__(self, given: Path):
        super().__init__(given, "model", "text_encoder")
        self.given = given

    def sha256(self) -> str:
        """Over all that states depend on: weight files, tokenizer.json, and what is used of config.json."""
        files = [*self.files, _tokenizer_file(self.given, self)]
        return sha256_of(files, {"config": not_default(t5_config(self)), "eos": _ends(self)})


class LoadedT5(NamedTuple):
    """An encoder as read from disk: `params` for `make_t5(config, dtype)`, `source` the folder of its weights."""

    config: T5Config
    params: dict
    tokenizer: Tokenizer
    source: EncoderFolder


def load_t5(path: Path | str, dtype: Any = jnp.float32, place: Any = None) -> LoadedT5:
    """Loads an encoder from a folder with config.json, model.safetensors (or shards) and tokenizer.json.

    A pipeline's folder with text_encoder/ and tokenizer/ does as well. Kernels come in `dtype`, norm scales and position
    biases in fp32.

    Args:
      place: tree of abstract leaves -> tree of Shardings, e.g. `sharding.shardings` of a mesh; None: the default device.

    Raises:
      FileNotFoundError: naming the files that are missing. ValueError: an option that this encoder does not have, by its name;
        or all tensors that are missing, left over, mis-shaped or of an unreadable dtype.
    """
    config, abstract, table, folder, tokenizer = checked_t5(path, dtype)
    return LoadedT5(config, stream(abstract, table, folder, place and place(abstract)), tokenizer, folder)


def checked_t5(path: Path | str, dtype: Any = jnp.float32) -> tuple[T5Config, dict, dict, EncoderFolder, Tokenizer]:
    """(sizes, abstract leaves, table, folder, tokenizer) of what `load_t5` loads, from the files' headers, with the same errors."""
    folder = encoder_folder(path)
    config = t5_config(folder)
    abstract = make_t5(config, dtype)[1]
    table = t5_table(abstract)
    if "shared.weight" not in folder.tensors and TIED in folder.tensors:
        table[TIED] = table.pop("shared.weight")
    check(abstract, table, folder, IGNORED)
    return config, abstract, table, folder, t5_tokenizer(path, folder)


def encoder_folder(path: Path | str) -> EncoderFolder:
    """The encoder's folder: `path` itself, or the text_encoder/ in it."""
    return EncoderFolder(Path(path))


def text_ids(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [B, length], mask bool [B, length]): end token added, padded on the right.

    Texts are cleaned as Wan cleans them: HTML's names of characters resolved (twice), white space made single spaces. Wan also
    repairs wrongly decoded characters (ftfy), which is not done here.

    Raises ValueError for a text of more than `length` tokens, the end token counted; none is ever cut.
    """
    clean = [" ".join(html.unescape(html.unescape(text)).split()) for text in texts]
    rows = [[*tokenizer.encode(text), tokenizer.eos[0]] for text in clean]
    for text, row in zip(texts, rows):
        if len(row) > length:
            raise TooLong(
                f"a text has {len(row)} tokens with its end token, at most {length} are allowed (model.native.length); "
                f"shorten it: {text[:80]!r} ...",
                len(row),
            )
    return right_pad(rows, length, tokenizer.pad)


def t5_table(tree: dict) -> dict[str, Place]:
    """Published name -> Place, for every leaf of an encoder's tree (arrays or abstract)."""
    table = {}
    for path, leaf in named_leaves(tree).items():
        form = "matrix" if path.endswith("kernel") else "plain"
        for layer in range(leaf.shape[0]) if path.startswith("blocks/") else (None,):
            table[NAMES[path].format(layer)] = Place(path, layer, form)
    return table


def t5_config(folder: TensorFolder) -> T5Config:
    """From config.json; ValueError names every setting that this encoder does not have or know, or of an impossible value."""
    settings, where = folder.settings, f"{folder.path}/config.json"
    kind = settings.get("model_type")
    if kind not in ("t5", "umt5"):
        raise ValueError(f"{where}: model_type={kind!r} is not supported; known: t5, umt5")
    proj = "gated-gelu" if kind == "umt5" else "relu"  # where transformers' config is silent
    found = {"feed_forward_proj": proj} | {key: value for key, value in settings.items() if value is not None}
    check_settings(found, KINDS, where, free=FREE, needed=SIZES.values())
    vocab = found["vocab_size"]
    check_values(
        {"eos_token_id": 1, "pad_token_id": 0} | found,
        dict(eos_token_id=ids_below(vocab), pad_token_id=id_below(vocab)),
        where,
    )
    buckets = found.get("relative_attention_num_buckets", 32)
    max_distance = found.get("relative_attention_max_distance", 128)
    if max_distance <= buckets // 4:
        fault = f"relative_attention_max_distance={max_distance} (must be > {buckets // 4}: {buckets} buckets)"
        raise_faults([f"not supported: {fault}"], where)
    return T5Config(
        **{size: found[key] for size, key in SIZES.items()},
        shared_bias=kind == "t5",
        buckets=buckets,
        max_distance=max_distance,
        norm_eps=found.get("layer_norm_epsilon", 1e-6),
    )


def t5_tokenizer(path: Path | str, folder: TensorFolder) -> Tokenizer:
    """Of the encoder at `path` with the weights in `folder`: the tokenizer.json beside them, or in tokenizer/ of the pipeline they
    belong to. FileNotFoundError where there is none, ValueError for one that cannot be read."""
    found = _tokenizer_file(Path(path), folder)
    try:
        backend = tokenizers.Tokenizer.from_file(str(found))
    except Exception as error:  # the library raises no other
        raise ValueError(f"{found} cannot be read as a tokenizer ({error}); {AGAIN}") from error
    backend.no_truncation()  # a file may ask for either
    backend.no_padding()
    given = {key: value for key, value in folder.settings.items() if value is not None}
    _check_vocabulary(backend, given["vocab_size"], found)
    return Tokenizer(backend, _ends(folder), given.get("pad_token_id", 0))


def _tokenizer_file(path: Path, folder: TensorFolder) -> Path:
    places = [folder.path, path / "tokenizer", path.parent / "tokenizer"]
    files = [place / "tokenizer.json" for place in places]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no tokenizer.json in {', '.join(str(place) for place in places)}")
    return found


def _ends(folder: TensorFolder) -> tuple[int, ...]:
    eos = folder.settings.get("eos_token_id")
    eos = 1 if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _check_vocabulary(backend: tokenizers.Tokenizer, count: int, file: Path) -> None:
    largest = max(backend.get_vocab().values(), default=0)
    if largest >= count:
        raise ValueError(
            f"{file}: {backend.id_to_token(largest)!r} has the number {largest}, but the encoder knows 0 to {count - 1}: "
            "it is another model's tokenizer"
        )
