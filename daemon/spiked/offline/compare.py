"""The live units against the offline units, and both against the truth where it is known."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from spiked.offline.truth import Trains, accuracy_matrix, coincidences, pair_lags, score, summary

WINDOW_MS, MAX_LAG_MS, MARGIN_MS = 0.4, 2.0, 1.0
SAME, PARTLY = 0.5, 0.1  # agreement of a pair that is one neuron, and of one that shares spikes at all


def live_span(samples: np.ndarray, units: np.ndarray, n_samples: int, margin: int) -> tuple[int, int]:
    """[first sorted live spike less `margin`, end of the recording): before, live was not calibrated yet.

    The margin lets in the offline or true spike that the first live spike belongs to.
    """
    sorted_ = samples[units >= 0]
    return (max(int(sorted_.min()) - margin, 0), n_samples) if len(sorted_) else (0, n_samples)


def within(samples: np.ndarray, units: np.ndarray, span: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The spikes inside a half-open span."""
    keep = (samples >= span[0]) & (samples < span[1])
    return samples[keep], units[keep]


def agreement(live: Trains, offline: Trains, fs_hz: float) -> dict[str, Any]:
    """How the two sortings agree.

    A pair's lag is the peak of its cross-correlogram within +-MAX_LAG_MS (positive: the live spikes come
    later); its agreement is matched / (n_offline + n_live - matched) with coincidences within WINDOW_MS
    after that lag. Returns {"offline_ids", "live_ids", "matrix" (offline, live), "pairs": [{"offline",
    "live", "agreement", "lag_ms", "n_match", "n_offline", "n_live"}], "same": how many pairs reach SAME, "partly": offline
    ids of none of these pairs, of which a live unit has some spikes, "missed": those no live unit follows, "invented": live ids
    without an offline counterpart, "window_ms"}. Pairs are one to one (Hungarian method) above PARTLY.
    """
    window, max_lag = round(WINDOW_MS * fs_hz / 1000), round(MAX_LAG_MS * fs_hz / 1000)
    lags, _ = pair_lags(offline, live, max_lag)
    matched = coincidences(offline, live, window, lags)
    matrix = accuracy_matrix(matched, offline.counts, live.counts)
    pairs = []
    for o, v in zip(*linear_sum_assignment(-matrix), strict=True):
        if matrix[o, v] >= PARTLY:
            pairs.append(
                {
                    "offline": int(offline.ids[o]),
                    "live": int(live.ids[v]),
                    "agreement": float(matrix[o, v]),
                    "lag_ms": float(lags[o, v] * 1000 / fs_hz),
                    "n_match": int(matched[o, v]),
                    "n_offline": int(offline.counts[o]),
                    "n_live": int(live.counts[v]),
                }
            )
    best_offline = matrix.max(1, initial=0.0)
    best_live = matrix.max(0, initial=0.0)
    followed = [p["offline"] for p in pairs if p["agreement"] >= SAME]
    return {
        "offline_ids": offline.ids.tolist(),
        "live_ids": live.ids.tolist(),
        "matrix": np.round(matrix, 4).tolist(),
        "pairs": sorted(pairs, key=lambda p: -p["agreement"]),
        "same": sum(p["agreement"] >= SAME for p in pairs),
        "partly": offline.ids[(best_offline >= PARTLY) & ~np.isin(offline.ids, followed)].tolist(),
        "missed": offline.ids[best_offline < PARTLY].tolist(),
        "invented": live.ids[best_live < PARTLY].tolist(),
        "window_ms": WINDOW_MS,
    }


def set_aside(invented: list[int], live: Trains, raw: Trains, fs_hz: float) -> dict[str, int]:
    """{live unit like no curated one: the sorter's unit that it is like}, where there is one that curation did not keep."""
    if not invented:
        return {}
    found = agreement(live, raw, fs_hz)
    pairs = {p["live"]: p["offline"] for p in found["pairs"] if p["agreement"] >= SAME}
    return {str(u): pairs[u] for u in invented if u in pairs}


def compare(
    offline: tuple[np.ndarray, np.ndarray],
    live: tuple[np.ndarray, np.ndarray],
    truth: tuple[np.ndarray, np.ndarray] | None,
    raw: tuple[np.ndarray, np.ndarray],
    n_samples: int,
    fs_hz: float,
) -> dict[str, Any]:
    """Everything the report says about agreement. A sorting is (samples, units), indices into the recording.

    `offline` are the curated units, `raw` the sorter's own. Live and offline are compared, and the live
    sorter is scored, over the span in which live units existed; offline is scored over the whole
    recording and that span.
    """
    span = live_span(*live, n_samples, round(MARGIN_MS * fs_hz / 1000))
    has_live = bool((live[1] >= 0).any())
    result: dict[str, Any] = {
        "span_s": [span[0] / fs_hz, span[1] / fs_hz],
        "live_spikes": int((live[1] >= 0).sum()),
        "live_unsorted": int((live[1] < 0).sum()),
        "live_units": len(np.unique(live[1][live[1] >= 0])),
        "agreement": agreement(Trains.of(*within(*live, span)), Trains.of(*within(*offline, span)), fs_hz)
        if has_live
        else None,
        "set_aside": {},
        "truth": None,
    }
    if has_live:
        result["set_aside"] = set_aside(
            result["agreement"]["invented"],
            Trains.of(*within(*live, span)),
            Trains.of(*within(*raw, span)),
            fs_hz,
        )
    if truth is not None:
        late = within(*truth, span)
        scored = {
            "sorter": score(*truth, *raw, fs_hz),
            "offline": score(*truth, *offline, fs_hz),
            "offline_in_span": score(*late, *within(*offline, span), fs_hz),
            "live": score(*late, *within(*live, span), fs_hz),
        }
        result["truth"] = {
            name: {"summary": summary(s), "units": {str(k): v for k, v in s.items()}}
            for name, s in scored.items()
        }
    return result
