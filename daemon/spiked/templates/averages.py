"""Mean waveforms of many units at once, channel by channel, so that long calibrations of large arrays fit in memory."""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.templates.noise import Noise, filtered

# mypy: disable-error-code="no-untyped-def"


@njit(nogil=True, cache=True)
def _take_out(y, sample, unit, amplitude, waveform, before):
    """Subtract every spike's waveform (units, samples) from y (n,)."""
    length = waveform.shape[1]
    for i in range(len(sample)):
        a, first = amplitude[i], sample[i] - before
        row = waveform[unit[i]]
        for k in range(max(0, -first), min(length, len(y) - first)):
            y[first + k] -= a * row[k]


@njit(nogil=True, cache=True)
def _average(y, sample, unit, amplitude, used, waveform, before, total, weight):
    """total[u] += a (y around the spike + a x waveform), weight[u] += a^2, over the used spikes that lie inside y."""
    length = total.shape[1]
    for i in range(len(sample)):
        first = sample[i] - before
        if not used[i] or first < 0 or first + length > len(y):
            continue
        u, a = unit[i], amplitude[i]
        weight[u] += a * a
        for k in range(length):
            total[u, k] += a * (y[first + k] + a * waveform[u, k])


def mean_waveforms(
    x: np.ndarray, noise: Noise, sample: np.ndarray, unit: np.ndarray, amplitude: np.ndarray, used: np.ndarray, before: int,
    length: int, n_units: int, former: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """(units, channels, length) float32: what a spike of amplitude 1 looks like after the noise's filters.

    `sample` (spikes,) positions in x (channels, n), in time order; `unit` their index; `used` which of them are averaged. With
    `former` waveforms all spikes are taken out first and each adds its own again, so that overlaps do not count.
    """
    out = np.zeros((n_units, len(x), length), np.float32)
    none = np.zeros((n_units, length), np.float32)
    for c in range(len(x)):
        y = filtered(x[c : c + 1], noise.sos, noise.taps)[0]
        own = none
        if former is not None:
            own = np.ascontiguousarray(former[:, c])
            _take_out(y, sample, unit, amplitude, own, before)
        total, weight = np.zeros((n_units, length)), np.zeros(n_units)
        _average(y, sample, unit, amplitude, used, own, before, total, weight)
        out[:, c] = total / np.maximum(weight, 1e-9)[:, None]
    return out
