"""The last samples, logits and validity of a stream, in flat arrays that compiled code slides along."""

from __future__ import annotations

import numpy as np
from numba import njit

# ruff: noqa: SIM110 - compiled code has no any() over a generator
# mypy: disable-error-code="no-untyped-def"

SLICE = 64  # samples taken in and evaluated at a time inside the compiled loop
ROOM = 1024

FILL, BASE, NEXT, N_PENDING, FINAL, DROPPED = 0, 1, 2, 3, 4, 5  # places in the state vector


@njit(nogil=True, cache=True)
def append(bx, bq, bad, n_bad, state, keep, x, q, valid, at, m):
    """Take columns [at, at + m) of x and q; older columns beyond `keep` make room when the buffer is full.

    valid is (1, n), (channels, n) or (0, 0) for all valid; n_bad counts the invalid channels per column.
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
        state[BASE] += cut
        fill = keep
    for c in range(bx.shape[0]):
        for t in range(m):
            bx[c, fill + t] = x[c, at + t]
            bq[c, fill + t] = q[c, at + t]
    for t in range(m):
        n_bad[fill + t] = 0
    if valid.shape[0]:
        for c in range(bx.shape[0]):
            row = c if valid.shape[0] > 1 else 0
            for t in range(m):
                ok = valid[row, at + t]
                bad[c, fill + t] = not ok
                if not ok:
                    n_bad[fill + t] += 1
    else:
        for c in range(bx.shape[0]):
            for t in range(m):
                bad[c, fill + t] = False
    state[FILL] = fill + m


@njit(nogil=True, cache=True)
def any_bad(n_bad, at, half):
    """True if any channel is invalid within half of column `at`."""
    for t in range(at - half, at + half + 1):
        if n_bad[t]:
            return True
    return False


@njit(nogil=True, cache=True)
def bad_near(bad, e, at, half):
    """True if channel e is invalid within half of column `at`."""
    for t in range(at - half, at + half + 1):
        if bad[e, t]:
            return True
    return False


class StreamBuffer:
    """State of one stream for the compiled loops. `lead` samples are needed on both sides of an evaluated one."""

    def __init__(self, n_channels: int, lead: int) -> None:
        self.lead = max(1, lead)
        self.keep = 2 * self.lead + 2
        size = ROOM + self.keep + SLICE
        self.x = np.zeros((n_channels, size), np.float32)
        self.q = np.zeros((n_channels, size), np.float32)
        self.bad = np.zeros((n_channels, size), np.bool_)
        self.n_bad = np.zeros(size, np.int32)
        self.state = np.zeros(8, np.int64)

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
        return np.zeros((0, 0), np.bool_)
    return np.ascontiguousarray(np.atleast_2d(valid), np.bool_)
