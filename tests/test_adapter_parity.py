"""The adapters against code we did not write: torch's attention and encoder layers, diffusers' time embedding."""

import jax
import numpy as np
import pytest
import torch
from adapters import D_CTX, D_LLM, WIDTH, inputs, make_noisy
from diffusers.models.embeddings import TimestepEmbedding, Timesteps

from rise_jax.models.adapter import ELLA


def copy(linear, params):
    linear.weight.data = torch.tensor(np.asarray(params["kernel"]).T.copy())
    linear.bias.data = torch.tensor(np.asarray(params["bias"]).copy())


def copy_attention(attention, params):
    order = ("query", "key", "value")
    attention.in_proj_weight.data = torch.tensor(np.concatenate([np.asarray(params[p]["kernel"]).T for p in order]))
    attention.in_proj_bias.data = torch.tensor(np.concatenate([params[p]["bias"] for p in order]))
    copy(attention.out_proj, params["out"])


def layer(blocks, i):
    return jax.tree.map(lambda leaf: leaf[i], blocks)


def torch_of(x):
    return torch.tensor(np.asarray(x))


@torch.no_grad()
def test_refiner_agrees_with_torch_encoder_layers():
    adapter = make_noisy("refiner")
    params = adapter.params
    states, mask, _ = inputs(7, 4, 1)
    h = torch.nn.functional.rms_norm(torch_of(states), (D_LLM,), torch_of(params["input_norm"]["scale"]), 1e-6)
    h = h + torch_of(params["input_bias"])
    project_in, project_out = torch.nn.Linear(D_LLM, WIDTH), torch.nn.Linear(WIDTH, D_CTX)
    copy(project_in, params["project_in"])
    copy(project_out, params["project_out"])
    x = torch.cat([torch_of(params["registers"]).expand(3, -1, -1), project_in(h)], dim=1)
    hidden = torch.cat([torch.zeros(3, 4, dtype=bool), ~torch_of(mask)], dim=1)
    for i in range(2):
        block = layer(params["blocks"], i)
        gelu = torch.nn.GELU(approximate="tanh")
        encoder = torch.nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, 0.0, gelu, 1e-6, True, norm_first=True)
        copy_attention(encoder.self_attn, block["self_attn"])
        copy(encoder.linear1, block["mlp"]["up"])
        copy(encoder.linear2, block["mlp"]["down"])
        for norm, name in ((encoder.norm1, "norm_1"), (encoder.norm2, "norm_2")):
            norm.weight.data, norm.bias.data = (torch_of(block[name]["norm"][leaf]) for leaf in ("scale", "bias"))
        x = encoder(x, src_key_padding_mask=hidden)
    for name, after in (("norm", project_out), ("output_norm", torch.nn.Identity())):
        leaves = params[name].get("norm", params[name])
        scale, bias = torch_of(leaves["scale"]), torch_of(leaves["bias"])
        x = after(torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-6))
    expected = np.where(hidden.numpy()[..., None], 0, x.numpy())
    np.testing.assert_allclose(adapter(states, mask)[0], expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.slow
def test_ella_options_agree_with_torch_attention_and_diffusers_time_embedding():
    width, latents = 16, 5
    options = ELLA | dict(width=width, depth=2, heads=2, latents=latents)
    adapter = make_noisy("resampler", d_ctx=width, **options)
    params = adapter.params
    states, mask, t = inputs(7, 4)

    embedding = TimestepEmbedding(320, width)
    copy(embedding.linear_1, params["time_embedding"]["up"])
    copy(embedding.linear_2, params["time_embedding"]["down"])
    time = embedding(Timesteps(320, flip_sin_to_cos=True, downscale_freq_shift=0)(1000 * torch_of(t)))
    activated = torch.nn.functional.silu(time)

    def dense(params, x):
        return x @ torch_of(params["kernel"]) + torch_of(params["bias"])

    def adaptive_norm(params, x):
        shift, scale = dense(params["modulation"], activated)[:, None].chunk(2, dim=-1)
        return torch.nn.functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift

    x = dense(params["project_in"], torch_of(states))
    y = torch_of(params["latents"]) + dense(params["latents_time"], activated)[:, None]
    hidden = torch.cat([torch.zeros(2, latents, dtype=bool), ~torch_of(mask)], dim=1)
    for i in range(2):
        block = layer(params["blocks"], i)
        attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        copy_attention(attention, block["cross_attn"])
        h = adaptive_norm(block["norm_latents"], y)
        keys = torch.cat([h, adaptive_norm(block["norm_states"], x)], dim=1)
        y = y + attention(h, keys, keys, key_padding_mask=hidden)[0]
        h = dense(block["mlp"]["up"], adaptive_norm(block["norm_mlp"], y)).relu().square()
        y = y + dense(block["mlp"]["down"], h)
    context, context_mask = adapter(states, mask, t)
    assert context_mask.all()
    np.testing.assert_allclose(context, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
