"""A run whose video model, VAE and null condition come from published files: taken whole, kept byte for byte, told apart."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import wan
import wan_vae
from published_parts import config_of, null_of, write_files

from rise_jax import Pipeline
from rise_jax.export import export
from rise_jax.export_card import CARD
from rise_jax.run_config import moved_paths
from rise_jax.runs import read_run
from rise_jax.train import train
from rise_jax.trees import named_leaves
from rise_jax.validate import validate
from rise_jax.weights_wan import load_wan
from rise_jax.weights_wan_vae import load_wan_vae

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def workdir(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "first"
    assert train(config_of(files), workdir) == 0
    return workdir


@functools.cache
def leaves(workdir):
    """Of a run that is not trained on."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(Pipeline.from_run(workdir).params).items()}


def provenance(workdir):
    return json.loads(next((workdir / "checkpoints").glob("*/meta/metadata")).read_text())["meta"]["provenance"]


def test_the_published_parts_are_used_as_they_are_and_only_the_adapter_moves(workdir, files):
    pipe, found = Pipeline.from_run(workdir), leaves(workdir)
    for name, leaf in named_leaves({"dit": load_wan(files / "wan", text_len=164).params}).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    null = safetensors.numpy.load_file(files / "null.safetensors")["null"]
    np.testing.assert_array_equal(found["null/embedding"], null)
    for name, leaf in named_leaves(load_wan_vae(files / "wan" / "vae").params).items():
        np.testing.assert_array_equal(named_leaves(pipe.vae)[name], leaf, err_msg=name)
    assert "adapter/null" not in found
    origins = provenance(workdir)
    assert {origin.split()[0] for name, origin in origins.items() if name.startswith(("dit/", "null/"))} == {"file"}
    assert not (workdir / "frozen").exists(), "published files are not copied"


def test_the_latents_are_the_published_vaes(workdir, files):
    pipe = Pipeline.from_run(workdir)
    video = np.random.default_rng(0).uniform(-1, 1, (1, 5, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        model = wan_vae.reference(wan_vae.SMALL)
        mean = model.encode(torch.tensor(video).movedim(-1, 1)).latent_dist.mode().movedim(1, -1).numpy()
    theirs = (mean - np.array(model.config.latents_mean)) / np.array(model.config.latents_std)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(pipe.model.encode)(pipe.vae, video)
    assert wan.relative(ours, theirs) < 1e-4
    assert pipe("a red circle").videos.shape == (1, 5, 16, 16, 3)


def test_tiles_change_no_video_and_may_change_with_every_start(workdir, files, tmp_path):
    pipe, pieced = Pipeline.from_run(workdir), Pipeline.from_run(workdir, tile=8)
    options = dict(height=24, width=24, steps=1)
    video, same = (each("a red circle", **options).videos.astype(int) for each in (pipe, pieced))
    assert np.ptp(video) > 10 and np.abs(video - same).max() <= 1
    loops = [
        str(jax.make_jaxpr(each.model.decode)(each.vae, np.zeros((1, 2, 6, 6, 5)))).count("scan[")
        for each in (pipe, pieced)
    ]
    assert loops[1] > loops[0]
    with pytest.raises(ValueError, match="model.vae.tile=5 is not a multiple of 2; nearest: 4, or 0"):
        Pipeline.from_run(workdir, tile=5)
    moved = tmp_path / "again"
    shutil.copytree(workdir, moved)
    config = config_of(files, run__steps=3)
    config.model.vae.tile = 8
    assert train(config, moved) == 0
    assert json.loads((moved / "summary.json").read_text())["steps"] == 3


def test_an_export_keeps_its_tiles_and_those_asked_for_go_before(workdir, files, tmp_path):
    options = dict(height=24, width=24, steps=1)
    video = Pipeline.from_run(workdir)("a red circle", **options).videos.astype(int)
    shutil.copytree(workdir, tmp_path / "run")
    config = config_of(files)
    config.model.vae.tile = 8
    assert export(config, tmp_path / "run") == 0
    folder = tmp_path / "run" / "export"
    card = json.loads((folder / CARD).read_text())
    assert card["model"]["vae"]["tile"] == 8
    own, asked = Pipeline.from_export(folder), Pipeline.from_export(folder, tile=12)
    pieces = [str(jax.make_jaxpr(pipe.model.decode)(pipe.vae, np.zeros((1, 2, 12, 12, 5)))) for pipe in (own, asked)]
    assert pieces[0] != pieces[1]
    assert np.abs(own("a red circle", **options).videos - video).max() <= 1
    with pytest.raises(ValueError, match="model.vae.tile=7 is not a multiple of 2; nearest: 8, or 0"):
        Pipeline.from_export(folder, tile=7)
    card["model"]["vae"]["tile"] = 5
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(ValueError, match="do not belong together:\n  model.vae.tile=5 is not a multiple of 2"):
        Pipeline.from_export(folder)


def test_it_resumes_and_notices_files_that_changed(workdir, files, tmp_path):
    config = config_of(files, run__steps=3)
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    assert train(config, moved) == 0
    shutil.copytree(files, tmp_path / "files")
    file = tmp_path / "files" / "wan" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {"proj_out.bias": tensors["proj_out.bias"] + 1}, file)
    written = json.loads((moved / "config.json").read_text())
    written["model"]["dit"]["path"] = str(tmp_path / "files" / "wan")
    (moved / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="moved was trained with other files: dit changed since"):
        Pipeline.from_run(moved)
    with pytest.raises(ValueError, match="run.init_from was trained with other files: dit changed since"):
        train(config_of(tmp_path / "files", 2, run__init_from=str(moved)), tmp_path / "second")


def test_a_continuation_takes_moved_files_and_keeps_its_config_where_they_are_others(workdir, files, tmp_path):
    run, there = tmp_path / "run", tmp_path / "files"
    shutil.copytree(workdir, run)
    shutil.copytree(files, there)
    config = config_of(there, run__steps=3)
    assert train(config, run) == 0
    own = lambda: json.loads((run / "config.json").read_text())["model"]
    assert own()["dit"]["path"] == str(there / "wan") and own()["null"] == str(there / "null.safetensors")
    null = np.zeros((1, 3, 16), np.float32)
    safetensors.numpy.save_file({"null": null}, tmp_path / "other.safetensors")
    config.model.null, config.run.steps = str(tmp_path / "other.safetensors"), 4
    with pytest.raises(ValueError, match="run was trained with other files: null changed since"):
        train(config, run)
    assert own()["null"] == str(there / "null.safetensors")


@pytest.mark.parametrize("name", ["/gone/wan", "Wan-gone"])
def test_a_start_from_a_run_whose_files_were_moved_finds_them_by_its_own_config(name, workdir, files, tmp_path):
    shutil.copytree(workdir, tmp_path / "origin")
    config = json.loads((workdir / "config.json").read_text())
    for part in ("dit", "vae"):
        config["model"][part]["path"] = name
    config["model"]["null"] = "/gone/null.safetensors"
    (tmp_path / "origin" / "config.json").write_text(json.dumps(config))
    paths = moved_paths(tmp_path / "origin", config_of(files, 2).model)
    assert paths == {"dit": str(files / "wan"), "vae": str(files / "wan"), "null": str(files / "null.safetensors")}
    assert moved_paths(workdir, config_of(files, 2).model) == {}
    found = named_leaves(read_run(tmp_path / "origin", 16, paths=paths).params)
    for name, leaf in leaves(workdir).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    config["model"] |= {"null": "learned", "vae": {"path": "pixels"}, "dit": {"path": ""}}
    (tmp_path / "origin" / "config.json").write_text(json.dumps(config))
    assert moved_paths(tmp_path / "origin", config_of(files, 2).model) == {}  # words, and other files instead of none


def test_stage_2_moves_its_patterns_alone_and_starts_low_rank_corrections_at_zero(workdir, files, tmp_path):
    patterns = ("^adapter/", "cross_attn/(key|value)/", "/low_rank_")
    config = config_of(files, 2, run__init_from=str(workdir), model__trainable=patterns)
    config.model.dit.low_rank = 3
    assert train(config, tmp_path / "second") == 0
    before, after = leaves(workdir), leaves(tmp_path / "second")
    added = {name for name in after if name not in before}
    assert added == {
        f"dit/blocks/self_attn/{part}/low_rank_{end}"
        for part in ("query", "key", "value", "out")
        for end in ("in", "out")
    }
    moved = {name for name in before if (before[name] != after[name]).any()}
    allowed = {name for name in before if name.startswith("adapter/") or "cross_attn/key" in name}
    allowed |= {name for name in before if "cross_attn/value" in name}
    assert moved <= allowed and {name.split("/")[0] for name in moved} == {"adapter", "dit"}
    assert all(np.abs(after[name]).max() > 0 for name in added), "B moves off zero once it is trained"
    origins = provenance(tmp_path / "second")
    assert origins["dit/patch_in/kernel"].startswith("file ")  # not a copy of a copy
    trained = json.loads((workdir / "summary.json").read_text())[
        "ema_sha256"
    ]  # the frozen DiT's bytes are not looked at
    assert origins["adapter/project_in/kernel"] == f"run {trained[:12]} step 2"


def test_a_run_is_read_without_its_published_parts(workdir):
    found, everything = named_leaves(read_run(workdir, 16, published_too=False).params), leaves(workdir)
    assert {name.split("/")[0] for name in found} == {"adapter"}
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, everything[name], err_msg=name)


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("dit", dict(width=36), r"model.dit.width=36, but 24 in .*wan"),
        ("dit", dict(patch=(1, 1, 1)), r"model.dit.patch=\(1, 1, 1\), but \(1, 2, 2\) in"),
        ("adapter", dict(d_ctx=32), r"model.adapter.d_ctx=32, but 16 in"),
        ("vae", dict(path="pixels"), r"channels of model.vae.path=pixels=12, but 5 in"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(files, group, changes, message):
    config = config_of(files)
    config.model[group].update(changes)
    with pytest.raises(ValueError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("group", "message"), [("dit", "no folder at /nowhere"), ("vae", "no folder at /nowhere"), ("null", "is no file")]
)
def test_missing_files_are_named(files, tmp_path, group, message):
    config = config_of(files)
    if group == "null":
        config.model.null = "/nowhere"
    else:
        config.model[group].path = "/nowhere"
    with pytest.raises(FileNotFoundError, match=message):
        train(config, tmp_path / "run")


def test_norms_of_another_epsilon_are_refused(files, tmp_path):
    shutil.copytree(files / "wan", tmp_path / "wan")
    written = tmp_path / "wan" / "transformer" / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"eps": 0.01}))
    with pytest.raises(ValueError, match="model.dit.eps=1e-06, but 0.01 in"):
        validate(config_of(files, dit__path=str(tmp_path / "wan")))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_tensors_that_do_not_fit_are_told_before_the_llm_works(files, tmp_path, part):
    shutil.copytree(files / "wan", tmp_path / "wan")
    file = tmp_path / "wan" / part / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    lost = sorted(tensors)[0]
    safetensors.numpy.save_file({name: tensors[name] for name in tensors if name != lost}, file)
    config = config_of(files)
    (config.model.dit if part == "transformer" else config.model.vae).path = str(tmp_path / "wan")
    with pytest.raises(ValueError, match=f"missing: {lost}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a start that failed leaves nothing"


def test_a_start_on_another_file_of_the_backbone_is_told(workdir, files, tmp_path, caplog):
    null = np.ones((1, 3, 16), np.float32)
    safetensors.numpy.save_file({"null": null}, tmp_path / "null.safetensors")
    config = config_of(files, model__null=str(tmp_path / "null.safetensors"))
    np.testing.assert_array_equal(null_of(config, read_run(workdir, 16)), null)
    assert "run.init_from was trained on other files of: null" in caplog.text
