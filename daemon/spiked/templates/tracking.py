"""Slow drift followed: every unit's waveform is averaged along the stream, and its template renewed when it has changed.

A spike counts when it is isolated (no other spike of a unit that shares electrodes within a waveform of it) and well above its
threshold. One unit is looked at every second, in turn, always at the same sample numbers, so the result does not depend on how the stream was
cut. A template that has become too unlike the calibrated one is left as it is, and the unit is reported as doubtful.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.templates.library import Templates

# mypy: disable-error-code="no-untyped-def"

RATE = 1 / 100  # of the running mean, per isolated spike
SURE = 1.5  # times its threshold, for a spike that counts
ENOUGH = 30  # isolated spikes before a template is renewed
CHANGED = 0.03  # of the energy, besides four times what noise leaves in the running mean
ALIKE = 0.7  # similarity to the calibrated waveform below which a unit is doubtful
LEVELS = 0.6, 1.6  # amplitudes, in units of the calibrated one, outside of which a unit is doubtful
KEPT = 4096  # recent spikes


@njit(nogil=True, cache=True)
def follow(
    y, newest, final, recent, n_recent, before, length, wave_ptr, wave_channel, mean, counts, overlap, shared, threshold
):  # fmt: skip
    """Average the isolated ones of the recent spikes that everything near them is known of; forget the old ones.

    y (channels, m): filtered samples up to sample number `newest`; all spikes up to `final` are known. recent (spikes, 5): unit, sample,
    amplitude, gain, 1 once it was looked at. Returns how many are left.
    """
    start = newest - y.shape[1] + 1
    for i in range(n_recent):
        u, t, a = int(recent[i, 0]), int(recent[i, 1]), recent[i, 2]
        if recent[i, 4] > 0 or t + length > final:
            continue
        recent[i, 4] = 1
        alone = recent[i, 3] >= SURE * threshold[u] and t - before >= start and a > 0
        for j in range(n_recent):
            if j != i and abs(recent[j, 1] - t) < length and overlap[u, int(recent[j, 0])] >= shared:
                alone = False
        if not alone:
            continue
        counts[u] += 1
        at = t - before - start
        for e in range(wave_ptr[u], wave_ptr[u + 1]):
            row, piece = mean[e], y[wave_channel[e], at : at + length]
            for k in range(length):
                row[k] += np.float32(RATE) * (piece[k] / np.float32(a) - row[k])
    kept = 0
    for i in range(n_recent):
        if recent[i, 4] == 0 or recent[i, 1] + 2 * length > final:
            recent[kept] = recent[i]
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def _append(recent, n, spikes):
    for i in range(min(len(spikes), len(recent) - n)):
        recent[n + i, :4] = spikes[i]
        recent[n + i, 4] = 0
    return min(n + len(spikes), len(recent))


class Tracker:
    """The running mean waveforms of a sorter's units, and whom to doubt.

    `renew(u)` says whether unit u's template should follow its mean, which then is in `waveform`.
    """

    def __init__(self, t: Templates) -> None:
        self.templates = t
        self.waveform = t.waveform.copy()
        self.mean = t.waveform.copy()
        self._noise = np.diag(t.precision)[t.wave_channel].astype(np.float32)
        self.counts = np.zeros(len(t), np.int64)
        self.recent, self.n_recent = np.zeros((KEPT, 5)), 0
        self.similarity = np.ones(len(t), np.float32)

    def add(self, spikes: np.ndarray) -> None:
        """Take new spikes (n, 4): unit, sample, amplitude, gain. More than there is room for are not averaged."""
        self.n_recent = _append(self.recent, self.n_recent, spikes)

    def renew(self, u: int) -> bool:
        """Look at unit u: its similarity to the calibration, and whether it has changed since its template was made."""
        t = self.templates
        mine, early = slice(t.wave_ptr[u], t.wave_ptr[u + 1]), slice(0, t.length)
        noise = self._noise[mine, None]
        first, now, used = t.waveform[mine, early], self.mean[mine, early], self.waveform[mine, early]
        energy = float((noise * first**2).sum())
        size = float(np.sqrt((noise * now**2).sum() * energy))
        self.similarity[u] = float((noise * first * now).sum()) / max(size, 1e-9)
        left_by_noise = now.size * RATE / (2 - RATE)
        moved = float((noise * (now - used) ** 2).sum())
        if (
            self.counts[u] < ENOUGH
            or self.similarity[u] < ALIKE
            or moved < CHANGED * energy + 4 * left_by_noise
        ):
            return False
        self.counts[u] = 0
        self.waveform[mine] = self.mean[mine]
        return True

    def doubtful(self, level: np.ndarray) -> np.ndarray:
        """(units,) bool: waveform or amplitude is no longer what was calibrated."""
        return (self.similarity < ALIKE) | (level < LEVELS[0]) | (level > LEVELS[1])
