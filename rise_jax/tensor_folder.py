"""One folder as diffusers and transformers write it: config.json, and safetensors in one file or in shards named by an index.

Files are mapped, not read: a tensor costs memory only while it is being copied from, and a slice only what it touches.
"""

import dataclasses
import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

INCOMPLETE = "the folder is incomplete"
AGAIN = "the file is damaged or incomplete: download it again"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
PICKLES = (".bin", ".pth", ".pt", ".ckpt")  # names of what torch.save writes end so
RUNS_CODE = "which may run code when read"
BYTES = 8  # of the header's length, little-endian, which opens a file


class Tensor(NamedTuple):
    """Where a tensor lies. `dtype` is the format's own name for it, `shape` in torch order (out, in)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFolder:
    """`settings` are those of config.json, `tensors` maps every tensor's name to its `Tensor`."""

    def __init__(self, path: Path | str, stem: str, part: str = ""):
        """`stem` opens the names of the weight files: "model" for transformers, "diffusion_pytorch_model" for diffusers. `part` is
        where they lie if `path` is a pipeline's folder.

        FileNotFoundError names every file that is missing, ValueError one that cannot be parsed or is cut short, or a pickle.
        """
        self.path = _inner(Path(path), part)
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"{self.path} lacks config.json: {pickles_in(self.path, stem) or INCOMPLETE}")
        self.settings = parsed(self.path / "config.json")
        index = self.path / f"{stem}.safetensors.index.json"
        names = shard_names(index) if index.is_file() else [f"{stem}.safetensors"]
        self.files = [self.path / name for name in names]
        missing = [file.name for file in self.files if not file.is_file()]
        if missing:
            also = "" if index.is_file() else f" (or {index.name} with its shards)"
            reason = pickles_in(self.path, stem) or INCOMPLETE
            raise FileNotFoundError(f"{self.path} lacks {', '.join(missing)}{also}: {reason}")
        self.tensors = {name: tensor for file in self.files for name, tensor in _header(file).items()}
        self._maps = {file: _map(file) for file in self.files}

    def view(self, name: str) -> np.ndarray:
        """The values, in the file's dtype and torch order, read from disk where and when they are touched."""
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        count = (tensor.stop - tensor.start) // dtype.itemsize
        return np.frombuffer(self._maps[tensor.file], dtype, count, tensor.start).reshape(tensor.shape)

    def release(self, name: str) -> None:
        """Gives the memory behind a view back; touching the view again reads from disk again."""
        tensor = self.tensors[name]
        start = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
        self._maps[tensor.file].madvise(mmap.MADV_DONTNEED, start, tensor.stop - start)

    def sha256(self) -> str:
        """Over the weight files in order of their names; takes as long as reading them."""
        return sha256_of(self.files)


class TensorFile(TensorFolder):
    """One .safetensors file by itself, without settings."""

    def __init__(self, path: Path | str):
        """FileNotFoundError when there is no file, ValueError when it is a pickle, cannot be parsed or is cut short."""
        self.path, self.settings = Path(path), {}
        refuse_pickle(self.path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        self.files, self.tensors = [self.path], _header(self.path)
        self._maps = {self.path: _map(self.path)}


def sha256_of(files: Sequence[Path], settings: dict | None = None) -> str:
    """Over the bytes of the files in this order, then over `settings` as JSON, where there are any; paths do not count.

    Fractions count to 9 digits: the last ones of what is worked out from a config differ between CPUs.
    """
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    if settings:
        plain = json.loads(json.dumps(settings), parse_float=lambda digits: f"{float(digits):.9g}")
        digest.update(json.dumps(plain, sort_keys=True).encode())
    return digest.hexdigest()


def not_default(config: Any) -> dict:
    """The fields of a dataclass that have another value than their default: a field that is added later changes no hash."""
    values = dataclasses.asdict(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def shard_names(index: Path) -> list[str]:
    """The weight files that an index names. ValueError for one that is no index."""
    weight_map = parsed(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files; {AGAIN}")
    return sorted(set(weight_map.values()))


def refuse_pickle(path: Path, instead: str = "save its tensors as .safetensors first") -> None:
    """ValueError for the path of a pickle."""
    if path.suffix in PICKLES and not path.is_dir():
        raise ValueError(f"{path} is a pickle, {RUNS_CODE}: {instead}")


def pickles_in(folder: Path, stem: str) -> str:
    """What to do about the pickles in a folder without weights whose names begin with `stem`; "" where it has such weights or no
    pickles."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not names or any(folder.glob(f"{stem}*.safetensors")):
        return ""
    return (
        f"it holds {names[0]}{' and other pickles' if names[1:] else ', a pickle'}, {RUNS_CODE}; save the tensors as safetensors "
        "(save_pretrained of transformers and diffusers does), or take a folder that has them so"
    )


def _inner(path: Path, part: str) -> Path:
    """The folder itself, or the `part` of a pipeline's."""
    refuse_pickle(path, "take a folder that has its tensors as .safetensors, and config.json")
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is a file, give its folder" if path.is_file() else f"no folder at {path}")
    inner = path / part
    if not inner.is_dir() and (path / "model_index.json").is_file():
        raise FileNotFoundError(f"{path} lacks {part}/: the pipeline is incomplete, download that part of it, too")
    return inner if inner.is_dir() else path


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _header(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(BYTES), "little")
        text = file.read(length) if BYTES + length <= size else b""
    start = BYTES + length
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        tensors = {
            name: Tensor(path, entry["dtype"], tuple(entry["shape"]), *(start + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
        }
        ends = [_checked_end(name, tensor) for name, tensor in tensors.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); {AGAIN}") from error
    if max(ends, default=start) != size:
        raise ValueError(
            f"{path} cannot be read as safetensors ({size} bytes, {max(ends, default=start)} announced); {AGAIN}"
        )
    return tensors


def _checked_end(name: str, tensor: Tensor) -> int:
    dtype = DTYPES.get(tensor.dtype)
    if dtype and tensor.stop - tensor.start != dtype.itemsize * np.prod(tensor.shape, dtype=int):
        raise ValueError(f"{name} is {tensor.shape} of {tensor.dtype} in {tensor.stop - tensor.start} bytes")
    return tensor.stop


def parsed(path: Path) -> dict:
    """The JSON object in a file that is there. ValueError for one that holds no such thing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object but {type(value).__name__}; {AGAIN}")
    return value
