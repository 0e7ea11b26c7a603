"""Decisions in two steps: what was told early, and what became of each.

No I/O and no clock. A final spike confirms the oldest early decision of its unit that lies within `reach`; one that the final decisions
have passed without such a spike is withdrawn. Nothing is told early that the same chunk has settled already.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked_client.protocol import EARLY, FATES, RESOLVED, SPIKE, TOLD_EARLY

# mypy: disable-error-code="no-untyped-def"

MAX_OPEN = 4096  # early decisions that wait for the final one; more are not told
CONFIRMED, WITHDRAWN = FATES.index("confirmed"), FATES.index("withdrawn")
NO_EARLY, NO_RESOLVED = np.zeros(0, EARLY), np.zeros(0, RESOLVED)
END = int(np.iinfo(np.int64).max)  # as `until`: nothing comes any more


@njit(nogil=True, cache=True)
def _resolve(row, early, sample, fate):
    row.number, row.early_sample, row.unit = early.number, early.sample, early.unit
    row.sample, row.fate = sample, fate


@njit(nogil=True, cache=True)
def settle(open_, n, spikes, until, reach, flag, confirmed, withdrawn, out):
    """Resolve what can be among open_[:n] (EARLY) by final spikes and all that is final; (how many stay open, how many of `out`).

    Final spikes that confirm one get the flag.
    """
    told = 0
    for s in spikes:
        for i in range(n):
            if open_[i].number > 0 and open_[i].unit == s.unit and abs(open_[i].sample - s.sample) <= reach:
                s.flags |= flag
                _resolve(out[told], open_[i], s.sample, confirmed)
                open_[i].number = 0
                told += 1
                break
    kept = 0
    for i in range(n):
        if open_[i].number == 0:
            continue
        if open_[i].sample < until - reach:
            _resolve(out[told], open_[i], -1, withdrawn)
            told += 1
            continue
        open_[kept] = open_[i]
        kept += 1
    return kept, told


@njit(nogil=True, cache=True)
def announce(found, since, open_, n, number, spikes, until, reach, flag):
    """Append the early decisions `found` (SPIKE) to open_[:n], numbered from `number` on; how many are open then.

    Left out are those before sample `since`, and what is final already: by a spike of the same chunk, or by there being none.
    """
    for s in found:
        if s.sample < since or s.sample < until - reach or n == len(open_):
            continue
        settled = False
        for f in spikes:
            settled |= f.unit == s.unit and abs(f.sample - s.sample) <= reach
        if settled:
            continue
        e = open_[n]
        e.sample, e.unit, e.channel, e.flags = s.sample, s.unit, s.channel, flag
        e.amplitude_uv, e.score, e.number = s.amplitude_uv, s.score, number
        number += 1
        n += 1
    return n


class TwoSteps:
    """`final` with the final decisions of every chunk, then `early` with its early ones.

    What they return is overwritten by the next call. `counters`: told, confirmed, withdrawn.
    """

    def __init__(self, reach: int) -> None:
        self.counters = {"told": 0, "confirmed": 0, "withdrawn": 0}
        self._reach, self._n = reach, 0
        self._open, self._resolved = np.zeros(MAX_OPEN, EARLY), np.zeros(MAX_OPEN, RESOLVED)
        self._n = self._settle(np.zeros(0, SPIKE), 0)[0]  # compiled here, not when spikes wait for it
        self._announce(np.zeros(0, SPIKE), np.zeros(0, SPIKE), 0, 0)

    def final(self, spikes: np.ndarray, until: int) -> np.ndarray:
        """Final spikes (SPIKE; those told early get the flag) and up to where all is final; RESOLVED records."""
        if not self._n:
            return NO_RESOLVED
        self._n, told = self._settle(spikes, until)
        found = self._resolved[:told]
        if told:
            confirmed = int((found["fate"] == CONFIRMED).sum())
            self.counters["confirmed"] += confirmed
            self.counters["withdrawn"] += told - confirmed
        return found

    def early(self, found: np.ndarray, spikes: np.ndarray, until: int, since: int = -1) -> np.ndarray:
        """Early decisions (SPIKE) from sample `since` on, after what was final in the same chunk; EARLY records to tell."""
        before = self._n
        if len(found):
            self._n = self._announce(found, spikes, until, since)
            self.counters["told"] += self._n - before
        return self._open[before : self._n]

    def _settle(self, spikes: np.ndarray, until: int) -> tuple[int, int]:
        kept, told = settle(
            self._open, self._n, spikes, until, self._reach, TOLD_EARLY, CONFIRMED, WITHDRAWN, self._resolved
        )
        return int(kept), int(told)

    def _announce(self, found: np.ndarray, spikes: np.ndarray, until: int, since: int) -> int:
        number = self.counters["told"] + 1
        return int(
            announce(found, since, self._open, self._n, number, spikes, until, self._reach, TOLD_EARLY)
        )

    def __len__(self) -> int:
        """How many are open."""
        return self._n
