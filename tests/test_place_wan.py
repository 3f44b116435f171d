"""Where the leaves of a loaded Wan transformer go: their dtypes, their shardings, the memory that replicas share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from rise_jax import sharding
from rise_jax.trees import named_leaves
from rise_jax.weights_wan import load_wan, wan_table
from tests import wan
from tests.wan import TINY, bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model as diffusers saves it."""
    path = tmp_path_factory.mktemp("tiny")
    wan.build_torch(**TINY).save_pretrained(path)
    return path


def test_bf16_keeps_in_fp32_what_diffusers_keeps(folder):
    params = named_leaves(load_wan(folder, dtype=jnp.bfloat16).params)
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    theirs = {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in model.named_parameters()}
    table = wan_table(load_wan(folder).params, TINY["patch"], "diffusers")
    assert {name: params[place.path].dtype.name for name, place in table.items()} == theirs


def test_leaves_go_straight_to_their_shardings(folder):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    place = lambda tree: sharding.shardings(tree, mesh)
    spread, alone = load_wan(folder, place=place).params, load_wan(folder).params
    assert bits(spread) == bits(alone)
    assert jax.tree.map(lambda leaf: leaf.sharding, spread) == place(alone)
    kernel = spread["blocks"]["self_attn"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 12, 12)


def test_layers_may_be_spread_too(folder):
    mesh = jax.make_mesh((2,), ("layers",), devices=jax.devices()[:2])
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("layers"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = lambda tree: (
        tree
        | {
            name: jax.tree.map(lambda _, to=along if name == "blocks" else whole: to, part)
            for name, part in tree.items()
        }
    )
    assert bits(load_wan(folder, place=place).params) == bits(load_wan(folder).params)


def test_replicas_share_the_memory_that_was_read_into_and_a_donated_one_leaves_the_others_alone(folder):
    whole = jax.sharding.NamedSharding(jax.make_mesh((8,), ("all",)), jax.sharding.PartitionSpec())
    place = lambda tree: jax.tree.map(lambda _: whole, tree)
    loaded, expected = (load_wan(folder, place=place).params["blocks"] for _ in range(2))
    kernel = loaded["up"]["kernel"]
    parts = [shard.data for shard in kernel.addressable_shards]
    assert len({part.unsafe_buffer_pointer() for part in parts}) == 1
    new = jax.jit(lambda leaf: leaf + 1, donate_argnums=0)(parts[0])
    assert parts[0].is_deleted() and (np.asarray(new) != np.asarray(parts[1])).all()
    for part in parts[1:]:
        np.testing.assert_array_equal(part, expected["up"]["kernel"])
