import hashlib
import struct

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_jax.trees import combine, named_leaves, nearest_paths, nested, partition, tree_sha256

TREE = {
    "adapter": {"query": {"kernel": 1, "bias": 2}, "null": 3},
    "dit": {"blocks": {"cross_attn": {"key": {"kernel": 4}}, "self_attn": {"key": {"kernel": 5}}}},
}


def test_paths_of_nested_dicts_and_optimizer_states():
    assert list(named_leaves(TREE)) == [
        "adapter/null",
        "adapter/query/bias",
        "adapter/query/kernel",
        "dit/blocks/cross_attn/key/kernel",
        "dit/blocks/self_attn/key/kernel",
    ]
    state = {"opt": optax.adam(1.0).init({"a": {"kernel": jnp.zeros(2)}})}
    assert list(named_leaves(state)) == ["opt/0/count", "opt/0/mu/a/kernel", "opt/0/nu/a/kernel"]


def test_partition_takes_what_matches_and_leaves_the_rest():
    chosen, others = partition(TREE, ("^adapter/", "cross_attn/(key|value)/"))
    assert chosen == {"adapter": TREE["adapter"], "dit": {"blocks": {"cross_attn": {"key": {"kernel": 4}}}}}
    assert others == {"dit": {"blocks": {"self_attn": {"key": {"kernel": 5}}}}}


@settings(deadline=None)  # of 200 ms an example, which a collection of garbage can take
@given(st.sets(st.sampled_from(list(named_leaves(TREE))), min_size=1))
def test_combine_undoes_partition(names):
    assert combine(*partition(TREE, sorted(f"^{name}$" for name in names))) == TREE


def test_nested_undoes_named_leaves():
    assert nested(named_leaves(TREE)) == TREE


def test_combine_refuses_a_leaf_that_both_hold():
    with pytest.raises(ValueError, match="both trees hold 'adapter/null'"):
        combine(TREE, {"adapter": {"null": 0}})


def test_a_pattern_without_a_match_names_the_nearest_paths():
    with pytest.raises(ValueError, match=r"'\^adaptor/' matches no parameter; nearest: adapter"):
        partition(TREE, ["^dit/", "^adaptor/"])
    names = list(named_leaves(TREE))
    assert "dit/blocks/cross_attn/key" in nearest_paths("blocks/crossattn/key", names, count=9) or (
        "blocks/cross_attn/key" in " ".join(nearest_paths("blocks/crossattn/key", names))
    )
    assert nearest_paths("zzzz", names) == ["adapter/", "dit/"]


def test_sha256_is_of_the_documented_bytes():
    tree = {"b": jnp.array([[1.0, 2.0]], jnp.bfloat16), "a": {"x": np.float32(3.0)}}
    expected = b"a/x\0float32\0\0" + struct.pack("<f", 3.0) + b"b\0bfloat16\x001,2\0" + struct.pack("<ff", 1.0, 2.0)
    assert tree_sha256(tree) == hashlib.sha256(expected).hexdigest()


def test_sha256_sees_path_dtype_shape_order_and_value():
    base = {"a": np.arange(6, dtype="f4").reshape(2, 3)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].astype("f2")},
        {"a": base["a"].reshape(3, 2)},
        {"a": base["a"] + np.float32(1e-6)},
    ]
    assert len({tree_sha256(tree) for tree in [base, *others]}) == 5
    assert tree_sha256({"a": np.asfortranarray(base["a"])}) == tree_sha256(base)
