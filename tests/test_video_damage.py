"""Media that cannot be read or written: files damaged by hand, and a disk that refuses."""

import errno
import io
import subprocess
import sys

import av
import numpy as np
import pytest
from media import QUARTERS, RED, encode, flat, grays, read_at
from PIL import Image

from rise_jax.video import MediaError, read_video, write_png, write_video


def damaged(tmp_path, name):
    whole = encode(tmp_path / "whole.mp4", np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3)).astype(np.uint8))
    front = encode(tmp_path / "front.mp4", grays(30), container={"movflags": "faststart"})
    webm = encode(tmp_path / "whole.webm", grays(40), codec="libvpx-vp9")
    png, gif = io.BytesIO(), io.BytesIO()
    Image.fromarray(QUARTERS).save(png, "png")
    Image.fromarray(QUARTERS).save(gif, "gif", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    content = {
        "no index.mp4": whole.read_bytes()[:-2000],
        "cut short.mp4": front.read_bytes()[:-400],
        "cut short.webm": webm.read_bytes()[: webm.stat().st_size // 2],
        "text.mp4": b"this is no video at all",
        "empty.mp4": b"",
        "cut.png": png.getvalue()[:60],
        "bent.png": png.getvalue()[:20] + b"\xff\xff" + png.getvalue()[22:],
        "cut.gif": gif.getvalue()[:40],
    }[name]
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


DAMAGED = ["no index.mp4", "cut short.mp4", "cut short.webm", "text.mp4", "empty.mp4", "cut.png", "bent.png", "cut.gif"]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_media_gives_a_reason(tmp_path, name):
    with pytest.raises(MediaError) as caught:
        read_video(damaged(tmp_path, name))
    assert len(str(caught.value)) > 15


def test_a_file_cut_short_says_where_it_ends(tmp_path):
    with pytest.raises(MediaError, match=r"ends at [\d.]+ s, but its header says 4.00 s"):
        read_video(damaged(tmp_path, "cut short.webm"))


def test_a_picture_that_ffmpeg_had_to_make_up_is_damage(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    path = encode(tmp_path / "a.mp4", noise, bf=0, g=50, crf=35)
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux() if packet.size][10]
        start, end = packet.pos + packet.size // 2, packet.pos + packet.size
    content = bytearray(path.read_bytes())
    content[start:end] = b"\xff" * (end - start)
    path.write_bytes(content)
    assert len(read_at(path, np.arange(9) / 10)) == 9  # what comes before it is sound
    with pytest.raises(MediaError, match=r"is damaged at 1.00 s"):
        read_video(path)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("aac", 44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(MediaError, match="no video"):
        read_video(tmp_path / "a.mp4")


def test_a_missing_file_is_an_os_error_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        read_video(tmp_path / "nowhere.mp4")


def test_an_unwritable_folder_is_an_os_error_with_path_and_reason():
    with pytest.raises(OSError, match=r"cannot write \d+ bytes: .*'/sys/rise_jax_test/a.mp4'"):
        write_video("/sys/rise_jax_test/a.mp4", flat([RED]), fps=8)


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    write_png(tmp_path / "a.png", QUARTERS)
    code = f"""
import errno, resource, numpy as np
from rise_jax.video import write_png
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
try:
    write_png({str(tmp_path / "a.png")!r}, noise)
except OSError as error:
    print(error.errno, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(errno.EFBIG))
    assert "cannot write" in done.stdout
    assert str(tmp_path / "a.png") in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(read_video(tmp_path / "a.png")[0][0], QUARTERS)
