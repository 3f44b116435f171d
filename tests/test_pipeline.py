"""A seed is a video: whatever the batch, the order, or a second run; and every prompt is answered for."""

from contextlib import contextmanager

import jax
import numpy as np
import pytest
from noisy import noise
from tiny import tiny_config, write_llm
from written import write_run

from rise_jax import Pipeline
from rise_jax.build import model_from
from rise_jax.language import states_in_batch
from rise_jax.sampler import initial_noise
from rise_jax.sharding import make_mesh
from rise_jax.video import to_uint8

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle", "ein blaues Quadrat nach oben", "3"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(
        2,
        write_llm(folder / "llm"),
        data__frames=5,
        sample__frames=5,
        sample__batch_size=2,
    )
    return Pipeline.from_run(write_run(config, folder / "run"))


@pytest.fixture(scope="module", params=["off", "adaln"])
def either(request, pipe):
    """Without and with an adapter that knows the time, whose output is another one at every step."""
    if request.param == "off":
        return pipe
    config = pipe.config.model.copy_and_resolve_references()
    config.adapter.time_cond = "adaln"
    model = model_from(config, pipe.language.width, states_in_batch)
    return Pipeline(model, noise(model.abstract, spread=0.25), pipe.vae, pipe.language, pipe.config)


@contextmanager
def changed(settings, **values):
    """Config values for a while."""
    before = {name: settings[name] for name in values}
    settings.update(values)
    try:
        yield
    finally:
        settings.update(before)


def distance(videos, others):
    """Largest difference in levels of [0, 255]."""
    return np.abs(np.asarray(videos).astype(int) - np.asarray(others)).max()


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


def rows(heard, order):
    return heard._replace(states=heard.states[order], mask=heard.mask[order])


def test_a_video_depends_on_its_own_states_and_seed_alone(either):
    """Not on its place, nor on what else is made: rows and seeds in another order, other rows poisoned, other batch sizes."""
    heard, seeds = either.language.rephrase(PROMPTS), np.array([7, 1, 4])
    heard = heard._replace(mask=np.arange(heard.mask.shape[1]) < np.array([160, 9, 60])[:, None])
    videos = either.render(heard, seeds)
    order = np.array([2, 0, 1])
    assert distance(either.render(rows(heard, order), seeds[order]), videos[order]) <= 1
    poisoned = heard._replace(states=np.where(np.arange(3)[:, None, None] == 0, np.nan, heard.states))
    assert distance(either.render(poisoned, seeds)[1:], videos[1:]) <= 1
    for size in (1, 3):
        with changed(either.config.sample, batch_size=size):
            assert distance(either.render(heard, seeds), videos) <= 1
    for other in (either.render(heard, seeds + 1), either.render(rows(heard, order), seeds)):
        assert all(distance(a, b) > 20 for a, b in zip(other, videos))


def test_a_mesh_makes_the_same_videos(either):
    """Parameters, videos and the tokens of each spread over all eight devices; three videos, which do not divide over two."""
    mesh = make_mesh(1, 2, 2, 2)
    spread = Pipeline(either.model, either.params, either.vae, either.language, either.config, mesh)
    heard = either.language.rephrase(PROMPTS)
    assert distance(spread.render(heard, [7, 1, 4]), either.render(heard, [7, 1, 4])) <= 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 3), ("guidance", 1.5), ("stepper", "heun"), ("frames", 1), ("height", 32), ("width", 8)],
)
def test_settings_that_are_not_given_are_those_of_the_run(pipe, name, value):
    prompt = PROMPTS[0]
    given = pipe(prompt, **{name: value}).videos
    with changed(pipe.config.sample, **{name: value}):
        np.testing.assert_array_equal(pipe(prompt).videos, given)
    usual = pipe(prompt).videos
    assert usual.shape != given.shape or distance(usual, given) > 1
    np.testing.assert_array_equal(pipe(prompt, **{name: pipe.config.sample[name]}).videos, usual)


def test_the_rephrasing_is_drawn_with_the_seed_of_the_video(pipe):
    """At the run's own temperature, unless another is given."""
    greedy = pipe(PROMPTS[:1], seed=5).rephrased
    assert pipe(PROMPTS[:1], seed=6).rephrased == greedy
    with changed(pipe.config.sample, temperature=1.0):
        drawn = pipe([PROMPTS[0]] * 2, seed=5).rephrased
        assert drawn[1:] == pipe(PROMPTS[0], seed=6).rephrased
        assert pipe(PROMPTS[0], seed=5, temperature=0.0).rephrased == greedy
    assert pipe(PROMPTS[0], seed=5, temperature=1.0).rephrased == drawn[:1]
    assert len({*drawn, *greedy}) == 3


def test_guidance_0_leaves_the_prompt_out(either):
    videos = either.render(either.language.rephrase(PROMPTS[:2]), [3, 3], guidance=0.0)
    assert distance(videos[0], videos[1]) <= 1 < distance(videos[0], either(PROMPTS[0], seed=3).videos[0])


def test_one_step_from_noise_is_what_the_network_predicts(pipe):
    """x_0 itself, for a network that predicts data, whatever made the step; with guidance, v_null + scale (v_cond - v_null)."""
    model, params = pipe.model, pipe.params
    heard = pipe.language.rephrase(PROMPTS[:1])
    noise = initial_noise(jax.random.key(0), jax.numpy.array([5]), model.latent_shape((5, 16, 16)))
    time = jax.numpy.ones(1)
    states, mask = jax.device_put((heard.states, heard.mask))
    contexts = model.context(params, states, mask, time), model.null(params)
    cond, null = (model.dit(params, noise, time, model.kv(params, context)) for context in contexts)
    expected = to_uint8(model.decode({}, null + 2.5 * (cond - null)))
    assert distance(pipe.render(heard, [5], steps=1, guidance=2.5), expected) <= 1
    assert len(np.unique(expected)) > 50


def test_guidance_1_leaves_the_null_condition_out(pipe):
    """With scale 1 the null branch has weight zero, so its parameter cannot matter."""
    before = pipe(PROMPTS[0], guidance=1.0).videos
    null = pipe.params["adapter"]["null"]
    changed = Pipeline(
        pipe.model,
        {**pipe.params, "adapter": {**pipe.params["adapter"], "null": null + 1}},
        pipe.vae,
        pipe.language,
        pipe.config,
    )
    np.testing.assert_array_equal(changed(PROMPTS[0], guidance=1.0).videos, before)
    assert (changed(PROMPTS[0], guidance=4.0).videos != pipe(PROMPTS[0], guidance=4.0).videos).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", ""],), "prompt is empty"),
        (([],), "no prompt given"),
        ((["word " * 50],), "at most 160"),
        ((["a", 1],), "prompt 2 of 2 is no text: 1"),
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(seed=-1), "sample.seed=-1 must be at least 0; nearest: 0"),
        (dict(seed=2**40), f"sample.seed={2**40} must be at most {2**31 - 1_000_000}"),
        (dict(seed=1.5), "sample.seed=1.5 is no int"),
        (dict(guidance="3"), "sample.guidance='3' is no float, such as 2.0"),
        (dict(guidance=float("nan")), "sample.guidance=nan must be a finite number"),
        (dict(temperature=-1.0), "sample.temperature=-1.0 must be at least 0"),
        (dict(steps=0), "sample.steps=0 must be at least 1"),
        (dict(stepper="ddim"), "sample.stepper='ddim' is unknown .nearest: .*valid: euler, heun, unipc"),
    ],
)
def test_settings_that_are_none_are_refused_before_the_llm_works(pipe, given, message, monkeypatch):
    monkeypatch.setattr(pipe, "language", None)
    with pytest.raises(ValueError, match=message):
        pipe("a", **given)


def test_settings_may_be_numbers_of_numpy_and_jax(pipe):
    given = dict(seed=np.int64(4), steps=np.array(2), guidance=jax.numpy.float32(3))
    videos = pipe(PROMPTS[0], **given).videos
    np.testing.assert_array_equal(pipe(PROMPTS[0], seed=4, steps=2, guidance=3).videos, videos)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Pipeline.from_run(tmp_path)
