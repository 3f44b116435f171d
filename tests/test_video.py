"""Media in and out: real files, made here by Pillow and ffmpeg, some damaged by hand."""

import errno
import io
import struct
import subprocess
import sys
from fractions import Fraction

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rise_jax import video
from rise_jax.video import (
    MediaError,
    contact_sheet,
    frames_at,
    is_still,
    open_media,
    read_video,
    write_png,
    write_video,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
QUARTERS = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(16, 0).repeat(16, 1)  # one colour per corner


def flat(colours, height=32, width=48):
    """Frames of one colour each."""
    return np.broadcast_to(np.array(colours, np.uint8)[:, None, None], (len(colours), height, width, 3)).copy()


def grays(count):
    """Frame n has level 4 n."""
    return flat([(4 * n,) * 3 for n in range(count)])


def numbers(frames):
    """Which frame of `grays` each one is."""
    return [round(float(np.mean(frame)) / 4) for frame in frames]


def encode(path, frames, rate=10, codec="libx264", milliseconds=None, container=None, **options):
    """A file of ffmpeg's own making; with `milliseconds`, the time of each frame."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate, options={name: str(value) for name, value in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = milliseconds[number] if milliseconds else round(1000 * number / rate)
            frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def read_at(path, times):
    with open_media(path) as reader:
        return numbers(frames_at(reader, np.array(times)))


def test_to_uint8_inverts_to_float_and_clips():
    every = np.arange(256, dtype=np.uint8)
    for array in (every, jnp.asarray(every)):
        as_float = video.to_float(array)
        assert as_float.dtype == np.float32
        assert (float(as_float[0]), float(as_float[255])) == (-1.0, 1.0)
        np.testing.assert_array_equal(video.to_uint8(as_float), every)
    np.testing.assert_array_equal(video.to_uint8(np.array([-9.0, 9.0])), [0, 255])


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 48), (32, 47), (35, 37)])
def test_mp4_keeps_frames_rate_and_colours(tmp_path, height, width):
    frames = flat([RED, GREEN, BLUE, WHITE, BLACK], height, width)
    write_video(tmp_path / "new" / "clip.mp4", frames, fps=12.5)
    back, fps = read_video(tmp_path / "new" / "clip.mp4")
    assert back.shape == (5, height + height % 2, width + width % 2, 3)
    assert fps == 12.5
    assert np.abs(back.astype(int) - flat([RED, GREEN, BLUE, WHITE, BLACK], *back.shape[1:3])).max() <= 4
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["clip.mp4"]
    with av.open(str(tmp_path / "new" / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_mp4_of_a_moving_wave_is_nearly_lossless(tmp_path):
    time, rows, columns = np.mgrid[0:9, 0:64, 0:64]
    wave = 127.5 + 127.5 * np.sin(rows / 9 + columns / 7 + time / 3)
    frames = wave.round().astype(np.uint8)[..., None].repeat(3, axis=3)
    write_video(tmp_path / "wave.mp4", frames, fps=8)
    assert np.abs(read_video(tmp_path / "wave.mp4")[0].astype(int) - frames).mean() < 2


def test_one_frame_is_a_video(tmp_path):
    write_video(tmp_path / "one.mp4", flat([RED]), fps=8)
    assert read_video(tmp_path / "one.mp4")[0].shape == (1, 32, 48, 3)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 8, 8, 3), float), ((8, 8, 3), "uint8"), ((0, 8, 8, 3), "uint8")])
def test_writing_what_is_no_video_is_refused_with_its_shape(tmp_path, shape, dtype):
    array = np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=rf"uint8 \[T, H, W, 3\], got {array.dtype} \[{array.shape[0]}, "):
        write_video(tmp_path / "no.mp4", array, fps=8)


def test_png_is_exact(tmp_path):
    write_png(tmp_path / "a.png", QUARTERS)
    np.testing.assert_array_equal(read_video(tmp_path / "a.png")[0], QUARTERS[None])


def test_webm_is_read(tmp_path):
    back, fps = read_video(encode(tmp_path / "a.webm", grays(12), codec="libvpx-vp9"))
    assert numbers(back) == list(range(12))
    assert fps == 10


def test_a_webm_that_says_no_length_is_measured_by_its_packets(tmp_path):
    path = encode(tmp_path / "live.webm", grays(30), codec="libvpx-vp9", container={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    with open_media(path) as reader:
        assert reader.last == pytest.approx(2.9, abs=2e-3)
        assert numbers(frames_at(reader, np.array([0.0, 1.5, 2.9]))) == [0, 15, 29]


def test_gif_frames_of_a_palette_are_composed(tmp_path):
    frames = [Image.fromarray(picture).convert("P", palette=Image.Palette.ADAPTIVE) for picture in flat([RED, RED])]
    frames[1] = Image.new("RGB", (48, 32), RED)
    frames[1].paste(BLUE, (4, 6, 12, 10))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=[frames[1]], duration=[40, 120], disposal=1)
    with Image.open(tmp_path / "a.gif") as stored:  # the second frame is stored as the part that differs
        stored.seek(1)
        assert stored.tile[0][1] == (4, 6, 12, 10)
    expected = flat([RED, RED])
    expected[1, 6:10, 4:12] = BLUE
    back, fps = read_video(tmp_path / "a.gif")
    np.testing.assert_array_equal(back, expected)
    assert fps == pytest.approx(2 / 0.16)


def test_animated_webp_is_exact_and_keeps_its_times(tmp_path):
    frames = [Image.fromarray(picture) for picture in grays(4)]
    times = {"duration": [100, 100, 300, 100]}
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, **times)
    np.testing.assert_array_equal(read_video(tmp_path / "a.webp")[0], grays(4))
    assert read_at(tmp_path / "a.webp", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == [0, 1, 2, 2, 2, 3, 3]


def test_transparency_is_laid_on_black(tmp_path):
    rgba = Image.new("RGBA", (8, 8), (200, 100, 50, 51))  # a fifth
    rgba.save(tmp_path / "a.png")
    rgba.save(tmp_path / "a.webp", lossless=True, exact=True)
    for name in ("a.png", "a.webp"):
        np.testing.assert_array_equal(read_video(tmp_path / name)[0][0, 0, 0], (40, 20, 10))
    Image.new("P", (8, 8), 0).save(tmp_path / "a.gif", transparency=0)
    assert not read_video(tmp_path / "a.gif")[0].any()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 77, 77), ("LA", (100, 51), 20), ("1", 1, 255), ("I;16", 77 * 256 + 200, 77)],
)
def test_gray_pictures_become_rgb(tmp_path, mode, colour, expected):
    if mode == "I;16":
        Image.fromarray(np.full((8, 8), colour, np.uint16)).save(tmp_path / "a.png")
    else:
        Image.new(mode, (8, 8), colour).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_video(tmp_path / "a.png")[0], np.full((1, 8, 8, 3), expected))


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert np.abs(read_video(tmp_path / "a.jpg")[0].astype(int) - RED).max() <= 4


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left: the first row of the file is the right column of the photo
    Image.fromarray(np.rot90(QUARTERS)).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    assert np.abs(read_video(tmp_path / f"a.{suffix}")[0][0, ::31, ::31].astype(int) - QUARTERS[::31, ::31]).max() < 60


def test_the_rotation_of_a_phone_clip_is_applied(tmp_path):
    content = encode(tmp_path / "a.mp4", np.rot90(QUARTERS)[None].repeat(5, 0)).read_bytes()
    header = content.index(b"tkhd") + 4  # ISO 14496-12, 8.3.2: version 0 has its matrix at byte 40
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)  # a quarter turn to the right
    assert content[header] == 0
    (tmp_path / "b.mp4").write_bytes(content[: header + 40] + matrix + content[header + 76 :])
    corners = read_video(tmp_path / "b.mp4")[0][0, 4::23, 4::23].astype(int)
    assert np.abs(corners - QUARTERS[4::23, 4::23]).max() < 60


def test_a_jpeg_with_a_second_picture_for_depth_is_one_photo(tmp_path):
    Image.new("RGB", (16, 16), RED).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), BLUE)]
    )
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.n_frames == 2
    assert read_video(tmp_path / "a.jpg")[0].shape[0] == 1


def test_media_is_told_by_content_not_by_suffix(tmp_path):
    encode(tmp_path / "a.mp4", grays(3)).rename(tmp_path / "a.gif")
    assert numbers(read_video(tmp_path / "a.gif")[0]) == [0, 1, 2]
    assert numbers(read_video((tmp_path / "a.gif").read_bytes())[0]) == [0, 1, 2]


def test_is_still(tmp_path):
    frames = [Image.fromarray(picture) for picture in flat([RED, BLUE])]
    for suffix in ("gif", "webp"):
        frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / f"still.{suffix}")
        (tmp_path / f"broken.{suffix}").write_bytes(b"GIF89a")
        assert [is_still(tmp_path / f"{name}.{suffix}") for name in ("moving", "still", "broken")] == [0, 1, 0]
    assert is_still("any.PNG")
    assert not is_still("any.mp4")


def test_frames_are_those_shown_at_the_time(tmp_path):
    path = encode(tmp_path / "a.mp4", grays(20), rate=10)
    assert read_at(path, np.arange(5) / 10) == [0, 1, 2, 3, 4]  # its own rate
    assert read_at(path, 0.3 + np.arange(4) / 5) == [3, 5, 7, 9]  # half of it
    assert read_at(path, np.arange(5) / 20) == [0, 0, 1, 1, 2]  # twice
    assert read_at(path, [1.7, 1.9, 2.1, 9.0]) == [17, 19, 19, 19]  # past the end


def test_frames_of_an_uneven_clip_are_those_shown_at_the_time(tmp_path):
    path = encode(tmp_path / "a.mp4", grays(5), milliseconds=[0, 100, 700, 800, 1000])
    assert read_at(path, [0.0, 0.3, 0.5, 0.75, 0.9, 1.0]) == [0, 1, 1, 2, 3, 4]


def test_a_long_last_frame_is_no_damage(tmp_path):
    path = encode(tmp_path / "a.mp4", grays(12), milliseconds=[*range(0, 1000, 100), 5000, 9000])
    assert read_at(path, [0.5, 4.0, 5.0, 8.9, 9.0]) == [5, 9, 10, 10, 11]


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_every_start_finds_the_same_frames_as_reading_from_the_front(tmp_path, suffix, codec):
    path = encode(tmp_path / f"a.{suffix}", grays(60), codec=codec, g=12)
    for start in range(60):
        assert read_at(path, [start / 10]) == [start]


def test_a_late_window_does_not_read_the_front(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3)).astype(np.uint8)
    noise[80:] = 128
    path = encode(tmp_path / "a.mp4", noise, g=10, bf=0, crf=30)
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin : begin + len(content) // 2] = bytes(len(content) // 2)  # the front half cannot be decoded
    (tmp_path / "b.mp4").write_bytes(content)
    with open_media(tmp_path / "b.mp4") as reader:
        late = list(frames_at(reader, np.array([8.5, 9.5])))
    assert np.abs(np.array(late).astype(int) - 128).max() <= 4
    with open_media(tmp_path / "b.mp4") as reader, pytest.raises(MediaError):
        list(frames_at(reader, np.array([0.0, 9.5])))


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


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("webm", "libvpx-vp9")])
def test_times_count_from_the_first_frame(tmp_path, suffix, codec):
    path = encode(tmp_path / f"a.{suffix}", grays(30), codec=codec, milliseconds=[*range(3000, 6000, 100)], g=5)
    assert read_at(path, [0.0, 0.5, 1.5, 2.9]) == [0, 5, 15, 29]
    assert read_at(path, [2.0, 2.5]) == [20, 25]


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


def test_contact_sheet_shows_evenly_spaced_frames_enlarged_without_blur():
    clip = np.random.default_rng(0).integers(0, 256, (11, 24, 20, 3)).astype(np.uint8)
    sheet = contact_sheet([clip, QUARTERS[None]], ["a prompt", "another"], ["long", None], columns=3)
    margin, factor = 8, 4  # 24 pixels -> 96
    for column, frame in enumerate(clip[[0, 5, 10]]):
        left = margin + column * (20 * factor + 2)
        shown = sheet[margin : margin + 96, left : left + 20 * factor]
        np.testing.assert_array_equal(shown, frame.repeat(factor, 0).repeat(factor, 1))
    second = sheet[2 * margin + 96 : 2 * margin + 192, margin : margin + 96]
    np.testing.assert_array_equal(second, QUARTERS.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("fonts", [video._FONTS, ()])
def test_contact_sheet_has_accents_and_wraps(monkeypatch, fonts):
    monkeypatch.setattr(video, "_FONTS", fonts)
    letters = "enuaéñüçßàäöê¿"
    pictures = {contact_sheet([QUARTERS[None]], [letter], [None]).tobytes() for letter in letters}
    assert len(pictures) == len(letters)  # a missing letter would look like every other missing one
    sheet = contact_sheet([QUARTERS[None]], ["many words " * 40], ["x" * 500])
    assert sheet.shape[0] > 200
    assert (sheet[:, -4:] == 255).all()
    contact_sheet([QUARTERS[None]], ["跑步的狗 🐕"], [None])


def test_contact_sheet_refuses_unequal_lists():
    with pytest.raises(ValueError, match="1 videos, 2 prompts, 1 rephrasings"):
        contact_sheet([QUARTERS[None]], ["a", "b"], [None])
