"""The loader: the same batches whatever the start, process count or workers; bad clips set aside, never hidden."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from rise_jax.data.folder import FolderSource
from rise_jax.data.loader import make_loader
from rise_jax.data.scenes import ScenesSource
from rise_jax.data.sources import BadClipError, Sample, Text
from rise_jax.video import write_video


class Numbered:
    """Item n is a clip of level n with a random second pixel; the items in `bad` cannot be read."""

    shape = (2, 4, 4, 3)

    def __init__(self, count, bad=()):
        self.count, self.bad = count, set(bad)
        self.texts = [Text(str(item), None) for item in range(count)]

    def __len__(self):
        return self.count

    def name(self, item):
        return f"clip {item}"

    def load(self, item, rng):
        if item in self.bad:
            raise BadClipError(self.name(item), "is damaged")
        video = np.full(self.shape, item, np.uint8)
        video[:, 0, 1] = rng.integers(256, size=3)
        return Sample(video, item)


@pytest.fixture
def load(tmp_path):
    """load(source, ...) -> a loader with a quarantine file of its own."""

    def load(source, **changes):
        defaults = {"batch_size": 4, "seed": 3, "quarantine_file": tmp_path / "quarantine.jsonl"}
        return make_loader(source, **defaults | changes)

    return load


def take(loader, count):
    return list(itertools.islice(loader, count))


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for left, right in zip(one, other):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype
            np.testing.assert_array_equal(left[name], right[name])


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


# Clips that cannot be read


def test_a_bad_clip_is_an_empty_row_of_weight_0_and_is_listed_once(load, tmp_path):
    whole = joined(take(load(Numbered(10)), 10))
    got = joined(take(load(Numbered(10, bad=[2, 7]), max_bad=0.2), 10))
    bad = np.isin(whole["text"], [2, 7])
    assert bad.sum() == 8
    np.testing.assert_array_equal(got["weight"], np.where(bad, 0, 1))
    assert not got["video"][bad].any()
    assert not got["text"][bad].any()
    for name in got:
        np.testing.assert_array_equal(got[name][~bad], whole[name][~bad])
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    first = [int(np.flatnonzero(whole["text"] == item)[0]) for item in (2, 7)]
    expected = [{"path": f"clip {n}", "reason": "is damaged", "index": at} for n, at in zip((2, 7), first)]
    assert lines == sorted(expected, key=lambda line: line["index"])


def test_too_many_bad_clips_stop_the_run_and_say_how_to_go_on(load):
    with pytest.raises(RuntimeError) as caught:
        take(load(Numbered(50, bad=[2, 7, 9]), max_bad=0.05), 50)
    message = str(caught.value)
    assert "3 of 50 clips cannot be read, more than data.max_bad=0.05 allows" in message
    assert all(f"clip {item}: is damaged" in message for item in (2, 7, 9))
    assert "quarantine.jsonl" in message
    assert "data.max_bad=0.06" in message


def test_the_limit_named_when_a_run_stops_is_enough_to_go_on(load):
    with pytest.raises(RuntimeError) as caught:
        take(load(Numbered(30, bad=[3])), 30)
    named = float(str(caught.value).rsplit("data.max_bad=", 1)[1].rstrip("."))
    assert 1 / 30 <= named < 0.04
    take(load(Numbered(30, bad=[3]), max_bad=named), 30)


def test_one_bad_clip_of_few_is_above_the_default_rate(load):
    with pytest.raises(RuntimeError, match=r"1 of 5 clips .* data.max_bad=0.01 allows"):
        take(load(Numbered(5, bad=[3])), 5)


def test_a_batch_of_nothing_but_bad_clips_has_the_right_shape(load):
    batch = next(load(Numbered(2, bad=[0, 1]), max_bad=1.0))
    assert batch["video"].shape == (4, 2, 4, 4, 3)
    assert not batch["weight"].any()


def test_a_resumed_run_does_not_list_again_and_forgets_repaired_clips(load, tmp_path):
    take(load(Numbered(10, bad=[2]), max_bad=0.1), 5)
    listed = (tmp_path / "quarantine.jsonl").read_text()
    take(load(Numbered(10, bad=[2]), max_bad=0.1, start_step=5), 5)
    assert (tmp_path / "quarantine.jsonl").read_text() == listed
    take(load(Numbered(10, bad=[7]), max_bad=0.1), 5)  # 2 was repaired: 7 is the only one
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 2


def test_processes_count_together_and_write_files_of_their_own(load, tmp_path):
    source = Numbered(10, bad=range(4))
    for n in range(2):  # one process alone meets at most 3 of the 4 in the first epoch
        file = tmp_path / f"{n}.jsonl"
        take(load(source, rows=[2 * n, 2 * n + 1], max_bad=0.3, quarantine_file=file), 3)
    shares = [load(source, rows=[2 * n, 2 * n + 1], max_bad=0.3, process=n) for n in range(2)]
    together = (next(share) for _ in range(3) for share in shares)
    with pytest.raises(RuntimeError, match="4 of 10 clips"):
        list(together)
    files = [tmp_path / name for name in ("quarantine.jsonl", "quarantine-1.jsonl")]
    alone = [[json.loads(line)["path"] for line in file.read_text().splitlines()] for file in files]
    assert all(alone) and sorted(alone[0] + alone[1]) == sorted({*alone[0], *alone[1]})


@pytest.mark.slow
def test_a_full_disk_is_told_when_a_clip_is_set_aside(tmp_path):
    code = """
import resource, sys
sys.path.insert(0, "tests")
from test_loader import Numbered, take
from rise_jax.data.loader import make_loader
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    take(make_loader(Numbered(4, [1]), batch_size=4, seed=0, max_bad=1.0, quarantine_file=sys.argv[1]), 1)
except OSError as error:
    print("told:", error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "quarantine.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"told: [Errno 27] cannot write {tmp_path}/quarantine.jsonl: File too large" in done.stdout
    assert not (tmp_path / "quarantine.jsonl").read_text(), "no half line"


def test_an_unwritable_quarantine_is_told_with_its_path(load):
    with pytest.raises(OSError, match="cannot write /sys/rise_jax_test/quarantine.jsonl: "):
        next(load(Numbered(4, bad=[1]), max_bad=1.0, quarantine_file="/sys/rise_jax_test/quarantine.jsonl"))


def test_an_error_that_is_no_bad_clip_is_not_swallowed(load):
    class Wrong(Numbered):
        def load(self, item, rng):
            raise KeyError("a mistake of ours")

    with pytest.raises(KeyError, match="a mistake of ours"):
        next(load(Wrong(4)))


# Real files, read by several threads


@pytest.mark.slow
def test_a_folder_with_damaged_files(load, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        write_video(tmp_path / f"{number}.mp4", rng.integers(0, 256, (12, 32, 32, 3)).astype(np.uint8), fps=8)
        rows.append({"file_name": f"{number}.mp4", "prompt": f"clip {number}", "split": "train"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "3.mp4").write_bytes((tmp_path / "3.mp4").read_bytes()[:-3000])
    (tmp_path / "5.mp4").write_text("not a video")
    source = FolderSource(tmp_path, frames=5, height=16, width=16, fps=8)
    with pytest.raises(RuntimeError, match=r"of 12 clips .* data.max_bad=0.01"):
        take(load(source), 6)
    got = take(load(source, max_bad=0.2), 9)
    assert_same(got[4:], take(load(source, max_bad=0.2, start_step=4), 5))
    got = joined(got)
    assert (got["weight"] == 0).sum() == 6
    assert set(got["text"][got["weight"] == 1].tolist()) == set(range(12)) - {3, 5}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {line["path"] for line in lines} == {str(tmp_path / "3.mp4"), str(tmp_path / "5.mp4")}


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
