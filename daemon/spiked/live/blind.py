"""What could not be seen, as records: every invalid stretch with the cause that was noted nearest to it."""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.detect.detector import Detected
from spiked.stream import StreamInfo
from spiked_client.protocol import BLIND, BLIND_REASONS

# mypy: disable-error-code="no-untyped-def"

NEAR_MS = 20.0  # a cause this close to an invalid stretch is its cause
KEPT_MS = 1000.0
OTHERWISE = BLIND_REASONS.index("clipped")
NO_BLIND = np.zeros(0, BLIND)


@njit(nogil=True, cache=True)
def _row(rows, n, start, stop, channel):
    if n < len(rows):
        rows[n].start, rows[n].stop, rows[n].channel = start, stop, channel
    return n + 1


@njit(nogil=True, cache=True)
def _stretches(valid, first, blank, rows):
    """Put the invalid stretches of valid (channels, n) into rows (BLIND), those of all channels first; how many there are."""
    channels, n = valid.shape
    for t in range(n):
        blank[t] = True
        for c in range(channels):
            if valid[c, t]:
                blank[t] = False
                break
    found = 0
    for c in range(-1, channels):
        start = -1
        for t in range(n):
            bad = blank[t] if c < 0 else not valid[c, t] and not blank[t]
            if bad and start < 0:
                start = t
            elif not bad and start >= 0:
                found = _row(rows, found, first + start, first + t, c)
                start = -1
        if start >= 0:
            found = _row(rows, found, first + start, first + n, c)
    return found


class BlindStretches:
    """Finds the invalid stretches of what was detected and tells why they are. With `reuse` the next call overwrites them."""

    def __init__(self, info: StreamInfo, reuse: bool = False) -> None:
        self._near, self._kept = info.samples(NEAR_MS), info.samples(KEPT_MS)
        self._causes: list[tuple[int, int, int]] = []
        self._rows, self._blank = np.zeros(64, BLIND), np.zeros(0, bool)
        self._reuse = reuse

    def note(self, start: int, stop: int, reason: str) -> None:
        """Something made [start, stop) invalid, for one of BLIND_REASONS."""
        self._causes.append((start, stop, BLIND_REASONS.index(reason)))

    def find(self, found: Detected) -> np.ndarray:
        """BLIND records of the invalid stretches among these samples."""
        if self._causes and self._causes[0][1] <= found.first_sample - self._kept:
            self._causes = [c for c in self._causes if c[1] > found.first_sample - self._kept]
        if found.all_valid:
            return NO_BLIND
        if len(self._blank) < found.valid.shape[1]:
            self._blank = np.zeros(found.valid.shape[1], bool)
        n = _stretches(found.valid, found.first_sample, self._blank, self._rows)
        if n > len(self._rows):
            self._rows = np.zeros(2 * n, BLIND)
            _stretches(found.valid, found.first_sample, self._blank, self._rows)
        rows = self._rows[:n]
        for row in rows:
            row["reason"] = self._reason(int(row["start"]), int(row["stop"]))
        return rows if self._reuse else rows.copy()

    def _reason(self, start: int, stop: int) -> int:
        near = self._near
        return next(
            (why for a, b, why in reversed(self._causes) if start < b + near and stop > a - near), OTHERWISE
        )
