"""Medians as elements of what they are taken of, so that they are the same however they were found."""

from __future__ import annotations

import numpy as np
from numba import njit

# mypy: disable-error-code="no-untyped-def"

FEW = 16


@njit(nogil=True, cache=True)
def select(a, n, k):
    """Element k of a[:n] in order (Hoare's selection; reorders a so that none after k is smaller)."""
    lo, hi = 0, n - 1
    while lo < hi:
        pivot = a[(lo + hi) // 2]
        i, j = lo, hi
        while i <= j:
            while a[i] < pivot:
                i += 1
            while a[j] > pivot:
                j -= 1
            if i <= j:
                a[i], a[j] = a[j], a[i]
                i += 1
                j -= 1
        if k <= j:
            hi = j
        elif k >= i:
            lo = i
        else:
            break
    return a[k]


@njit(nogil=True, cache=True)
def lower_median(a, n):
    """Element (n - 1) // 2 of a[:n] in order; reorders a."""
    return select(a, n, (n - 1) // 2)


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _largest(a, n, s):
    """The s-th largest of a[:n]; uses what follows."""
    if s > FEW:
        return select(a, n, n - s)
    top = a[n : n + s]  # the largest so far, descending
    top[:] = -np.inf
    for i in range(n):
        v = a[i]
        if v > top[s - 1]:
            k = s - 1
            while k > 0 and v > top[k - 1]:
                top[k] = top[k - 1]
                k -= 1
            top[k] = v
    return top[s - 1]


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def median_near(values, known, guess, scratch):
    """Element (known - 1) // 2 in order of the `known` finite ones of `values` (the others are infinite).

    The nearer to it the guess the less there is to do: only what lies on its other side is looked through.
    `scratch` holds FEW more than `values`.
    """
    want = (known - 1) // 2
    below = np.int32(0)
    upto = np.int32(0)
    for v in values:
        below += v < guess
        upto += v <= guess
    n = 0
    if want < below:
        for v in values:
            scratch[n] = v
            n += v < guess
        return _largest(scratch, n, below - want)
    if want >= upto:
        for v in values:
            scratch[n] = -v
            n += v > guess
        return -_largest(scratch, n, want - upto + 1)
    return guess
