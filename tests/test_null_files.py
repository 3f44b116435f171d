"""A file with the condition of "no prompt" that cannot be one is told in one line, whatever is the matter with it."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from rise_jax.published import load_null

GOOD = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)


def load(path):
    model = {"null": str(path), "adapter": {"d_ctx": 16}, "dit": {"text_len": 8}}
    return load_null(ConfigDict(model))[0]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "null.safetensors"


def save(path, value):
    safetensors.numpy.save_file({"null": value}, path)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_good_one_is_read_in_fp32(path, dtype):
    found = load(save(path, GOOD.astype(dtype)))
    np.testing.assert_array_equal(found, GOOD.astype(dtype).astype(np.float32))
    assert found.dtype == np.float32


@pytest.mark.parametrize("damage", [lambda b: b"garbage" * 10, lambda b: b[:-20], lambda b: b"", lambda b: b[:30]])
def test_a_damaged_file_is_told(path, damage):
    path.write_bytes(damage(save(path, GOOD).read_bytes()))
    with pytest.raises(
        ValueError, match=r"null\.safetensors cannot be read as safetensors \(.*download it again"
    ) as raised:
        load(path)
    assert "\n" not in str(raised.value)


WRONG = [
    (np.zeros((1, 3, 16), ml_dtypes.float8_e4m3fn), "`null` is F8_E4M3, readable: F32, F16, BF16"),
    (np.zeros((1, 3, 16), np.int64), "`null` is I64, readable: F32, F16, BF16"),
    (np.full((1, 3, 16), np.nan, np.float32), "`null` holds 48 values that are not finite"),
    (np.zeros((1, 0, 16), np.float32), "`null` has 0 tokens, model.dit.text_len=8 takes 1 to 8; nearest: 1"),
    (np.zeros((1, 9, 16), np.float32), "`null` has 9 tokens, model.dit.text_len=8 takes 1 to 8; nearest: 8"),
    (np.zeros((3, 16), np.float32), "must give one tensor `null` [1, L, 16], found {'null': (3, 16)}"),
]


@pytest.mark.parametrize(("value", "told"), WRONG, ids=[row[1][:30] for row in WRONG])
def test_a_tensor_that_is_no_condition_is_told(path, value, told):
    with pytest.raises(ValueError) as raised:
        load(save(path, value))
    message = str(raised.value)
    assert message.startswith(str(path)) and told in message and "\n" not in message
