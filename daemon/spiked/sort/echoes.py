"""Echoes: units that are reported together again and again within a fraction of a millisecond.

Two neurons do not do that. One of the two units takes part of the other's spikes for its own, on electrodes that
both see or far away from it. Such pairs are found in the calibration, whatever their distance, and compete for a spike.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# mypy: disable-error-code="no-untyped-def"

JITTER_MS = 0.1  # around the lag at which most coincide
BESIDE_MS = (0.75, 2.5)  # lags that say how often they coincide by chance, bursts included
LEAST = 5  # coincidences
EXCESS = 4.0  # times what chance gives
NO_ECHOES = np.zeros((0, 3), np.int32)


def echoes(samples: list[np.ndarray], fs_hz: float, within_ms: float, fraction: float) -> np.ndarray:
    """(pairs, 3) int32: two units, and within how many samples of each other only one of them is to be reported.

    `samples` are each unit's spikes in the calibration, ascending. An echo coincides with at least `fraction` of the
    spikes of the one that fires less, at one lag of at most `within_ms`, and far more often than chance gives.
    """
    sizes = np.array([len(s) for s in samples], np.int64)
    when = np.concatenate([np.zeros(0, np.int64), *samples])
    unit = np.repeat(np.arange(len(samples)), sizes)
    order = np.argsort(when, kind="stable")
    when, unit = when[order], unit[order]
    within, jitter, near, far = (
        max(1, round(ms * fs_hz / 1000)) for ms in (within_ms, JITTER_MS, *BESIDE_MS)
    )
    together = _together(when, unit, len(samples), within)
    need = np.maximum(LEAST, fraction * np.minimum(sizes[:, None], sizes[None]))
    pairs = np.argwhere(np.triu(together >= need, 1))
    row = np.full(together.shape, -1, np.int32)
    row[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    counts, beside = _lags(when, unit, row, len(pairs), within, near, far)
    out = []
    for k, (u, v) in enumerate(pairs):
        around = np.convolve(counts[k], np.ones(2 * jitter + 1, np.int64), "same")
        lag = int(around.argmax())
        chance = beside[k] / (2 * (far - near)) * (2 * jitter + 1)
        if around[lag] >= max(need[u, v], EXCESS * chance):
            out.append((u, v, min(within, abs(lag - within) + jitter)))
    return np.array(out, np.int32).reshape(-1, 3)


def renumbered(known: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The echoes after unit k has become unit place[k]; -1: it is gone."""
    out = np.column_stack([place[known[:, 0]], place[known[:, 1]], known[:, 2]]).astype(np.int32)
    return out[(out[:, :2] >= 0).all(1)]


@njit(nogil=True, cache=True)
def _together(when, unit, n_units, within):
    """(units, units): spikes at most `within` samples apart; only the lower unit first is counted."""
    out = np.zeros((n_units, n_units), np.int32)
    for i in range(len(when)):
        j = i + 1
        while j < len(when) and when[j] - when[i] <= within:
            if unit[i] != unit[j]:
                out[min(unit[i], unit[j]), max(unit[i], unit[j])] += 1
            j += 1
    return out


@njit(nogil=True, cache=True)
def _lags(when, unit, row, n_pairs, within, near, far):
    """Per pair (row[u, v], u < v): counts of lags -within to within of v after u, and how many lie `near` to `far` off."""
    counts = np.zeros((n_pairs, 2 * within + 1), np.int64)
    beside = np.zeros(n_pairs, np.int64)
    for i in range(len(when)):
        j = i + 1
        while j < len(when) and when[j] - when[i] <= far:
            k = row[min(unit[i], unit[j]), max(unit[i], unit[j])]
            if k >= 0:
                lag = when[j] - when[i]
                if lag <= within:
                    counts[k, within + (lag if unit[i] < unit[j] else -lag)] += 1
                elif lag > near:
                    beside[k] += 1
            j += 1
    return counts, beside
