"""One-dimensional Gaussian mixtures with the number of parts chosen by BIC, small, deterministic and fast.

Expectation maximisation as in scikit-learn's GaussianMixture (a gain in mean log-likelihood below 1e-3 ends it),
but on a histogram fine against the variance floor, started from quantiles instead of random numbers. The floor is
the data's resolution: the published code's 1e-6 lets a part collapse onto a single integer lag.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# mypy: disable-error-code="no-untyped-def"

MAX_BINS = 400


@njit(nogil=True, cache=True)
def _centres(v, w, k):
    """Centres of k groups of ascending values v with weights w: Lloyd's algorithm from quantiles."""
    n = len(v)
    centre = np.empty(k)
    total = w.sum()
    j, below = 0, 0.0
    for i in range(n):
        below += w[i]
        while j < k and below >= (j + 0.5) / k * total:
            centre[j] = v[i]
            j += 1
    while j < k:
        centre[j] = v[-1]
        j += 1
    for j in range(1, k):
        if centre[j] <= centre[j - 1]:
            centre[j] = centre[j - 1] + 1e-3 * (v[-1] - v[0] + 1e-9)
    sums, size = np.zeros(k), np.zeros(k)
    for _ in range(100):
        sums[:] = 0
        size[:] = 0
        j = 0
        for i in range(n):
            while j + 1 < k and abs(v[i] - centre[j + 1]) < abs(v[i] - centre[j]):
                j += 1
            sums[j] += w[i] * v[i]
            size[j] += w[i]
        moved = 0.0
        for j in range(k):
            if size[j] > 0:
                moved = max(moved, abs(sums[j] / size[j] - centre[j]))
                centre[j] = sums[j] / size[j]
        if moved < 1e-6:
            break
    return centre


@njit(nogil=True, cache=True)
def fit(v, w, k, floor):
    """(weights, means, variances, log-likelihood) of k Gaussians on ascending values v that occur w times."""
    n = len(v)
    total = w.sum()
    mean = _centres(v, w, k)
    var, weight = np.empty(k), np.zeros(k)
    p = np.zeros((n, k))
    for i in range(n):
        j = 0
        for m in range(1, k):
            if abs(v[i] - mean[m]) < abs(v[i] - mean[j]):
                j = m
        p[i, j] = w[i]
    before = -np.inf
    likelihood = 0.0
    for _ in range(1000):
        for j in range(k):
            s = p[:, j].sum() + 1e-10
            weight[j] = s / total
            mean[j] = (p[:, j] * v).sum() / s
            var[j] = (p[:, j] * (v - mean[j]) ** 2).sum() / s + floor
        likelihood = 0.0
        for i in range(n):
            top = -np.inf
            for j in range(k):
                p[i, j] = np.log(weight[j]) - 0.5 * (
                    np.log(2 * np.pi * var[j]) + (v[i] - mean[j]) ** 2 / var[j]
                )
                top = max(top, p[i, j])
            s = 0.0
            for j in range(k):
                p[i, j] = np.exp(p[i, j] - top)
                s += p[i, j]
            for j in range(k):
                p[i, j] *= w[i] / s
            likelihood += w[i] * (top + np.log(s))
        if likelihood / total - before < 1e-3:
            break
        before = likelihood / total
    return weight, mean, var, likelihood


def parts(values: np.ndarray, most: int, floor: float, fewest: int = 1) -> np.ndarray:
    """Part (int64, from 0) of each value in the mixture of `fewest` to `most` Gaussians with the lowest BIC.

    `floor` is added to every variance; values are binned at a quarter of its root (or coarser, 400 bins at most).
    """
    values = np.asarray(values, np.float64)
    label = np.zeros(len(values), np.int64)
    if len(values) < 2:
        return label
    step = max(np.sqrt(floor) / 4, np.ptp(values) / MAX_BINS)
    v, where, count = np.unique(np.round(values / step), return_inverse=True, return_counts=True)
    v, w = v * step, count.astype(np.float64)
    lowest = np.inf
    for k in range(fewest, min(most, len(v)) + 1):
        weight, mean, var, likelihood = fit(v, w, k, floor)
        bic = -2 * likelihood + (3 * k - 1) * np.log(len(values))
        if bic < lowest:
            lowest = bic
            label = (np.log(weight) - 0.5 * (np.log(var) + (v[:, None] - mean) ** 2 / var)).argmax(1)[where]
    return label
