"""Rows of token ids of different lengths as one array and its mask."""

from collections.abc import Sequence

import numpy as np


def left_pad(rows: Sequence[Sequence[int]], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [B, width], mask bool [B, width]) with each row's ids at its right end; ValueError for a row longer than `width`."""
    ids, mask = right_pad([row[::-1] for row in rows], width, pad)
    return ids[:, ::-1].copy(), mask[:, ::-1].copy()


def right_pad(rows: Sequence[Sequence[int]], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [B, width], mask bool [B, width]) with each row's ids at its left end; ValueError for a row longer than `width`."""
    ids, mask = np.full((len(rows), width), pad, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"text {i} has {len(row)} tokens, at most {width} fit")
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return ids, mask
