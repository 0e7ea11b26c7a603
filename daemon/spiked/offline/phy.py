"""Columns of a Phy folder: cluster_NAME.tsv, one row per cluster id, tab-separated.

Every template of the sorter has a row, also those without spikes: SpikeInterface's reader stops where rows are missing. What a
column held before stays beside it as .tsv.orig (a second .tsv would be read as a column of its own, and stops that reader too).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

LABELS = ("cluster_KSLabel.tsv", "cluster_group.tsv")
MERGES = "cluster_slay.tsv"
UNDECIDED = {
    "cluster_KSLabel.tsv": "mua",
    "cluster_group.tsv": "unsorted",
}  # Kilosort too calls mua what is too little to tell


def clusters(folder: Path) -> list[int]:
    """Every cluster id that needs a row."""
    ids: set[int] = set()
    if (folder / "templates.npy").is_file():
        ids |= set(range(len(np.load(folder / "templates.npy", mmap_mode="r"))))
    if (folder / "spike_clusters.npy").is_file():
        ids |= set(np.unique(np.load(folder / "spike_clusters.npy")).tolist())
    return sorted(ids)


def column(path: Path) -> dict[int, str]:
    """{cluster: value} of a column; {} where there is none."""
    if not path.is_file():
        return {}
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return {int(row[0]): row[1] for row in rows if len(row) > 1}


def original(path: Path) -> Path:
    return path.with_name(path.name + ".orig")


def _write(path: Path, title: str, values: dict[int, str]) -> None:
    beside = path.with_name(path.name + ".part")
    rows = [f"cluster_id\t{title}", *(f"{k}\t{v}" for k, v in values.items())]
    beside.write_text("\n".join(rows) + "\n", encoding="utf-8")
    beside.replace(path)


def save_labels(folder: Path, labels: dict[int, str]) -> list[str]:
    """Write the labels by cluster id, the sorter's own kept beside them; clusters without one keep the sorter's.

    Returns the names of the files. Nothing is written where the sorter left no labels.
    """
    written = []
    for name in LABELS:
        path = folder / name
        if not path.is_file():
            continue
        if not original(path).is_file():
            shutil.copy2(path, original(path))
        before = column(original(path))
        told = {u: UNDECIDED[name] if v == "undetermined" else v for u, v in labels.items()}
        _write(path, "KSLabel", {u: told.get(u, before.get(u, "mua")) for u in clusters(folder)})
        written.append(name)
    return written


def restore_labels(folder: Path) -> None:
    """The sorter's own labels again."""
    for name in LABELS:
        if original(folder / name).is_file():
            original(folder / name).replace(folder / name)


def save_merges(folder: Path, groups: list[list[int]], scores: dict[tuple[int, int], float]) -> None:
    """A column that says with whom a cluster belongs; Phy shows it, and sorts by it. `scores` of pairs (smaller id first)."""
    values = dict.fromkeys(clusters(folder), "")
    for k, group in enumerate(groups):
        best = max((scores.get((a, b), 0.0) for a in group for b in group if a < b), default=0.0)
        values |= dict.fromkeys(group, f"{k + 1}: {' + '.join(map(str, group))} ({best:.2f})")
    if groups:
        _write(folder / MERGES, "slay", values)
    else:
        (folder / MERGES).unlink(missing_ok=True)
