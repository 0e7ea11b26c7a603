"""Stable unit ids: recognise the units of an earlier calibration in a new one.

Two units are compared as RT-Sort compares two clusters (van der Molen, Lim et al. 2024): latencies and amplitudes of
the electrodes both know, weighted by how surely they are seen. Pairs are chosen so that the summed similarity is
largest; what matches nothing well gets a new id, after the largest ever used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spiked.sort.geometry import distances
from spiked.sort.sequences import LOOSE, Sequences

MIN_SIMILARITY = 0.3
MIN_SHARED = 1 / 3  # of the electrodes that either sees at least loosely
WIDE = 2.0  # limits of the assignment that a match across sessions may differ by


@dataclass(frozen=True)
class Match:
    """`sequences` under matched ids. Per unit of it: `previous_id` (-1: new) and `confidence` (0 to 1).

    Confidence is the similarity, lowered to half of it as the second-best candidate becomes as similar.
    """

    sequences: Sequences
    previous_id: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class _Dense:
    """Per unit and common channel."""

    prob: np.ndarray
    lag_ms: np.ndarray
    amp: np.ndarray
    loose: np.ndarray
    known: np.ndarray


def _dense(s: Sequences, ids: list[str]) -> _Dense:
    column = {c: k for k, c in enumerate(ids)}
    where = np.array([column.get(c, -1) for c in s.channel_ids], np.int64)
    unit, at = np.repeat(np.arange(len(s)), np.diff(s.ptr)), where[s.electrode]
    ok = at >= 0

    def spread(values: np.ndarray) -> np.ndarray:
        out = np.zeros((len(s), len(ids)))
        out[unit[ok], at[ok]] = values[ok]
        return out

    return _Dense(
        spread(s.prob), spread(s.latency * 1000 / s.fs_hz), spread(s.amp),
        spread((s.flags & LOOSE) > 0) > 0, spread(np.ones(len(unit))) > 0,
    )  # fmt: skip


def _similarity(a: _Dense, i: int, b: _Dense, j: int, lag_limit_ms: float, amp_limit: float) -> float:
    either = (a.loose[i] | b.loose[j]).sum()
    both = a.known[i] & b.known[j]
    if either == 0 or (a.loose[i] & b.loose[j]).sum() < MIN_SHARED * either:
        return 0.0
    w = (a.prob[i] + b.prob[j])[both] / 2
    w = w / w.sum()
    shift = (b.lag_ms[j] - a.lag_ms[i])[both]
    # The roots may differ: only differences between electrodes count.
    order = np.argsort(shift)
    middle = shift[order][np.searchsorted(np.cumsum(w[order]), 0.5)]
    d_lag = (w * np.minimum(np.abs(shift - middle), 2 * lag_limit_ms)).sum() / lag_limit_ms
    x, y = a.amp[i][both], b.amp[j][both]
    d_amp = (w * np.abs(x - y) / np.maximum((x + y) / 2, 1e-6)).sum() / amp_limit
    seen = (a.prob[i] + b.prob[j])[both].sum() / max((a.prob[i] + b.prob[j]).sum(), 1e-9)
    return float(max(0.0, 1 - (d_lag + d_amp) / 2) * seen)


def match_ids(previous: Sequences, new: Sequences) -> Match:
    """Give the units of `new` the ids of the units of `previous` that they are; channels are matched by id."""
    from scipy.optimize import linear_sum_assignment

    old_ids = previous.unit_ids
    shared = [c for c in new.channel_ids if c in set(previous.channel_ids)]
    s = np.zeros((len(new), len(previous)))
    if shared and s.size:
        a, b, p = _dense(new, shared), _dense(previous, shared), new.parameters
        near = (
            distances(new.positions_um[new.roots], previous.positions_um[previous.roots]) <= p.outer_radius_um
        )
        for i, j in np.argwhere(near):
            s[i, j] = _similarity(a, i, b, j, WIDE * p.max_latency_diff_ms, WIDE * p.max_amplitude_diff)
    rows, columns = linear_sum_assignment(-s)
    ids, confidence = np.full(len(new), -1, np.int32), np.zeros(len(new), np.float32)
    for i, j in zip(rows, columns, strict=True):
        if s[i, j] < MIN_SIMILARITY:
            continue
        rival = max(np.delete(s[i], j).max(initial=0), np.delete(s[:, j], i).max(initial=0))
        ids[i] = old_ids[j]
        confidence[i] = s[i, j] * (1 - 0.5 * min(1.0, rival / s[i, j]))
    known = ids.copy()
    fresh = ids < 0
    ids[fresh] = previous.next_unit_id + np.arange(fresh.sum())
    return Match(new.with_ids(ids, previous.next_unit_id), known, confidence)
