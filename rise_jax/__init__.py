"""RISE-T2V in JAX: a frozen LLM rephrases a prompt, and the states that emit the rephrased tokens condition a video DiT."""

from rise_jax.pipeline import Pipeline

__all__ = ["Pipeline"]
