"""Latency as a histogram: fixed memory, exact mean, percentiles to the width of a bin."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from spiked.timing import EDGES_MS, Histogram, told
from spiked_client.protocol import BLIND_REASONS

BIN_MS = 0.05
BINS = 20_000  # up to one second
EDGE_BINS = np.round(np.array(EDGES_MS) / BIN_MS).astype(np.int64)
STAGES = ("wait", "clean", "detect", "sort", "act", "publish", "chunk")
RECENT = 20  # tells, of half a second each


class Latency:
    """Milliseconds between two monotonic stamps."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS + 1, np.int64)
        self.total, self.n, self.worst = 0.0, 0, 0.0

    def add(self, ms: np.ndarray) -> None:
        if len(ms) == 0:
            return
        np.add.at(self.counts, np.clip(ms / BIN_MS, 0, BINS).astype(np.int64), 1)
        self.total += float(ms.sum())
        self.n += len(ms)
        self.worst = max(self.worst, float(ms.max()))

    def percentile(self, q: float) -> float:
        """Upper edge of the bin that holds quantile q (0..1); NaN while empty."""
        if self.n == 0:
            return float("nan")
        return float(min((np.searchsorted(np.cumsum(self.counts), q * self.n) + 1) * BIN_MS, self.worst))

    def summary(self) -> dict[str, float | int | None]:
        """n, mean, p50, p99, max; None while empty."""
        if self.n == 0:
            return {"n": 0, "mean": None, "p50": None, "p99": None, "max": None}
        values = {
            "mean": self.total / self.n,
            "p50": self.percentile(0.5),
            "p99": self.percentile(0.99),
            "max": self.worst,
        }
        return {"n": self.n, **{k: round(v, 3) for k, v in values.items()}}

    def told(self) -> dict[str, Any]:
        """As a Histogram tells it, on its coarser bins."""
        n = np.diff(np.cumsum(self.counts)[EDGE_BINS - 1], prepend=0).tolist()
        return {"n": [*n, self.n - sum(n)], "sum": round(self.total, 3)}


class Stages:
    """How long each chunk waited, and how long each stage took with it."""

    def __init__(self) -> None:
        self._of = {name: Histogram() for name in STAGES}
        self._adds = tuple(h.add for h in self._of.values())

    def add(self, *ns: int) -> None:
        """Monotonic ns: arrival, begun, cleaned, detected, sorted, acted, published, done. `chunk` is begun to done."""
        arrival, begun, cleaned, detected, sorted_, acted, published, done = ns
        wait, clean, detect, sort, act, publish, chunk = self._adds
        wait((begun - arrival) / 1e6)
        clean((cleaned - begun) / 1e6)
        detect((detected - cleaned) / 1e6)
        sort((sorted_ - detected) / 1e6)
        act((acted - sorted_) / 1e6)
        publish((published - acted) / 1e6)
        chunk((done - begun) / 1e6)

    def told(self, spike: Latency) -> dict[str, Any]:
        """For the health message; `spike` is arrival to publication per spike."""
        return {**told(**self._of), "spike": spike.told()}


class BlindTally:
    """Of the samples looked at, how many were blind and why. An interval on one of `channels` counts for its share."""

    def __init__(self, channels: int) -> None:
        self._share = 1 / channels
        self.by_reason = np.zeros(len(BLIND_REASONS))
        self._recent: deque[tuple[int, float]] = deque([(0, 0.0)], maxlen=RECENT + 1)

    def add(self, blind: np.ndarray) -> None:
        """BLIND records that were published."""
        if len(blind):
            n = (blind["stop"] - blind["start"]) * np.where(blind["channel"] < 0, 1.0, self._share)
            self.by_reason += np.bincount(blind["reason"], n, len(BLIND_REASONS))

    def told(self, covered: int) -> dict[str, Any]:
        """`ratio` is of the last ten seconds and leaves out what was blind for want of units; `covered` samples were looked at."""
        uncalibrated = self.by_reason[BLIND_REASONS.index("uncalibrated")]
        self._recent.append((covered, float(self.by_reason.sum() - uncalibrated)))
        (before, was), (now, is_) = self._recent[0], self._recent[-1]
        by_reason = zip(BLIND_REASONS, np.round(self.by_reason, 1).tolist(), strict=True)
        return {"samples": dict(by_reason), "ratio": round(min((is_ - was) / max(now - before, 1), 1.0), 5)}
