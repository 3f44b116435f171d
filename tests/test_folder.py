"""A folder of clips with captions, and how windows and pictures are cut: real files, and every way to get one wrong."""

import csv
import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from rise_jax.data.folder import FolderSource
from rise_jax.data.sources import BadClipError, Text, text_of, unique_texts
from rise_jax.data.transforms import clip_times, resize_cover
from rise_jax.video import write_png, write_video


def grays(count, height=32, width=48):
    """Frame n has level 4 n."""
    return np.broadcast_to((4 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def numbers(clip):
    """Which frame of `grays` each one is."""
    return [round(float(frame.mean()) / 4) for frame in clip]


def write_clip(path, count=20, fps=10):
    write_video(path, np.ascontiguousarray(grays(count)), fps)


def write_metadata(folder, rows, suffix="jsonl"):
    folder.mkdir(exist_ok=True)
    if suffix == "jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "metadata.jsonl").write_text(content, encoding="utf-8")
        return
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list({column: None for row in rows for column in row}))
        writer.writeheader()
        writer.writerows(rows)


def source(folder, **changes):
    return FolderSource(folder, **{"frames": 5, "height": 16, "width": 16, "fps": 10, "split": "train"} | changes)


def folder_of(tmp_path, count=1, **columns):
    """Clips 0.mp4, 1.mp4, ... with prompts 'clip 0', ... and further columns."""
    rows = [{"file_name": f"{n}.mp4", "prompt": f"clip {n}"} | columns for n in range(count)]
    write_metadata(tmp_path, rows)
    for row in rows:
        (tmp_path / row["file_name"]).touch()
    return tmp_path


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


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"prompt": "p"}, Text("p", None)),
        ({"caption": "c"}, Text("c", None)),
        ({"prompt": "p", "caption": "c"}, Text("p", "c")),
        ({"prompt": "p", "rephrased": "r"}, Text("p", "r")),
        ({"caption": "c", "rephrased": "r"}, Text("c", "r")),
        ({"prompt": "p", "caption": "c", "rephrased": "r"}, Text("p", "r")),
        ({"prompt": " ", "caption": " c ", "rephrased": " "}, Text("c", None)),
        ({"prompt": " ", "rephrased": "r"}, None),
        ({}, None),
    ],
)
def test_which_column_is_the_prompt_and_which_the_rephrasing(cells, text):
    assert text_of(cells) == text


def test_unique_texts_keep_their_first_place():
    texts, index = unique_texts([Text("b", None), Text("a", "x"), Text("b", None), Text("b", "x")])
    assert texts == [Text("b", None), Text("a", "x"), Text("b", "x")]
    assert index.tolist() == [0, 1, 0, 2]


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


# Clips


def test_a_window_is_drawn_from_the_clip_and_repeats_with_its_rng(tmp_path):
    write_clip(folder_of(tmp_path) / "0.mp4", count=20, fps=10)
    made = pickle.loads(pickle.dumps(source(tmp_path)))  # as a worker process gets it
    starts = set()
    for seed in range(60):
        sample = made.load(0, np.random.default_rng(seed))
        assert sample.video.shape == (5, 16, 16, 3)
        assert sample.video.dtype == np.uint8
        first = numbers(sample.video)[0]
        assert numbers(sample.video) == list(range(first, first + 5))
        np.testing.assert_array_equal(sample.video, made.load(0, np.random.default_rng(seed)).video)
        starts.add(first)
    assert min(starts) == 0
    assert max(starts) == 15
    assert numbers(made.load(0, None).video) == [7, 8, 9, 10, 11]


def test_frames_are_taken_at_the_rate_asked_for(tmp_path):
    write_clip(folder_of(tmp_path) / "0.mp4", count=40, fps=20)
    assert numbers(source(tmp_path, fps=5).load(0, None).video) == [11, 15, 19, 23, 27]
    assert numbers(source(tmp_path, fps=40).load(0, None).video) == [18, 18, 19, 19, 20]


def test_a_clip_that_is_too_short_holds_its_last_frame(tmp_path):
    write_clip(folder_of(tmp_path) / "0.mp4", count=3, fps=10)
    for rng in (None, np.random.default_rng(0)):
        assert numbers(source(tmp_path).load(0, rng).video) == [0, 1, 2, 2, 2]


def test_one_frame_of_a_clip_is_any_of_them(tmp_path):
    write_clip(folder_of(tmp_path) / "0.mp4", count=6, fps=10)
    made = source(tmp_path, frames=1)
    drawn = {numbers(made.load(0, np.random.default_rng(seed)).video)[0] for seed in range(60)}
    assert drawn == set(range(6))
    assert numbers(made.load(0, None).video) == [2]


def stills(tmp_path):
    write_metadata(tmp_path, [{"file_name": name, "prompt": name} for name in ("a.png", "b.webp", "c.gif", "d.mp4")])
    picture = np.full((20, 30, 3), 9, np.uint8)
    write_png(tmp_path / "a.png", picture)
    Image.fromarray(picture).save(tmp_path / "b.webp", lossless=True)
    later = Image.fromarray(picture + 90)
    Image.fromarray(picture).save(tmp_path / "c.gif", save_all=True, append_images=[later])
    write_clip(tmp_path / "d.mp4")
    return tmp_path


def test_stills_are_images(tmp_path):
    made = source(stills(tmp_path), frames=1)
    for item in range(len(made)):
        assert made.load(item, np.random.default_rng(0)).video.shape == (1, 16, 16, 3)


def test_stills_among_videos_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)2 of 4 clips are still .* 5 frames:.*: a.png\n.*: b.webp\nTake"):
        source(stills(tmp_path))


def test_clips_that_cannot_be_read_say_which_and_why(tmp_path):
    folder_of(tmp_path, 2, split="train")
    (tmp_path / "0.mp4").write_text("this is no video")
    made = source(tmp_path)
    (tmp_path / "1.mp4").unlink()
    for item, reason in ((0, "Invalid data"), (1, "No such file")):
        with pytest.raises(BadClipError, match=reason) as caught:
            made.load(item, None)
        assert caught.value.path == str(tmp_path / f"{item}.mp4")


def test_the_rate_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match=r"data.fps=0 must be above 0"):
        source(folder_of(tmp_path), fps=0)


# Times and pictures


def test_clip_times_stay_inside_and_reach_both_ends():
    rng = np.random.default_rng(0)
    times = np.array([clip_times(9.9, 10, 17, 8, rng) for _ in range(3000)])
    np.testing.assert_allclose(np.diff(times), 1 / 8, atol=1e-12)
    assert times.min() == 0
    assert 9.8 < times.max() <= 9.9 + 1e-9
    counts = np.bincount(np.round(times[:, 0] * 10).astype(int))
    assert len(counts) == 80  # 9.9 s less the window of 2 s, in frames of 0.1 s, both ends
    assert counts.min() > 10
    np.testing.assert_allclose(clip_times(9.9, 10, 17, 8, None), 3.9 + np.arange(17) / 8)


def test_clip_times_of_a_window_that_just_fits():
    for rate in (8, 23.976, 29.97, 30, 60):
        times = clip_times(16 / rate, rate, 17, rate, np.random.default_rng(0))
        np.testing.assert_allclose(times, np.arange(17) / rate)


@pytest.mark.parametrize("rate", [8, 23.976, 29.97, 30, 60])
def test_clip_times_count_the_windows_of_media_of_any_rate(rate):
    last = (16 + 6) / rate  # frames before the last one: 16 of the window and 6 to spare
    starts = {round(clip_times(last, rate, 17, rate, np.random.default_rng(n))[0] * rate) for n in range(80)}
    assert starts == set(range(7))
    np.testing.assert_allclose(clip_times(last, rate, 17, rate, None)[0], 3 / rate)


def test_resize_cover_crops_the_centre():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, :20], picture[:, 20:40], picture[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    wide, high = resize_cover(picture, 10, 10), resize_cover(picture.transpose(1, 0, 2), 7, 7)
    for middle in (wide[:, 1:-1], high[1:-1]):  # the outermost pixels may see a little of what is cut off
        np.testing.assert_array_equal(middle, np.broadcast_to([0, 255, 0], middle.shape))
    assert (wide[:, [0, -1], 1] > 220).all()
    assert (high[[0, -1], :, 1] > 220).all()


def test_resize_cover_keeps_a_picture_of_the_right_size_and_flips_with_it():
    picture = np.random.default_rng(0).integers(0, 256, (24, 36, 3)).astype(np.uint8)
    np.testing.assert_array_equal(resize_cover(picture, 24, 36), picture)
    flipped = resize_cover(np.ascontiguousarray(picture[::-1, ::-1]), 10, 9)
    assert np.abs(resize_cover(picture, 10, 9)[::-1, ::-1].astype(int) - flipped).max() <= 1


def test_resize_cover_averages_what_it_makes_smaller():
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert np.abs(resize_cover(checks, 8, 8).astype(int) - 127.5).max() <= 2
