"""Two streams that get the same pulses: which edge is which, and the line through the pairs.

Arrival times say to some tens of milliseconds where a pulse of one stream must lie in the other. Among the shifts
within that reach the one is taken at which the most pulses meet; pulses of a constant period shorter than the reach
meet at several, and are refused until something tells them apart. Missing and extra pulses are left over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from spiked.clocks.fit import Line, straight

WINDOW_S = 120.0
REACH_S = 0.6  # arrival is not off by more
UNSURE_S = 0.02  # by how much two shifts must differ from zero to be told apart by arrival
COARSE_S = 60.0  # pulses that the first match looks at
COARSE_PULSES = 400  # and at most so many
MEET_S = 0.002  # pulses this near one another, after the shift, meet
ALIKE_S = 0.0005
FEWEST, SHARE, RIVAL = 4, 0.5, 0.7
NEAR_S, NEAR_SD = 0.0003, 8.0
STEP_PULSES, STEP_AMONG = 2, 4  # so many of the last pulses must be off by the same
STEP_SHARE = (
    0.45  # of the usual interval; a larger jump cannot be told from missing pulses, but arrival shows it
)
SETTLE_S = 0.25  # a pulse is looked at this long after it came: its counterpart may be on its way
LOST_S = 90.0  # without a match: begin again
KEPT = 1 << 17  # pairs of a session (36 h of one a second)


class PulseClock:
    """Seconds by each stream's nominal rate, `reference` against `stream`. `line`: reference - stream, over stream."""

    def __init__(self) -> None:
        self.line: Line | None = None
        self.ambiguous = False
        self.x: deque[float] = deque(maxlen=KEPT)  # matched pulses since the last step
        self.e: deque[float] = deque(maxlen=KEPT)
        self.matched = self.left_over = 0
        self._reference: deque[float] = deque(maxlen=4096)
        self._stream: deque[float] = deque(maxlen=4096)
        self._next = 0  # pulses of the stream that were looked at, of those that ever came
        self._came = 0
        self._strays: list[tuple[float, float]] = []

    def add_reference(self, seconds: np.ndarray) -> None:
        """Rising edges of the reference stream."""
        self._reference.extend(seconds.tolist())

    def add(self, seconds: np.ndarray) -> None:
        """Rising edges of the stream."""
        self._stream.extend(seconds.tolist())
        self._came += len(seconds)

    def forget(self) -> None:
        """A stream's count jumped: match anew with pulses that come from now on."""
        self.line, self._strays = None, []
        self._reference.clear()
        self._stream.clear()
        self.x.clear()
        self.e.clear()
        self._next = self._came

    def update(
        self, guess: Callable[[float], float] | None, now_stream: float, now_reference: float
    ) -> float | None:
        """Look at what came. `guess`: reference seconds of stream seconds, by arrival; `now_*`: how far each stream is.

        Returns the size of a step (seconds) when one became certain.
        """
        if self.line is not None and now_stream - self.x[-1] > LOST_S:
            self.line = None  # pulses may come, but none where it is expected
            self.x.clear()
            self.e.clear()
            self._strays.clear()
        if self.line is None:
            if guess is not None:
                self._match_anew(guess)
            return None
        reference = np.array(self._reference)
        step, met = None, self.matched
        first = self._came - len(self._stream)
        for k in range(max(self._next, first), self._came):
            x = self._stream[k - first]
            if x > now_stream - SETTLE_S or x + self.line(x) > now_reference - SETTLE_S:
                break
            self._next = k + 1
            step = self._one(x, reference) or step
        if self.matched > met:
            self._refit()
        return step

    def _one(self, x: float, reference: np.ndarray) -> float | None:
        assert self.line is not None
        if not len(reference):
            return None
        there = x + self.line(x)
        e = float(reference[np.argmin(np.abs(reference - there))]) - there
        near = max(NEAR_S, NEAR_SD * self.line.spread, 4 * self.line.error(x))
        if abs(e) <= near:
            self._strays.clear()
            self.x.append(x)
            self.e.append(e + self.line(x))
            self.matched += 1
            return None
        self._strays.append((x, e))
        self.left_over += 1
        return self._judge(reference, near)

    def _judge(self, reference: np.ndarray, near: float) -> float | None:
        """Strays that are off by the same are a jump. By a whole interval they are only missing their counterparts."""
        assert self.line is not None
        e = self._strays[-1][1]
        interval = float(np.median(np.diff(reference))) if len(reference) > 1 else 0.0
        agree = [s for s in self._strays[-STEP_AMONG:] if abs(s[1] - e) <= near]
        if len(agree) < STEP_PULSES or abs(e) > STEP_SHARE * interval:
            return None
        last = [s for _, s in agree]
        new = [(x, e + self.line(x)) for x, e in agree]
        slope = self.line.slope
        self.x.clear()
        self.e.clear()
        self._strays.clear()
        for point in new:
            self.x.append(point[0])
            self.e.append(point[1])
        self.line = straight(np.array(self.x), np.array(self.e), slope, 10e-6)
        return float(np.median(last))

    def _refit(self) -> None:
        xs = np.array(self.x) if len(self.x) < 4096 else np.array([*self.x][-4096:])
        es = np.array(self.e) if len(self.e) < 4096 else np.array([*self.e][-4096:])
        recent = xs > xs[-1] - WINDOW_S
        self.line = straight(xs[recent], es[recent])

    def _match_anew(self, guess: Callable[[float], float]) -> None:
        stream, reference = np.array(self._stream), np.array(self._reference)
        if len(stream) < FEWEST or len(reference) < FEWEST:
            return
        there = np.array([guess(x) for x in stream])
        since = max(there[0], reference[0]) - REACH_S, min(there[-1], reference[-1]) + REACH_S
        begin = max(since[0], since[1] - COARSE_S, there[-COARSE_PULSES:][0], reference[-COARSE_PULSES:][0])
        pick = (there >= begin) & (there <= since[1])
        stream, there = stream[pick], there[pick]
        reference = reference[(reference >= begin) & (reference <= since[1])]
        shift = _shift(there, reference)
        self.ambiguous = shift is None and min(len(there), len(reference)) >= 2 * FEWEST
        if shift is None:
            return
        keep, best = _pairs(there + shift, reference)
        if not keep.any():  # pulses that scatter so much that no two are off by the same
            return
        self.x.extend(stream[keep].tolist())
        self.e.extend((reference[best[keep]] - stream[keep]).tolist())
        self.matched += int(keep.sum())
        self._next = self._came
        self.line = straight(np.array(self.x), np.array(self.e))


def _pairs(there: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which pulses have a counterpart (bool), and which one: nearest to one another, off by what the others are."""
    off = reference[None, :] - there[:, None]
    best = np.abs(off).argmin(1)
    mine = off[np.arange(len(there)), best]
    keep = (np.abs(mine) <= MEET_S) & (np.abs(off).argmin(0)[best] == np.arange(len(there)))
    return keep & (np.abs(mine - np.median(mine[keep])) <= ALIKE_S), best


def _shift(there: np.ndarray, reference: np.ndarray) -> float | None:
    """By how much the pulses must be shifted to meet those of the reference; None while that is not certain."""
    d = (reference[None, :] - there[:, None]).ravel()
    d = np.sort(d[np.abs(d) <= REACH_S])
    n = min(len(there), len(reference))
    if n < FEWEST or not len(d):
        return None
    inside = np.searchsorted(d, d + MEET_S) - np.arange(len(d))  # differences in [d, d + MEET_S]
    best = int(inside.max())
    if best < max(FEWEST, SHARE * n):
        return None
    peaks: list[float] = []
    for k in np.flatnonzero(inside >= RIVAL * best):
        middle = float(np.median(d[k : k + inside[k]]))
        if not peaks or middle - peaks[-1] > 2 * MEET_S:
            peaks.append(middle)
        elif inside[k] == best:
            peaks[-1] = middle
    peaks.sort(key=abs)
    if len(peaks) > 1 and abs(peaks[1]) - abs(peaks[0]) < 2 * UNSURE_S:
        return None
    return peaks[0]
