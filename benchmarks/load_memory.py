"""Memory and time that loading a Wan DiT takes on the host, for a file of about 1 GiB made for the purpose.

    python -m benchmarks.load_memory [--depth 10] [--rounds 10] [--plain]

Each case runs in a process of its own: the kernel's record of the peak resident memory (VmHWM) minus the resident memory right
after loading, over the bytes of the largest stacked leaf. Aim: at most 1.3. "beyond" is stricter: the peak minus what was there
before and the leaves themselves, so that memory which the allocator keeps counts. "x read" is the time over that of safetensors'
own load_file, which only reads the tensors into arrays: aim, at most 3. `--plain` adds what the memory is compared with: the whole
file read into a dict of arrays, then stacked. The file has just been written, so all of them find it in the page cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rise_jax.trees import named_leaves, nested
from rise_jax.weights_wan import STEM, abstract_wan, load_wan, save_wan, wan_table

# Wan2.1-T2V-1.3B but for its depth, which is 30.
SIZES = dict(width=1536, mlp_width=8960, heads=12, patch=(1, 2, 2), channels=16, d_ctx=4096, text_len=512)

TOUCHED = 4 * 2**30  # bytes
WAYS = ("stream", "plain")


def write_file(folder: Path, dtype, depth: int) -> None:
    """Random weights in diffusers' layout, one file."""
    rng = np.random.default_rng(0)
    abstract = abstract_wan(SIZES | dict(depth=depth), dtype)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32).astype(leaf.dtype), abstract)
    save_wan(params, SIZES | dict(depth=depth), folder)


def load_plain(folder: Path, dtype) -> dict:
    """The whole file at once: the naive way."""
    tensors = safetensors.numpy.load_file(folder / f"{STEM}.safetensors")
    depth = json.loads((folder / "config.json").read_text())["num_layers"]
    abstract = abstract_wan(SIZES | dict(depth=depth), dtype)
    leaves = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in named_leaves(abstract).items()}
    for name, place in wan_table(abstract, SIZES["patch"], "diffusers").items():
        leaves[place.path][... if place.layer is None else place.layer] = place.inward(tensors[name])
    return jax.device_put(nested(leaves))


def status(key: str) -> int:
    """Bytes by the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def reading(folder: Path) -> float:
    """Seconds to read the file's tensors into arrays, in this process."""
    start = time.perf_counter()
    tensors = safetensors.numpy.load_file(folder / f"{STEM}.safetensors")
    assert tensors
    return time.perf_counter() - start


def measure(folder: Path, dtype, plain: bool) -> dict:
    """Loads once, in this process."""
    jax.block_until_ready(jnp.zeros(8))  # the backend's own memory
    before, start = status("VmRSS"), time.perf_counter()
    params = load_plain(folder, dtype) if plain else load_wan(folder, dtype=dtype).params
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    peak, final = status("VmHWM"), status("VmRSS")
    leaves = named_leaves(params).values()
    return dict(
        seconds=seconds,
        file=(folder / f"{STEM}.safetensors").stat().st_size,
        params=sum(leaf.nbytes for leaf in leaves),
        largest=max(leaf.nbytes for leaf in leaves),
        before=before,
        peak=peak,
        final=final,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--depth", type=int, default=10, help="blocks of the bf16 file; half as many in fp32 (default: 10)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="processes of each case, interleaved (default: 10)")
    parser.add_argument("--plain", action="store_true", help="also the naive way, for comparison")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        folder, dtype, way = arguments.case
        found = reading(Path(folder)) if way == "read" else measure(Path(folder), jnp.dtype(dtype), way == "plain")
        print(json.dumps(found))
        return
    names = (
        "file",
        "loaded as",
        "way",
        "file MiB",
        "leaves",
        "largest",
        "peak-final",
        "beyond",
        "ratio",
        "beyond",
        "s",
        "x read",
    )
    print("".join(f"{name:>11}" for name in names))
    for stored, depth in (("bfloat16", arguments.depth), ("float32", arguments.depth // 2)):
        with tempfile.TemporaryDirectory() as folder:
            write_file(Path(folder), jnp.dtype(stored), depth)
            ways = [(way, dtype) for way in WAYS[: 1 + arguments.plain] for dtype in ("bfloat16", "float32")]
            found = [
                [child(folder, dtype, way) for way, dtype in (("read", stored), *ways)] for _ in range(arguments.rounds)
            ]
            read, *loads = zip(*found)
            for (way, dtype), load in zip(ways, loads):
                report(stored, dtype, way, load, read)


def child(folder: str, dtype: str, way: str):
    """What a process of its own finds, with memory that has been in use: a virtual machine's first touch of a page may take longer
    than all that is measured here."""
    np.ones(TOUCHED, np.uint8)
    command = [sys.executable, "-m", "benchmarks.load_memory", "--case", folder, dtype, way]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def report(stored: str, dtype: str, way: str, found: tuple[dict, ...], read: tuple[float, ...]) -> None:
    """Memory of the worst round, median seconds."""
    worst = max(found, key=lambda each: each["peak"] - each["final"])
    extra, beyond = worst["peak"] - worst["final"], worst["peak"] - worst["before"] - worst["params"]
    sizes = [bytes / 2**20 for bytes in (worst["file"], worst["params"], worst["largest"], extra, beyond)]
    ratios = [f"{bytes / worst['largest']:.2f}" for bytes in (extra, beyond)]
    seconds = np.median([each["seconds"] for each in found])
    row = [
        stored,
        dtype,
        way,
        *(f"{size:.0f}" for size in sizes),
        *ratios,
        f"{seconds:.2f}",
        f"{seconds / np.median(read):.1f}",
    ]
    print("".join(f"{cell:>11}" for cell in row))


if __name__ == "__main__":
    main()
