"""What a step does, in samples, frames, tokens and operations, and how fast devices can be."""

import re
from typing import NamedTuple

import jax

# Device kinds as JAX names them, whole, and their bf16 products with fp32 sums, without sparsity, in TFLOP/s per JAX device. From the
# makers' data sheets: NVIDIA's (half of the figure "with sparsity") for A100, H100, H200, HGX B200, GH200, L4 and L40S, the
# appendix of its Ada GPU architecture paper for GeForce; Google's (docs.cloud.google.com/tpu/docs/v2 to v6e, and tpu7x), where a
# chip of v2, v3 and 7x is two devices.
PEAK_TFLOPS = (
    (r"NVIDIA A100.*", 312.0),
    (r"NVIDIA H100 80GB HBM3|NVIDIA GH200 .*|NVIDIA H200", 989.5),
    (r"NVIDIA H100 PCIe", 756.5),
    (r"NVIDIA (H100|H200) NVL", 835.5),
    (r"NVIDIA B200", 2250.0),
    (r"NVIDIA L4", 121.0),
    (r"NVIDIA L40S", 362.0),
    (r"NVIDIA GeForce RTX 4090", 165.2),
    (r"TPU v2", 22.5),
    (r"TPU v3", 61.5),
    (r"TPU v4", 275.0),
    (r"TPU v5 lite|TPU v5e", 197.0),
    (r"TPU v5|TPU v5p", 459.0),
    (r"TPU v6 lite|TPU v6e", 918.0),
    (r"TPU7x", 2307.0 / 2),
)
GIB = 2**30


class Work(NamedTuple):
    """What one step does on all `devices` together. `peak`: TFLOP/s of one of them; None where that is not known."""

    samples: int
    frames: int  # of pixels
    tokens: int  # of video, after patchify
    flops: int
    devices: int
    peak: float | None

    def rates(self, seconds: float) -> dict[str, float]:
        """Per second, for a step of `seconds`; tflops_per_device in TFLOP/s, and mfu, which is its share of the peak."""
        tflops = self.flops / seconds / self.devices / 1e12
        return {
            "samples_per_second": self.samples / seconds,
            "frames_per_second": self.frames / seconds,
            "tokens_per_second": self.tokens / seconds,
            "tflops_per_device": tflops,
        } | ({"mfu": tflops / self.peak} if self.peak else {})


def peak_tflops(device_kind: str) -> float | None:
    """Peak of a device in TFLOP/s; None for a kind that is not in the table, CPUs and parts of GPUs (MIG) among them."""
    if " MIG " in device_kind:
        return None
    return next((peak for kind, peak in PEAK_TFLOPS if re.fullmatch(kind, device_kind)), None)


def device_memory_gib() -> dict[str, float]:
    """{"device_memory_gib": the most that one of this process's devices has held so far}; {} where devices do not say (CPUs)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    return {"device_memory_gib": max(known) / GIB} if known else {}
