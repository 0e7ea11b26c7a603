"""Latency as a histogram: fixed memory, exact mean, percentiles to the width of a bin."""

from __future__ import annotations

import numpy as np

BIN_MS = 0.05
BINS = 20_000  # up to one second


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
