"""Bad configs: every fault is named with its value and the nearest valid choice, before anything compiles."""

from pathlib import Path

import pytest
from tiny import tiny_config

from configs import stage0, stage1, stage2
from rise_jax.condition_kinds import CONDITIONS
from rise_jax.models.vae import Pixels
from rise_jax.models.wan_vae import WanVAE
from rise_jax.validate import RANGES, tile_faults, validate

FAULTS = {
    "data__frames": (6, r"data.frames=6 is not 4n\+1; nearest: 5"),
    "data__height": (20, "data.height=20 is not a multiple of the patch times the VAE's stride, 8 x 1; nearest: 16"),
    "sample__width": (9, "sample.width=9 .*nearest: 8"),
    "model__dit__width": (25, "model.dit.width=25 is not a multiple of model.dit.heads=2; nearest: 24"),
    "model__dit__heads": (8, "odd head width 3"),
    "model__adapter__width": (17, "model.adapter.width=17 is not a multiple of model.adapter.heads=2; nearest: 16"),
    "model__dit__text_len": (100, "cannot hold 2 registers and 160 tokens; nearest: 162, or, .*model.llm.max_new=98"),
    "model__dit__patch": ((2, 8, 8), "time patch must be 1"),
    "model__condition": ("rewrite", "model.condition='rewrite' is unknown .nearest: rewrite_then_encode"),
    "model__adapter__kind": ("refinr", "model.adapter.kind='refinr' is unknown .nearest: refiner"),
    "model__prediction": ("noise", "valid: velocity, data"),
    "model__dtype": ("float16", "nearest: float32|nearest: bfloat16"),
    "model__attention": (
        "flash",
        "model.attention='flash' is unknown .nearest: splash.; valid: auto, xla, cudnn, splash",
    ),
    "model__sequence": ("rings", "model.sequence='rings' is unknown .nearest: ring"),
    "data__states": ("cache", "nearest: cached"),
    "sample__stepper": ("eular", "nearest: euler"),
    "optim__kind": ("moun", "nearest: muon"),
    "run__steps": (0, "run.steps=0 must be at least 1"),
    "run__accumulate": (3, "run.batch_size=4 is not a multiple of run.accumulate=3; nearest: 3"),
    "run__profile": ("2:9", "run.profile='2:9' needs START < STOP <= run.steps=4; nearest: '2:4'"),
    "model__dit__remat": (
        "block",
        "model.dit.remat='block' is unknown .nearest: blocks.; valid: none, dots, attention, blocks, offload",
    ),
    "optim__drop": (1.5, "optim.drop=1.5 must be from 0 to 1; nearest: 1"),
    "data__source": (
        "scene",
        "data.source='scene' is unknown .nearest: scenes.; valid: scenes, folder, tfds:NAME",
    ),
    "data__fps": (0.0, "data.fps=0.0 must be above 0"),
    "sample__seed": (-1, "sample.seed=-1"),
    "run__seed": (2**32, "run.seed=4294967296 must be at most 4294967295; nearest: 4294967295"),
    "model__adapter__heads": (0, "model.adapter.heads=0 must be at least 1; nearest: 1"),
    "model__adapter__d_ctx": (0, "model.adapter.d_ctx=0 must be at least 1; nearest: 1"),
    "model__adapter__registers": (-3, "model.adapter.registers=-3 must be at least 0; nearest: 0"),
    "model__dit__depth": (0, "model.dit.depth=0 must be at least 1; nearest: 1"),
    "model__dit__mlp_width": (0, "model.dit.mlp_width=0 must be at least 1; nearest: 1"),
    "model__dit__low_rank": (-2, "model.dit.low_rank=-2 must be at least 0; nearest: 0"),
    "model__llm__max_new": (0, "model.llm.max_new=0 must be at least 1; nearest: 1"),
    "model__llm__max_prompt": (-1, "model.llm.max_prompt=-1 must be at least 1; nearest: 1"),
    "model__native__length": (0, "model.native.length=0 must be at least 1; nearest: 1"),
    "model__shift": (float("inf"), "model.shift=inf must be a finite number"),
    "optim__learning_rate": (float("nan"), "optim.learning_rate=nan must be a finite number"),
    "optim__clip": (-1.0, "optim.clip=-1.0 must be above 0"),
    "optim__b2": (1.0, "optim.b2=1.0 must be at least 0 and below 1"),
    "optim__ema": (2.0, "optim.ema=2.0 must be from 0 to 1; nearest: 1"),
    "data__path": ("clips", "data.path='clips' is not read where data.source='scenes'; nearest: data.source='folder'"),
    "optim__warmup": (-3, "optim.warmup=-3 must be at least 0; nearest: 0"),
    "optim__decay_from": (
        1,
        "optim.decay_from=1 and optim.decay_until=2000: .*optim.warmup=2 steps.*nearest: 2 and 2000",
    ),
    "optim__decay_until": (9, "optim.decay_from=1000 and optim.decay_until=9: .*nearest: 1000 and 1001"),
    "data__workers": (-1, "data.workers=-1 must be at least 0; nearest: 0"),
    "sample__guidance": (float("nan"), "sample.guidance=nan must be a finite number"),
    "sample__temperature": (float("nan"), "sample.temperature=nan must be a finite number"),
    "model__trainable": (("^dit/", "("), r"model.trainable='\(' is no pattern .*; nearest: '\^adapter/'"),
    "model__vae__dtype": (
        "float23",
        "model.vae.dtype='float23' is unknown .nearest: float32.; valid: float32, bfloat16",
    ),
    "model__vae__tile": (8, "model.vae.tile=8: the VAE 'pixels' has nothing to save by tiles; nearest: 0"),
    "model__native__dtype": ("bfloat61", "model.native.dtype='bfloat61' is unknown .nearest: bfloat16"),
}


@pytest.mark.parametrize("key", FAULTS)
def test_a_fault_is_named_with_the_nearest_choice(key, tmp_path):
    value, message = FAULTS[key]
    with pytest.raises(ValueError, match=message):
        validate(tiny_config(1, tmp_path, **{key: value}))


def test_tiles_are_of_whole_latent_cells():
    fine = ((0, WanVAE()), (256, WanVAE()), (0, Pixels()))
    assert [fault for tile, vae in fine for fault in tile_faults(tile, vae)] == []
    told = "model.vae.tile=100 is not a multiple of 8; nearest: 96, or 0: whole frames"
    assert [*tile_faults(100, WanVAE())] == [told]


@pytest.mark.parametrize("patch", [(1, 2), (1, 0, 2), ("a", 8, 8)])
def test_a_patch_has_three_sizes(tmp_path, patch):
    with pytest.raises(ValueError, match="must be three sizes >= 1: frames, rows, columns; nearest: .1, 2, 2."):
        validate(tiny_config(1, tmp_path, model__dit__patch=patch))


@pytest.mark.parametrize(
    ("texts", "told"), [(2000, "at most 1000 .*; nearest: 1000"), (0, "at least 1 .*; nearest: 1")]
)
def test_scenes_have_so_many_texts(tmp_path, texts, told):
    with pytest.raises(ValueError, match=f"data.texts={texts} must be {told}"):
        validate(tiny_config(1, tmp_path, data__texts=texts))
    validate(tiny_config(1, tmp_path, data__texts=texts, data__source="folder"))


def test_all_faults_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="(?s)data.frames=3.*data.height=20|data.height=20.*data.frames=3"):
        validate(tiny_config(1, tmp_path, data__frames=3, data__height=20))


def test_cudnn_wants_16_bits_and_a_head_width_that_it_has(tmp_path):
    config = tiny_config(1, tmp_path, model__attention="cudnn")
    with pytest.raises(
        ValueError, match="='cudnn' needs bfloat16 or float16, and this is float32 in model.dit; nearest: xla"
    ):
        validate(config)
    config.model.dtype = "bfloat16"
    with pytest.raises(ValueError, match="this is 12 .nearest: 16. in model.dit") as error:
        validate(config)
    assert "model.adapter" not in str(error.value)  # its heads are 8 wide
    config.model.dit.width = 32
    validate(config)


def test_text_len_holds_the_states_of_the_condition(tmp_path):
    """Those of the prompt's own tokens for `encode`, else those of what is written."""
    config = tiny_config(1, tmp_path, model__llm__max_prompt=170, model__condition="encode")
    with pytest.raises(ValueError, match="text_len=164 cannot hold 2 registers and 170 tokens; nearest: 172"):
        validate(config)
    for condition in ("rephrase", "rewrite_then_encode"):
        config.model.condition = condition
        validate(config)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_shipped_presets_are_valid(preset):
    for stage in (stage0, stage1, stage2):
        validate(stage.get_config(preset))
    validate(stage0.get_config(f"{preset}_images"))


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_stage_0_makes_what_the_frozen_preset_takes(size):
    """The same DiT but for how it runs; images first, then clips from there; everything trains in one, the adapter in the other."""
    made, taken = stage0.get_config(size), stage1.get_config(f"{size}_frozen")
    runtime = {"path": f"runs/stage0-{size}/export", "low_rank": 0}
    assert taken.model.dit.to_dict() == made.model.dit.to_dict() | runtime and made.model.dit.path == ""
    assert taken.model.adapter.d_ctx == made.model.adapter.d_ctx
    assert (made.model.condition, taken.model.condition) == ("encode", "rephrase")
    assert (made.model.null, made.model.trainable, made.optim.drop) == ("learned", (".",), 0.1)
    assert (taken.model.trainable, taken.optim.drop) == (("^adapter/",), 0)
    images = stage0.get_config(f"{size}_images")
    assert images.data.frames == 1 < made.data.frames and images.run.init_from == ""
    assert (images.run.stage, images.run.preset) == (made.run.init_from, made.run.preset)


def test_a_frozen_preset_without_its_backbone_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder at runs/stage0-tiny/export"):
        validate(stage1.get_config("tiny_frozen"))


def test_stage_0_of_a_published_backbone_is_refused():
    with pytest.raises(ValueError, match="'wan_1_3b' has a backbone, Wan2.1-T2V-1.3B-Diffusers; .* use tiny or small"):
        stage0.get_config("wan_1_3b")


def test_a_rate_that_never_falls_has_two_noughts(tmp_path):
    config = tiny_config(1, tmp_path, optim__decay_until=0)
    with pytest.raises(ValueError, match="nearest: 1000 and 1001, or 0 and 0 for no fall"):
        validate(config)
    config.optim.decay_from = 0
    validate(config)


def test_every_range_is_that_of_a_key():
    config = stage1.get_config("tiny")
    keys = {(group, name) for groups, *_ in RANGES for group, names in groups.items() for name in names.split()}
    assert len(keys) > 20 and all(name in config[group] for group, name in keys)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="'tinny': did you mean 'tiny'"):
        stage1.get_config("tinny")


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("preset", ["tiny", "small", "wan_1_3b", "wan_14b"])
def test_conditions_are_one_key_apart(preset, condition):
    config = stage1.get_config(preset)
    config.model.condition = condition
    config.model.dit.path = ""  # a file that is not here
    validate(config, WanVAE() if preset.startswith("wan") else None)


def test_an_adapter_without_an_output_norm_cannot_be_calibrated():
    config = tiny_config(1, Path("llm"), model__adapter__kind="identity", model__adapter__registers=0)
    config.model.adapter.d_ctx = 16
    config.model.calibrate = "captions.txt"
    with pytest.raises(ValueError, match="model.calibrate='captions.txt': the adapter 'identity' has no output"):
        validate(config)
