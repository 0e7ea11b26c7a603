"""One spike, one report: exact greedy choice among conflicting candidates along an endless stream.

Greedy by score means: a candidate is accepted if and only if no conflicting candidate with a higher score is
accepted. Each decision waits while a candidate that could matter may still come, so the outcome is that of the
whole stream at once, however it was cut. The published code starts afresh with every chunk.

What was accepted then casts a shadow: of spikes that follow one another more closely than `shadow` allows the first is
reported. This needs no waiting, so it may reach further than the conflicts.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# mypy: disable-error-code="no-untyped-def"

PENDING = np.dtype(
    [
        ("sample", "<i8"),
        ("unit", "<i4"),
        ("state", "<i4"),
        ("score", "<f4"),
        ("amplitude_uv", "<f4"),
        ("logit", "<f4"),
    ]
)
UNDECIDED, ACCEPTED, REPORTED, HIDDEN = 0, 1, 2, 3  # HIDDEN: accepted, but in the shadow of a reported one


@njit(nogil=True, cache=True)
def _ahead(p, i, j):
    """True if candidate i goes before j: higher score, then earlier, then lower unit."""
    if p[i].score != p[j].score:
        return p[i].score > p[j].score
    if p[i].sample != p[j].sample:
        return p[i].sample < p[j].sample
    return p[i].unit < p[j].unit


@njit(nogil=True, cache=True)
def _decide(p, n, order, window, contested):
    """Decide what can be decided; order[:n] holds the candidates by score. Rejected ones get state -1."""
    for a in range(n):
        i = order[a]
        if p[i].state != UNDECIDED:
            continue
        wait = contested[i]
        lost = False
        for b in range(a):
            j = order[b]
            if p[j].state < 0:
                continue
            w = window[p[i].unit, p[j].unit]
            if w >= 0 and abs(p[i].sample - p[j].sample) <= w:
                if p[j].state == UNDECIDED:
                    wait = True
                else:
                    lost = True
                    break
        if lost:
            p[i].state = -1
        elif not wait:
            p[i].state = ACCEPTED


@njit(nogil=True, cache=True)
def _by_score(p, n, order):
    for i in range(n):
        k = i
        while k > 0 and _ahead(p, i, order[k - 1]):
            order[k] = order[k - 1]
            k -= 1
        order[k] = i


@njit(nogil=True, cache=True)
def _first(p, n, final):
    """The first of the accepted candidates before sample `final` by sample, then unit; -1: there is none."""
    first = -1
    for i in range(n):
        if p[i].state != ACCEPTED or p[i].sample >= final:
            continue
        later = first >= 0 and p[i].sample >= p[first].sample
        if not later or (p[i].sample == p[first].sample and p[i].unit < p[first].unit):
            first = i
    return first


@njit(nogil=True, cache=True)
def _shadowed(p, n, i, shadow):
    """Whether candidate i follows too closely on what was reported."""
    for j in range(n):
        if p[j].state == REPORTED and p[i].sample - p[j].sample <= shadow[p[j].unit, p[i].unit]:
            return True
    return False


@njit(nogil=True, cache=True)
def resolve(p, n, window, shadow, reach, seen_until, contested, out, n_out, order):
    """Decide among p[:n] (PENDING) when all candidates before `seen_until` are in it.

    window[u, v]: units u and v conflict within this many samples (-1: never); shadow[u, v]: v is not reported within
    so many samples after u (-1: it may be); reach: the largest value of both.
    contested[i]: a candidate at or after `seen_until` may conflict with p[i]; for decided ones it is not looked at.
    Appends what became final to out[n_out:] in order of sample, then unit. Returns (n kept, n_out, final until).
    """
    _by_score(p, n, order)
    _decide(p, n, order, window, contested)
    final = seen_until
    for i in range(n):
        if p[i].state == UNDECIDED:
            final = min(final, p[i].sample)
    while n_out < len(out):
        i = _first(p, n, final)
        if i < 0:
            break
        if _shadowed(p, n, i, shadow):
            p[i].state = HIDDEN
            continue
        p[i].state = REPORTED
        out[n_out] = p[i]
        n_out += 1
    kept = 0
    for i in range(n):
        done = p[i].state == REPORTED or p[i].state == HIDDEN
        if p[i].state >= 0 and (not done or p[i].sample >= final - reach):
            p[kept] = p[i]
            kept += 1
    return kept, n_out, final
