"""A job's curated units as what Phy is to be told: see phy_curated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import OfflineError
from spiked.offline.phy_curated import Found, assigned
from spiked.offline.truth import Trains

Spikes = tuple[np.ndarray, np.ndarray]  # samples and units
FIGURES = {"snr": "snr", "contamination_pct": "contamination"}  # column in Phy: figure of ours


def found(
    output: Path,
    sorted_: Spikes,
    cleaned: Spikes,
    curated: Spikes,
    merges: Mapping[int, list[int]],
    rows: Mapping[int, dict[str, Any]],
    slay: Mapping[int, str],
) -> Found:
    """`output` is the sorter's folder; the spikes are what it found, that without second detections, and after labels and merges.

    `rows` are {unit: its label, reason and figures} of every unit before and after the merges, `slay` as phy.merges. What a person did in `output` since is not
    looked at: the sorter's clusters are those of `sorted_`.
    """
    times = np.load(output / "spike_times.npy").ravel().astype(np.int64)
    before = clusters_of(times, np.load(output / "spike_clusters.npy").ravel(), *sorted_, output)
    parts = {p for of in merges.values() for p in of}
    units = {u: t for u, t in _trains(*cleaned).items() if u not in parts} | _trains(*curated)
    clusters, left_out = assigned(times, before, units, merges)
    present = np.unique(clusters).tolist()
    groups = {u: rows[u]["label"] if u in rows else "noise" for u in present}
    columns: dict[str, dict[int, Any]] = {
        "reason": {u: rows[u]["reason"] for u in present if u in rows},
        **{title: {u: _figure(rows[u], key) for u in present if u in rows} for title, key in FIGURES.items()},
    }
    if slay:
        columns["slay"] = {u: slay[merges.get(u, [u])[0]] for u in present if merges.get(u, [u])[0] in slay}
    if left_out is not None:
        columns["reason"][left_out] = "second detections of spikes, taken out of their units"
    return Found(clusters, groups, dict(merges), left_out, columns)


def _figure(row: dict[str, Any], key: str) -> float:
    return float(row[key]) * (100.0 if key == "contamination" else 1.0)


def _trains(samples: np.ndarray, units: np.ndarray) -> dict[int, np.ndarray]:
    t = Trains.of(samples, units)
    return {int(u): t.samples[t.index == k] for k, u in enumerate(t.ids)}


def clusters_of(
    times: np.ndarray, now: np.ndarray, samples: np.ndarray, units: np.ndarray, output: Path
) -> np.ndarray:
    """The clusters that the sorter itself gave the folder's spikes, also where somebody has changed them since.

    `samples` and `units` are what was read of it after sorting: in time order, without spikes beyond the recording, which keep their own.
    """
    before = now.astype(np.int64)
    order = np.argsort(times, kind="stable")
    first = int(np.searchsorted(times[order], samples[0])) if len(samples) else 0
    rows = order[first : first + len(samples)]
    if not np.array_equal(times[rows], samples):
        raise OfflineError(
            f"{output} is not what was sorted any more; sort once more, with --recompute sort", stage="phy"
        )
    before[rows] = units
    return before
