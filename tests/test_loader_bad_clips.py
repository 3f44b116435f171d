"""Clips that cannot be read: set aside, counted and named, never hidden."""

import json
import subprocess
import sys

import numpy as np
import pytest
from numbered import Numbered, assert_same, joined, take

from rise_jax.data.folder import FolderSource
from rise_jax.video import write_video


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
from numbered import Numbered, take
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
