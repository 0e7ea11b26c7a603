"""The fits at the two ends of a stretch, for many channels at once: after a pulse on the whole array they are due together.

A block is LANES channels whose stretch begins at the same sample: rows of the rings are read once for all of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.clean.stim.state import CLEAN, WAIT
from spiked.clean.stim.stretch import FAST, ROBUST_SIGMAS, acceptable, go_on, prior_width, widen

# mypy: disable-error-code="no-untyped-def"

LANES = 8


@njit(nogil=True, cache=True)
def _fill(ring, idx, start, factor, y):
    """y (LANES, n) = factor times the ring's rows from sample `start` on, of the channels idx (LANES,)."""
    rows = len(ring)
    for i in range(y.shape[1]):
        row = ring[(start + i) % rows]
        for b in range(LANES):
            y[b, i] = factor * np.float32(row[idx[b]])


@njit(nogil=True, cache=True, fastmath=FAST)
def _weigh(g, y, w):
    """w (LANES, K) = y (LANES, n) times the transpose of g (K, n)."""
    for b in range(LANES):
        row = y[b]
        for k in range(len(g)):
            curve, total = g[k], np.float32(0)
            for i in range(len(row)):
                total += curve[i] * row[i]
            w[b, k] = total


@njit(nogil=True, cache=True, fastmath=FAST)
def _compose(w, g, fit):
    """fit (LANES, n) = w times g."""
    for b in range(LANES):
        row = fit[b]
        row[:] = 0
        for k in range(len(g)):
            curve, v = g[k], w[b, k]
            for i in range(len(row)):
                row[i] += v * curve[i]


@njit(nogil=True, cache=True, fastmath=FAST)
def _bounded(y, fit, bound, near):
    """near = y, no further from fit than bound (LANES,)."""
    for b in range(LANES):
        one, middle, out, far = y[b], fit[b], near[b], bound[b]
        for i in range(len(one)):
            out[i] = min(max(one[i], middle[i] - far), middle[i] + far)


@njit(nogil=True, cache=True)
def _write(s, idx, lanes, start, skip, stop, y, fit):
    """Samples start + skip to start + stop of the first lanes: remainder less fit, mixed with the untouched by the channel's weight."""
    rows = len(s.raw)
    for i in range(skip, stop):
        raw, out, bad = s.raw[(start + i) % rows], s.out[(start + i) % rows], s.bad[(start + i) % rows]
        for b in range(lanes):
            c = idx[b]
            off = raw[c] - (s.base[c] + y[b, i] - fit[b, i])
            out[c], bad[c] = raw[c] - s.weight[c] * off, False


@njit(nogil=True, cache=True)
def _lanes(channels, at, idx):
    """idx: the channels from `at` on, the first of them again where there are no more; how many are real."""
    n = min(LANES, len(channels) - at)
    for b in range(LANES):
        idx[b] = channels[at + b] if b < n else channels[at]
    return n


@njit(nogil=True, cache=True)
def right_halves(s, f, channels, o, t):
    """The samples before o that no symmetric window reaches, on these cleaned channels: from the last window that ends before o."""
    n, q = 2 * f.half + 1, np.float32(f.quantum)
    p = f.poly[n]
    idx, w = np.empty(LANES, np.int64), np.empty((LANES, len(p)), np.float32)
    y, fit = np.empty((LANES, n), np.float32), np.empty((LANES, n), np.float32)
    for at in range(0, len(channels), LANES):
        lanes = _lanes(channels, at, idx)
        _fill(s.near, idx, o - n, q, y)
        _weigh(p, y, w)
        _compose(w, p, fit)
        _fill(s.rem, idx, o - n, q, y)
        _write(s, idx, lanes, o - n, max(t - f.half - (o - n), 0), n, y, fit)


@njit(nogil=True, cache=True)
def _templates(s, f, idx, start, w):
    """w (LANES, K): what the channels' templates say of the components at `start`."""
    rho, template, seen, slot, last_bad = f.rho, s.template, s.seen, s.slot, s.last_bad
    for b in range(LANES):
        c = idx[b]
        off, j = start - last_bad[c] - 1, slot[c]
        there = f.learn and seen[j, c] > 0
        for k in range(len(rho)):
            left = f.curve[k, off] if off < f.curve.shape[1] else rho[k] ** off
            w[b, k] = template[j, k, c] * left if there else np.float32(0)


@njit(nogil=True, cache=True)
def _resolve(s, f, idx, lanes, width, t):
    """One block of channels whose stretch began 2 half samples before t and whose prior has the same width."""
    rows, half, start = len(s.raw), f.half, t - 2 * f.half
    n, q = 2 * half + 1, np.float32(f.quantum)
    y, near = np.empty((LANES, n), np.float32), np.empty((LANES, n), np.float32)
    fit, bound = np.empty((LANES, n), np.float32), np.empty(LANES, np.float32)
    amp, d = np.empty((LANES, len(f.rho)), np.float32), np.empty((LANES, len(f.rho)), np.float32)
    for b in range(LANES):
        bound[b] = np.float32(ROBUST_SIGMAS) * s.sigma[idx[b]]
    _fill(s.rem, idx, start, q, y)
    _templates(s, f, idx, start, amp)
    _compose(amp, f.curve, fit)
    y -= fit
    gain = f.gain[len(f.lengths) - 1, width]
    _weigh(gain, y, d)
    for _ in range(2):
        _compose(d, f.curve, fit)
        _bounded(y, fit, bound, near)
        _weigh(gain, near, d)
    _compose(d, f.curve, fit)
    y -= fit
    for b in range(lanes):
        widen(s, f, idx[b], start, d[b])
    amp += d
    p = f.poly[n]
    w = np.empty((LANES, len(p)), np.float32)
    _weigh(p, y, w)
    _compose(w, p, fit)
    for _ in range(2):
        _bounded(y, fit, bound, near)
        _weigh(p, near, w)
        _compose(w, p, fit)
    kept = 0
    for b in range(lanes):
        c = idx[b]
        if not acceptable(s, c, y[b], fit[b]) and t - s.onset[c] < f.timeout:
            for k in range(start, start + f.advance):
                s.out[k % rows, c], s.bad[k % rows, c] = s.base[c], True
            s.start[c] += f.advance
            continue
        idx[kept] = c
        if kept != b:
            y[kept], fit[kept], near[kept], amp[kept] = y[b], fit[b], near[b], amp[b]
        kept += 1
    _write(s, idx, kept, start, 0, half + 1, y, fit)
    _slide_from(s, f, idx, kept, start, y, near)
    for b in range(kept):
        c = idx[b]
        go_on(s, f, c, amp[b], n)
        s.phase[c], s.live[c], s.weight[c], s.calm[c], s.far[c] = CLEAN, True, 1, 0, 0


@njit(nogil=True, cache=True)
def _slide_from(s, f, idx, lanes, start, y, near):
    """The rings and moments of the sliding cubic over the window from `start` on."""
    rows, half, inverse = len(s.raw), f.half, np.float32(1 / f.quantum)
    for b in range(lanes):
        c = idx[b]
        s.u0[c] = s.u1[c] = s.w0[c] = s.w1[c] = s.w2[c] = 0
    for i in range(y.shape[1]):
        rem, held, j = s.rem[(start + i) % rows], s.near[(start + i) % rows], i - half
        for b in range(lanes):
            c = idx[b]
            v, p = np.int32(np.rint(y[b, i] * inverse)), np.int32(np.rint(near[b, i] * inverse))
            rem[c], held[c] = v, p
            s.u0[c] += v
            s.u1[c] += np.int32(j) * v
            s.w0[c] += p
            s.w1[c] += np.int32(j) * p
            s.w2[c] += np.int32(j * j) * p


@njit(nogil=True, cache=True)
def resolve(s, f, t):
    """What has waited for a whole window becomes clean, or its first samples blank where the fit fails."""
    start, n, widths = t - 2 * f.half, 0, len(f.widths)
    due = np.empty(len(s.phase), np.int64)
    width = np.empty(len(s.phase), np.int64)
    for c in range(len(s.phase)):
        if s.phase[c] == WAIT and s.start[c] == start:
            due[n], width[n] = c, prior_width(s, f, c)
            n += 1
    if n == 0:
        return
    idx = np.empty(LANES, np.int64)
    for w in range(widths):
        same = due[:n][width[:n] == w]
        for at in range(0, len(same), LANES):
            _resolve(s, f, idx, _lanes(same, at, idx), w, t)
