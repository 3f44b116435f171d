"""The list of clips that could not be read, as a later start finds it."""

import json

import pytest

from rise_jax.data.loader import Quarantine, quarantined


def listed(file):
    return [json.loads(line)["path"] for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_paths_and_reasons_may_hold_any_line_separator_of_unicode(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    for _ in range(2):
        quarantine = Quarantine(file, clips=2, max_bad=1.0)
        quarantine.add("one\u2028clip.mp4", "is\x85damaged", 0)
    assert listed(file) == ["one\u2028clip.mp4"]
    assert list(quarantine.earlier) == ["one\u2028clip.mp4"]


def test_a_line_that_is_not_finished_is_none_yet(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    Quarantine(file, clips=2, max_bad=1.0).add("a.mp4", "is damaged", 0)
    with file.open("a") as other:
        other.write('{"path": "b.mp4", "rea')
    assert list(Quarantine(file, clips=2, max_bad=1.0).earlier) == ["a.mp4"]


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[]", b'{"path": "a"}'])
def test_a_damaged_line_is_told_with_its_file(tmp_path, line):
    (tmp_path / "quarantine-1.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="quarantine-1.jsonl is damaged .*: remove it, and clips"):
        quarantined(tmp_path / "quarantine.jsonl")
