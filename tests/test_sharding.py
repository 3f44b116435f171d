import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from rise_jax.sharding import batch_sharding, check_batch, describe, make_mesh, put_batch, replicated, shardings
from rise_jax.trees import named_leaves

PARAMS = {
    "blocks": {
        "query": {"kernel": jnp.zeros((3, 16, 32)), "bias": jnp.zeros((3, 32))},
        "out": {"kernel": jnp.zeros((3, 32, 16)), "bias": jnp.zeros((3, 16))},
        "norm": {"scale": jnp.zeros((3, 16))},
    },
    "patch_in": {"kernel": jnp.zeros((7, 16))},
    "tokens": {"embedding": jnp.zeros((64, 16))},
}


def specs(tree, mesh):
    return {name: tuple(leaf.spec) for name, leaf in named_leaves(shardings(tree, mesh)).items()}


def test_minus_one_fills_from_the_devices():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
    assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert dict(make_mesh(devices=jax.devices()[:1]).shape)["data"] == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(fsdp=3), "mesh.fsdp=3.*product 3 does not divide the number of devices, 8; nearest:.*mesh.fsdp=[24]"),
        (dict(data=3, fsdp=2), "product 6 is not the number of devices, 8; nearest: mesh.data=4, mesh.fsdp=2"),
        (dict(data=2, fsdp=1), "product 2 is not the number of devices, 8; nearest: mesh.data=[248]"),
        (dict(data=16), "product 16 is not the number of devices, 8; nearest: mesh.data=8"),
        (dict(data=-1, fsdp=-1), "may be -1; got mesh.data=-1, mesh.fsdp=-1; nearest: mesh.data=-1, mesh.fsdp=1"),
        (dict(data=0), "mesh sizes must be >= 1, or -1.*mesh.data=0; nearest: mesh.data=1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_both_numbers_and_the_nearest_choice(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_rules_place_kernels_by_name_and_keep_the_layer_axis_whole():
    assert specs(PARAMS, make_mesh(data=1, fsdp=4, tensor=2)) == {
        "blocks/query/kernel": (None, "fsdp", "tensor"),
        "blocks/query/bias": (None, "tensor"),
        "blocks/out/kernel": (None, "tensor", "fsdp"),
        "blocks/out/bias": (),
        "blocks/norm/scale": (),
        "patch_in/kernel": (None, None),  # 7 rows do not divide by 4
        "tokens/embedding": ("tensor", "fsdp"),
    }


def test_adam_moments_and_averages_lie_as_their_parameters():
    mesh = make_mesh(data=2, fsdp=4)
    state = {"params": PARAMS, "ema": PARAMS, "opt_state": optax.adamw(1.0).init(PARAMS)}
    placed = specs(jax.eval_shape(lambda: state), mesh)
    for name, spec in specs(PARAMS, mesh).items():
        assert placed[f"params/{name}"] == placed[f"ema/{name}"] == spec
        assert placed[f"opt_state/0/mu/{name}"] == placed[f"opt_state/0/nu/{name}"] == spec
    assert placed["opt_state/0/count"] == ()


def test_each_device_holds_its_share_of_the_batch_and_of_the_parameters():
    mesh = make_mesh(data=2, fsdp=4)
    rows = np.arange(16 * 3, dtype="f4").reshape(16, 3)
    batch = put_batch({"video": rows}, mesh)["video"]
    assert batch.sharding == batch_sharding(mesh)
    assert sorted(tuple(shard.data[:, 0].tolist()) for shard in batch.addressable_shards) == sorted(
        tuple(rows[2 * i : 2 * i + 2, 0].tolist()) for i in range(8)
    )
    kernel = jax.device_put(PARAMS, shardings(PARAMS, mesh))["blocks"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 4, 32)}
    assert replicated(mesh).spec == PartitionSpec()


@pytest.mark.parametrize("sizes", [dict(data=8), dict(fsdp=8, data=1), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.slow
def test_loss_and_gradients_are_the_same_on_every_mesh(sizes):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "query": {"kernel": jax.random.normal(keys[0], (16, 32)), "bias": jax.random.normal(keys[1], (32,))},
        "out": {"kernel": jax.random.normal(keys[2], (32, 16))},
    }
    batch = np.asarray(jax.random.normal(keys[3], (16, 16)))

    def loss(params, x):
        hidden = jnp.tanh(x @ params["query"]["kernel"] + params["query"]["bias"])
        return jnp.mean((hidden @ params["out"]["kernel"]) ** 2)

    expected, expected_gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = make_mesh(**sizes)
    placed = shardings(params, mesh)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=(placed, batch_sharding(mesh)), out_shardings=(None, placed))
    value, gradients = step(jax.device_put(params, placed), put_batch(batch, mesh))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, leaf in named_leaves(gradients).items():
        reference = np.asarray(named_leaves(expected_gradients)[name])
        assert np.abs(np.asarray(leaf) - reference).max() <= 1e-5 * np.abs(reference).max(), name


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_sizes():
    mesh = make_mesh(data=2, fsdp=4)
    check_batch(16, mesh)
    with pytest.raises(
        ValueError, match="run.batch_size=12 does not divide over mesh.data=2 x mesh.fsdp=4 = 8.*8 or 16"
    ):
        check_batch(12, mesh)
    with pytest.raises(ValueError, match="nearest: 8.*split their tokens: mesh.data=1, mesh.fsdp=1, mesh.context=8"):
        check_batch(3, mesh)
    check_batch(32, mesh, accumulate=2)
    with pytest.raises(ValueError, match="= 8 devices times run.accumulate=2; nearest: 16 or 32"):
        check_batch(24, mesh, accumulate=2)


@pytest.mark.parametrize(
    ("sizes", "samples", "better"),
    [
        ((8, 1, 1, 1), 2, (2, 1, 4)),
        ((1, 8, 1, 1), 2, (1, 2, 4)),
        ((2, 2, 1, 2), 2, (1, 2, 2)),
        ((4, 1, 2, 1), 1, (1, 1, 8)),
    ],
)
def test_fewer_samples_than_devices_are_told_to_split_their_tokens(sizes, samples, better):
    with pytest.raises(ValueError, match="mesh.data={}, mesh.fsdp={}, mesh.context={}$".format(*better)):
        check_batch(samples, make_mesh(*sizes))
    check_batch(samples, make_mesh(*better, sizes[3]))


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from rise_jax.sharding import make_mesh, process_rows, put_batch
rows = np.arange(24, dtype="f4").reshape(8, 3)
first, second = (jax.devices()[i : i + 4] for i in (0, 4))
alternating = [device for pair in zip(first, second) for device in pair]
for devices, sizes, own in (
    (jax.devices(), (8, 1, 1, 1), ([0, 1, 2, 3], [4, 5, 6, 7])),
    (alternating, (4, 2, 1, 1), ([0, 2, 4, 6], [1, 3, 5, 7])),
    (alternating, (2, 2, 2, 1), (range(8), range(8))),
    (jax.devices(), (1, 2, 2, 2), ([0, 1, 2, 3], [4, 5, 6, 7])),
):
    mesh = make_mesh(*sizes, devices=devices)
    assert process_rows(8, mesh).tolist() == list(own[int(sys.argv[2])]), sizes
    batch = put_batch(rows[process_rows(8, mesh)], mesh)
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
print("right")
"""


@pytest.mark.slow
def test_a_process_loads_the_rows_of_its_own_devices():
    """Two processes of four devices: beside each other, alternating on the mesh, and with the same rows where context spans them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", TWO_PROCESSES, port]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out for out, _ in said] == ["right\n"] * 2, said


def test_a_mesh_is_described_with_all_its_sizes():
    assert describe(make_mesh(2, 2, 1, 2)) == "mesh data=2, fsdp=2, context=1, tensor=2 of 8 devices (cpu)"
    assert describe(make_mesh(devices=jax.devices()[:1])).endswith("tensor=1 of 1 device (cpu)")
