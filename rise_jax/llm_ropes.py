"""Rotary frequencies of published LLMs: by what they are divided, in each way of scaling that the decoder has."""

import math
from collections.abc import Callable

import numpy as np

from rise_jax.models.llm import rope_frequencies


def linear_divisors(base: float, head_width: int, factor: float) -> tuple[float, ...]:
    """Every position divided by `factor` (arXiv 2306.15595)."""
    return (float(factor),) * (head_width // 2)


def llama3_divisors(
    base: float, head_width: int, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Llama 3.1's scaling: wavelengths above `original` / low are stretched by `factor`, those below `original` / high not at all.

    Between the two the frequencies are mixed linearly in `original` / wavelength (`apply_scaling` in Meta's llama-models).
    """
    wavelengths = 2 * math.pi / rope_frequencies(head_width, base)
    kept = (original / wavelengths - low) / (high - low)
    mixed = 1 / ((1 - kept) / factor + kept)
    stretched = np.where(wavelengths > original / low, factor, mixed)
    return tuple(np.where(wavelengths < original / high, 1.0, stretched).tolist())


# By `rope_type`: (base, head_width, *settings) -> divisors [head_width / 2], and the names of the settings.
SCALINGS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "default": (lambda base, head_width: (), ()),
    "linear": (linear_divisors, ("factor",)),
    "llama3": (
        llama3_divisors,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}
