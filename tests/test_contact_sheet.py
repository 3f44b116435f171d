"""One picture of many videos with their texts."""

import numpy as np
import pytest
from media import QUARTERS

from rise_jax import sheets
from rise_jax.sheets import contact_sheet


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


@pytest.mark.parametrize("fonts", [sheets._FONTS, ()])
def test_contact_sheet_has_accents_and_wraps(monkeypatch, fonts):
    monkeypatch.setattr(sheets, "_FONTS", fonts)
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
