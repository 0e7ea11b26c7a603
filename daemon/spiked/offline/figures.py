"""What report.html draws, as small arrays: footprints, correlograms, amplitudes over time, the session's raster.

A browser draws them when they come into view, so that a page of 300 units stays a few megabytes and opens at once.
"""

from __future__ import annotations

import base64
import itertools
from typing import Any

import numpy as np

BINS = 600  # of the raster, over the whole session
AMPLITUDE_BINS = 60
FOOTPRINT_CHANNELS = 20  # drawn per unit
FOOTPRINT_SHARE = 0.1  # of the peak, least on a channel that is drawn
LEAST_CHANNELS = 4
MOST_PAIRS = 60


def collect(
    analyzer: Any | None,
    before: Any | None,
    pairs: list[tuple[int, int]],
    rows: list[dict[str, Any]],
    agreement: dict[str, Any] | None,
    curated: tuple[np.ndarray, np.ndarray],
    live: tuple[np.ndarray, np.ndarray],
    n_samples: int,
) -> dict[str, Any]:
    """Everything the page's script draws. `before` holds the units before the merges, `pairs` are theirs.

    `rows` are the curated units; spikes are (samples, units), indices into the recording. Offline units are ordered
    by depth, live ones like the offline units that they agree with, the others after them.
    """
    depth = [int(u["unit"]) for u in sorted(rows, key=lambda u: (u["y_um"], u["x_um"]))]
    partner = {p["offline"]: p["live"] for p in (agreement or {"pairs": []})["pairs"]}
    followed = [partner[u] for u in depth if u in partner]
    heard = live[1] >= 0
    others = sorted(set(np.unique(live[1][heard]).tolist()) - set(followed))
    acg, bin_ms = ({}, 1.0) if analyzer is None else autocorrelograms(analyzer)
    return {
        "footprints": {} if analyzer is None else footprints(analyzer),
        "acg": acg,
        "bin_ms": bin_ms,
        "window_ms": 0.0 if analyzer is None else _window_ms(analyzer),
        "amplitudes": {} if analyzer is None else amplitudes(analyzer, n_samples),
        "ccg": [] if before is None else crosscorrelograms(before, pairs),
        "rasters": {
            "offline": raster(*curated, depth, n_samples),
            "live": raster(live[0][heard], live[1][heard], followed + others, n_samples),
        },
    }


def _window_ms(analyzer: Any) -> float:
    told = analyzer.get_extension("templates").params
    return float(told["ms_before"] + told["ms_after"])


def footprints(analyzer: Any) -> dict[int, dict[str, Any]]:
    """Per unit: channel indices, their `xy` (um) and mean waveforms `uv` (channels, samples), largest first."""
    extension = analyzer.get_extension("templates")
    templates = extension.get_templates(operator="average")
    places = analyzer.get_channel_locations()
    out = {}
    for unit, t in zip(analyzer.unit_ids, templates, strict=True):
        size = np.abs(t).max(0)
        order = np.argsort(-size, kind="stable")[:FOOTPRINT_CHANNELS]
        n = max(int((size[order] >= FOOTPRINT_SHARE * size[order[0]]).sum()), LEAST_CHANNELS)
        drawn = order[:n]
        out[int(unit)] = {
            "channels": drawn.tolist(),
            "xy": np.round(places[drawn], 1).tolist(),
            "uv": np.rint(t[:, drawn].T).astype(int).tolist(),
            "before": int(extension.nbefore),
        }
    return out


def autocorrelograms(analyzer: Any) -> tuple[dict[int, list[int]], float]:
    """({unit: counts per bin, centred on 0}, bin in ms)."""
    counts, edges = analyzer.get_extension("correlograms").get_data()
    ids = [int(u) for u in analyzer.unit_ids]
    return {u: counts[k, k].tolist() for k, u in enumerate(ids)}, float(edges[1] - edges[0])


def crosscorrelograms(analyzer: Any, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """One per pair of unit ids: {"a", "b", "counts"}, positive times: b fires after a."""
    counts, _ = analyzer.get_extension("correlograms").get_data()
    at = {int(u): k for k, u in enumerate(analyzer.unit_ids)}
    return [
        {"a": a, "b": b, "counts": counts[at[a], at[b]].tolist()} for a, b in pairs if a in at and b in at
    ]


def amplitudes(analyzer: Any, n_samples: int) -> dict[int, list[int | None]]:
    """Per unit, the median amplitude (microvolt) in equal parts of the session; None where it did not fire."""
    uv = np.asarray(analyzer.get_extension("spike_amplitudes").get_data())
    spikes = analyzer.sorting.to_spike_vector()
    part = np.minimum(spikes["sample_index"] * AMPLITUDE_BINS // max(n_samples, 1), AMPLITUDE_BINS - 1)
    out: dict[int, list[int | None]] = {}
    for k, unit in enumerate(analyzer.unit_ids):
        mine = spikes["unit_index"] == k
        order = np.argsort(part[mine], kind="stable")
        values, parts = uv[mine][order], part[mine][order]
        found, first = np.unique(parts, return_index=True)
        row: list[int | None] = [None] * AMPLITUDE_BINS
        for p, piece in zip(found.tolist(), np.split(values, first[1:]), strict=True):
            row[p] = round(float(np.median(piece)))
        out[int(unit)] = row
    return out


def raster(samples: np.ndarray, units: np.ndarray, order: list[int], n_samples: int) -> dict[str, Any]:
    """{"ids", "bins", "counts": base64 of (ids, bins) uint8}: spikes per bin of the session, at most 255 each."""
    row = {u: k for k, u in enumerate(order)}
    k = np.array([row.get(int(u), -1) for u in np.unique(units)], np.int64)
    at = k[np.searchsorted(np.unique(units), units)] if len(units) else np.zeros(0, np.int64)
    inside = (at >= 0) & (samples >= 0) & (samples < n_samples)
    bins = samples[inside].astype(np.int64) * BINS // max(n_samples, 1)
    flat = np.bincount(at[inside] * BINS + bins, minlength=len(order) * BINS)
    packed = np.minimum(flat, 255).astype(np.uint8).tobytes()
    return {"ids": order, "bins": BINS, "counts": base64.b64encode(packed).decode("ascii")}


def pairs_of(
    groups: list[list[int]], candidates: list[dict[str, Any]], candidates_drawn: int = 6
) -> list[tuple[int, int]]:
    """The pairs to draw: neighbours within each merged group, then the best-scored candidates."""
    drawn = [pair for g in groups for pair in itertools.pairwise(g)]
    drawn += [(int(p["a"]), int(p["b"])) for p in candidates[: len(drawn) + candidates_drawn]]
    return list(dict.fromkeys((min(p), max(p)) for p in drawn))[:MOST_PAIRS]
