"""Sync pulses that several simulated devices get at the same instants, each seen at its own sample number.

The pulses are tied to this computer's monotonic clock, so that simulators in separate processes share them: pulse k
of a period rises at k * period (plus, for random ones, a share of the period that only k decides).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

WIDTH_S = 0.02
RANDOM_SHARE = 0.7  # of the period over which a random pulse is spread
Untold = tuple[tuple[int, int], ...]  # (sample, n): the device loses n samples there and does not tell


@dataclass(frozen=True)
class SyncPulses:
    """`jitter_s`: standard deviation of each edge as this device sees it; `missing`, `extra`: share of pulses."""

    period_s: float = 1.0
    random: bool = False
    line: int = 6
    jitter_s: float = 0.0
    missing: float = 0.0
    extra: float = 0.0
    seed: int = 0  # of what this device sees wrong; never of the pulses themselves

    def times(self, from_s: float) -> Iterator[tuple[int, float]]:
        """(number, rise) of the pulses from this monotonic time on."""
        for k in itertools.count(math.ceil(from_s / self.period_s)):
            shift = np.random.default_rng(k).uniform(0, RANDOM_SHARE) if self.random else 0.0
            yield k, (k + shift) * self.period_s

    def edges(self, begun_s: float, fs_hz: float, untold: Untold = ()) -> Iterator[tuple[int, int, int]]:
        """(sample, line, state), rising, for a device whose sample 0 existed at `begun_s` and that runs at `fs_hz`."""
        wrong = np.random.default_rng([self.seed, 7])
        for _, rise in self.times(begun_s + 0.001):
            jitter, missed, extra = wrong.normal(0, 1), wrong.random(), wrong.random()
            if missed >= self.missing:
                t = rise + self.jitter_s * jitter - begun_s
                yield self._edge(t * fs_hz, 1, untold)
                yield self._edge((t + WIDTH_S) * fs_hz, 0, untold)
            if extra < self.extra:
                t = rise - begun_s + (RANDOM_SHARE + 0.1 + 0.1 * extra) * self.period_s
                yield self._edge(t * fs_hz, 1, untold)
                yield self._edge((t + WIDTH_S / 4) * fs_hz, 0, untold)

    def _edge(self, sample: float, state: int, untold: Untold) -> tuple[int, int, int]:
        return max(0, counted(math.ceil(sample), untold)), self.line, state


def counted(taken: int, untold: Untold) -> int:
    """The number a device gives to the `taken`-th sample, when it lost some without telling."""
    for sample, n in untold:
        if taken >= sample + n:
            taken -= n
        elif taken > sample:
            return sample
    return taken


def lost_before(sample: int, untold: Untold) -> int:
    """How many samples the device had lost, untold, when it gave this number."""
    return sum(n for s, n in untold if sample > s)
