"""How well each unit will be sorted live, from the calibration alone: inject and recover.

Spikes of every unit, of amplitudes that vary as its own do, are added to the calibration's samples at known times and sorted with
the rest. The share that comes back, by gain, is the recall at every threshold. The gains of what is found without injection are then
those of n true spikes, distributed like the injected ones, plus false ones, which lie lower: n follows from the upper two thirds,
where false ones are rare, and with it the precision and the accuracy expected at every threshold. Each unit gets the lowest threshold
at which that is nearly best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from spiked.templates.library import Templates
from spiked.templates.noise import filtered
from spiked.templates.sorter import TemplateSorter

# mypy: disable-error-code="no-untyped-def"

LEAST_GAIN = 16.0  # looked at; noise alone seldom gains more
PER_UNIT = 120  # injected spikes of each unit
RATE_HZ = 2.0  # of each unit at most, so that injected spikes seldom overlap each other
MATCH_MS = 0.4
STEPS = 40
UPPER = 1 / 3  # of the recovered spikes' gains lie below what n is estimated from
NEARLY = 0.02  # of accuracy, that a lower threshold may cost


@dataclass(frozen=True)
class Expectation:
    """Per unit: what to expect live at its threshold."""

    accuracy: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    threshold: np.ndarray
    rate_hz: np.ndarray  # of true spikes, as estimated


@njit(nogil=True, cache=True)
def add_spikes(y, sample, unit, amplitude, ptr, channel, waveform, before):
    """Add a waveform per spike to y (channels, n)."""
    for i in range(len(sample)):
        u, first = unit[i], sample[i] - before
        for e in range(ptr[u], ptr[u + 1]):
            for k in range(waveform.shape[1]):
                if 0 <= first + k < y.shape[1]:
                    y[channel[e], first + k] += amplitude[i] * waveform[e, k]


def planned(t: Templates, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(samples, unit, amplitude) of what is injected into n samples, in time order."""
    rng = np.random.default_rng(seed)
    each = min(PER_UNIT, round(RATE_HZ * n / t.fs_hz))
    edge = t.waveform.shape[1]
    unit = np.repeat(np.arange(len(t)), each)
    sample = rng.integers(edge, n - edge, len(unit))
    amplitude = np.clip(rng.normal(1, t.amplitude_sd[unit]), 0.3, 2.0)
    order = np.argsort(sample, kind="stable")
    return sample[order], unit[order], amplitude[order]


def gains_of(sample: np.ndarray, unit: np.ndarray, spikes: np.ndarray, reach: int) -> np.ndarray:
    """Gain of the spike of the same unit within `reach` samples of each of (sample, unit), 0 where there is none."""
    out = np.zeros(len(sample))
    for u in np.unique(unit):
        mine = spikes[spikes[:, 0] == u]
        mine = mine[np.argsort(mine[:, 1], kind="stable")]
        if not len(mine):
            continue
        at = np.flatnonzero(unit == u)
        k = np.searchsorted(mine[:, 1], sample[at])
        for j in (k - 1, k):
            j = np.clip(j, 0, len(mine) - 1)
            near = np.abs(mine[j, 1] - sample[at]) <= reach
            out[at] = np.maximum(out[at], np.where(near, mine[j, 3], 0))
    return out


def inject(
    t: Templates, x: np.ndarray, seed: int = 0, piece_s: float = 5.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gains found without injection with their unit (spikes, 2); injected unit; injected spikes' gains, 0 where lost).

    x (channels, n): cleaned samples, any float type. Every unit's threshold is LEAST_GAIN for this.
    """
    low = replace(t, threshold=np.full(len(t), LEAST_GAIN, np.float32), unit_ids=np.arange(len(t)))
    plain, with_more = TemplateSorter(low, track=False), TemplateSorter(low, track=False)
    sample, unit, amplitude = planned(t, x.shape[1], seed)
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    step, lead = round(piece_s * t.fs_hz), round(0.1 * t.fs_hz)
    for a in range(0, x.shape[1], step):
        y = filtered(x[:, max(0, a - lead) : a + step], t.sos, t.taps)[:, a - max(0, a - lead) :]
        found[0].append(plain.match_filtered(y, a))
        near = slice(*np.searchsorted(sample, [a - t.waveform.shape[1], a + step + t.waveform.shape[1]]))
        add_spikes(
            y, sample[near] - a, unit[near], amplitude[near], t.wave_ptr, t.wave_channel, t.waveform, t.before
        )
        found[1].append(with_more.match_filtered(y, a))
    reach = round(MATCH_MS * t.fs_hz / 1000)
    gains = gains_of(sample, unit, np.concatenate(found[1]), reach)
    return np.concatenate(found[0])[:, [0, 3]], unit, gains


def _best(observed: np.ndarray, injected: np.ndarray) -> tuple[float, float, float, float, float]:
    """(accuracy, recall, precision, threshold, number of true spikes) from the gains found and those of injected spikes (0: lost)."""
    back = np.sort(injected[injected > 0])
    if len(back) < 5 or not len(observed):
        return 0.0, 0.0, 0.0, float("inf"), 0.0
    certain = float(np.quantile(back, UPPER))
    n_true = (observed >= certain).sum() / max((injected >= certain).mean(), 1e-6)
    if n_true < 1:
        return 0.0, 0.0, 0.0, certain, 0.0
    thresholds = np.linspace(LEAST_GAIN, max(certain, LEAST_GAIN), STEPS)
    recall = (injected >= thresholds[:, None]).mean(1)
    n = (observed >= thresholds[:, None]).sum(1)
    hits = np.minimum(n_true * recall, n)
    accuracy = hits / np.maximum(n + n_true - hits, 1e-9)
    k = int(np.flatnonzero(accuracy >= accuracy.max() - NEARLY)[0])
    return (
        float(accuracy[k]),
        float(recall[k]),
        float(hits[k] / max(n[k], 1)),
        float(thresholds[k]),
        float(n_true),
    )


def expect(t: Templates, x: np.ndarray, seed: int = 0) -> Expectation:
    """What to expect of every unit on samples like x (channels, n), and its best threshold."""
    observed, unit, gains = inject(t, x, seed)
    rows = [_best(observed[observed[:, 0] == u, 1], gains[unit == u]) for u in range(len(t))]
    accuracy, recall, precision, threshold, n_true = np.array(rows, float).reshape(-1, 5).T
    return Expectation(accuracy, recall, precision, threshold, n_true * t.fs_hz / x.shape[1])
