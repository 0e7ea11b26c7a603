"""Durations as histograms, and a device's clock against this computer's. Plain Python, cheap enough for every chunk."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import Any

import numpy as np

# Upper edges of the bins, in ms; one more bin holds what is longer.
EDGES_MS = (
    0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 50.0, 75.0, 100.0, 200.0, 500.0, 1000.0,
)  # fmt: skip
POINT_S = 0.25
WINDOW_S = 300.0
LEAST_S = 5.0


class Histogram:
    """How often a duration fell into each bin; `add` takes less than a microsecond."""

    __slots__ = ("counts", "total_ms")

    def __init__(self) -> None:
        self.counts = [0] * (len(EDGES_MS) + 1)
        self.total_ms = 0.0

    def add(self, ms: float) -> None:
        """Count one duration; the edges belong to the bin below them."""
        self.counts[bisect_left(EDGES_MS, ms)] += 1
        self.total_ms += ms

    def told(self) -> dict[str, Any]:
        """For the health message: n per bin, and the sum of all in ms."""
        return {"n": list(self.counts), "sum": round(self.total_ms, 3)}


def told(**histograms: Histogram) -> dict[str, Any]:
    """Several histograms and the edges they share."""
    return {"edges_ms": list(EDGES_MS), **{name: h.told() for name, h in histograms.items()}}


class ClockFit:
    """A line through sample numbers and the monotonic ns at which they arrived.

    Of every quarter of a second the sample that waited least counts, over the last five minutes. Arrival is later than the
    sample was taken by the device's own delay, which cannot be known here.
    """

    def __init__(self, fs_hz: float) -> None:
        self._fs_hz = fs_hz
        self.restart()

    def restart(self) -> None:
        """The device began to count anew."""
        self._points: deque[tuple[int, int]] = deque(maxlen=int(WINDOW_S / POINT_S))
        self._best: tuple[float, int, int] | None = None
        self._until_ns = 0

    def add(self, sample: int, ns: int) -> None:
        """The samples before `sample` had arrived at `ns`."""
        delay = ns - sample * 1e9 / self._fs_hz
        if self._best is not None and ns >= self._until_ns:
            self._points.append(self._best[1:])
            self._best = None
        if self._best is None:
            self._until_ns = ns + int(POINT_S * 1e9)
            self._best = (delay, sample, ns)
        elif delay < self._best[0]:
            self._best = (delay, sample, ns)

    def told(self) -> dict[str, float | int] | None:
        """None in the first seconds, else

        sample, t_ns: a point of the line. fs_hz: its slope, in this computer's seconds. ppm: how much faster than nominal,
        `ppm_error` the standard error of that. rms_ms: how far arrivals scatter. seconds: what the line rests on.
        """
        if len(self._points) < LEAST_S / POINT_S:
            return None
        points = np.array(self._points, np.int64)
        middle = points[len(points) // 2]
        x, y = (points - middle).astype(float).T
        y /= 1e9
        mx, my = x.mean(), y.mean()
        spread = ((x - mx) ** 2).sum()
        slope = float(((x - mx) * (y - my)).sum() / spread)
        rest = y - my - slope * (x - mx)
        rms = float(np.sqrt((rest**2).mean()))
        fs = 1 / slope
        error = rms / float(np.sqrt(spread)) * fs
        at_ns = int(middle[1]) + round((my + slope * (0 - mx)) * 1e9)
        return {
            "sample": int(middle[0]), "t_ns": at_ns, "fs_hz": round(fs, 6), "ppm": round((fs / self._fs_hz - 1) * 1e6, 3),
            "ppm_error": round(error * 1e6, 3), "rms_ms": round(rms * 1e3, 4), "seconds": round(float(y[-1] - y[0]), 1),
        }  # fmt: skip
