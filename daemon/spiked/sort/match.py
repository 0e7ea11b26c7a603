"""Stable unit ids: recognise the units of an earlier calibration in a new one.

Two units are compared by what all their electrodes see: latencies and the pattern of amplitudes, weighted by how
surely they are seen (as RT-Sort compares two clusters; van der Molen, Lim et al. 2024). The roots play no part: of
electrodes that see a cell equally well, now one is the root and now another. Nor does a common factor count much: an electrode
array whose noise changed, or a fragment with the cell's larger spikes, still has the cell's pattern, while another
cell on the same electrodes has not. Pairs are chosen so that the summed similarity is largest; what matches nothing
well gets a new id, after the largest ever used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spiked.sort.geometry import distances
from spiked.sort.sequences import LOOSE, Sequences

# Pieces of 25 and 60 s of one cell differed by up to 0.024 ms and 0.17 of the amplitude (99th percentile), other
# cells on the same electrodes by more than 0.01 ms and 0.13 (1st percentile), 0.22 (5th).
LATENCY_MS, PATTERN, LOUDNESS = (
    0.03,
    0.12,
    0.5,
)  # a pair this far apart in one of them has similarity exp(-1/2)
MIN_SIMILARITY = 0.15
MIN_OF_BEST = 1 / 3  # of either unit's best similarity to anything: less is a fragment of that, not this
MIN_SHARED = 1 / 3  # of the electrodes that either sees at least loosely


@dataclass(frozen=True)
class Match:
    """`sequences` under matched ids. Per unit of it: `previous_id` (-1: new) and `confidence` (0 to 1).

    Confidence is the similarity, lowered to half of it as the second-best candidate becomes as similar. It is also
    kept in the sequences, as `id_confidence`.
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


def _similarity(a: _Dense, i: int, b: _Dense, j: int) -> float:
    either = (a.loose[i] | b.loose[j]).sum()
    both = a.known[i] & b.known[j]
    if either == 0 or (a.loose[i] & b.loose[j]).sum() < MIN_SHARED * either:
        return 0.0
    w = (a.prob[i] + b.prob[j])[both] / 2
    w = w / w.sum()
    shift = (b.lag_ms[j] - a.lag_ms[i])[both]
    # The roots may differ: only differences between electrodes count.
    order = np.argsort(shift)
    middle = shift[order][np.searchsorted(np.cumsum(w[order]), 0.5 - 1e-9)]
    d_lag = (w * np.abs(shift - middle)).sum()
    x, y = a.amp[i][both], b.amp[j][both]
    factor = np.sqrt((w * x * x).sum() / max((w * y * y).sum(), 1e-12))
    y = y * factor
    d_amp = (w * np.abs(x - y) / np.maximum((x + y) / 2, 1e-6)).sum()
    seen = (a.prob[i] + b.prob[j])[both].sum() / max((a.prob[i] + b.prob[j]).sum(), 1e-9)
    loudness = np.log(max(factor, 1e-6))
    far = (d_lag / LATENCY_MS) ** 2 + (d_amp / PATTERN) ** 2 + (loudness / LOUDNESS) ** 2
    return float(seen * np.exp(-0.5 * far))


def _similarities(new: Sequences, previous: Sequences) -> np.ndarray:
    """(new units, previous units), 0 to 1; 0 for roots further apart than a sequence reaches."""
    s = np.zeros((len(new), len(previous)))
    shared = [c for c in new.channel_ids if c in set(previous.channel_ids)]
    if not shared or not s.size:
        return s
    a, b = _dense(new, shared), _dense(previous, shared)
    apart = distances(new.positions_um[new.roots], previous.positions_um[previous.roots])
    for i, j in np.argwhere(apart <= new.parameters.outer_radius_um):
        s[i, j] = _similarity(a, i, b, j)
    return s


def match_ids(previous: Sequences, new: Sequences) -> Match:
    """Give the units of `new` the ids of the units of `previous` that they are; channels are matched by id."""
    from scipy.optimize import linear_sum_assignment

    old_ids = previous.unit_ids
    s = _similarities(new, previous)
    best = np.maximum(s.max(1, initial=0)[:, None], s.max(0, initial=0)[None])
    possible = np.where((s >= MIN_SIMILARITY) & (s >= MIN_OF_BEST * best), s, 0.0)
    ids, confidence = np.full(len(new), -1, np.int32), np.zeros(len(new), np.float32)
    for i, j in zip(*linear_sum_assignment(-possible), strict=True):
        if possible[i, j] <= 0:
            continue
        rival = max(np.delete(s[i], j).max(initial=0), np.delete(s[:, j], i).max(initial=0))
        ids[i] = old_ids[j]
        confidence[i] = s[i, j] * (1 - 0.5 * min(1.0, rival / s[i, j]))
    known = ids.copy()
    fresh = ids < 0
    ids[fresh] = previous.next_unit_id + np.arange(fresh.sum())
    return Match(new.with_ids(ids, previous.next_unit_id, confidence), known, confidence)
