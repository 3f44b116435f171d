"""Scores of an evaluation counted by hand on rendered clips; what is scored, and the held-out loss under three conditions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tiny import tiny_config, write_llm
from written import write_run

from rise_jax import Pipeline, evaluate, pipeline
from rise_jax.data.attributes import Scene, Thing
from rise_jax.data.captions import long_caption
from rise_jax.data.drawing import render
from rise_jax.data.scenes import ScenesSource
from rise_jax.data.sources import BadClipError
from rise_jax.evaluate import intervals, scene_scores, shares
from rise_jax.sharding import make_mesh

pytestmark = pytest.mark.slow

RED = Scene((Thing("circle", "red", "large", "left"),), "black", frozenset({"colour", "shape", "count"}))
BLUE = replace(RED, things=(Thing("square", "blue", "large", "left"),), language="de")
PAIR = replace(RED, things=(Thing("circle", "green", "small", "left"), Thing("triangle", "red", "small", "right")))
SCENES = [RED, BLUE, PAIR]


def clip(scene):
    return render(scene, 5, 32, 32, np.random.default_rng(0))


@pytest.fixture(scope="module")
def scores():
    """The video of RED shows another colour, the others are right; without states all show BLUE; one rephrasing says BLUE of RED."""
    wrong = replace(RED, things=(replace(RED.things[0], colour="yellow"),))
    texts = [long_caption(BLUE), long_caption(BLUE), long_caption(PAIR)]
    return scene_scores([clip(wrong), clip(BLUE), clip(PAIR)], [clip(BLUE)] * 3, texts, SCENES)


def test_videos_are_scored_against_their_own_prompts(scores):
    assert scores["attribute_accuracy"] == pytest.approx(dict(colour=2 / 3, shape=1, count=1, all=2 / 3))
    assert scores["one_thing"] == dict(colour=0.5, shape=1, count=1, all=0.5)
    assert scores["two_things"] == dict(colour=1, shape=1, count=1, all=1)


def test_shuffled_scores_are_those_against_the_prompt_before(scores):
    """Yellow circle against PAIR, blue square against RED, the pair against BLUE: one right count."""
    assert scores["shuffled"] == pytest.approx(dict(colour=0, shape=0, count=1 / 3, all=0))


def test_zeroed_scores_are_of_the_other_videos_and_kept_of_the_texts(scores):
    assert scores["zeroed"] == pytest.approx(dict(colour=1 / 3, shape=1 / 3, count=2 / 3, all=1 / 3))
    assert scores["kept_by_rephrasing"] == pytest.approx(dict(colour=2 / 3, shape=2 / 3, count=1, all=2 / 3))


def test_scores_are_told_apart_by_the_language_of_the_prompt(scores):
    right = dict(colour=1, shape=1, count=1, all=1)
    assert scores["by_language"] == {
        "de": dict(prompts=1, attribute_accuracy=right, kept_by_rephrasing=right),
        "en": dict(
            prompts=2,
            attribute_accuracy=dict(colour=0.5, shape=1, count=1, all=0.5),
            kept_by_rephrasing=dict(colour=0.5, shape=0.5, count=1, all=0.5),
        ),
    }


def test_where_nothing_is_rephrased_nothing_is_said_of_it(scores):
    """All else is as before."""
    videos = [clip(replace(RED, things=(replace(RED.things[0], colour="yellow"),))), clip(BLUE), clip(PAIR)]
    without = scene_scores(videos, [clip(BLUE)] * 3, [None] * 3, SCENES)
    assert "kept_by_rephrasing" not in json.dumps(without)
    expected = json.loads(json.dumps(scores))
    for part in (expected, *expected["by_language"].values()):
        del part["kept_by_rephrasing"]
    assert without == expected


def test_one_video_has_no_neighbour_to_be_scored_against():
    alone = scene_scores([clip(RED)], [clip(BLUE)], [long_caption(RED)], [RED])
    assert "shuffled" not in alone and alone["attribute_accuracy"]["all"] == 1


def test_pictures_of_a_run_on_clips_are_not_asked_for_a_direction():
    """Of a right picture all is right; a clip that does not move is wrong."""
    asked = replace(RED, asked=RED.asked | {"direction"})
    still = np.repeat(clip(RED)[:1], 5, axis=0)
    for video, expected in ((clip(RED)[:1], None), (still, False), (clip(RED), True)):
        scores = scene_scores([video], [video], [long_caption(RED)], [evaluate.scorable(asked, len(video))])
        assert scores["attribute_accuracy"].get("direction") == expected
        assert scores["attribute_accuracy"]["all"] == (expected is not False)


class Evaluated(NamedTuple):
    """A run, how many rows were rendered at a time, what its evaluation gave to be scored, and what it wrote."""

    workdir: Path
    rendered: list[int]
    videos: np.ndarray
    unheard: np.ndarray
    rephrased: list[str]
    scenes: list[Scene]
    result: dict


# Of the evaluation; the run's own are others.
SAMPLE = dict(steps=3, guidance=1.5, temperature=0.7)
COUNT, AT_A_TIME, OWN = 9, 16, 4


def held_out(texts):
    return ScenesSource("heldout", num_texts=texts, frames=5, height=16, width=16, seed=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With parameters so large that its videos differ."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(2, write_llm(folder / "llm"), data__frames=5)
    config.sample.update(frames=5, seed=7, count=COUNT, batch_size=OWN)
    write_run(config, folder / "run")
    config.sample.update(SAMPLE, batch_size=AT_A_TIME)
    config.run.seed = 3
    scored, rendered, put_rows = [], [], pipeline.put_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "scene_scores", lambda *given: scored.append(given) or scene_scores(*given))
        patch.setattr(pipeline, "put_rows", lambda rows, mesh: rendered.append(len(rows[-1])) or put_rows(rows, mesh))
        assert evaluate.evaluate(config, folder / "run") == 0
    result = json.loads((folder / "run" / "evaluation.json").read_text())
    return Evaluated(folder / "run", rendered, *scored[0], result)


@pytest.fixture(scope="module")
def pipe(run):
    """As in evaluate: bit for bit."""
    pipe = Pipeline.from_run(run.workdir, mesh=make_mesh())
    pipe.config.sample.batch_size = AT_A_TIME
    return pipe


def test_what_is_scored_are_a_users_videos_of_held_out_prompts(run, pipe):
    source = held_out(COUNT)
    out = pipe([text.prompt for text in source.texts], seed=7, **SAMPLE)
    np.testing.assert_array_equal(run.videos, out.videos)
    assert run.rephrased == out.rephrased and run.scenes == source.scenes
    assert run.result["prompts"] == COUNT and run.result["seeds"] == [7, 15]
    assert sum(part["prompts"] for part in run.result["by_language"].values()) == COUNT


def test_the_result_says_what_was_measured_and_on_what(run):
    """The hash is compared with a summary's in test_end_to_end.py."""
    assert run.result["step"] == 1 and len(run.result["ema_sha256"]) == 64
    assert run.result["prompts_seed"] == 3 and run.result["data"] == {"source": "scenes", "path": ""}


def test_the_commands_batch_size_is_that_of_the_rendering_and_not_of_the_loss(run, pipe, tmp_path):
    """With the run's own there would be two batches of eight, a row on each device; with the command's there is one."""
    assert run.rendered == [16, 16], "the videos, and those without states"
    losses = [evaluate.heldout_loss(pipe, held_out(COUNT), tmp_path, size, max_bad=0.0) for size in (8, 24)]
    assert [each["clips"] for each in (*losses, run.result["heldout_loss"])] == [32, 32, 32]
    for name in ("true", "shuffled", "zeroed"):
        np.testing.assert_allclose(losses[0][name], losses[1][name], rtol=1e-5)


def test_the_loss_of_scenes_is_the_same_however_many_prompts_are_asked_for(run, pipe, tmp_path):
    fixed = evaluate.heldout_loss(pipe, held_out(evaluate.CLIPS), tmp_path, AT_A_TIME, max_bad=0.0)
    for name in ("true", "shuffled", "zeroed"):
        np.testing.assert_allclose(run.result["heldout_loss"][name], fixed[name], rtol=1e-5)


def test_without_states_the_prompt_is_not_heard(run, pipe):
    """Seeds and masks are the same; of what the LLM said only its length is left."""
    prompts, (steps, guidance, temperature) = [text.prompt for text in held_out(COUNT).texts], SAMPLE.values()
    heard = pipe.language.rephrase(prompts, temperature=temperature, seeds=range(7, 16))
    deaf = heard._replace(states=heard.states * 0)
    np.testing.assert_array_equal(run.unheard, pipe.render(deaf, range(7, 16), steps=steps, guidance=guidance))
    assert (run.unheard != run.videos).any()


def test_the_heldout_loss_tells_the_conditions_apart(run, pipe, tmp_path):
    """With one text for all clips, or one clip, another clip's states would be one's own: there are none."""
    losses = run.result["heldout_loss"]
    assert len(losses["times"]) == len(losses["true"]) and np.isfinite(losses["true"]).all()
    assert len({tuple(losses[name]) for name in ("true", "shuffled", "zeroed")}) == 3
    single = ScenesSource("heldout", num_texts=1, frames=5, height=16, width=16, length=1)
    for source, clips in ((held_out(1), 32), (single, 1)):
        alone = evaluate.heldout_loss(pipe, source, tmp_path, 4, max_bad=0.0)
        assert alone.keys() == {"clips", "times", "true", "zeroed"} and alone["clips"] == clips
        assert np.abs(np.divide(alone["zeroed"], alone["true"]) - 1).max() > 1e-3


def test_a_clip_that_could_not_be_read_does_not_count(pipe, tmp_path):
    """The held-out loss is that of the others."""

    class Damaged(ScenesSource):
        bad = ()

        def load(self, item, rng):
            if item in self.bad:
                raise BadClipError(self.name(item), "damaged")
            return super().load(item, rng)

    sources = [Damaged("heldout", num_texts=2, frames=5, height=16, width=16, length=2) for _ in range(3)]
    sources[1].bad, sources[2].bad = [0], [1]
    found = [evaluate.heldout_loss(pipe, source, tmp_path, 2, max_bad=0.5) for source in sources]
    assert [each["clips"] for each in found] == [2, 1, 1]
    both, *alone = (each["true"] for each in found)
    np.testing.assert_allclose(np.mean(alone, axis=0), both, rtol=1e-5)
    assert np.abs(np.subtract(*alone)).max() > 1e-3 * np.max(both)
    sources[0].bad = [0, 1]
    with pytest.raises(RuntimeError, match="none of 2 held-out clips can be read: see .*quarantine.jsonl"):
        evaluate.heldout_loss(pipe, sources[0], tmp_path / "all", 2, max_bad=1.0)


def test_shares_and_intervals_count_only_prompts_that_asked():
    asked = [dict(size=True, all=True), dict(all=False), dict(size=False, all=True), dict(size=False, all=True)]
    assert shares(asked) == dict(size=pytest.approx(1 / 3), all=0.75)
    low, high, n = intervals(asked)["size"]
    assert n == 3 and low < 1 / 3 < high
    assert intervals(asked)["all"][2] == 4
