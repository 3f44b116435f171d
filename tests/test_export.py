"""An export is the run again for whoever has the LLM, and plain diffusers weights for everyone else."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import wan
import wan_vae
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from encoders import write_umt5
from safetensors.numpy import load_file, save_file
from tiny import INSTRUCTION, on_one_device, tiny_config, write_llm

from rise_jax import Pipeline
from rise_jax.build import language_from, model_from
from rise_jax.checkpoint import Checkpoints
from rise_jax.condition_kinds import Condition
from rise_jax.export import export
from rise_jax.exported import write_export
from rise_jax.language import states_in_batch
from rise_jax.published import load_null, load_vae
from rise_jax.runs import Run
from rise_jax.sharding import make_mesh
from rise_jax.trees import named_leaves, path_name
from rise_jax.weights_wan import merge_low_rank, save_wan

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle", "3"]


class Made(NamedTuple):
    """A run with random parameters, none of them 0 or 1, and where it was exported to."""

    run: Run
    language: Condition
    vae: dict
    folder: Path

    def pipeline(self):
        return Pipeline(self.run.model, self.run.params, self.vae, self.language, self.run.config)


def make(folder, *, small=False, **overrides):
    """With `small`, kernels are of bfloat16's numbers and low-rank corrections of 1e-5 of them."""
    config = tiny_config(2, write_llm(folder / "llm"), data__frames=5, sample__frames=5, **overrides)
    language = language_from(config.model)
    model = model_from(config.model, language.width, states_in_batch)
    rng = np.random.default_rng(0)
    noisy = lambda leaf: np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    params = jax.tree.map(noisy, jax.jit(model.init)(jax.random.key(0)))
    if small:
        params = jax.tree_util.tree_map_with_path(_small, params)
    provenance = dict.fromkeys(named_leaves(params), "run 0123456789ab step 4")
    run = Run(config, model, {"provenance": provenance, "llm": language.identity}, 7, params, set())
    made = Made(run, language, load_vae(config.model.vae.path)[0], folder / "export")
    write_export(made.folder, run, language, made.vae)
    return made


def _small(path, leaf):
    name = path_name(path)
    return leaf * 1e-5 if "low_rank_out" in name else np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float32)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """As the tiny preset: exact pixels, a learned null condition, coordinates."""
    return make(tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """As the wan presets: Wan's VAE, a null condition from a file, low-rank corrections."""
    folder = tmp_path_factory.mktemp("adapted")
    wan_vae.reference(wan_vae.EARLY).save_pretrained(folder / "vae")
    save_file({"null": np.zeros((1, 3, 16), np.float32)}, folder / "null.safetensors")
    parts = dict(vae__path=str(folder / "vae"), null=str(folder / "null.safetensors"))
    sizes = dict(model__dit__low_rank=2, model__dit__coordinates=False, model__dit__patch=(1, 2, 2))
    return make(folder, **sizes, **{f"model__{name}": value for name, value in parts.items()})


@pytest.fixture
def copy(scratch, tmp_path):
    return Path(shutil.copytree(scratch.folder, tmp_path / "export"))


@pytest.fixture
def copy_adapted(adapted, tmp_path):
    return Path(shutil.copytree(adapted.folder, tmp_path / "export"))


def change_card(folder, group, **values):
    card = json.loads((folder / "adapter" / "adapter.json").read_text())
    target = card
    for part in filter(None, group.split(".")):
        target = target[part]
    target.update(values)
    (folder / "adapter" / "adapter.json").write_text(json.dumps(card))


def bits(leaves):
    return {name: (leaf.shape, leaf.dtype.name, np.asarray(leaf).tobytes()) for name, leaf in leaves.items()}


# ---- the same again ----


def test_the_same_videos_bit_for_bit(scratch):
    ours, theirs = scratch.pipeline()(PROMPTS, seed=3), Pipeline.from_export(scratch.folder)(PROMPTS, seed=3)
    assert theirs.rephrased == ours.rephrased and theirs.seeds == ours.seeds
    assert theirs.videos.shape == (2, 5, 16, 16, 3) and len(np.unique(theirs.videos)) > 100
    np.testing.assert_array_equal(theirs.videos, ours.videos)


@pytest.mark.parametrize("condition", ["encode", "native"])
def test_a_run_that_reads_the_prompt_alone_needs_no_instruction(condition, tmp_path):
    """Nor an adapter, where the native encoder's states are what the backbone takes."""
    overrides = dict(model__condition=condition)
    if condition == "native":
        encoder = write_umt5(tmp_path / "t5", width=16)
        overrides["model__adapter"] = dict(kind="identity", d_ctx=16, registers=0, time_cond="off")
        overrides["model__native"] = dict(path=str(encoder), length=100, dtype="float32")
    made = make(tmp_path, **overrides)
    assert json.loads((made.folder / "adapter" / "adapter.json").read_text())["llm"]["instruction"] is None
    (tmp_path / "llm" / "instruction.txt").unlink()
    ours, theirs = made.pipeline()(PROMPTS, seed=3), Pipeline.from_export(made.folder)(PROMPTS, seed=3)
    assert theirs.rephrased == [None, None]
    np.testing.assert_array_equal(theirs.videos, ours.videos)


def test_merged_corrections_and_the_vae_give_the_same_videos(adapted):
    ours, theirs = adapted.pipeline()(PROMPTS, seed=3).videos, Pipeline.from_export(adapted.folder)(PROMPTS, seed=3)
    assert len(np.unique(ours)) > 100
    assert np.abs(theirs.videos.astype(int) - ours.astype(int)).max() <= 1


def test_corrections_are_not_rounded_away_where_kernels_are_bfloat16(tmp_path):
    """Each is below half a unit in the last place of its weight: merged for good, none would be left."""
    sizes = dict(model__dit__low_rank=2, model__dit__coordinates=False, model__dit__patch=(1, 2, 2))
    made = make(tmp_path, **sizes, model__dtype="bfloat16", small=True)
    ours = {name: leaf for name, leaf in named_leaves(made.run.params).items() if "self_attn" in name}
    pipe = Pipeline.from_export(made.folder)
    theirs = named_leaves(pipe.params)
    corrected = [name for name in ours if name.replace("kernel", "low_rank_in") in ours and "kernel" in name]
    merged = named_leaves(merge_low_rank(made.run.params["dit"]))
    for name in corrected:
        np.testing.assert_array_equal(theirs[name], ours[name].astype(jnp.bfloat16))
        rounded = merged[name.removeprefix("dit/")].astype(jnp.bfloat16)
        assert (rounded == ours[name].astype(jnp.bfloat16)).mean() > 0.99 and len(corrected) == 4
    for name in {*ours} - {*corrected}:
        np.testing.assert_array_equal(theirs[name], ours[name])
    np.testing.assert_array_equal(pipe(PROMPTS, seed=3).videos, made.pipeline()(PROMPTS, seed=3).videos)


def test_corrections_come_apart_where_kernels_lie_over_devices(adapted):
    pipe = Pipeline.from_export(adapted.folder, mesh=make_mesh(2, 2, 1, 2))
    ours, theirs = named_leaves(adapted.run.params), named_leaves(pipe.params)
    assert ours.keys() == theirs.keys() and any("low_rank" in name for name in ours)
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], atol=1e-6, err_msg=name)
    kernel = theirs["dit/blocks/self_attn/query/kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4


def test_an_export_without_its_corrections_is_incomplete(copy_adapted):
    (copy_adapted / "adapter" / "low_rank.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter/low_rank.safetensors: the export is incomplete"):
        Pipeline.from_export(copy_adapted)


def test_the_llm_may_lie_elsewhere(scratch, tmp_path):
    """And it needs no instruction file: the text is in the export."""
    llm = write_llm(tmp_path / "llm")
    (llm / "instruction.txt").unlink()
    pipe = Pipeline.from_export(scratch.folder, llm=llm)
    assert pipe.language.identity == scratch.language.identity
    assert pipe.language.rephrase(PROMPTS).texts == scratch.language.rephrase(PROMPTS).texts


@pytest.mark.parametrize("name", ["scratch", "adapted"])
def test_diffusers_loads_the_backbone_and_gives_the_same_output(name, request):
    """Ours with its corrections apart, theirs with them merged."""
    made = request.getfixturevalue(name)
    model, report = WanTransformer3DModel.from_pretrained(made.folder / "transformer", output_loading_info=True)
    assert not any(report.values())
    rng = np.random.default_rng(1)
    shape = made.run.model.latent_shape((5, 16, 16))
    latents, t = rng.normal(size=(2, *shape)).astype("f4"), np.array([0.2, 0.9], "f4")
    context = rng.normal(size=(2, made.run.config.model.dit.text_len, 16)).astype("f4")

    @jax.jit
    def forward(params, latents, t, context):
        with jax.default_matmul_precision("highest"):
            return made.run.model.dit(params, latents, t, made.run.model.kv(params, context))

    with torch.no_grad():
        theirs = wan.forward_torch(model, *map(torch.tensor, (latents, t, context)), context.shape[1])
    assert wan.relative(forward(made.run.params, latents, t, context), theirs) < 1e-5


def test_diffusers_loads_the_vae(adapted):
    model = AutoencoderKLWan.from_pretrained(adapted.folder / "vae")
    latents = 0.5 * np.random.default_rng(2).normal(size=(1, 2, 4, 4, 3)).astype("f4")
    ours = jax.jit(adapted.run.model.decode)(adapted.vae, latents)
    assert wan_vae.difference(ours, np.clip(wan_vae.decoded(model, latents), -1, 1)) < 1e-5


@pytest.mark.parametrize("name", ["scratch", "adapted"])
def test_the_null_condition_serves_another_run(name, request):
    made = request.getfixturevalue(name)
    other = tiny_config(1, Path("llm"), model__null=str(made.folder / "null.safetensors")).model
    ours = made.run.model.null(made.run.params)
    value = load_null(other)[0]
    np.testing.assert_array_equal(value, ours[:, : value.shape[1]])
    assert not np.asarray(ours[:, value.shape[1] :]).any() and value.any()


def test_the_adapters_tensors_are_its_leaves(scratch):
    leaves = named_leaves(scratch.run.params["adapter"])
    null = leaves.pop("null")
    assert bits(load_file(scratch.folder / "adapter" / "adapter.safetensors")) == bits(leaves)
    assert bits(load_file(scratch.folder / "null.safetensors")) == bits({"null": null})


def test_orbax_keeps_every_leaf_as_it_was_trained(adapted):
    params = adapted.run.params
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    abstract = jax.tree.map(place, params, on_one_device(params))
    checkpoints = Checkpoints(adapted.folder / "params", read_only=True)
    step, found, meta = checkpoints.restore(abstract)
    checkpoints.close()
    assert step == 7 and meta == {"provenance": adapted.run.meta["provenance"]}
    assert bits(named_leaves(found)) == bits(named_leaves(params))


def test_the_card_says_what_it_takes_to_use_the_adapter(scratch):
    card = json.loads((scratch.folder / "adapter" / "adapter.json").read_text())
    config = scratch.run.config
    assert card["llm"]["identity"] == scratch.language.identity and card["llm"]["identity"]["align"] == "predictor"
    assert card["llm"]["width"] == 16 and card["llm"]["instruction"] == INSTRUCTION
    assert card["model"] == json.loads(json.dumps(config.model.to_dict()))
    assert {"layer", "max_prompt", "max_new", "dtype"} <= {"layer"} | card["model"]["llm"].keys()
    assert card["null"] == "learned" and card["provenance"] == scratch.run.meta["provenance"]
    assert card["sample"]["guidance"] == config.sample.guidance and card["fps"] == config.data.fps
    assert card["step"] == 7 and card["rise_jax"].count(".") == 2


def test_a_left_over_half_is_cleared_away(scratch, tmp_path):
    half = tmp_path / "export.partial" / "transformer"
    half.mkdir(parents=True)
    (half / "diffusion_pytorch_model.safetensors").write_text("killed here")
    write_export(tmp_path / "export", scratch.run, scratch.language, scratch.vae)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    names = lambda folder: {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert names(tmp_path / "export") == names(scratch.folder)


# ---- what is refused ----


def test_an_export_is_never_written_over(copy):
    with pytest.raises(FileExistsError, match="export is there already: remove it"):
        export(None, copy.parent)


def test_all_missing_files_are_named(copy_adapted):
    names = "adapter/adapter.safetensors", "null.safetensors", "transformer/config.json", "vae/config.json"
    for name in names:
        (copy_adapted / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {', '.join(names)}: the export is incomplete"):
        Pipeline.from_export(copy_adapted)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_missing_weights_are_named(copy_adapted, part):
    (copy_adapted / part / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{part} lacks diffusion_pytorch_model.safetensors"):
        Pipeline.from_export(copy_adapted)


def test_another_llm_is_refused(scratch, tmp_path):
    with pytest.raises(
        ValueError, match=r"belongs to another LLM or condition than this one: sha256: [0-9a-f]{64} there, "
    ):
        Pipeline.from_export(scratch.folder, llm=write_llm(tmp_path / "llm", seed=1))


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("model.llm", {"layer": 0}, "layer: None there, 0 here"),
        ("model.llm", {"layer": 3}, "layer"),
        ("model.llm", {"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 here"),
        ("llm.identity", {"align": "token"}, "align: token there, predictor here"),
        ("llm", {"width": 32}, "width: 32 there, 16 here"),
        ("llm", {"instruction": "Say less."}, "instruction: "),
        ("model.dit", {"heads": 3}, r"(?s)do not belong together:.*model.dit.heads=3, but 2 in"),
        ("model.adapter", {"d_ctx": 8}, r"(?s)do not belong together:.*model.adapter.d_ctx=8, but 16 in"),
        ("", {"format": 1}, "has format 1, this version reads 2"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(copy, group, values, message):
    change_card(copy, group, **values)
    with pytest.raises(ValueError, match=message):
        Pipeline.from_export(copy)


def test_a_dit_of_other_channels_than_the_vae_is_refused(copy_adapted, scratch):
    shutil.rmtree(copy_adapted / "transformer")
    sizes = dict(width=24, mlp_width=32, heads=2, depth=2, patch=(1, 8, 8), d_ctx=16, channels=12, coordinates=True)
    save_wan(scratch.run.params["dit"], sizes, copy_adapted / "transformer")
    with pytest.raises(ValueError, match=r"channels of model.vae.path=\S+export=3, but 12 in"):
        Pipeline.from_export(copy_adapted)


def test_all_tensors_of_the_adapter_that_do_not_fit_are_named(copy):
    file = copy / "adapter" / "adapter.safetensors"
    tensors = load_file(file)
    tensors["registers"] = tensors["registers"][:1]
    save_file(tensors | {"more": tensors.pop("input_bias")}, file)
    with pytest.raises(
        ValueError, match=r"(?s)3 problems.*missing: input_bias.*left over: more.*wrong shape: registers"
    ):
        Pipeline.from_export(copy)


@pytest.mark.parametrize(("text", "told"), [("{", "is not valid JSON"), ("[1]", "holds no JSON object but list")])
def test_a_card_that_cannot_be_read_is_named(copy, text, told):
    (copy / "adapter" / "adapter.json").write_text(text)
    with pytest.raises(ValueError, match=f"adapter.json {told}"):
        Pipeline.from_export(copy)
