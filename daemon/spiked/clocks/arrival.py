"""A stream's clock against the computer's, from when its chunks arrived.

A chunk can be late but never early, so of every half second only the chunk that was the least late counts. What
remains is a straight line as long as the device counts evenly; a lasting shift of all points at once is a step: the
device lost samples that it did not tell, or was restarted.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from spiked.clocks.fit import SLOPE_SD, Line, straight

BUCKET_S = 0.5
LATE_BUCKETS = 240
WINDOW_S = 300.0  # the rate drifts with temperature: what is older says nothing of now
SETTLED, SETTLED_WITHIN_S, SETTLED_ANYHOW = 8, 0.005, 40
NO_CLOCK, NO_CLOCK_S = 0.001, 0.1  # slope and spread beyond these: a queue is being worked off
STEP_S, STEP_SD, STEP_POINTS = 0.004, 6.0, 4
STEP_AGREE_S, STEP_AGREE_SD, STEP_AGREE_MOST_S = 0.0015, 4.0, 0.02
STRAY_POINTS = 600  # five minutes in which nothing fits: begin again
REFIT_ALWAYS, REFIT_EVERY = 60, 4
SAME_DEVICE_SD = 10e-6  # after a step the device's rate is what it was, or nearly


class Step(NamedTuple):
    """The stream's clock jumped at about this sample; positive: more time passed than samples were counted."""

    sample: int
    seconds: float
    method: str  # "arrival" or "pulses"


class ArrivalClock:
    """Points are (seconds by the stream's nominal rate, how much later by the computer's clock)."""

    def __init__(self, fs_hz: float) -> None:
        self.fs_hz = fs_hz
        self.line: Line | None = None
        self.since = 0  # sample from which the present line holds
        self.told = 0  # resets that the stream told of
        self.x = np.zeros(0)  # all points since `since`
        self.d = np.zeros(0)
        self._late: deque[float] = deque(maxlen=LATE_BUCKETS)
        self.newest = 0
        self._origin: tuple[int, int] | None = None  # sample, ns
        self._bucket: int | None = None
        self._least = (0.0, 0.0)
        self._fresh: list[tuple[float, float]] = []  # points before the line is settled
        self._strays: list[tuple[float, float, float]] = []
        self._slope = 0.0, SLOPE_SD

    @property
    def origin(self) -> tuple[int, int]:
        """(sample, monotonic ns) to which x and the computer's time count."""
        assert self._origin is not None
        return self._origin

    def add(self, samples: np.ndarray, arrival_ns: np.ndarray) -> list[Step]:
        """The last sample of each chunk and when it arrived, in order. Returns the steps that became certain."""
        if not len(samples):
            return []
        if self._origin is None:
            self._origin = int(samples[0]), int(arrival_ns[0])
            self.since = int(samples[0])
        self.newest = int(samples[-1])
        x = (samples - self._origin[0]) / self.fs_hz
        d = (arrival_ns - self._origin[1]) / 1e9 - x
        buckets = np.floor(x / BUCKET_S).astype(np.int64)
        steps: list[Step] = []
        starts = np.flatnonzero(np.diff(buckets, prepend=buckets[0] - 1))
        for a, b in zip(starts, [*starts[1:], len(x)], strict=True):
            k = a + int(np.argmin(d[a:b]))
            self._late.append(float(np.median(d[a:b]) - d[k]))
            steps += self._in_bucket(int(buckets[a]), (float(x[k]), float(d[k])))
        return steps

    def reset(self, sample: int) -> None:
        """The stream told that its count began anew: what came before says nothing of what follows."""
        self._begin(sample, [])
        self.told += 1

    def _in_bucket(self, bucket: int, point: tuple[float, float]) -> list[Step]:
        if bucket == self._bucket:
            self._least = min(self._least, point, key=lambda p: p[1])
            return []
        full, self._bucket = self._bucket is not None, bucket
        least, self._least = self._least, point
        return self._point(*least) if full else []

    def _point(self, x: float, d: float) -> list[Step]:
        if self.line is None:
            self._settle(x, d)
            return []
        r, limit = d - self.line(x), max(STEP_S, STEP_SD * self.line.spread)
        if abs(r) <= limit:
            self._strays.clear()
            self.x, self.d = np.append(self.x, x), np.append(self.d, d)
            if len(self.x) < REFIT_ALWAYS or len(self.x) % REFIT_EVERY == 0:
                self._refit()
            return []
        self._strays.append((x, d, r))
        return self._judge()

    def _judge(self) -> list[Step]:
        """Strays that agree are a step; strays that do not are a busy computer."""
        assert self.line is not None
        last = [r for _, _, r in self._strays[-STEP_POINTS:]]
        agree = max(STEP_AGREE_S, min(STEP_AGREE_SD * self.line.spread, STEP_AGREE_MOST_S))
        certain = len(last) == STEP_POINTS and max(last) - min(last) <= agree
        if not certain and len(self._strays) < STRAY_POINTS:
            return []
        new = [(x, d) for x, d, _ in self._strays[-STEP_POINTS:]]
        sample = self.origin[0] + round(new[0][0] * self.fs_hz)
        self._slope = self.line.slope, SAME_DEVICE_SD
        self._begin(sample, new)
        return [Step(sample, float(np.median(last)), "arrival")]

    def _begin(self, sample: int, points: list[tuple[float, float]]) -> None:
        self.since, self.line = sample, None
        self._strays, self._fresh, self._bucket = [], [], self._bucket if points else None
        self.x, self.d = np.array([p[0] for p in points]), np.array([p[1] for p in points])
        if points:
            self._refit()

    def _settle(self, x: float, d: float) -> None:
        """The first points wait until several agree: a stream begins with what had piled up."""
        self._fresh = [*self._fresh[1 - SETTLED_ANYHOW :], (x, d)]
        last = [p[1] for p in self._fresh[-SETTLED:]]
        calm = len(last) == SETTLED and max(last) - min(last) <= SETTLED_WITHIN_S
        if not calm and len(self._fresh) < SETTLED_ANYHOW:
            return
        kept = np.array(self._fresh[-SETTLED:] if calm else self._fresh)
        line = straight(kept[:, 0], kept[:, 1], *self._slope)
        if calm or (abs(line.slope) <= NO_CLOCK and line.spread <= NO_CLOCK_S):
            self.x, self.d, self.line, self._fresh = kept[:, 0].copy(), kept[:, 1].copy(), line, []

    def _refit(self) -> None:
        recent = self.x > self.x[-1] - WINDOW_S
        self.line = straight(self.x[recent], self.d[recent], *self._slope)

    def seconds(self, sample: float) -> float:
        """Monotonic seconds at which this sample was taken, plus the stream's least delay; needs a line."""
        assert self.line is not None
        x = (sample - self.origin[0]) / self.fs_hz
        return self.origin[1] / 1e9 + x + self.line(x)

    def sample(self, seconds: float) -> float:
        """The sample (a fraction too) that was taken at this time of `seconds`."""
        assert self.line is not None
        host = seconds - self.origin[1] / 1e9
        x = host - self.line(host)  # slopes are millionths: two rounds are exact to a nanosecond
        x = host - self.line(x)
        return self.origin[0] + x * self.fs_hz

    def error(self, sample: float) -> float:
        """Standard error of `seconds`, without the delay that all chunks share."""
        assert self.line is not None
        return self.line.error((sample - self.origin[0]) / self.fs_hz)

    @property
    def late_s(self) -> float:
        """How much later than the least late chunk a chunk usually is."""
        return float(np.median(self._late)) if self._late else 0.0

    @property
    def ppm(self) -> float:
        """By how much the device counts faster than its nominal rate, by the computer's clock."""
        return 0.0 if self.line is None else -1e6 * self.line.slope / (1 + self.line.slope)
