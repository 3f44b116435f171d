"""A run that cannot begin as told is refused before the LLM works and before its folder binds anybody."""

import json
import shutil

import pytest
from encoders import write_umt5
from folders import write_metadata
from tiny import tiny_config, write_llm
from written import write_run

from rise_jax import run_config
from rise_jax.checkpoint import Checkpoints
from rise_jax.plan import plan
from rise_jax.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two language models, a run on one of them, a folder without a run, one without a checkpoint, and a config that is cut short."""
    folder = tmp_path_factory.mktemp("origin")
    llm = write_llm(folder / "llm")
    write_llm(folder / "other", seed=1)
    write_run(tiny_config(1, llm), folder / "run")
    (folder / "empty").mkdir()
    for name in ("begun", "cut"):
        (folder / name).mkdir()
        shutil.copy(folder / "run" / "config.json", folder / name)
    (folder / "cut" / "config.json").write_text('{"model": {')
    return folder


def config_of(folder, llm="llm", **changes):
    return tiny_config(2, folder / llm, run__batch_size=8, **changes)


def refused(config, workdir, told):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        train(config, workdir)
    assert not workdir.exists(), "neither a config nor what the LLM was asked for"


FOLDERS = [
    ("empty", "empty holds no run: there is no config.json in it"),
    ("llm", "llm holds no run: its config.json is that of something else, without 'model'"),
    ("cut", "cut holds no run: its config.json is not JSON"),
    ("begun", "begun holds no checkpoint yet"),
]


@pytest.mark.parametrize(("name", "told"), FOLDERS)
def test_plan_and_training_look_at_the_folder_before_the_llm_is_loaded(folder, tmp_path, name, told):
    config = config_of(folder, run__init_from=str(folder / name))
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        plan(config, tmp_path / "run")
    config.model.llm.path = "/nowhere"
    refused(config, tmp_path / "run", told)


UNLIKE = [
    (dict(llm="other"), "run.init_from was trained on the states of another LLM or condition: sha256 differ"),
    (
        dict(model__condition="encode"),
        "run.init_from was trained on .* condition: align, condition, instruction differ",
    ),
    (dict(model__adapter__width=32), "run.init_from has .* parameters that do not fit this model"),
    (dict(model__dit__depth=3), "run.init_from has .* parameters that do not fit this model, the first: dit/blocks"),
]


@pytest.mark.parametrize(("changes", "told"), UNLIKE, ids=[str(row[0]) for row in UNLIKE])
def test_a_run_unlike_this_one_is_refused_before_the_llm_works(folder, tmp_path, changes, told):
    config = config_of(folder, run__init_from=str(folder / "run"), **changes)
    with pytest.raises(ValueError, match=told):
        plan(config, tmp_path / "run")
    refused(config, tmp_path / "run", told)


def test_what_would_stay_random_is_refused_before_the_llm_works(folder, tmp_path):
    told = r"\d+ frozen parameters come from random initialisation, the first: dit/"
    config = config_of(folder, model__trainable=("^adapter/",))
    refused(config, tmp_path / "run", told)
    with pytest.raises(ValueError, match=told):
        plan(config, tmp_path / "run")
    config.run.init_from = str(folder / "run")
    assert plan(config, tmp_path / "run") == 0


def test_a_run_whose_frozen_parameters_are_gone_is_refused_before_the_llm_works(folder, tmp_path):
    """Those it had from another run; what published files hold is read from there."""
    shutil.copytree(folder / "run", tmp_path / "origin")
    file = tmp_path / "origin" / "config.json"
    config = json.loads(file.read_text())
    config["model"]["trainable"] = ["^adapter/"]
    file.write_text(json.dumps(config))
    changed = config_of(folder, run__init_from=str(tmp_path / "origin"))
    with pytest.raises(FileNotFoundError, match=r"origin/frozen is missing: \d+ frozen parameters of that run"):
        plan(changed, tmp_path / "run")
    refused(changed, tmp_path / "run", "origin/frozen is missing")


def test_meta_is_that_of_the_newest_checkpoint_that_can_be_read(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "1", checkpoints / "2")
    written = checkpoints / "2" / "meta" / "metadata"
    document = json.loads(written.read_text())
    document["meta"]["vae"] = {"sha256": "second"}
    written.write_text(json.dumps(document))
    read = lambda: Checkpoints(checkpoints, read_only=True).meta()["vae"]
    assert read() == {"sha256": "second"}
    written.write_text("{")
    assert read() == {}
    (checkpoints / "1" / "meta" / "metadata").write_text("{")
    with pytest.raises(OSError, match="no checkpoint in .* can be read"):
        read()


def native(folder, tmp_path, captions="red\n"):
    """A config whose new adapter is calibrated on the native encoder's states of `captions`."""
    (tmp_path / "captions.txt").write_text(captions)
    config = config_of(folder, model__calibrate=str(tmp_path / "captions.txt"))
    config.model.native.update(path=str(write_umt5(tmp_path / "t5", width=16)), length=3)
    return config


def test_a_native_encoder_needs_its_tokenizer(folder, tmp_path):
    config = native(folder, tmp_path)
    for damage, told in (
        (lambda file: file.write_text("{"), "tokenizer.json cannot be read as a tokenizer"),
        (lambda file: file.unlink(), "no tokenizer.json in .*t5"),
    ):
        damage(tmp_path / "t5" / "tokenizer.json")
        refused(config, tmp_path / "run", told)
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            plan(config, tmp_path / "run")


def test_a_caption_over_the_native_encoders_length_is_refused(folder, tmp_path):
    told = (
        "a text has 4 tokens with its end token, at most 3 are allowed .model.native.length.; shorten it: 'red red red'"
    )
    config = native(folder, tmp_path, "red\nred red red\n")
    refused(config, tmp_path / "run", told)
    with pytest.raises(ValueError, match=told):
        plan(config, tmp_path / "run")


NAMES = '"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"'
PARTS = [
    ("tokenizer.json", None, "no tokenizer.json in"),
    ("tokenizer.json", "{", "tokenizer.json cannot be read as a tokenizer"),
    ("instruction.txt", "", "line 1: the file must open with the rule"),
    ("instruction.txt", "Say more.\nprompt: a\n", "'prompt:' has no 'caption:'"),
    ("instruction.txt", None, "instruction.txt' is no file; nearest of those shipped"),
    (
        "instruction.txt",
        "Say <|end|> more.",
        r"instruction of .*instruction.txt holds .* control token '<\|end\|>'",
    ),
    ("tokenizer_config.json", f'{{{NAMES}, "chat_template": "{{% for"}}', "the chat template cannot be used"),
    ("tokenizer_config.json", f'{{{NAMES}, "chat_template": "hello"}}', "the chat template writes the prompt 0 times"),
]


@pytest.mark.parametrize(("name", "text", "told"), PARTS)
def test_a_plan_says_of_the_llms_texts_what_training_says(tmp_path, name, text, told):
    llm = write_llm(tmp_path / "llm")
    (llm / name).unlink() if text is None else (llm / name).write_text(text)
    config = tiny_config(1, llm, run__batch_size=8)
    said = []
    for mode in (plan, train):
        with pytest.raises((ValueError, FileNotFoundError), match=told) as raised:
            mode(config, tmp_path / "run")
        said.append(str(raised.value))
    assert said[0] == said[1] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["[]", '{"model": 3}', '{"model": {}, "data": {}, "optim": {}, "sample": {}}'])
def test_a_config_of_something_else_is_none_of_a_run(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="holds no run: its config.json is that of something else"):
        run_config.read_config(tmp_path)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("vae", "run.init_from was trained on another VAE: {'sha256': 'c0de'} then, {} now"),
        ("prediction", "model.prediction='data', but .*origin was trained to predict 'velocity'; nearest: velocity"),
    ],
)
def test_what_the_backbone_goes_on_with_is_that_of_the_run(folder, tmp_path, part, told):
    shutil.copytree(folder / "run", tmp_path / "origin")
    config = json.loads((tmp_path / "origin" / "config.json").read_text())
    meta = tmp_path / "origin" / "checkpoints" / "1" / "meta" / "metadata"
    if part == "vae":
        meta.write_text(meta.read_text().replace('"vae": {}', '"vae": {"sha256": "c0de"}'))
    config["model"]["prediction"] = "velocity" if part == "prediction" else "data"
    (tmp_path / "origin" / "config.json").write_text(json.dumps(config))
    changed = config_of(folder, run__init_from=str(tmp_path / "origin"))
    with pytest.raises(ValueError, match=told):
        plan(changed, tmp_path / "run")
    refused(changed, tmp_path / "run", told)


def test_captions_for_calibration_are_not_asked_for_where_the_adapter_is_anothers(folder, tmp_path, caplog, capsys):
    config = config_of(folder, run__init_from=str(folder / "run"), model__calibrate="/nowhere.txt")
    assert plan(config, tmp_path / "run") == 0
    assert "model.calibrate=/nowhere.txt is not looked at: the adapter is that of" in caplog.text
    assert "native encoder" not in capsys.readouterr().out


def test_texts_over_their_budget_are_told_together_before_the_llm_writes(folder, tmp_path):
    """A token is a byte here; the longest counts."""
    rows = [{"file_name": f"{n}.mp4", "prompt": "a" * 5, "split": "train"} for n in range(4)]
    for n, length in ((1, 200), (2, 230)):
        rows[n]["rephrased"] = "b" * length
    rows[3]["prompt"] = "c" * 170
    write_metadata(tmp_path / "clips", rows)
    for row in rows:
        (tmp_path / "clips" / row["file_name"]).touch()
    config = config_of(folder, data__source="folder", data__path=str(tmp_path / "clips"))
    told = (
        "3 of 4 texts are too long; the longest: a rephrased caption has 230 tokens, model.llm.max_new=160 is the limit"
    )
    refused(config, tmp_path / "run", told)
