"""Spike trains against spike trains: coincidences, lags, agreement, and the score against a simulated truth.

numpy and scipy only. All times are sample numbers. Two spikes coincide when they are at most `window` samples
apart after the lag is taken out; each spike takes part in at most one coincidence per pair of units.

Accuracy, recall and precision are those of SpikeForest (Magland et al. 2020, eLife 9:e55167): with n_match
coincidences, accuracy = n_match / (n_true + n_sorted - n_match), recall = n_match / n_true, precision =
n_match / n_sorted. True and sorted units are paired one to one so that the summed accuracy is largest
(Hungarian method).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class Trains:
    """Spike trains of one sorting, in time order: `samples` (spikes,) int64, `index` (spikes,) into `ids`."""

    samples: np.ndarray
    index: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, samples: np.ndarray, units: np.ndarray) -> Trains:
        """From parallel arrays in any order. Negative units are unsorted spikes and are left out."""
        samples, units = np.asarray(samples, np.int64), np.asarray(units, np.int64)
        if samples.shape != units.shape or samples.ndim != 1:
            raise ValueError(f"samples {samples.shape} and units {units.shape} must be equally long lists")
        keep = units >= 0
        samples, units = samples[keep], units[keep]
        order = np.argsort(samples, kind="stable")
        ids, index = np.unique(units[order], return_inverse=True)
        return cls(samples[order], index.astype(np.int64), ids)

    @property
    def counts(self) -> np.ndarray:
        """(units,) spikes per unit."""
        return np.bincount(self.index, minlength=len(self.ids))


def neighbours(a: Trains, b: Trains, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions (i, j) of all spikes with |b[j] - a[i]| <= reach, ordered by i, then j."""
    low = np.searchsorted(b.samples, a.samples - reach, "left")
    n = np.searchsorted(b.samples, a.samples + reach, "right") - low
    i = np.repeat(np.arange(len(a.samples)), n)
    j = np.arange(len(i)) - np.repeat(np.cumsum(n) - n, n) + np.repeat(low, n)
    return i, j


def pair_lags(a: Trains, b: Trains, max_lag: int, smooth: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Where each pair's cross-correlogram peaks within +-max_lag: (lags, heights), both (a units, b units).

    A positive lag says that b's spikes come later. `heights` is the number of spike pairs within `smooth`
    samples of the peak. Ties go to the smallest |lag|; a pair without neighbours has lag 0 and height 0.
    """
    shape = (len(a.ids), len(b.ids))
    lags, heights = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    if not len(a.samples) or not len(b.samples):
        return lags, heights
    i, j = neighbours(a, b, max_lag + smooth)
    pair = a.index[i] * shape[1] + b.index[j]
    delta = b.samples[j] - a.samples[i]
    order = np.argsort(pair, kind="stable")
    pair, delta = pair[order], delta[order]
    found, start = np.unique(pair, return_index=True)
    width = max_lag + smooth
    triangle = np.convolve(np.ones(smooth + 1, np.int64), np.ones(smooth + 1, np.int64))
    prefer = np.argsort(np.abs(np.arange(-max_lag, max_lag + 1)), kind="stable")
    for p, lo, hi in zip(found, start, np.append(start[1:], len(pair)), strict=True):
        histogram = np.bincount(delta[lo:hi] + width, minlength=2 * width + 1)
        best = prefer[np.argmax(np.convolve(histogram, triangle, "valid")[prefer])]
        lags[divmod(p, shape[1])] = best - max_lag
        heights[divmod(p, shape[1])] = histogram[best : best + 2 * smooth + 1].sum()
    return lags, heights


def coincidences(a: Trains, b: Trains, window: int, lags: np.ndarray) -> np.ndarray:
    """(a units, b units) int64: one-to-one coincidences within `window` after `lags[a, b]` is taken from b.

    The largest one-to-one matching of every pair is counted: spikes in time order, each taking the earliest
    free partner, which is optimal when all windows are equally wide.
    """
    shape = (len(a.ids), len(b.ids))
    if not len(a.samples) or not len(b.samples):
        return np.zeros(shape, np.int64)
    i, j = neighbours(a, b, window + int(np.abs(lags).max(initial=0)))
    delta = b.samples[j] - a.samples[i] - lags[a.index[i], b.index[j]]
    near = np.abs(delta) <= window
    i, j = i[near], j[near]
    pair = a.index[i] * shape[1] + b.index[j]
    crowded = _repeated(i * shape[1] + b.index[j]) | _repeated(j * shape[0] + a.index[i])
    counts = np.bincount(pair[~crowded], minlength=shape[0] * shape[1])
    taken: set[tuple[int, int, int]] = set()
    for p, ti, sj in zip(pair[crowded].tolist(), i[crowded].tolist(), j[crowded].tolist(), strict=True):
        if (p, 0, ti) not in taken and (p, 1, sj) not in taken:
            taken.update(((p, 0, ti), (p, 1, sj)))
            counts[p] += 1
    return counts.reshape(shape)


def _repeated(keys: np.ndarray) -> np.ndarray:
    """True where a key occurs more than once."""
    _, inverse, n = np.unique(keys, return_inverse=True, return_counts=True)
    return n[inverse] > 1


def accuracy_matrix(matched: np.ndarray, n_a: np.ndarray, n_b: np.ndarray) -> np.ndarray:
    """matched / (n_a + n_b - matched), elementwise; (a units, b units) float64."""
    union = n_a[:, None] + n_b[None, :] - matched
    return np.where(union > 0, matched / np.maximum(union, 1), 0.0)


def score(
    true_samples: np.ndarray,
    true_units: np.ndarray,
    sorted_samples: np.ndarray,
    sorted_units: np.ndarray,
    fs: float,
    window_ms: float = 0.4,
    max_lag_ms: float = 0.5,
) -> dict[int, dict[str, Any]]:
    """Per true unit: how well its matched sorted unit found it.

    Sorters put a spike's time at different points of its waveform, so each sorted unit is first shifted by
    one constant lag within +-max_lag_ms: the peak of its cross-correlogram with the true unit it follows
    best. Sorted units below zero are unsorted spikes and do not count.

    Returns {true unit: {"unit": sorted unit or None, "accuracy", "recall", "precision" (0 to 1), "lag_ms",
    "n_true", "n_sorted", "n_match"}}, in order of the true unit's id.
    """
    true, found = Trains.of(true_samples, true_units), Trains.of(sorted_samples, sorted_units)
    window, max_lag = round(window_ms * fs / 1000), round(max_lag_ms * fs / 1000)
    result = {int(u): _unmatched(int(n)) for u, n in zip(true.ids, true.counts, strict=True)}
    if not len(true.ids) or not len(found.ids):
        return result
    lags, heights = pair_lags(true, found, max_lag)
    lag = lags[np.argmax(heights, axis=0), np.arange(len(found.ids))]
    matched = coincidences(true, found, window, np.broadcast_to(lag, lags.shape))
    accuracy = accuracy_matrix(matched, true.counts, found.counts)
    for t, s in zip(*linear_sum_assignment(-accuracy), strict=True):
        n = int(matched[t, s])
        if n:
            result[int(true.ids[t])] = {
                "unit": int(found.ids[s]),
                "accuracy": float(accuracy[t, s]),
                "recall": n / int(true.counts[t]),
                "precision": n / int(found.counts[s]),
                "lag_ms": float(lag[s] * 1000 / fs),
                "n_true": int(true.counts[t]),
                "n_sorted": int(found.counts[s]),
                "n_match": n,
            }
    return result


def _unmatched(n_true: int) -> dict[str, Any]:
    zero = {"accuracy": 0.0, "recall": 0.0, "precision": 0.0, "lag_ms": 0.0}
    return {"unit": None, **zero, "n_true": n_true, "n_sorted": 0, "n_match": 0}


def summary(scores: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Means over the true units, and how many were found well (accuracy at least 0.8) or at all (0.5)."""
    accuracy = np.array([s["accuracy"] for s in scores.values()])
    if not len(accuracy):
        return {"true_units": 0, "accuracy": 0.0, "recall": 0.0, "precision": 0.0, "well": 0, "half": 0}
    return {
        "true_units": len(accuracy),
        "accuracy": float(accuracy.mean()),
        "recall": float(np.mean([s["recall"] for s in scores.values()])),
        "precision": float(np.mean([s["precision"] for s in scores.values()])),
        "well": int((accuracy >= 0.8).sum()),
        "half": int((accuracy >= 0.5).sum()),
    }
