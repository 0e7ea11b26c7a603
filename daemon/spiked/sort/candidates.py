"""Candidates: which units fit a detection peak, and which may still come."""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.sort.buffer import BASE, DROPPED, FILL, N_PENDING, NEXT, count_above
from spiked.sort.conflicts import UNDECIDED
from spiked.sort.sequences import INNER, LOOSE
from spiked.sort.window import may_be_peak, peak_near, refined, trough

# mypy: disable-error-code="no-untyped-def"


@njit(nogil=True, cache=True)
def match(u, at, half, ahead, noise, bx, bq, bad, careful, root_offset, ptr, electrode, latency, amp, w_lat, w_amp, flags,
           min_loose, min_inner, loose, lim, mark, lag, level, value, stamp):  # fmt: skip
    """(fits, sum of the two distances in units of their limits, loose electrodes) of unit u at column `at`."""
    d_lat = d_amp = seen_lat = seen_amp = 0.0
    n_loose = n_inner = 0
    for k in range(ptr[u], ptr[u + 1]):
        e = electrode[k]
        if mark[e] != stamp:
            mark[e] = stamp
            value[e] = np.nan
            if not (careful and bad[e, at]) and noise[e] > 0:
                t, level[e] = peak_near(bq, e, at, half, ahead) if k > ptr[u] else (at, bq[e, at])
                lag[e] = t - at + refined(bq, e, t, at - half, at + ahead) - root_offset
                value[e] = abs(bx[e, t]) / noise[e]
        if np.isnan(value[e]):
            continue
        if level[e] >= loose:
            if flags[k] & LOOSE:
                n_loose += 1
            if flags[k] & INNER:
                n_inner += 1
        d_lat += w_lat[k] * min(abs(lag[e] - latency[k]), lim[0])
        d_amp += w_amp[k] * min(abs(value[e] - amp[k]) / amp[k], lim[1])
        seen_lat += w_lat[k]
        seen_amp += w_amp[k]
    if n_loose < min_loose[u] or n_inner < min_inner[u] or seen_lat < 0.5 or seen_amp < 0.5:
        return False, 0.0, 0
    d_lat /= seen_lat * lim[2]
    d_amp /= seen_amp * lim[3]
    return d_lat <= 1 and d_amp <= 1, d_lat + d_amp, n_loose


@njit(nogil=True, cache=True)
def score(distance, n_loose, r, at, half, ahead, bq, near_ptr, near, loose):
    """Published score over its largest value: closeness, plus how many of the electrodes seen belong to the unit."""
    crossed = 0
    for k in range(near_ptr[r], near_ptr[r + 1]):
        if peak_near(bq, near[k], at, half, ahead)[1] >= loose:
            crossed += 1
    return (2.1 - distance + 0.5 * min(1.0, n_loose / max(1, crossed))) / 2.6


@njit(nogil=True, cache=True)
def root_fits(a, u, root_mean, root_sd, lim):
    """Whether amplitude a (noise SDs) at its root is one that unit u has."""
    return abs(a - root_mean[u]) <= lim[4] * root_sd[u]


@njit(nogil=True, cache=True)
def evaluate(r, at, sample, half, ahead, reach, noise, bx, bq, bad, n_bad, n_above, roots, root_ptr, root_units, near_ptr, near,
              ptr, electrode, latency, amp, w_lat, w_amp, flags, min_loose, min_inner, root_mean, root_sd,
              loose, array_limit, lim, pending, state, mark, lag, level, value, stamp):  # fmt: skip
    """Append to `pending` the units rooted at roots[r] that fit the peak at column `at`."""
    root = roots[r]
    careful = n_bad[at] > 0
    if (careful and bad[root, at]) or not noise[root] > 0:
        return
    if bq.shape[0] > array_limit and count_above(bq, n_above, at, loose) > array_limit:
        return
    offset = refined(bq, root, at, at - half, at + ahead)
    a = abs(bx[root, at]) / noise[root]
    for i in range(root_ptr[r], root_ptr[r + 1]):
        u = root_units[i]
        if not root_fits(a, u, root_mean, root_sd, lim):
            continue
        fits, distance, n_loose = match(
            u, at, half, ahead, noise, bx, bq, bad, careful, offset, ptr, electrode, latency, amp, w_lat, w_amp, flags,
            min_loose, min_inner, loose, lim, mark, lag, level, value, stamp,
        )  # fmt: skip
        if not fits:
            continue
        n = state[N_PENDING]
        if n >= len(pending):
            state[DROPPED] += 1
            continue
        pending[n].sample = sample
        pending[n].unit = u
        pending[n].state = UNDECIDED
        pending[n].score = score(distance, n_loose, r, at, half, ahead, bq, near_ptr, near, loose)
        pending[n].amplitude_uv = trough(bx, root, at, reach)
        state[N_PENDING] = n + 1


@njit(nogil=True, cache=True)
def noise_row(sample, size, oldest, newest, rows):
    """Row of the noise ring for the block that a sample is in; -1 where it is not kept."""
    block = sample // size
    return block % rows if oldest <= block <= newest else -1


@njit(nogil=True, cache=True)
def rival_announced(u, sample, state, noise, size, oldest, newest, bx, bq, loose, lim, roots_of, root_mean, root_sd,
                    window, rival_ptr, rival):  # fmt: skip
    """Whether a candidate that is still to be evaluated may conflict with unit u at `sample`.

    Only a loose peak of fitting amplitude on the rival's own root can become one, and peaks are known up to the newest
    sample, further than candidates are evaluated.
    """
    base, fill = state[BASE], state[FILL]
    for k in range(rival_ptr[u], rival_ptr[u + 1]):
        v = rival[k]
        last = sample + window[u, v] - base
        if last >= fill:
            return True
        e = roots_of[v]
        for t in range(state[NEXT] - base, last + 1):
            if may_be_peak(bq, e, t, fill, loose):
                row = noise_row(base + t, size, oldest, newest, len(noise))
                if row >= 0 and noise[row, e] > 0:
                    a = abs(bx[e, t]) / noise[row, e]
                    if root_fits(a, v, root_mean, root_sd, lim):
                        return True
    return False
