"""Every part of a published folder against the library it comes from, in float32: largest difference, relative to the largest value.

    python -m benchmarks.published_parity FOLDER [--parts=vae,dit,llm,t5]

FOLDER holds Wan2.1-T2V-1.3B-Diffusers and Qwen2.5-1.5B-Instruct, downloaded or made by `benchmarks.published_folders`. Clips and texts
are short; all weights are read. A part is held twice, by us and by its library: 12 GB for the LLM in float32; T5 is compared in
bfloat16 on both sides (23 GB; on a CPU with XLA_FLAGS=--xla_disable_hlo_passes=while-loop-invariant-code-motion, docs/published.md).
"""

import argparse
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from rise_jax.models.dit import DiT
from rise_jax.models.llm import make_llm
from rise_jax.models.t5 import make_t5
from rise_jax.models.wan_vae import WanVAE
from rise_jax.weights import load_llm
from rise_jax.weights_t5 import load_t5
from rise_jax.weights_wan import load_wan
from rise_jax.weights_wan_vae import load_wan_vae

WAN, QWEN = "Wan2.1-T2V-1.3B-Diffusers", "Qwen2.5-1.5B-Instruct"
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def channels_first(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(value, -1, 1).copy())


def vae(folder: Path):
    """Encoding (standardised latents) and decoding of 5 frames of 64x96."""
    loaded = load_wan_vae(folder / WAN)
    ours, config = WanVAE(loaded.config), loaded.config
    theirs = diffusers.AutoencoderKLWan.from_pretrained(folder / WAN, subfolder="vae").eval()
    video = RNG.uniform(-1, 1, (1, 5, 64, 96, 3)).astype(np.float32)
    raw = theirs.encode(channels_first(video)).latent_dist.mode().movedim(1, -1).numpy()
    latents = (raw - np.float32(config.mean)) / np.float32(config.std)
    yield "VAE, latents", jax.jit(ours.encode)(loaded.params, video), latents
    decoded = theirs.decode(channels_first(raw)).sample.movedim(1, -1).numpy()
    yield "VAE, video", jax.jit(ours.decode)(loaded.params, latents), decoded


def dit(folder: Path):
    """One call: 2 latent frames of 8x12, 20 text states padded to 512."""
    loaded = load_wan(folder / WAN)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder / WAN, subfolder="transformer").float().eval()
    latents, context, t = normal(1, 2, 8, 12, 16), np.zeros((1, 512, 4096), np.float32), np.float32([0.7])
    context[:, :20] = normal(20, 4096)

    graph, _ = nnx.split(nnx.eval_shape(lambda: DiT(**loaded.sizes, rngs=nnx.Rngs(params=jax.random.key(0)))))

    def run(params, latents, t, context):
        model = nnx.merge(graph, params)
        return model(latents, t, model.kv(context))

    expected = theirs(channels_first(latents), torch.from_numpy(1000 * t), torch.from_numpy(context)).sample
    yield "DiT", jax.jit(run)(loaded.params, latents, t, context), expected.movedim(1, -1).numpy()


def llm(folder: Path):
    """Logits and the states of every layer, 2 texts of 48 random tokens."""
    loaded = load_llm(folder / QWEN)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / QWEN, dtype=torch.float32).eval()
    make, _ = make_llm(loaded.config, jnp.float32)
    ids = RNG.integers(0, 256, (2, 48)).astype(np.int32)

    @jax.jit
    def run(params, ids):
        model = make(params)
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        states, _ = model(ids, jnp.ones(ids.shape, bool), places, keep=range(loaded.config.depth + 1))
        return states, model.logits(states[-1])

    states, logits = run(loaded.params, ids)
    out = theirs(torch.from_numpy(ids).long(), output_hidden_states=True)
    yield "LLM, states", states, torch.stack(out.hidden_states).numpy()
    yield "LLM, logits", logits, out.logits.numpy()


def t5(folder: Path):
    """States of 2 texts, one of them padded."""
    loaded = load_t5(folder / WAN, jnp.bfloat16)
    theirs = transformers.UMT5EncoderModel.from_pretrained(
        folder / WAN, subfolder="text_encoder", dtype=torch.bfloat16
    ).eval()
    make, _ = make_t5(loaded.config, jnp.bfloat16)
    ids, mask = RNG.integers(3, 250, (2, 40)).astype(np.int32), np.ones((2, 40), bool)
    mask[1, 25:] = False
    expected = theirs(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state.float().numpy()
    ours = jax.jit(lambda params, ids, mask: make(params)(ids, mask).astype(jnp.float32))(loaded.params, ids, mask)
    yield "T5, bfloat16", np.asarray(ours)[mask], expected[mask]


PARTS = {"vae": vae, "dit": dit, "llm": llm, "t5": t5}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", default="vae,dit,llm,t5")
    args = parser.parse_args()
    for part in args.parts.split(","):
        for name, ours, theirs in PARTS[part](args.folder):
            ours = np.asarray(ours)
            assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
            print(f"{name:16}{np.abs(ours - theirs).max() / np.abs(theirs).max():10.1e}   {ours.shape}", flush=True)


if __name__ == "__main__":
    main()
