"""Preliminary clusters: the peaks of one root electrode, split by latency along its neighbours, then by amplitude.

After RT-Sort's sequence detection (van der Molen, Lim et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import diptest
import numpy as np

from spiked.sort.features import PeakTable
from spiked.sort.geometry import distances
from spiked.sort.mixture import parts
from spiked.sort.parameters import RTSortParameters

LAG_FLOOR = 1 / 12  # variance of a lag known to the sample
AMP_FLOOR = 0.5  # (noise SDs) squared
MAX_DIP = 5000  # spikes the dip test looks at


@dataclass(frozen=True)
class Part:
    """Rows of a root's PeakTable that may be one neuron, and the electrodes whose latencies told it apart."""

    rows: np.ndarray
    split: frozenset[int]


class Splitter:
    """Splits the peaks of one root. Deterministic."""

    def __init__(
        self,
        table: PeakTable,
        positions_um: np.ndarray,
        p: RTSortParameters,
        stringent: float,
        min_active: float,
    ) -> None:
        self.table, self.p, self.stringent, self.min_active = table, p, stringent, min_active
        near = table.near
        self.from_root = distances(positions_um[near[:1]], positions_um[near])[0]
        self.between = distances(positions_um[near])
        self.inner = np.flatnonzero((self.from_root <= p.inner_radius_um) & (self.from_root > 0))

    def clusters(self) -> list[Part]:
        """Every cluster of this root; empty when the root is not active enough."""
        t, p = self.table, self.p
        seen = t.logit[:, self.inner] >= self.stringent
        neighbours = seen.sum(1)
        free = t.largest & (neighbours > 0) & (t.logit[:, 0] >= self.stringent)
        if (
            free.sum() < p.min_spikes
            or (free & (neighbours >= p.min_root_neighbours)).sum() < self.min_active
        ):
            return []
        out: list[Part] = []
        for column in self.inner:
            left = np.flatnonzero(free)
            if len(left) < p.min_spikes:
                break
            others = [int(c) for c in self.inner if c != column]
            found = self._grow(left, [int(column), *others], {int(column), *others}, frozenset(), 0, -1.0)
            for part in found:
                if part.split:
                    free[part.rows] = False
                    out += self._by_amplitude(part)
        return out

    def _grow(
        self,
        rows: np.ndarray,
        todo: list[int],
        known: set[int],
        split: frozenset[int],
        patience: int,
        last: float,
    ) -> list[Part]:
        p, t = self.p, self.table
        at = 0
        while at < len(todo) and patience < p.patience:
            e = todo[at]
            at += 1
            hit = rows[t.logit[rows, e] >= self.stringent]
            need = max(p.min_spikes, p.min_part * len(rows))
            groups = []
            if len(hit) > need:
                label = parts(t.lag[hit, e], p.max_latency_parts, LAG_FLOOR)
                groups = [g for g in (hit[label == k] for k in range(label.max() + 1)) if len(g) >= need]
            if not groups:
                if self.from_root[e] != last:
                    patience, last = patience + 1, float(self.from_root[e])
                continue
            real = label.max() > 0
            return [
                leaf
                for g in groups
                for leaf in self._child(g, rows, e, todo[at:], known, split, 0 if real else patience, last)
            ]
        return [Part(rows, split)]

    def _child(
        self, group: np.ndarray, rows: np.ndarray, e: int, todo: list[int], known: set[int], split: frozenset[int],
        patience: int, last: float,
    ) -> list[Part]:  # fmt: skip
        split = split | {int(self.table.near[e])}
        if len(group) <= self.p.min_spikes:
            return [Part(group, split)]
        if len(group) >= self.p.min_extend_part * len(rows):
            near = np.flatnonzero(self.between[e] <= self.p.inner_radius_um)
            new = [int(c) for c in near if c != 0 and int(c) not in known]
            known = known | set(new)
            todo = sorted([*todo, *new], key=lambda c: (self.from_root[c], c))
        return self._grow(group, todo, known, split, patience, last)

    def _by_amplitude(self, part: Part) -> list[Part]:
        p = self.p
        if len(part.rows) < 2 * p.min_spikes:
            return [part]
        amp = self.table.amp[part.rows, 0].astype(np.float64)
        # The device's steps would look like many modes: spread them over the noise.
        amp += np.random.default_rng(len(amp)).uniform(-0.5, 0.5, len(amp))
        step = -(-len(amp) // MAX_DIP)
        if diptest.diptest(np.sort(amp)[::step])[1] >= p.amplitude_dip_p:
            return [part]
        label = parts(amp, p.max_amplitude_parts, AMP_FLOOR, fewest=2)
        groups = [part.rows[label == k] for k in range(label.max() + 1)]
        return [Part(g, part.split) for g in groups if len(g) >= p.min_spikes] or [part]
