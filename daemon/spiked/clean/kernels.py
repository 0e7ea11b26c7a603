"""The compiled passes of cleaning: one channel after the other, all steps of a sample at once."""

from __future__ import annotations

import numpy as np
from numba import njit

from spiked.clean.medians import median_near, select

# mypy: disable-error-code="no-untyped-def"


@njit(nogil=True, cache=True)
def any_at_rail(codes, rails):
    """Whether one of codes (n, C) is at or beyond the rails (lowest, highest), or not a number."""
    low, high = rails[0], rails[1]
    bad = np.int32(0)
    for t in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            bad += not (codes[t, c] > low and codes[t, c] < high)
    return bad > 0


@njit(nogil=True, cache=True)
def _filter(row, sos, state):
    """One channel's samples through its biquads (direct form II transposed), in place."""
    for s in range(sos.shape[0]):
        b0, b1, b2, a1, a2 = sos[s, 0], sos[s, 1], sos[s, 2], sos[s, 4], sos[s, 5]
        z0, z1 = state[s, 0], state[s, 1]
        for t in range(len(row)):
            v = row[t]
            y = b0 * v + z0
            z0 = b1 * v - a1 * y + z1
            z1 = b2 * v - a2 * y
            row[t] = y
        state[s, 0], state[s, 1] = z0, z1


@njit(nogil=True, cache=True)
def _next_baseline(c, past, known, baseline, ready, scratch):
    """The baseline of the hop that begins now: the median of the past where half of it is known."""
    window = past.shape[1]
    if known[c] * 2 >= window or (known[c] * 4 >= window and ready[c]):
        baseline[c] = median_near(past[c], known[c], baseline[c], scratch)
        ready[c] = True


@njit(nogil=True, cache=True)
def clean(
    codes, first, gain, zero, sos, state, hop, past, known, baseline, ready, last, scratch, row, x, valid
):
    """Codes (n, C), all of them good, to x (C, n): microvolt, filter, baseline. Returns how many samples are invalid."""
    n, channels = codes.shape
    window = past.shape[1]
    bad = 0
    for c in range(channels):
        for t in range(n):
            row[t] = np.float32((codes[t, c] - zero[0]) * gain[c])
        if sos.shape[0] and n:
            last[c] = row[n - 1]
            _filter(row[:n], sos, state[c])
        at, slot, phase = 0, first % window, first % hop
        while at < n:
            if phase == 0:
                _next_baseline(c, past, known, baseline, ready, scratch)
            m = min(n - at, hop - phase, window - slot)
            ok, base = ready[c], baseline[c]
            if known[c] < window:
                for i in range(m):
                    known[c] += past[c, slot + i] == np.inf
            for i in range(m):
                v = np.float32(row[at + i])
                past[c, slot + i] = v
                x[c, at + i] = v - base if ok else np.float32(0.0)
                valid[c, at + i] = ok
            bad += 0 if ok else m
            at += m
            slot = slot + m if slot + m < window else 0
            phase = phase + m if phase + m < hop else 0
    return bad


@njit(nogil=True, cache=True)
def clean_doubted(codes, first, gain, zero, sos, state, hop, past, known, baseline, ready, last, scratch, row, x, valid,
                  dead, rails, hold, hold_samples):  # fmt: skip
    """As `clean`, for codes of which some never arrived (dead (n, C), or (0, 0)) or are or just were at the rails.

    Returns also on how many channels the last sample's clipping still holds.
    """
    n, channels = codes.shape
    window = past.shape[1]
    bad = holding = 0
    for c in range(channels):
        for t in range(n):
            missing = dead.shape[0] > 0 and dead[t, c]
            if not missing and not (codes[t, c] > rails[0] and codes[t, c] < rails[1]):
                hold[c] = hold_samples + 1
            ok = hold[c] == 0 and not missing
            if hold[c] > 0:
                hold[c] -= 1
            valid[c, t] = ok
            if ok:
                last[c] = np.float32((codes[t, c] - zero[0]) * gain[c])
            row[t] = last[c]  # the filter sees the last valid sample in place of invalid ones
        if sos.shape[0]:
            _filter(row[:n], sos, state[c])
        slot, phase = first % window, first % hop
        for t in range(n):
            if phase == 0:
                _next_baseline(c, past, known, baseline, ready, scratch)
            ok = valid[c, t]
            known[c] += np.int64(ok) - np.int64(past[c, slot] < np.inf)
            v = np.float32(row[t])
            past[c, slot] = v if ok else np.float32(np.inf)
            ok = ok and ready[c]
            x[c, t] = v - baseline[c] if ok else np.float32(0.0)
            valid[c, t] = ok
            bad += not ok
            slot = slot + 1 if slot + 1 < window else 0
            phase = phase + 1 if phase + 1 < hop else 0
        holding += hold[c] > 0
    return bad, holding


@njit(nogil=True, cache=True)
def reference_to_median(x, valid, scratch):
    """Subtract from x (C, n) each sample's median over the channels; what is invalid reads 0."""
    channels, n = x.shape
    k = (channels - 1) // 2
    for t in range(n):
        for c in range(channels):
            scratch[c] = x[c, t]
        middle = select(scratch, channels, k)
        if channels % 2 == 0:
            after = scratch[k + 1]
            for c in range(k + 2, channels):
                after = min(after, scratch[c])
            middle = (middle + after) / np.float32(2.0)
        for c in range(channels):
            x[c, t] = x[c, t] - middle if valid[c, t] else np.float32(0.0)
