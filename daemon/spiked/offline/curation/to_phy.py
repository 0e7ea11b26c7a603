"""A curated Phy folder beside the history: what stayed, what each step set aside, and the merges, for the folder that was curated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spiked.offline import phy, phy_curated
from spiked.offline.sorters import OUTPUT

if TYPE_CHECKING:
    from spiked.offline.curation.curate import Curation

REFRACTORY = ("isi_violations", "contamination", "rp_", "sliding_rp", "kilosort_contamination")
GROUPS = ("good", "mua", "noise")
HISTORY = "history"  # in the folder's curation.json: where the decisions are


def source_of(c: Curation) -> Path | None:
    """The Phy folder that was curated, or None where it was something else, or has moved."""
    told = c.history["sorting"]
    where = Path(told["path"])
    there = (p for p in (where, where / OUTPUT) if (p / "params.py").is_file())
    return next(there, None) if told["kind"] == "Phy folder" else None


def write(c: Curation, source: Path, place: Path, history: str) -> dict[str, Any]:
    """As phy_curated.write. What a step on refractory violations set aside is mua, what any other did noise.

    A unit that stayed keeps the group that a person gave it, else it is good.
    """
    times = np.load(source / "spike_times.npy").ravel().astype(np.int64)
    before = np.load(source / "spike_clusters.npy").ravel().astype(np.int64)
    trains = {int(u): np.sort(c.sorting.get_unit_spike_train(u)) for u in c.sorting.unit_ids}
    merges = {int(u): [int(p) for p in parts] for u, parts in c.merged.items()}
    clusters, left_out = phy_curated.assigned(times, before, trains, merges)
    said = phy.column(source / phy_curated.GROUP) if phy.saved_by_hand(source) else {}
    groups, why = {}, {}
    for u in np.unique(clusters).tolist():
        parts = {g if (g := said.get(p, "")) in GROUPS else "good" for p in merges.get(u, [u])}
        groups[u] = parts.pop() if len(parts) == 1 else "good"
        if u == left_out:
            groups[u], why[u] = "noise", "spikes that are in no unit any more"
        elif u not in trains:
            step = next((s.step for s in c.steps if _set_aside(c, u, s.removed)), "")
            groups[u] = "mua" if step.startswith(REFRACTORY) else "noise"
            why[u] = f"not {step}" if step else "not curated"
    found = phy_curated.Found(clusters, groups, merges, left_out, {"set_aside_by": why} if why else {})
    return phy_curated.write(source, place, found, {HISTORY: history})


def _set_aside(c: Curation, unit: int, removed: list[Any]) -> bool:
    """Whether a step removed the unit, or what it was merged into before."""
    into = next((new for s in c.steps for new, of in s.merged.items() if unit in of), None)
    if into is not None:
        return _set_aside(c, into, removed)
    return unit in removed
