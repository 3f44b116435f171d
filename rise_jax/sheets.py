"""Pictures of many videos with their texts: one run's in rows, or several runs' side by side."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from rise_jax.video import check_pixels

_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")
_CELL, _TEXT_WIDTH, _MARGIN = (96, 240), 360, 8  # pixels: least and most height of a frame; caption
_TITLE_WIDTH = 144  # least width of a titled column
_PROMPT, _REPHRASED = (15, "black"), (13, "dimgray")  # size and colour


def contact_sheet(
    videos: Sequence[UInt8[np.ndarray, "T H W 3"]], prompts: Sequence[str], rephrased: Sequence[str | None], columns=6
) -> UInt8[np.ndarray, "H W 3"]:
    """One picture: a row per video of up to `columns` evenly spaced frames, its prompt and rephrasing beside them.

    Frames lower than 96 pixels are enlarged by a whole factor, those above 240 are reduced. Where the machine has none
    of _FONTS, letters are Latin only. Raises ValueError for unequal numbers of videos and texts, or none.
    """
    if not len(videos) == len(prompts) == len(rephrased) > 0:
        raise ValueError(f"{len(videos)} videos, {len(prompts)} prompts, {len(rephrased)} rephrasings: not one for one")
    texts = zip(prompts, rephrased)
    return _laid_out([[_strip(video, columns), _caption(*both)] for video, both in zip(videos, texts)])


def comparison_sheet(
    videos: Sequence[Sequence[UInt8[np.ndarray, "T H W 3"]]],
    titles: Sequence[str],
    prompts: Sequence[str],
    rephrased: Sequence[Sequence[str | None]],
    columns=3,
) -> UInt8[np.ndarray, "H W 3"]:
    """One picture: a row per prompt, a column per run under its title; `videos` and `rephrased` are by run, then by prompt.

    The prompt and every different rephrasing of it stand beside its row. Frames as in `contact_sheet`. Raises ValueError for
    unequal numbers, or none.
    """
    counts = {len(prompts), *map(len, videos), *map(len, rephrased)}
    if not len(videos) == len(titles) == len(rephrased) > 0 or len(counts) > 1 or 0 in counts:
        raise ValueError(
            f"{len(titles)} titles, {len(prompts)} prompts, {[*map(len, videos)]} videos, {[*map(len, rephrased)]} rephrasings: "
            "not one for one"
        )
    rows = []
    for prompt, made, said in zip(prompts, zip(*videos), zip(*rephrased)):
        rows.append([*(_strip(video, columns) for video in made), _caption(prompt, *dict.fromkeys(filter(None, said)))])
    widths = [max(_TITLE_WIDTH, *(row[run].width for row in rows)) for run in range(len(titles))]
    head = [_text([(title, *_PROMPT)], width) for title, width in zip(titles, widths)]
    return _laid_out([[*head, _caption("")], *rows])


def _laid_out(rows: list[list[Image.Image]]) -> UInt8[np.ndarray, "H W 3"]:
    """A table on white: columns as wide and rows as high as what is widest and highest in them, margins around."""
    lefts = np.cumsum([_MARGIN, *(_MARGIN + max(image.width for image in column) for column in zip(*rows))]).tolist()
    tops = np.cumsum([_MARGIN, *(_MARGIN + max(image.height for image in row) for row in rows)]).tolist()
    sheet = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    for row, top in zip(rows, tops):
        for image, left in zip(row, lefts):
            sheet.paste(image, (left, top))
    return np.asarray(sheet)


def _strip(video: UInt8[np.ndarray, "T H W 3"], columns: int) -> Image.Image:
    check_pixels(video, 4)
    frames = video[np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)]
    low, high = _CELL
    enlarged = -(-low // frames.shape[1])
    frames = frames.repeat(enlarged, axis=1).repeat(enlarged, axis=2)
    frames = np.pad(frames, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    strip = Image.fromarray(np.concatenate(frames, axis=1))
    return strip if strip.height <= high else strip.resize((round(strip.width * high / strip.height), high))


def _caption(prompt: str, *rephrased: str | None) -> Image.Image:
    return _text([(prompt, *_PROMPT), *((text or "", *_REPHRASED) for text in rephrased)], _TEXT_WIDTH)


def _text(paragraphs: list[tuple[str, int, str]], width: int) -> Image.Image:
    """Paragraphs (text, size, colour), wrapped at `width` pixels."""
    image = Image.new("RGB", (width, 10_000), "white")
    draw, top = ImageDraw.Draw(image), 0
    for text, size, colour in paragraphs:
        font, drawable = _font(size)
        lines = "\n".join(_wrap(drawable(text), lambda line, font=font: draw.textlength(line, font) <= width))
        draw.multiline_text((0, top), lines, colour, font)
        top = draw.multiline_textbbox((0, top), lines, font)[3] + _MARGIN
    return image.crop((0, 0, width, round(top)))


def _font(size: int):
    """A font with accents, and what makes a text drawable with it. Pillow's own outline font knows ASCII only."""
    for name in _FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size), str
    return ImageFont.load_default_imagefont(), lambda text: text.encode("latin-1", "replace").decode("latin-1")


def _wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Lines that fit, broken at spaces, or within a word longer than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if fits(joined):
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            lines += [] if fits(lines[-1] + letter) else [""]
            lines[-1] += letter
    return lines
