"""Media in and out: real files, made here by Pillow and ffmpeg."""

import struct

import av
import jax.numpy as jnp
import numpy as np
import pytest
from media import BLACK, BLUE, GREEN, QUARTERS, RED, WHITE, encode, flat, grays, numbers, read_at
from PIL import Image

from rise_jax import video
from rise_jax.video import frames_at, is_still, open_media, read_video, write_png, write_video


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
