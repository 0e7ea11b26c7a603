"""What both calibration and assignment read off the samples around a spike, so that they agree to the last bit."""

from __future__ import annotations

import numpy as np
from numba import njit

# ruff: noqa: SIM110 - compiled code has no any() over a generator
# mypy: disable-error-code="no-untyped-def"


@njit(nogil=True, cache=True, inline="always")
def vertex(a, b, c):
    """Where between -0.5 and 0.5 the parabola through (-1, a), (0, b), (1, c) peaks, b being the largest."""
    bend = a - 2 * b + c
    if bend >= 0:
        return 0.0
    d = 0.5 * (a - c) / bend
    return min(0.5, max(-0.5, d))


@njit(nogil=True, cache=True)
def peak_near(q, e, at, half, ahead):
    """(column, value) of the largest of q[e, at - half : at + ahead + 1]; the earliest of equals."""
    best, k = q[e, at - half], at - half
    for t in range(at - half + 1, at + ahead + 1):
        if q[e, t] > best:
            best, k = q[e, t], t
    return k, best


@njit(nogil=True, cache=True)
def refined(q, e, k, lo, hi):
    """Sub-sample offset of the peak at column k; 0 where k is no local peak inside [lo, hi]."""
    if k <= lo or k >= hi or q[e, k] < q[e, k - 1] or q[e, k] < q[e, k + 1]:
        return 0.0
    return vertex(q[e, k - 1], q[e, k], q[e, k + 1])


@njit(nogil=True, cache=True)
def any_above(q, e, lo, hi, threshold):
    """Whether anything in q[e, lo:hi] is at or above the threshold."""
    n = np.int32(0)
    for t in range(lo, hi):
        n += q[e, t] >= threshold
    return n > 0


@njit(nogil=True, cache=True)
def is_inside(sample, stretches):
    """Whether a sample number lies in one of the stretches, rows of (start, stop)."""
    for k in range(len(stretches)):
        if stretches[k, 0] <= sample < stretches[k, 1]:
            return True
    return False


@njit(nogil=True, cache=True)
def is_peak(q, e, k, threshold):
    """A local peak at or above the threshold; of equal neighbours the first counts."""
    v = q[e, k]
    return v >= threshold and v > q[e, k - 1] and v >= q[e, k + 1]


@njit(nogil=True, cache=True)
def may_be_peak(q, e, k, fill, threshold):
    """Whether column k < fill is a peak, or can still become one because column k + 1 is not there yet."""
    v = q[e, k]
    return v >= threshold and v > q[e, k - 1] and (k + 1 >= fill or v >= q[e, k + 1])


@njit(nogil=True, cache=True)
def trough(x, e, k, reach):
    """The value with the largest magnitude of x[e, k - reach : k + reach + 1], sign kept."""
    v = x[e, k]
    for t in range(k - reach, k + reach + 1):
        if abs(x[e, t]) > abs(v):
            v = x[e, t]
    return v
