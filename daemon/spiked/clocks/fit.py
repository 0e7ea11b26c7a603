"""A straight line through points of which some are wrong."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

SLOPE_SD = 100e-6  # crystals differ by less; holds the slope while there are few points
FLOOR_S = 5e-6  # no clock is read better than this
TRIMS = 6
KEEP_SD = 3.0


class Line(NamedTuple):
    """y = level + slope * (x - at). `spread`: standard deviation of the points that were kept, at least FLOOR_S."""

    at: float
    level: float
    slope: float
    spread: float
    n: int
    lever: float  # sum of squares of x - at, with what is known of slopes beforehand

    def __call__(self, x: float) -> float:
        return self.level + self.slope * (x - self.at)

    def error(self, x: float) -> float:
        """Standard error of the line at x."""
        return self.spread * math.sqrt(1 / self.n + (x - self.at) ** 2 / self.lever)

    @property
    def slope_error(self) -> float:
        return self.spread / math.sqrt(self.lever)


def straight(x: np.ndarray, y: np.ndarray, slope: float = 0.0, slope_sd: float = SLOPE_SD) -> Line:
    """Least squares over the points that lie within three deviations of one another; at least one point.

    `slope` and `slope_sd` are what is known of the slope beforehand.
    """
    keep = np.ones(len(x), bool)
    line = _fit(x, y - slope * x, slope_sd)
    for _ in range(TRIMS):
        r = y - slope * x - (line.level + line.slope * (x - line.at))
        middle = np.median(r[keep])
        sd = max(1.4826 * float(np.median(np.abs(r[keep] - middle))), FLOOR_S)
        new = np.abs(r - middle) <= KEEP_SD * sd
        line = _fit(x[new], (y - slope * x)[new], slope_sd)
        if np.array_equal(new, keep):
            break
        keep = new
    return line._replace(level=line.level + slope * line.at, slope=line.slope + slope)


def _fit(x: np.ndarray, y: np.ndarray, slope_sd: float) -> Line:
    at, level, n = float(x.mean()), float(y.mean()), len(x)
    dx, dy = x - at, y - level
    lever, prior, slope = float(dx @ dx), 0.0, 0.0
    spread = FLOOR_S
    for _ in range(2):  # the weight of what is known beforehand depends on the spread
        prior = (spread / slope_sd) ** 2
        slope = float(dx @ dy) / (lever + prior)
        rest = dy - slope * dx
        spread = max(math.sqrt(float(rest @ rest) / max(n - 2, 1)), FLOOR_S)
    return Line(at, level, slope, spread, n, lever + prior)
