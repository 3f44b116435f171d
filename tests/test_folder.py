"""A folder of clips with captions: how its files and splits are read, and every way to get one wrong."""

import logging

import pytest
from folders import folder_of, source, write_metadata

from rise_jax.data.open import open_source
from rise_jax.data.sources import Text

# Captions


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_both_formats_read_the_same(tmp_path, suffix):
    rows = [
        {"file_name": "a.mp4", "prompt": 'perro, "rápido"', "rephrased": "a dog\nruns", "split": "train"},
        {"file_name": "sub/b.webm", "prompt": "猫", "rephrased": "", "split": "train"},
        {"file_name": "c.gif", "prompt": 'perro, "rápido"', "rephrased": "a dog\nruns", "split": "train"},
    ]
    write_metadata(tmp_path, rows, suffix)
    (tmp_path / "sub").mkdir()
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    made = source(tmp_path)
    assert made.files == ["a.mp4", "sub/b.webm", "c.gif"]
    assert made.texts == [Text('perro, "rápido"', "a dog\nruns"), Text("猫", None)]
    assert made._text.tolist() == [0, 1, 0]
    assert made.name(1) == str(tmp_path / "sub/b.webm")


def broken(tmp_path, rows, error, match, suffix="jsonl", files=("a.mp4", "b.mp4")):
    write_metadata(tmp_path, rows, suffix)
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(error, match=match):
        source(tmp_path)


GOOD = {"file_name": "a.mp4", "prompt": "one"}


def test_all_missing_clips_are_named_with_the_nearest_file(tmp_path):
    rows = [GOOD, {"file_name": "beach_o1.mp4", "prompt": "x"}, {"file_name": "zzz.mp4", "prompt": "y"}]
    match = r"(?s)2 of 3 clips are missing.*line 2: beach_o1.mp4 \(nearest: beach_01.mp4\).*line 3: zzz.mp4$"
    broken(tmp_path, rows, FileNotFoundError, match, files=("a.mp4", "beach_01.mp4"))


def test_of_many_missing_clips_a_hundred_are_named(tmp_path):
    rows = [GOOD, *({"file_name": f"z{number}.mp4", "prompt": "x"} for number in range(130))]
    match = r"(?s)130 of 131 clips are missing.*line 101: z99.mp4\n  and 30 more$"
    broken(tmp_path, rows, FileNotFoundError, match, files=("a.mp4",))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_unknown_column_is_named_with_the_nearest_one(tmp_path, suffix):
    rows = [{"file_name": "a.mp4", "promt": "one"}]
    match = rf"metadata.{suffix} line [12]: unknown column 'promt' \(nearest: prompt\)"
    broken(tmp_path, rows, ValueError, match, suffix)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_empty_caption_is_named_with_its_row(tmp_path, suffix):
    rows = [GOOD, {"file_name": "b.mp4", "prompt": "  "}]
    broken(tmp_path, rows, ValueError, rf"line {2 + (suffix == 'csv')}: no text in prompt or caption of b.mp4", suffix)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "x"}, "line 2 has no file_name"),
        (GOOD | {"prompt": 3}, "line 2: prompt is 3, not text"),
        (GOOD, r"line 2: a.mp4 again, after .*line 1; one row per clip"),
        (GOOD | {"file_name": "./a.mp4"}, "line 2: ./a.mp4 again"),
        (GOOD | {"file_name": "b.mp4", "split": "heldut"}, r"split is 'heldut' \(nearest: heldout\)"),
        (GOOD | {"file_name": "b.mp4", "split": "train"}, "line 1 has no split; 1 of 2 rows have one"),
        (["a.mp4"], "line 2 is no JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, match):
    broken(tmp_path, [GOOD, row], ValueError, match)


def test_a_line_that_is_no_json_is_named(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.mp4", "prompt": "x"}\n\n{"file_name"\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl line 3 is not JSON"):
        source(tmp_path)


def test_a_column_given_twice_is_named(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.csv").write_text("file_name,prompt,prompt\na.mp4,one,two\n")
    with pytest.raises(ValueError, match=r"metadata.csv line 1 has 'prompt' twice"):
        source(tmp_path)


def test_a_key_given_twice_is_named(tmp_path):
    folder_of(tmp_path)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "a.mp4", "prompt": "one", "file_name": "0.mp4"}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl line 3 has 'file_name' twice"):
        source(tmp_path)


def test_a_comma_outside_quotes_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,prompt\na.mp4,a dog, running\n")
    with pytest.raises(ValueError, match=r"metadata.csv line 2 has more cells than the header; quote"):
        source(tmp_path)


@pytest.mark.parametrize("content", ["", "file_name,prompt\n"])
def test_a_caption_file_without_rows_is_refused(tmp_path, content):
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(ValueError, match=r"metadata.csv has no rows"):
        source(tmp_path)


def test_a_caption_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "metadata.csv").write_bytes("file_name,prompt\na.mp4,niño\n".encode("latin-1"))
    with pytest.raises(ValueError, match="metadata.csv cannot be read: .*utf-8"):
        source(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,prompt\r\na.mp4,one\r\n", encoding="utf-8-sig")
    (tmp_path / "a.mp4").touch()
    assert source(tmp_path).texts == [Text("one", None)]


def test_no_folder_no_caption_file_and_two_of_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        source(tmp_path / "nowhere")
    (tmp_path / "metadata.json").touch()
    with pytest.raises(FileNotFoundError, match=r"no metadata.jsonl or metadata.csv \(nearest: metadata.json\)"):
        source(tmp_path)
    folder_of(tmp_path)
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(ValueError, match=r"both metadata.jsonl and metadata.csv"):
        source(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path):
    rows = [GOOD, {"file_name": "b.avi", "prompt": "x"}]
    broken(tmp_path, rows, ValueError, r"(?s)1 of 2 files are not of \.mp4, .*line 2: b.avi", files=("a.mp4", "b.avi"))


def test_clips_without_a_row_are_reported(tmp_path, caplog):
    folder_of(tmp_path)
    (tmp_path / "left.webm").touch()
    with caplog.at_level(logging.WARNING):
        source(tmp_path)
    assert "1 clips have no row" in caplog.text
    assert "left.webm" in caplog.text


# Splits


def test_splits_by_column(tmp_path):
    rows = [{"file_name": f"{n}.mp4", "prompt": str(n), "split": ("train", "heldout")[n % 2]} for n in range(5)]
    write_metadata(tmp_path, rows)
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    assert source(tmp_path).files == ["0.mp4", "2.mp4", "4.mp4"]
    assert source(tmp_path, split="heldout").texts == [Text("1", None), Text("3", None)]


@pytest.mark.parametrize("count", [2, 3, 10, 2000])
def test_splits_by_hash_share_all_clips_and_hold_out_about_a_twentieth(tmp_path, count):
    folder_of(tmp_path, count)
    train, held_out = (source(tmp_path, split=split).files for split in ("train", "heldout"))
    assert sorted(train + held_out) == sorted(f"{n}.mp4" for n in range(count))
    assert 1 <= len(held_out) < len(train) or count == 2
    assert 0.035 < len(held_out) / count < 0.065 or count < 2000


def test_splits_by_hash_do_not_depend_on_order_or_on_new_clips(tmp_path):
    held_out = set(source(folder_of(tmp_path, 300), split="heldout").files)
    write_metadata(tmp_path, [{"file_name": f"{n}.mp4", "prompt": "x"} for n in reversed(range(200))])
    assert set(source(tmp_path, split="heldout").files) == {f for f in held_out if int(f.split(".")[0]) < 200}


def test_an_empty_split_says_what_to_do(tmp_path):
    assert len(source(folder_of(tmp_path, 1))) == 1
    with pytest.raises(ValueError, match="none of 1 clips is in split 'heldout'; one clip cannot serve both"):
        source(tmp_path, split="heldout")
    folder_of(tmp_path, 3, split="train")
    with pytest.raises(ValueError, match="give some of them split=heldout"):
        source(tmp_path, split="heldout")
    with pytest.raises(ValueError, match="'test' is unknown; a folder has train and heldout"):
        source(tmp_path, split="test")


def test_a_folder_without_a_path_is_not_the_one_at_hand(tmp_path, monkeypatch):
    write_metadata(tmp_path, [GOOD])
    (tmp_path / "a.mp4").touch()
    monkeypatch.chdir(tmp_path)
    given = dict(split="train", frames=1, height=16, width=16, fps=8.0, texts=0, seed=0)
    with pytest.raises(ValueError, match="data.path='' names no folder; nearest: '.'"):
        open_source("folder", path="", **given)
    assert len(open_source("folder", path=".", **given)) == 1
