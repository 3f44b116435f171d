"""The null condition and the calibration that published encoders and files give: as they say, asked for once, replaced when told."""

import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from encoders import write_umt5
from published_parts import config_of, null_of, write_files
from tiny import on_one_device
from transformers import UMT5EncoderModel

from rise_jax.build import model_from
from rise_jax.language import states_in_batch
from rise_jax.origin import check_parts
from rise_jax.published import check_files, load_null
from rise_jax.runs import initial_parameters, read_run
from rise_jax.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def test_a_null_condition_of_another_width_is_refused(files, tmp_path):
    safetensors.numpy.save_file({"null": np.zeros((1, 3, 8), np.float32)}, tmp_path / "null.safetensors")
    with pytest.raises(ValueError, match=r"must give one tensor `null` \[1, L, 16\], found {'null': \(1, 3, 8\)}"):
        train(config_of(files, model__null=str(tmp_path / "null.safetensors")), tmp_path / "run")


def test_the_native_null_condition_is_the_encoders_empty_text(files, tmp_path):
    """Its end token alone, as transformers encodes it."""
    folder = write_umt5(tmp_path / "t5", width=16)
    config = config_of(files, model__null="native")
    config.model.native.path = str(folder)
    value, origin = load_null(config.model)
    with torch.no_grad():
        model = UMT5EncoderModel.from_pretrained(folder, dtype=torch.bfloat16)
        theirs = model(torch.tensor([[1]])).last_hidden_state.float().numpy()
    assert value.shape == (1, 1, 16) and origin.startswith("encoder ")
    np.testing.assert_allclose(value, theirs, atol=0.05 * np.abs(theirs).max())


def test_the_adapters_output_starts_with_the_native_encoders_mean_and_spread(files, tmp_path):
    """Over all tokens of the captions, end tokens included, padding not, however many make a batch."""
    folder, captions = write_umt5(tmp_path / "t5", width=16), ["red", "red red blue", "blue"] * 12
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n")
    config = config_of(files, model__calibrate=str(tmp_path / "captions.txt"))
    config.model.native.update(path=str(folder), length=8, dtype="float32")
    heard = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32), np.ones((2, 3), bool)
    ours = model_from(config.model, 16, states_in_batch)
    started = initial_parameters(ours, config, None, {}, heard, on_one_device).tree
    model = UMT5EncoderModel.from_pretrained(folder)
    with torch.no_grad():
        states = [model(torch.tensor([ids])).last_hidden_state[0] for ids in ([3, 1], [3, 3, 2, 1], [2, 1])]
    expected = torch.cat(states).numpy()
    norm = started["adapter"]["output_norm"]
    np.testing.assert_allclose(norm["bias"], expected.mean(0), atol=1e-5)
    np.testing.assert_allclose(norm["scale"], expected.std(0), atol=1e-5)
    (tmp_path / "captions.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no caption"):
        train(config, tmp_path / "other")


def test_a_native_null_condition_is_asked_for_once_and_gives_way_to_another(files, tmp_path):
    """What a run keeps of the encoder, its continuation and the next stage need no encoder for."""
    folder = write_umt5(tmp_path / "t5", width=16)
    config = config_of(files, model__null="native", run__steps=1)
    config.model.native.path = str(folder)
    assert train(config, tmp_path / "run") == 0
    value = load_null(config.model)[0]
    shutil.rmtree(folder)
    config.run.steps = 2
    assert train(config, tmp_path / "run") == 0
    source = read_run(tmp_path / "run", 16)
    np.testing.assert_array_equal(null_of(config, source), value)
    given = config_of(files, model__null=str(files / "null.safetensors"))
    expected = safetensors.numpy.load_file(files / "null.safetensors")["null"]
    assert expected.shape != value.shape
    np.testing.assert_array_equal(null_of(given, source), expected)
    check_parts(
        given, *(model_from(each.model, 16, states_in_batch).abstract for each in (given, config)), tmp_path / "run"
    )


def test_captions_are_asked_for_by_new_runs_alone(files, tmp_path):
    config = config_of(files, model__null="native", model__calibrate=str(tmp_path / "captions.txt"))
    config.model.update(condition="native", native=dict(path=str(write_umt5(tmp_path / "t5", width=16)), length=8))
    check_files(config.model, calibrate=False)
    with pytest.raises(FileNotFoundError, match="captions.txt' is no file"):
        check_files(config.model)
