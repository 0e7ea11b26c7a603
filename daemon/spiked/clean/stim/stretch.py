"""The compiled passes at the two ends of a stretch between artifacts, for one channel: rare, so one channel at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.clean.stim.state import CLEAN, DEAD, ONSET, SLOT, WAIT

# mypy: disable-error-code="no-untyped-def"

FAST = {"contract", "nsz", "nnan", "ninf", "reassoc"}
ROBUST_SIGMAS = 3.0
TEST = 15  # samples whose mean must not be off by more than
FIRST_SIGMAS = 2.4
LATER_SIGMAS = 1.6
LEARNED_SHARE = 0.1


@njit(nogil=True, cache=True, inline="always")
def _rebase(s, f, c, o):
    """The baseline of a channel that was untouched: mean of what is near it in the samples before o."""
    rows = len(s.raw)
    mean = np.float32(0)
    for t in range(o - f.history, o, 2):
        mean += s.raw[t % rows, c]
    mean /= np.float32((f.history + 1) // 2)
    total, n = np.float32(0), np.float32(0)
    for t in range(o - f.history, o, 2):
        v = s.raw[t % rows, c]
        if abs(v - mean) < np.float32(3) * s.sigma[c]:
            total += v
            n += np.float32(1)
    s.base[c] = total / n if n else mean


@njit(nogil=True, cache=True, inline="always")
def begin(s, f, c, o, t):
    """A pulse began at o on channel c; t >= o is the present sample. What was before is decided, the rest is blank.

    On a channel that is being cleaned `right_halves` comes first.
    """
    rows, half = len(s.raw), f.half
    if s.live[c]:
        if s.weight[c] == 0:
            for k in range(t - half, o):
                s.out[k % rows, c], s.bad[k % rows, c] = s.raw[k % rows, c], False
            _rebase(s, f, c, o)
            s.z[:, c] = 0
    elif s.phase[c] == WAIT:
        end_wait(s, f, c, o - 1)
    for k in range(o, t + 1):
        s.out[k % rows, c], s.bad[k % rows, c] = s.base[c], True
    s.phase[c], s.live[c], s.weight[c] = DEAD, False, 1
    s.slot[c] = s.ints[SLOT]
    s.onset[c], s.last_bad[c], s.peak[c], s.flat[c], s.calm[c] = o, t, 0, 0, 0
    for k in range(o, t + 1):
        s.peak[c] = max(s.peak[c], abs(s.raw[k % rows, c] - s.base[c]))


@njit(nogil=True, cache=True)
def _gather(s, f, c, start, n):
    """The remainders of n samples of a channel, in codes: a contiguous copy, which everything here works on."""
    rows, q = len(s.rem), np.float32(f.quantum)
    y = np.empty(n, np.float32)
    for i in range(n):
        y[i] = q * np.float32(s.rem[(start + i) % rows, c])
    return y


@njit(nogil=True, cache=True)
def _scatter(s, f, c, start, y):
    """The remainders as they are now, back in whole quanta."""
    rows, inverse = len(s.rem), np.float32(1 / f.quantum)
    for i in range(len(y)):
        s.rem[(start + i) % rows, c] = np.int32(np.rint(y[i] * inverse))


@njit(nogil=True, cache=True, fastmath=FAST)
def _project(p, y, fit):
    """fit = the part of y that the rows of p (orthonormal) span."""
    fit[:] = 0
    for k in range(len(p)):
        w = np.float32(0)
        for i in range(len(y)):
            w += p[k, i] * y[i]
        for i in range(len(y)):
            fit[i] += w * p[k, i]


@njit(nogil=True, cache=True, fastmath=FAST)
def _polynomial(f, y, order, bound, near, fit):
    """Polynomial through y (n,): least squares, twice again with what lies far from the fit brought near to it."""
    p = f.poly[len(y), : order + 1, : len(y)]
    near[:] = y
    _project(p, near, fit)
    for _ in range(2):
        for i in range(len(y)):
            near[i] = min(max(y[i], fit[i] - bound), fit[i] + bound)
        _project(p, near, fit)


@njit(nogil=True, cache=True)
def _write(s, f, c, start, skip, stop, y, fit):
    """Samples start + skip to start + stop: remainder less fit, mixed with the untouched by the channel's weight."""
    rows = len(s.raw)
    for i in range(skip, stop):
        k = (start + i) % rows
        off = s.raw[k, c] - (s.base[c] + y[i] - fit[i])
        s.out[k, c], s.bad[k, c] = s.raw[k, c] - s.weight[c] * off, False


@njit(nogil=True, cache=True)
def end_wait(s, f, c, until):
    """A stretch that did not become long enough for a whole window ends with sample `until`: fitted as it is, or blank."""
    if s.phase[c] != WAIT:
        return
    rows, start = len(s.raw), s.start[c]
    n = until - start + 1
    if n >= f.shortest and n <= 2 * f.half + 1:
        y, near, fit = _gather(s, f, c, start, n), np.empty(n, np.float32), np.empty(n, np.float32)
        amp = _relax(s, f, c, start, y)
        _polynomial(f, y, 3 if n > f.half else 1, np.float32(ROBUST_SIGMAS) * s.sigma[c], near, fit)
        if acceptable(s, c, y, fit):
            _scatter(s, f, c, start, y)
            _write(s, f, c, start, 0, n, y, fit)
            if known(s, f, c):  # else too little was seen to say how it goes on
                go_on(s, f, c, amp, n)
            return
    elif n < f.shortest and known(s, f, c):
        off = until - s.last_bad[c]
        for k in range(len(f.rho)):
            s.z[k, c] += s.template[s.slot[c], k, c] * f.rho[k] ** off
    for k in range(start, until + 1):
        s.out[k % rows, c], s.bad[k % rows, c] = s.base[c], True


@njit(nogil=True, cache=True, inline="always")
def known(s, f, c):
    return f.learn and s.seen[s.slot[c], c] > 0


@njit(nogil=True, cache=True, inline="always")
def go_on(s, f, c, amp, n):
    """The components fitted to n samples go on decaying."""
    for k in range(len(amp)):
        left = f.curve[k, n - 1] * f.rho[k]
        s.tail[k, c] = s.z[k, c] / left
        s.z[k, c] += amp[k] * left


@njit(nogil=True, cache=True, inline="always")
def acceptable(s, c, y, fit):
    """Whether the fit follows the samples, spikes aside: else an artifact is there that it does not know."""
    n, bound = len(y), np.float32(ROBUST_SIGMAS) * s.sigma[c]
    i, m, most = 0, min(n, TEST), np.float32(FIRST_SIGMAS)
    while i < n:
        total = np.float32(0)
        for k in range(i, i + m):
            total += min(max(y[k] - fit[k], -bound), bound)
        if abs(total) > most * s.sigma[c] * np.float32(m):
            return False
        i += m
        m, most = min(n - i, 2 * TEST), np.float32(LATER_SIGMAS)
        if m < TEST:
            break
    return True


@njit(nogil=True, cache=True, fastmath=FAST)
def _sum_of_curves(amp, curve, fit):
    fit[:] = 0
    for k in range(len(amp)):
        for i in range(len(fit)):
            fit[i] += amp[k] * curve[k, i]


@njit(nogil=True, cache=True, fastmath=FAST)
def _differing(y, gain, curve, bound, d, fit, bounded):
    """d (K,): the amplitudes that follow y (n,) given the prior in `gain` (K, n); far samples are bounded, twice."""
    for turn in range(3):
        for i in range(len(bounded)):
            bounded[i] = y[i] if turn == 0 else min(max(y[i], fit[i] - bound), fit[i] + bound)
        for k in range(len(d)):
            w = np.float32(0)
            for i in range(len(bounded)):
                w += gain[k, i] * bounded[i]
            d[k] = w
        _sum_of_curves(d, curve, fit)


@njit(nogil=True, cache=True, inline="always")
def prior_width(s, f, c):
    """Which of the widths the prior around this channel's template has; the last without a template."""
    w = len(f.widths) - 1
    if known(s, f, c):
        while w > 0 and f.widths[w - 1] > s.spread[s.slot[c], c]:
            w -= 1
    return w


@njit(nogil=True, cache=True, inline="always")
def widen(s, f, c, start, d):
    """The template's spread a step towards how far this pulse was from it: components differing by d (K,)."""
    slot = s.slot[c]
    if known(s, f, c) and start - s.last_bad[c] - 1 == f.hold:
        wide = np.float32(1) + np.float32(1.5) * abs(d.sum()) / s.sigma[c]
        s.spread[slot, c] += np.float32(LEARNED_SHARE) * (
            min(wide, np.float32(4) * s.spread[slot, c]) - s.spread[slot, c]
        )


@njit(nogil=True, cache=True)
def _relax(s, f, c, start, y):
    """Fit the decaying components to y, the remainders from sample `start` on, and take them off it.

    The prior is the template of the pattern, where there is one. Spikes are kept out by bounding what one sample can say.
    Returns the components' amplitudes at `start`.
    """
    slot, n, sigma = s.slot[c], len(y), s.sigma[c]
    off = start - s.last_bad[c] - 1
    amp, d, fit = np.zeros(len(f.rho), np.float32), np.zeros(len(f.rho), np.float32), np.zeros(n, np.float32)
    w, m = prior_width(s, f, c), len(f.lengths) - 1
    while m > 0 and f.lengths[m] > n:
        m -= 1
    if known(s, f, c):
        for k in range(len(amp)):
            amp[k] = s.template[slot, k, c] * f.rho[k] ** off
        _sum_of_curves(amp, f.curve, fit)
        y -= fit
    _differing(
        y,
        f.gain[m, w],
        f.curve,
        np.float32(ROBUST_SIGMAS) * sigma,
        d,
        fit,
        np.empty(f.lengths[m], np.float32),
    )
    y -= fit
    widen(s, f, c, start, d)
    amp += d
    return amp


@njit(nogil=True, cache=True, inline="always")
def learn(s, f, c):
    """The template a step towards the artifact that was just taken off, where no later pulse disturbed it."""
    if s.phase[c] != CLEAN or s.weight[c] < 1 or s.onset[c] != s.ints[ONSET]:
        return
    rows, slot, start = len(s.raw), s.slot[c], s.start[c]
    off = start - s.last_bad[c] - 1
    if off != f.hold or s.last_bad[c] + 1 + f.teach_at[-1] > s.ints[ONSET] + f.taught:
        return
    whole = np.zeros(len(f.rho), np.float32)
    for i in range(len(f.teach_at)):
        t = s.last_bad[c] + 1 + f.teach_at[i]
        v = s.raw[t % rows, c] - s.out[t % rows, c]
        for k in range(len(whole)):
            v -= s.tail[k, c] * f.taught_tail[i, k]
        for k in range(len(whole)):
            whole[k] += v * f.teach[i, k]
    n = s.seen[slot, c]
    share = max(np.float32(LEARNED_SHARE), np.float32(1) / np.float32(n + 1))
    away = np.float32(0)
    for k in range(len(whole)):
        away += whole[k] - s.template[slot, k, c]
    away = abs(away) / s.sigma[c]
    if n == 0:
        s.spread[slot, c] = np.float32(0.2) * away + np.float32(3)
    elif away > np.float32(5) * s.spread[slot, c]:
        share *= np.float32(0.2)
    for k in range(len(whole)):
        s.template[slot, k, c] += share * (whole[k] - s.template[slot, k, c])
    s.seen[slot, c] = n + 1
