"""Decisions that were taken on early spikes, until it is known what became of these."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from spiked_client.protocol import FATES, SPIKE, TOLD_EARLY

MOST = 4096  # decisions that wait for this; the oldest are given up and stay marked as early
CONFIRMED = FATES.index("confirmed")


def as_spikes(found: np.ndarray) -> np.ndarray:
    """EARLY records as SPIKE records."""
    out = np.zeros(len(found), SPIKE)
    for name in SPIKE.names or ():
        out[name] = found[name]
    return out


def not_told_early(spikes: np.ndarray) -> np.ndarray:
    """Final SPIKE records without those that were taken early already."""
    told = (spikes["flags"] & TOLD_EARLY) > 0
    return spikes[~told] if told.any() else spikes


@dataclass
class Acted:
    """A ledger record, the numbers of the early spikes among its triggers that are open, and the word for it so far."""

    record: np.ndarray
    waiting: set[int]
    word: str = "early"


class Conditional:
    """`word` of a decision: "early" while its early spikes are open, "confirmed" when all are, "withdrawn" when one is not; "" of any other.

    `counters`: confirmed, withdrawn.
    """

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._open: dict[tuple[int, int], int] = {}  # unit, sample -> number
        self._acted: dict[int, Acted] = {}

    def tell(self, found: np.ndarray) -> None:
        """EARLY records that are open from now on."""
        self._open.update(
            zip(zip(found["unit"].tolist(), found["sample"].tolist(), strict=True), found["number"].tolist(), strict=True)
        )  # fmt: skip

    def note(self, record: np.ndarray, units: tuple[int, ...], samples: tuple[int, ...]) -> None:
        """A decision with these trigger spikes was taken."""
        if not self._open:
            return
        waiting = {n for key in zip(units, samples, strict=True) if (n := self._open.get(key))}
        if waiting:
            self._acted[int(record["number"][0])] = Acted(record, waiting)
            if len(self._acted) > MOST:
                del self._acted[next(iter(self._acted))]

    def word(self, number: int) -> str:
        acted = self._acted.get(number)
        return "" if acted is None else acted.word

    def say(self, number: int) -> str:
        """`word`, written down now: nothing more is to be said of a decision once it is resolved."""
        word = self.word(number)
        if word != "early":
            self.forget(number)
        return word

    def forget(self, number: int) -> None:
        """Nothing more is to be said of this decision."""
        self._acted.pop(number, None)

    def resolve(self, resolved: np.ndarray) -> list[Acted]:
        """RESOLVED records; the decisions whose word has changed by them."""
        fate = dict(zip(resolved["number"].tolist(), resolved["fate"].tolist(), strict=True))
        for row in resolved:
            self._open.pop((int(row["unit"]), int(row["early_sample"])), None)
        changed = []
        for acted in self._acted.values():
            mine = acted.waiting & fate.keys()
            if not mine or acted.word != "early":
                continue
            acted.waiting -= mine
            if any(fate[n] != CONFIRMED for n in mine):
                acted.word = "withdrawn"
            elif not acted.waiting:
                acted.word = "confirmed"
            else:
                continue
            self.counters[acted.word] += 1
            changed.append(acted)
        return changed
