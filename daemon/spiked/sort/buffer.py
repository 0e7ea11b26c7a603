"""The last samples, logits and validity of a stream, in flat arrays that compiled code slides along."""

from __future__ import annotations

import numpy as np
from numba import njit, types

# ruff: noqa: SIM110 - compiled code has no any() over a generator
# mypy: disable-error-code="no-untyped-def"

SLICE = 64  # samples evaluated at a time inside the compiled loops
ROOM = 1024  # samples taken in at a time

FILL, BASE, NEXT, N_PENDING, FINAL, DROPPED = 0, 1, 2, 3, 4, 5  # places in the state vector
ALL_VALID = np.zeros((0, 0), np.bool_)

_FLOATS, _BOOLS = types.float32[:, ::1], types.boolean[:, ::1]
_ANY_FLOATS = types.Array(types.float32, 2, "A", readonly=True)
_ANY_BOOLS = types.Array(types.boolean, 2, "A", readonly=True)
_INTS = types.int32[::1]


# One signature for arrays of every layout: views are taken as they are and nothing is compiled while samples wait.
@njit(
    types.void(
        _FLOATS, _FLOATS, _BOOLS, _INTS, _INTS, types.int64[::1], types.int64, _ANY_FLOATS, _ANY_FLOATS, _ANY_BOOLS,
        types.int64, types.int64,
    ),
    nogil=True, cache=True,
)  # fmt: skip
def append(bx, bq, bad, n_bad, n_above, state, keep, x, q, valid, at, m):
    """Take columns [at, at + m) of x and q; older columns beyond `keep` make room when the buffer is full.

    valid is (1, n), (channels, n) or (0, 0) for all valid; n_bad counts the invalid channels per column, and `bad` says
    which only where there are any. n_above is set to -1: not counted yet.
    """
    fill = state[FILL]
    if fill + m > bx.shape[1]:
        cut = fill - keep
        for c in range(bx.shape[0]):
            for t in range(keep):
                bx[c, t] = bx[c, cut + t]
                bq[c, t] = bq[c, cut + t]
                bad[c, t] = bad[c, cut + t]
        for t in range(keep):
            n_bad[t] = n_bad[cut + t]
            n_above[t] = n_above[cut + t]
        state[BASE] += cut
        fill = keep
    for c in range(bx.shape[0]):
        for t in range(m):
            bx[c, fill + t] = x[c, at + t]
            bq[c, fill + t] = q[c, at + t]
    for t in range(m):
        n_bad[fill + t] = 0
        n_above[fill + t] = -1
    if valid.shape[0]:
        for c in range(bx.shape[0]):
            row = c if valid.shape[0] > 1 else 0
            for t in range(m):
                ok = valid[row, at + t]
                bad[c, fill + t] = not ok
                if not ok:
                    n_bad[fill + t] += 1
    state[FILL] = fill + m


@njit(nogil=True, cache=True)
def any_bad(n_bad, at, half, ahead):
    """True if any channel is invalid in the columns at - half to at + ahead."""
    for t in range(at - half, at + ahead + 1):
        if n_bad[t]:
            return True
    return False


@njit(nogil=True, cache=True)
def bad_near(bad, n_bad, e, at, half, ahead):
    """True if channel e is invalid in the columns at - half to at + ahead."""
    for t in range(at - half, at + ahead + 1):
        if n_bad[t] and bad[e, t]:
            return True
    return False


@njit(nogil=True, cache=True)
def count_above(bq, n_above, at, threshold):
    """Channels at or above the threshold at column `at`, counted once."""
    if n_above[at] < 0:
        n = 0
        for e in range(bq.shape[0]):
            n += bq[e, at] >= threshold
        n_above[at] = n
    return n_above[at]


class StreamBuffer:
    """State of one stream for the compiled loops. `lead` samples are needed on both sides of an evaluated one."""

    def __init__(self, n_channels: int, lead: int) -> None:
        self.lead = max(1, lead)
        self.keep = 2 * self.lead + 2
        size = ROOM + self.keep
        self.x = np.zeros((n_channels, size), np.float32)
        self.q = np.zeros((n_channels, size), np.float32)
        self.bad = np.zeros((n_channels, size), np.bool_)
        self.n_bad = np.zeros(size, np.int32)
        self.n_above = np.zeros(size, np.int32)
        self.state = np.zeros(8, np.int64)

    def take(self, x: np.ndarray, q: np.ndarray, valid: np.ndarray, at: int) -> int:
        """Take in what there is room for from column `at` on, of (channels, n) float32 and a mask; the next column."""
        m = min(ROOM, x.shape[1] - at)
        append(self.x, self.q, self.bad, self.n_bad, self.n_above, self.state, self.keep, x, q, valid, at, m)
        return at + m

    def start(self, first_sample: int) -> None:
        """Forget the past; the next sample is `first_sample`."""
        dropped = self.state[DROPPED]
        self.state[:] = 0
        self.state[BASE] = first_sample
        self.state[NEXT] = first_sample + self.lead
        self.state[FINAL] = first_sample
        self.state[DROPPED] = dropped

    @property
    def end(self) -> int:
        """One past the newest sample."""
        return int(self.state[BASE] + self.state[FILL])


def as_mask(valid: np.ndarray | None) -> np.ndarray:
    """valid as `append` wants it."""
    if valid is None:
        return ALL_VALID
    return np.atleast_2d(np.asarray(valid, np.bool_))
