"""The loader: the same batches whatever the start, process count or workers."""

import contextlib
import time

import numpy as np
import pytest
from numbered import Numbered, assert_same, joined, take

from rise_jax.data import loader
from rise_jax.data.scenes import ScenesSource


def test_a_batch_has_the_fields_promised(load):
    batch = next(load(Numbered(10)))
    kinds = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert kinds == {
        "video": ("uint8", (4, 2, 4, 4, 3)),
        "text": ("int32", (4,)),
        "index": ("int64", (4,)),
        "weight": ("float32", (4,)),
    }
    assert (batch["weight"] == 1).all()
    np.testing.assert_array_equal(batch["video"][:, 0, 2, 2, 0], batch["text"])


@pytest.mark.parametrize(("clips", "batch_size"), [(10, 4), (3, 8), (8, 4), (1, 2), (10, 1), (2, 1), (1, 1)])
def test_every_epoch_shows_every_clip_once_across_batch_edges(load, clips, batch_size):
    epochs = 6
    got = joined(take(load(Numbered(clips), batch_size=batch_size), -(-epochs * clips // batch_size)))
    np.testing.assert_array_equal(got["index"], np.arange(len(got["index"])))
    orders = got["text"][: epochs * clips].reshape(epochs, clips)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(clips), (epochs, 1)))
    assert clips < 8 or len({tuple(order) for order in orders}) == epochs  # a new order every epoch


def test_what_varies_in_a_clip_is_new_every_epoch(load):
    got = joined(take(load(Numbered(5), batch_size=5), 8))
    drawn = got["video"][got["text"] == 2][:, 0, 0, 1]
    assert len(drawn) == 8
    assert len(np.unique(drawn, axis=0)) == 8


def test_the_seed_decides_everything(load):
    assert_same(take(load(Numbered(10)), 6), take(load(Numbered(10)), 6))
    other = joined(take(load(Numbered(10), seed=4), 6))
    assert (joined(take(load(Numbered(10)), 6))["text"] != other["text"]).any()


@pytest.mark.parametrize("start", [1, 2, 3, 5, 7])
def test_any_step_can_be_the_first(load, start):
    """10 clips in batches of 4: the epochs end inside batches 2 and 7 and at the end of batch 4."""
    assert_same(take(load(Numbered(10)), 9)[start:], take(load(Numbered(10), start_step=start), 9 - start))


@pytest.mark.parametrize("batch_size", [4, 1])
def test_a_late_start_does_not_replay(load, batch_size):
    step = 10**9
    batch = next(load(Numbered(10), start_step=step, batch_size=batch_size))
    np.testing.assert_array_equal(batch["index"], batch_size * step + np.arange(batch_size))


@pytest.mark.parametrize("clips", [10, 3, 1])
def test_batches_of_one_are_the_rows_of_larger_ones(load, clips):
    """From the first step and from a later one."""
    whole, single = (joined(take(load(Numbered(clips), batch_size=size), 24 // size)) for size in (4, 1))
    assert_same([whole], [single])
    late = joined(take(load(Numbered(clips), batch_size=1, start_step=9), 15))
    assert_same([{name: value[9:] for name, value in whole.items()}], [late])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_split_the_rows_of_the_same_batches(load, processes):
    whole = take(load(Numbered(10)), 7)
    shares = [take(load(Numbered(10), rows=rows), 7) for rows in np.split(np.arange(4), processes)]
    assert all(len(batch["index"]) == 4 // processes for share in shares for batch in share)
    assert_same(whole, [joined(rows) for rows in zip(*shares)])


def test_a_process_may_load_rows_that_are_not_neighbours(load):
    whole, part = (take(load(Numbered(10), rows=rows), 7) for rows in (None, [0, 3]))
    assert_same([{name: value[[0, 3]] for name, value in batch.items()} for batch in whole], part)


@pytest.mark.slow
def test_worker_processes_change_nothing(load, tmp_path):
    whole = take(load(Numbered(10, bad=[7]), max_bad=0.5), 5)
    workers = load(Numbered(10, bad=[7]), max_bad=0.5, workers=2, quarantine_file=tmp_path / "workers.jsonl")
    assert_same(whole, take(workers, 5))
    assert (tmp_path / "workers.jsonl").read_text() == (tmp_path / "quarantine.jsonl").read_text()


def test_scenes_load(load):
    source = ScenesSource(num_texts=6, frames=5, height=32, width=32)
    batch = next(load(source))
    assert batch["video"].shape == (4, *source.shape)
    assert batch["video"].any()
    assert_same(take(load(source), 3)[2:], take(load(source, start_step=2), 1))


# Values out of range


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"rows": []}, r"rows=\[\] must be ascending numbers in \[0, 4\), at least one"),
        ({"rows": [1, 4]}, r"rows=\[1, 4\] must be"),
        ({"rows": [-1, 2]}, r"rows=\[-1, 2\] must be"),
        ({"rows": [2, 2]}, r"rows=\[2, 2\] must be"),
        ({"seed": -1}, r"seed=-1 is outside .*; nearest valid value: 0"),
        ({"seed": 2**32}, f"nearest valid value: {2**32 - 1}"),
        ({"start_step": -1}, "start_step=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"max_bad": 1.5}, r"max_bad=1.5 is outside \[0, 1\]; nearest valid value: 1"),
    ],
)
def test_values_out_of_range_are_refused_at_once(load, changes, match):
    with pytest.raises(ValueError, match=match):
        load(Numbered(10), **changes)


def test_an_empty_source_is_refused(load):
    with pytest.raises(ValueError, match="at least 1 clip"):
        load(Numbered(0))


def test_what_is_loaded_ahead_is_bounded_by_memory(load, monkeypatch):
    """By default as many batches as there are threads; of large clips two."""
    monkeypatch.setattr(loader.os, "cpu_count", lambda: 12)

    class Counted(Numbered):
        loaded = 0

        def load(self, item, rng):
            self.loaded += 1
            return super().load(item, rng)

    def ahead():
        source = Counted(40)
        with contextlib.closing(load(source, batch_size=1)) as batches:
            next(batches)
            before = -1
            while before < source.loaded:
                before = source.loaded
                time.sleep(0.3)
        return source.loaded

    assert ahead() >= 12
    monkeypatch.setattr(loader, "AHEAD", 100)
    assert ahead() <= 4
