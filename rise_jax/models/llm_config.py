"""Sizes and options of the decoder in llm.py: what the published families differ in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LLMConfig:
    """`tied` says that the logits use the embedding matrix. The defaults below it are Llama's; llm_families.py has the others'.

    `rope_divisors` [head_width / 2] divide the rotary frequencies (() = none). `query_scale` None is head_width ** -0.5.
    Layers that are `local` (one bool per layer; () = none) see the last `window` tokens, themselves included, with
    rotary positions of base `local_rope_base`, never divided.
    """

    vocab: int
    width: int
    mlp_width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    rope_divisors: tuple[float, ...] = ()
    activation: str = "silu"  # of the gated MLP: silu | gelu_tanh
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head
    post_norms: bool = False  # RMSNorm behind attention and MLP as well, before the residual sum
    embed_scale: float = 1.0
    query_scale: float | None = None
    local: tuple[bool, ...] = ()
    window: int = 0
    local_rope_base: float = 10_000.0
    norm_inner: bool = (
        False  # the states of inner layers are given behind the final norm too: a choice, no part of a family
    )

    def layer_index(self, layer: int) -> int:
        """`layer` counted from 0: the embeddings, each layer's output, the last one normed (transformers' `hidden_states`).

        Negative ones count from the end; ValueError for one that is not there.
        """
        if not -self.depth - 1 <= layer <= self.depth:
            nearest = max(-self.depth - 1, min(layer, self.depth))
            raise ValueError(
                f"model.llm.layer={layer}: an LLM of {self.depth} layers has the states 0 (embeddings) to {self.depth} "
                f"(final-normed), or {-self.depth - 1} to -1; nearest: {nearest}"
            )
        return layer % (self.depth + 1)
