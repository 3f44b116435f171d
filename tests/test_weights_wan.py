"""Wan's DiT: agreement with diffusers from the folders it saved, both layouts' names, export, and every kind of broken folder."""

import collections
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from rise_jax.tensor_folder import TensorFolder
from rise_jax.trees import named_leaves
from rise_jax.weights_wan import STEM, abstract_wan, load_wan, merge_low_rank, save_wan, wan_sizes, wan_table
from tests import wan
from tests.wan import TINY, bits, read_tensors, relative, sizes_of, write_tensors

SHAPES = (
    Path(__file__).parent / "fixtures" / "wan_shapes.txt"
)  # of WanTransformer3DModel's state dict, diffusers 0.42.1

# config, token grid, tokens of context
CASES = {
    "wan patch": (TINY, (2, 3, 2), 3),
    "other patch": (TINY | dict(patch=(2, 1, 3), channels=3, heads=3, head_width=16, depth=3, d_ctx=9), (2, 3, 2), 5),
    "one frame": (TINY | dict(heads=1, head_width=20, text_len=9), (1, 5, 7), 1),
    "five frames": (TINY | dict(heads=4, head_width=6, mlp_width=28, text_len=7), (5, 1, 3), 7),
    "coordinates": (TINY | dict(coordinates=True), (2, 3, 2), 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model as diffusers saves it."""
    path = tmp_path_factory.mktemp("tiny")
    wan.build_torch(**TINY).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def renamed_by_diffusers(names):
    """{original name: diffusers' name}, by diffusers' own converter."""
    return {original: name for name, original in convert_wan_transformer_to_diffusers(dict(zip(names, names))).items()}


# ---- agreement ----


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 20])
def test_larger_weights_agree_too(offset, tmp_path):
    """They are sensitive to the time's frequencies: one unit in the last place of some is enough to fail. Tokens whose mean is
    `offset` are so to how a norm works out its variance."""
    sizes = dict(channels=3, patch=(2, 2, 1), heads=5, head_width=10, mlp_width=50, depth=3, d_ctx=5, text_len=7)
    model = wan.build_torch(**sizes, noise=0.2, seed=1)
    model.patch_embedding.bias.data += offset
    model.save_pretrained(tmp_path)
    draw = np.random.default_rng(1).normal
    inputs = draw(size=(2, 6, 10, 2, 3)).astype("f4"), np.array([0.52, 0.96], "f4"), draw(size=(2, 4, 5)).astype("f4")
    with torch.no_grad():
        expected = wan.forward_torch(model, *map(torch.tensor, inputs), 7)
    found = wan.forward(wan.build(**sizes)[0], load_wan(tmp_path, text_len=7).params, *inputs)
    assert relative(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("config", "grid", "length"), CASES.values(), ids=CASES)
def test_output_and_every_gradient_are_diffusers(config, grid, length, tmp_path):
    """From the folder it saved, with a context shorter than text_len in most cases."""
    model = wan.build_torch(**config)
    model.save_pretrained(tmp_path)
    loaded = load_wan(tmp_path, text_len=config["text_len"])
    graph, abstract = wan.build(**config)
    assert abstract_wan(loaded.sizes) == abstract

    inputs = wan.make_inputs(context_length=length, grid=grid, **config)
    latents, t, context = (torch.tensor(x) for x in inputs)
    latents.requires_grad_(), context.requires_grad_()
    theirs = wan.forward_torch(model, latents, t, context, config["text_len"])
    weights = np.random.default_rng(1).normal(size=theirs.shape).astype("f4")
    (theirs * torch.tensor(weights)).sum().backward()

    def weighted(params, latents, context):
        ours = wan.forward(graph, params, latents, inputs[1], context)
        return jnp.sum(weights * ours), ours

    gradients, ours = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(loaded.params, inputs[0], inputs[2])
    assert relative(ours, theirs.detach()) < 1e-5
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = (wan.tree_of(named, abstract, config["patch"]), latents.grad.numpy(), context.grad.numpy())
    errors = jax.tree.map(relative, gradients, expected)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def test_sharded_and_single_files_and_a_pipelines_folder_give_the_same(folder, tmp_path):
    expected = bits(load_wan(folder).params)
    wan.build_torch(**TINY).save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    assert bits(load_wan(tmp_path).params) == expected


# ---- names ----


def published_shapes():
    """{headline: {name: shape}} with every block written out."""
    models = collections.defaultdict(dict)
    for line in SHAPES.read_text().splitlines():
        if line.startswith("##"):
            headline = line
            continue
        name, shape, *times = line.split("\t")
        for layer in range(int(times[0][1:])) if times else [None]:
            models[headline][name.replace("{i}", str(layer))] = tuple(json.loads(shape))
    return models


@pytest.mark.parametrize("headline", published_shapes(), ids=lambda headline: headline.split()[1])
def test_every_published_key_is_mapped_both_ways(headline, tmp_path):
    """On shapes alone: no array is made."""
    expected = published_shapes()[headline]
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **json.loads(headline.split("config=")[1])})
    )
    write_tensors(tmp_path, {"none": np.zeros(1)})
    sizes, layout = wan_sizes(TensorFolder(tmp_path, STEM))
    abstract = abstract_wan(sizes, jnp.bfloat16)
    leaves = named_leaves(abstract)
    table = wan_table(abstract, sizes["patch"], layout)
    assert {name: place.shape(leaves[place.path].shape) for name, place in table.items()} == expected
    assert f"tensors={len(table)}" in headline
    assert f"params={sum(leaf.size for leaf in leaves.values()):,}" in headline

    places = {(place.path, place.layer) for place in table.values()}
    every = {
        (path, layer)
        for path, leaf in leaves.items()
        for layer in (range(leaf.shape[0]) if path.startswith("blocks/") else [None])
    }
    assert places == every and len(places) == len(table)

    original = wan_table(abstract, sizes["patch"], "original")
    renamed = renamed_by_diffusers(list(original))
    assert {renamed[name]: place for name, place in original.items()} == table


@pytest.mark.slow
def test_the_original_layout_gives_the_same_parameters(folder, tmp_path):
    theirs = read_tensors(folder)
    abstract = abstract_wan(sizes_of(TINY))
    renamed = renamed_by_diffusers(list(wan_table(abstract, TINY["patch"], "original")))
    write_tensors(tmp_path, {original: theirs[name] for original, name in renamed.items()})
    settings = dict(
        _class_name="WanModel", model_type="t2v", freq_dim=256, dim=24, ffn_dim=40, num_heads=2, num_layers=2
    )
    settings |= dict(in_dim=4, out_dim=4, text_len=5, text_dim=6, eps=1e-6)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load_wan(tmp_path)
    assert loaded.sizes["text_len"] == 5
    assert bits(loaded.params) == bits(load_wan(folder).params)
    assert "blocks.0.norm3.weight" in renamed and renamed["blocks.0.norm3.weight"] == "blocks.0.norm2.weight"


def test_sizes_of_a_config_that_says_little(tmp_path):
    settings = dict(
        _class_name="WanModel", model_type="t2v", freq_dim=256, dim=24, ffn_dim=40, num_heads=2, num_layers=2
    )
    (tmp_path / "config.json").write_text(json.dumps(settings | dict(in_dim=16, out_dim=16)))
    write_tensors(tmp_path, {"none": np.zeros(1)})
    sizes, layout = wan_sizes(TensorFolder(tmp_path, STEM))
    assert (layout, sizes["patch"], sizes["d_ctx"], sizes["text_len"]) == ("original", (1, 2, 2), 4096, 512)


# ---- export ----


@pytest.mark.parametrize(
    ("limit", "coordinates"), [(5_000_000_000, False), (20_000, True)], ids=["one file", "sharded, coordinates"]
)
@pytest.mark.slow
def test_what_is_saved_loads_in_diffusers_and_gives_the_same_output(limit, coordinates, tmp_path):
    config = TINY | dict(coordinates=coordinates)
    graph, abstract = wan.build(**config)
    params = wan.random_params(abstract)
    save_wan(params, sizes_of(config), tmp_path, limit)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (tmp_path / f"{STEM}.safetensors.index.json").exists() == (limit == 20_000)
    assert max(file.stat().st_size for file in files) < limit + 10_000
    model, report = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    inputs = wan.make_inputs(context_length=3, **config)
    with torch.no_grad():
        theirs = wan.forward_torch(model, *(torch.tensor(x) for x in inputs), config["text_len"])
    assert relative(wan.forward(graph, params, *inputs), theirs) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.slow
def test_a_round_trip_keeps_every_bit(dtype, tmp_path):
    config = TINY | dict(coordinates=True)
    params = wan.random_params(abstract_wan(sizes_of(config), dtype))
    save_wan(params, sizes_of(config), tmp_path, 20_000)
    loaded = load_wan(tmp_path, text_len=config["text_len"], dtype=dtype)
    assert bits(loaded.params) == bits(params)
    assert loaded.sizes == sizes_of(config) | dict(eps=1e-6)
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert model.patch_embedding.weight.dtype == torch.bfloat16


def test_leaves_come_back_in_the_dtypes_they_were_saved_in(tmp_path):
    """A mix as after training: frozen kernels in bf16, one that was trained in fp32."""
    params = wan.random_params(abstract_wan(sizes_of(TINY), jnp.bfloat16))
    params["blocks"]["cross_attn"]["key"]["kernel"] = jnp.full((2, 24, 24), 1 / 3, jnp.float32)
    save_wan(params, sizes_of(TINY), tmp_path)
    assert bits(load_wan(tmp_path, dtype=None).params) == bits(params)


@pytest.mark.slow
def test_low_rank_corrections_are_merged_into_their_kernels(tmp_path):
    """The same output without them, from diffusers too; kernels without a correction stay as they are."""
    graph, abstract = wan.build(**TINY | dict(low_rank=3))
    params = wan.random_params(abstract)
    merged = merge_low_rank(params)
    plain, expected = wan.build(**TINY)
    assert {name: leaf.shape for name, leaf in named_leaves(merged).items()} == {
        name: leaf.shape for name, leaf in named_leaves(expected).items()
    }
    assert bits(merged["blocks"]["cross_attn"]) == bits(params["blocks"]["cross_attn"])
    assert (merged["blocks"]["self_attn"]["value"]["kernel"] != params["blocks"]["self_attn"]["value"]["kernel"]).all()
    inputs = wan.make_inputs(context_length=3, **TINY)
    ours = wan.forward(graph, params, *inputs)
    assert relative(wan.forward(plain, merged, *inputs), ours) < 1e-5
    save_wan(merged, sizes_of(TINY), tmp_path)
    with torch.no_grad():
        theirs = wan.forward_torch(
            WanTransformer3DModel.from_pretrained(tmp_path), *(torch.tensor(x) for x in inputs), TINY["text_len"]
        )
    assert relative(ours, theirs) < 1e-5


def test_diffusers_own_file_comes_back_byte_for_byte(folder, tmp_path):
    loaded = load_wan(folder)
    save_wan(loaded.params, loaded.sizes, tmp_path)
    before, after = read_tensors(folder), read_tensors(tmp_path)
    assert {name: value.tobytes() for name, value in before.items()} == {k: v.tobytes() for k, v in after.items()}
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)]
    assert {k: v for k, v in configs[0].items() if k != "_diffusers_version"} == configs[1]


def test_weights_are_never_written_over(folder, copy):
    loaded = load_wan(folder)
    with pytest.raises(FileExistsError, match=rf"copy already holds {STEM}\.safetensors"):
        save_wan(loaded.params, loaded.sizes, copy)
