"""A raster of spikes in character cells: two time steps by four rows of dots in each (Braille), a row per unit where there is room."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # (row, column) of a Braille cell
TICKS = np.array([0x47, 0xB8])  # the whole height of a cell, left and right
BRAILLE = 0x2800
NOTHING, BLIND, GAP, UNHEARD = 0, 1, 2, 3


@dataclass(frozen=True)
class Raster:
    """`lines` are the text rows; `ground` (columns,) says what a column is: NOTHING, BLIND, GAP or UNHEARD; `marks` is
    the line above.

    `rows` gives, per text row, the first of the units (or electrodes) drawn in it.
    """

    lines: list[str]
    ground: np.ndarray
    marks: str
    rows: list[int]


def draw(
    samples: np.ndarray, rows: np.ndarray, n_rows: int, first: int, stop: int, width: int, height: int,
    blind: list[tuple[int, int]] | tuple[()] = (), gaps: list[tuple[int, int]] | tuple[()] = (), unheard: list[tuple[int, int]] | tuple[()] = (), marks: list[int] | tuple[()] = (),
) -> Raster:  # fmt: skip
    """Spikes at `samples` in `rows` (0 ... n_rows - 1, on top first) between sample numbers first and stop.

    Every spike within the window makes a dot; more rows than dots share them. `unheard` are samples of
    which no message came here: neither spikes nor silence are known.
    """
    width, height, n_rows = max(width, 1), max(height, 1), max(n_rows, 1)
    span = max(stop - first, 1)
    inside = (samples >= first) & (samples < stop) & (rows >= 0) & (rows < n_rows)
    x = (samples[inside] - first) * (2 * width) // span
    codes = np.zeros((height, width), np.int64)
    if n_rows <= height:
        np.bitwise_or.at(codes, (rows[inside], x // 2), TICKS[x % 2])
        top = list(range(n_rows))
    else:
        dots = 4 * height
        y = rows[inside] if n_rows <= dots else rows[inside] * dots // n_rows
        np.bitwise_or.at(codes, (y // 4, x // 2), DOTS[y % 4, x % 2])
        top = [k * 4 if n_rows <= dots else -(-k * 4 * n_rows // dots) for k in range(height)]
        top = [k for k in top if k < n_rows]
    text = np.where(codes > 0, BRAILLE + codes, ord(" "))
    lines = ["".join(map(chr, row)) for row in text.tolist()]
    ground = np.zeros(width, np.int64)
    for kind, intervals in ((BLIND, blind), (GAP, gaps), (UNHEARD, unheard)):
        for a, b in intervals:
            left, right = (a - first) * width / span, (b - first) * width / span
            if right > 0 and left < width:  # short ones are widened to a column, so that none is invisible
                lo = int(max(left, 0))
                ground[lo : max(int(np.ceil(min(right, width))), lo + 1)] = kind
    line = [" "] * width
    for sample in marks:
        if first <= sample < stop:
            line[(sample - first) * width // span] = "▾"
    return Raster(lines, ground, "".join(line), top)


BLOCKS = " ▁▂▃▄▅▆▇█"


def bars(values: np.ndarray, height: int) -> list[str]:
    """A bar chart of `values` (columns,), `height` text rows high, the tallest full; whatever is not 0 shows."""
    most = values.max() if len(values) else 0
    eighths = (
        np.zeros(len(values), int)
        if not most
        else np.maximum(np.round(values / most * 8 * height), values > 0).astype(int)
    )
    return [
        "".join(BLOCKS[min(max(e - 8 * row, 0), 8)] for e in eighths.tolist())
        for row in reversed(range(height))
    ]
