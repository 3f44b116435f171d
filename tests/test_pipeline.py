"""A seed is a video: whatever the batch, the order, or a second run; and every prompt is answered for."""

import numpy as np
import pytest
from tiny import tiny_config, write_llm

from rise_jax import Pipeline
from rise_jax.train import train

PROMPTS = ["a red circle", "ein blaues Quadrat nach oben", "3"]


@pytest.fixture(scope="module", params=["off", "adaln"])
def pipe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(
        2,
        write_llm(folder / "llm"),
        model__adapter__time_cond=request.param,
        data__frames=5,
        sample__frames=5,
        sample__batch_size=2,
        run__steps=2,
        mesh__data=1,
        mesh__fsdp=-1,
    )
    config.run.batch_size = 8
    assert train(config, folder / "run") == 0
    return Pipeline.from_run(folder / "run")


def test_the_output_is_what_it_says(pipe):
    out = pipe(PROMPTS, seed=3)
    assert out.videos.shape == (3, 5, 16, 16, 3) and out.videos.dtype == np.uint8
    assert out.seeds == [3, 4, 5] and len(out.rephrased) == 3


def test_a_seed_gives_the_same_video_alone_and_in_any_batch(pipe):
    together = pipe(PROMPTS, seed=3)
    for i, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, seed=3 + i)
        assert alone.rephrased == [together.rephrased[i]]
        assert np.abs(alone.videos[0].astype(int) - together.videos[i].astype(int)).max() <= 1
    np.testing.assert_array_equal(pipe(PROMPTS, seed=3).videos, together.videos)


def test_another_seed_gives_another_video(pipe):
    assert (pipe(PROMPTS[0], seed=1).videos != pipe(PROMPTS[0], seed=2).videos).any()


def test_guidance_1_leaves_the_null_condition_out(pipe):
    """With scale 1 the null branch has weight zero, so its parameter cannot matter."""
    before = pipe(PROMPTS[0], guidance=1.0).videos
    null = pipe.params["adapter"]["null"]
    changed = Pipeline(
        pipe.model, {**pipe.params, "adapter": {**pipe.params["adapter"], "null": null + 1}}, pipe.language, pipe.config
    )
    np.testing.assert_array_equal(changed(PROMPTS[0], guidance=1.0).videos, before)
    assert (changed(PROMPTS[0], guidance=4.0).videos != pipe(PROMPTS[0], guidance=4.0).videos).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", ""],), "prompt is empty"),
        (([],), "no prompt given"),
        ((["word " * 50],), "at most 160"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(*arguments)


def test_sizes_that_do_not_fit_are_refused(pipe):
    with pytest.raises(ValueError, match="sample.frames=4 is not 4n.1; nearest: 5"):
        pipe("a", frames=4)
    with pytest.raises(ValueError, match="sample.width=20 .*nearest: 16"):
        pipe("a", width=20)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Pipeline.from_run(tmp_path)
