"""What the spikes of each unit add to the scores of all, as a table made once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from spiked.templates.library import Templates

SHARED, RIVAL = 0.03, 0.1  # of the geometric mean energy: overlap that is subtracted, that competes


class Gram:
    """What a spike of each unit adds to the scores of all: for u, entries ptr[u]:ptr[u + 1] are (unit, (lags,)).

    `lags[:, back + d]`: the score d samples after the spike's trough, per unit of amplitude.
    """

    def __init__(self, t: Templates) -> None:
        n = len(t)
        self._templates, self.back = t, t.length - 1
        self._entry = np.full((n, t.n_channels), -1, np.int64)  # of each unit's filter on each electrode
        self._entry[np.repeat(np.arange(n), np.diff(t.ptr)), t.channel] = np.arange(len(t.channel))
        self._projected = np.array([self._project(w) for w in t.waveform], np.float32)
        pairs, values = [], []
        for u in range(n):
            for v in np.flatnonzero((self._entry[:, self._channels(u)] >= 0).any(1)):
                pairs.append((u, v))
                values.append(self._pair(u, int(v), t.weight))
        pair = np.array(pairs, np.int64).reshape(-1, 2)
        value = np.array(values, np.float32).reshape(-1, self.back + t.waveform.shape[1])
        own = pair[:, 0] == pair[:, 1]
        self.energy = np.zeros(n, np.float32)
        self.energy[pair[own, 0]] = np.maximum(value[own, self.back], 1e-6)
        mean = np.sqrt(np.maximum(self.energy[pair[:, 0]] * self.energy[pair[:, 1]], 1e-9))
        self.overlap = np.eye(n, dtype=np.float32)  # 1: the same waveform at some lag
        np.maximum.at(self.overlap, (pair[:, 0], pair[:, 1]), np.abs(value).max(1, initial=0) / mean)
        self.overlap = np.maximum(self.overlap, self.overlap.T)
        kept = self.overlap[pair[:, 0], pair[:, 1]] >= SHARED
        self.ptr = np.concatenate([[0], np.cumsum(np.bincount(pair[kept, 0], minlength=n))])
        self.unit, self.lags = pair[kept, 1].copy(), np.ascontiguousarray(value[kept])
        rivals = self.overlap >= RIVAL
        self.rival_ptr = np.concatenate([[0], np.cumsum(rivals.sum(1))])
        self.rival = np.nonzero(rivals)[1].astype(np.int64)

    def own(self) -> Gram:
        """The same, to be changed by `renew` without changing this one."""
        other = copy.copy(self)
        for name in ("lags", "energy", "_projected"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def _channels(self, u: int) -> np.ndarray:
        t = self._templates
        return t.wave_channel[t.wave_ptr[u] : t.wave_ptr[u + 1]]

    def _project(self, waveform: np.ndarray) -> np.ndarray:
        """(components, lags): one electrode's waveform in the components, at every lag."""
        return np.array([np.correlate(waveform, b, "full") for b in self._templates.basis], np.float32)

    def _pair(self, u: int, v: int, weight: np.ndarray) -> np.ndarray:
        """(lags,) what a spike of u adds to the scores of v."""
        entry = self._entry[v, self._channels(u)]
        both = entry >= 0
        projected = self._projected[self._templates.wave_ptr[u] : self._templates.wave_ptr[u + 1]]
        return np.einsum("ek,ekd->d", weight[entry[both]], projected[both])

    def renew(self, u: int, waveform: np.ndarray, weight: np.ndarray) -> None:
        """Unit u has other waveforms (all units' entries) and filters now; who overlaps with whom stays."""
        t = self._templates
        for e in range(t.wave_ptr[u], t.wave_ptr[u + 1]):
            self._projected[e] = self._project(waveform[e])
        for g in range(self.ptr[u], self.ptr[u + 1]):
            v = self.unit[g]
            self.lags[g] = self._pair(u, int(v), weight)
            if v == u:
                self.energy[u] = max(self.lags[g, self.back], 1e-6)
                continue
            back = self.ptr[v] + np.searchsorted(self.unit[self.ptr[v] : self.ptr[v + 1]], u)
            if back < self.ptr[v + 1] and self.unit[back] == u:
                self.lags[back] = self._pair(v, u, weight)
