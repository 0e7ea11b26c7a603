"""Other units from one chunk to the next, while spikes are under way: none is lost, none is told twice."""

from __future__ import annotations

import numpy as np

from spiked.sort.assign import RTSort
from spiked.templates.sorter import TemplateSorter

Sorter = RTSort | TemplateSorter


class Handover:
    """Both sorters are fed; up to `at` the former one's word counts, from there the new one's.

    By then the new one has seen all that competes with its first spikes. `open` until the former one has decided
    everything before `at`, some milliseconds.
    """

    def __init__(self, former: Sorter, new: Sorter) -> None:
        self.former, self.new = former, new
        self.at: int | None = None
        self.open = True
        self._kept: list[np.ndarray] = []

    def join(self, old: np.ndarray, new: np.ndarray, first_sample: int) -> tuple[np.ndarray, int]:
        """(spikes, decided until) from what both said to the samples that begin with `first_sample`."""
        if self.at is None:
            self.at = first_sample + 4 * max(self.former.lookahead_samples, self.new.lookahead_samples)
        self._kept.append(new[new["sample"] >= self.at])
        old = old[old["sample"] < self.at]
        if self.former.decided_until < self.at:
            return old, self.former.decided_until
        self.open = False
        return np.concatenate([old, *self._kept]), self.new.decided_until
