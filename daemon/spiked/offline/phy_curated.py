"""What curation found, in Phy's own terms: a folder beside the sorter's own, which stays as the sorter left it.

Every array of the sorter's folder is there (as a hard link, no second copy of it), only `spike_clusters.npy` and the cluster_*.tsv are
new. A merge gives a new id, as it does in Phy, and says in the column `merged_from` which ids it was made of; `split_init` in Phy takes it
apart again where the sorter's own clusters are its templates, as they are with Kilosort4. Spikes that are no longer in any unit, second
detections of a spike, are a cluster of their own in the group noise: a spike is never dropped. What was done is in curation.json.

What a person did in Phy is never overwritten: a folder that was saved in Phy stays, and the new one is written beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import OfflineError
from spiked.offline import phy
from spiked.offline.manifest import write_json

FOLDER, CARD, VERSION = "phy", "curation.json", 1
GROUP = "cluster_group.tsv"
OWN = ("spike_clusters.npy", "params.py", CARD)  # besides the columns, what is not taken over from the sorter
TRACES = (".dat", ".bin")  # as large as the recording: Phy is shown where they are
GROUPS = {"undetermined": "unsorted"}  # in Phy's words; the others are good, mua and noise


@dataclass(frozen=True)
class Found:
    """What is to be told: every spike's cluster, every cluster's group, and further columns {title: {cluster: value}}."""

    clusters: np.ndarray  # (spikes,) int64, in the order of the folder's spike_times.npy
    groups: dict[int, str]
    merges: dict[int, list[int]]  # {new id: the ids that it was made of}
    left_out: int | None  # the cluster of spikes that are in no unit any more
    columns: dict[str, dict[int, Any]] = field(default_factory=dict)


def assigned(
    times: np.ndarray, before: np.ndarray, units: Mapping[int, np.ndarray], merges: Mapping[int, list[int]]
) -> tuple[np.ndarray, int | None]:
    """(every spike's cluster after curation, the cluster of those that are in no unit any more, or None).

    `times` and `before` are the folder's spikes, (spikes,) each; `units` the spike trains of the units after the merges, in order; clusters
    that are not in it keep all of their spikes. OfflineError where a unit has spikes that the folder has not.
    """
    after = before.astype(np.int64)
    for new, parts in merges.items():
        after[np.isin(before, parts)] = new
    gone = np.zeros(len(after), bool)
    for cluster, train in units.items():
        rows = np.flatnonzero(after == cluster)
        rows = rows[np.argsort(times[rows], kind="stable")]
        at = times[rows]
        which = np.arange(len(at)) - np.searchsorted(at, at)  # of the spikes at one sample
        keep = which < np.searchsorted(train, at, "right") - np.searchsorted(train, at)
        if keep.sum() != len(train):
            raise OfflineError(
                f"unit {cluster} has {len(train)} spikes, of which the sorter's folder holds {int(keep.sum())}; sort once more, with "
                "--recompute sort",
                stage="phy",
            )
        gone[rows[~keep]] = True
    if not gone.any():
        return after, None
    free = max(int(after.max()), int(before.max())) + 1
    after[gone] = free
    return after, free


def write(source: Path, place: Path, found: Found, about: dict[str, Any]) -> dict[str, Any]:
    """Write the folder, whole or not at all: {"folder", "clusters", "by_hand": a folder that a person saved and that stays, or ""}.

    `source` is the sorter's folder. `about` goes into curation.json as it is. Where a person saved `place` in Phy, the next free name is
    taken.
    """
    by_hand = ""
    while place.is_dir() and saved_by_hand(place):
        by_hand, place = str(place), _next(place)
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and _taken_over(file):
            _link(file, part / file.name)
    np.save(part / "spike_clusters.npy", found.clusters.astype(np.int32))
    (part / "params.py").write_text(_params(source, place), encoding="utf-8")
    ids = np.unique(found.clusters).tolist()
    for title, values in _columns(source, found, ids).items():
        phy.write_column(part / f"cluster_{title}.tsv", title, {u: values.get(u, "") for u in ids})
    card = {
        "spiked_phy": VERSION,
        "sorter": os.path.relpath(source, place),
        "merges": [{"cluster": new, "of": parts} for new, parts in sorted(found.merges.items())],
        "left_out": found.left_out,
        **about,
        "saved": state(part),
    }
    write_json(part / CARD, card)
    if place.is_dir():
        shutil.rmtree(place)
    part.replace(place)
    return {"folder": str(place), "clusters": len(ids), "by_hand": by_hand}


def _taken_over(file: Path) -> bool:
    column = file.name.startswith("cluster_")
    return not column and file.name not in OWN and file.suffix not in (*TRACES, ".orig", ".part", ".log")


def _link(file: Path, to: Path) -> None:
    """The same file under another name; a copy where the disk has no such thing."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


def _next(place: Path) -> Path:
    stem, _, number = place.name.rpartition("-")
    if stem and number.isdigit():
        return place.with_name(f"{stem}-{int(number) + 1}")
    return place.with_name(f"{place.name}-2")


def _params(source: Path, place: Path) -> str:
    """The sorter's params.py; traces that lie beside it are pointed to from where the new one will be."""
    lines = []
    for line in (source / "params.py").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        path = value.strip().strip("'\"")
        if name.strip() == "dat_path" and not os.path.isabs(path) and (source / path).is_file():
            line = f"dat_path = {os.path.relpath(source / path, place)!r}"
        lines.append(line)
    return "\n".join(lines) + "\n"


# ---- columns ----------------------------------------------------------------------------------------------------------


def _columns(source: Path, found: Found, ids: list[int]) -> dict[str, dict[int, Any]]:
    """{title: {cluster: value}}: the sorter's own, ours after them.

    Every cluster has a row in every column: SpikeInterface leaves out units that one of them lacks.
    """
    parts = {u: found.merges.get(u, [u]) for u in ids}
    counts = dict(zip(*np.unique(found.clusters, return_counts=True), strict=True))
    out: dict[str, dict[int, Any]] = {}
    for file in sorted(source.glob("cluster_*.tsv")):
        title = file.stem.removeprefix("cluster_")
        if title in ("group", "info", "slay", *found.columns):
            continue
        values = phy.column(phy.original(file) if phy.original(file).is_file() else file)
        out[title] = {u: _whole([values.get(p, "") for p in parts[u]], title) for u in ids}
    merged = {u: " + ".join(map(str, of)) for u, of in found.merges.items() if u in counts}
    ours = {**found.columns, **({"merged_from": merged} if merged else {})}
    ours["group"] = {u: GROUPS.get(found.groups[u], found.groups[u]) for u in ids}
    return {**out, **ours}


def _whole(values: list[str], title: str) -> str:
    """A merged unit's value of a sorter's column: what its parts agree in, the doubtful label, or nothing."""
    told = set(values)
    if len(told) == 1:
        return told.pop()
    return "mua" if title == "KSLabel" else ""


# ---- what a person did ------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, Any]:
    """What Phy writes when a person saves, as far as it says something: clusters, groups, and which columns there are."""
    groups = phy.column(folder / GROUP)
    clusters = folder / "spike_clusters.npy"
    seen = np.load(clusters).ravel().astype("<i8").tobytes() if clusters.is_file() else b""
    return {
        "clusters": hashlib.sha256(seen).hexdigest(),
        "groups": {str(u): g for u, g in sorted(groups.items()) if g not in ("", "unsorted")},
        "columns": sorted(f.name for f in folder.glob("cluster_*.tsv") if f.name != "cluster_info.tsv"),
    }


def saved_by_hand(folder: Path) -> bool:
    """Whether somebody saved something in Phy since this folder was written; of a sorter's own folder, whether ever."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        before = dict(card["saved"])
    except FileNotFoundError:
        return phy.saved_by_hand(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return True  # nobody can tell any more, so it stays
    now = state(folder)
    missing = set(before["columns"]) - set(now["columns"])
    return now | {"columns": sorted({*now["columns"], *missing})} != before


def by_hand(job: Path) -> list[str]:
    """Every folder for Phy in a job's folder that a person saved."""
    there = [*job.glob("sorter*/sorter_output"), *(p for p in job.glob(f"{FOLDER}*") if (p / CARD).is_file())]
    return sorted(str(p) for p in there if saved_by_hand(p))
