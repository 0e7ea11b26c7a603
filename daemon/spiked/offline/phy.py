"""Columns of a Phy folder: cluster_NAME.tsv, one row per cluster id, tab-separated.

Every template of the sorter has a row, also those without spikes: SpikeInterface's reader stops where rows are missing. What a
column held before stays beside it as .tsv.orig (a second .tsv would be read as a column of its own, and stops that reader too).
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LABELS = ("cluster_KSLabel.tsv", "cluster_group.tsv")
MERGES = "cluster_slay.tsv"
BY_HAND = ".by-hand-"  # a sorter's folder that was saved in Phy before the recording was sorted again
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


def write_column(path: Path, title: str, values: Mapping[int, Any]) -> None:
    """{cluster: value} as a column, whole or not at all; numbers with four digits."""
    beside = path.with_name(path.name + ".part")
    rows = [f"cluster_id\t{title}", *(f"{k}\t{_text(v)}" for k, v in values.items())]
    beside.write_text("\n".join(rows) + "\n", encoding="utf-8")
    beside.replace(path)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def saved_by_hand(folder: Path) -> bool:
    """Whether a person saved this folder in Phy, which then writes a column `group`, and what its table of clusters showed."""
    if (folder / "cluster_info.tsv").is_file():
        return True
    group = folder / "cluster_group.tsv"
    if not group.is_file() or not group.read_text(encoding="utf-8").startswith("cluster_id\tgroup"):
        return False
    return any(v not in ("", "unsorted") for v in column(group).values())


def set_aside(folder: Path, output: Path) -> Path | None:
    """Where `folder` is from now on, if `output` in it was saved by hand; None where nothing has to be kept."""
    if not saved_by_hand(output):
        return None
    taken = [p.name for p in folder.parent.glob(f"{folder.name}{BY_HAND}*")]
    place = folder.with_name(f"{folder.name}{BY_HAND}{len(taken) + 1}")
    folder.rename(place)
    return place


def save_labels(folder: Path, labels: dict[int, str]) -> list[str]:
    """Write the labels by cluster id, the sorter's own kept beside them; clusters without one keep the sorter's.

    Returns the names of the files. Nothing is written where the sorter left no labels, or a person has saved theirs in Phy.
    """
    written: list[str] = []
    if saved_by_hand(folder):
        return written
    for name in LABELS:
        path = folder / name
        if not path.is_file():
            continue
        if not original(path).is_file():
            shutil.copy2(path, original(path))
        before = column(original(path))
        told = {u: UNDECIDED[name] if v == "undetermined" else v for u, v in labels.items()}
        write_column(path, "KSLabel", {u: told.get(u, before.get(u, "mua")) for u in clusters(folder)})
        written.append(name)
    return written


def restore_labels(folder: Path) -> None:
    """The sorter's own labels again; a person's, saved in Phy, stay."""
    if saved_by_hand(folder):
        return
    for name in LABELS:
        if original(folder / name).is_file():
            original(folder / name).replace(folder / name)


def merges(groups: list[list[int]], pairs: list[dict[str, Any]]) -> dict[int, str]:
    """{cluster: with whom it belongs, and by which score}; Phy shows it, and sorts by it. `pairs` as merges.propose gives them."""
    scores = {frozenset((p["a"], p["b"])): float(p["final_metric"]) for p in pairs}
    values: dict[int, str] = {}
    for k, group in enumerate(groups):
        best = max(
            (scores.get(frozenset(pair), 0.0) for pair in itertools.combinations(group, 2)), default=0.0
        )
        values |= dict.fromkeys(group, f"{k + 1}: {' + '.join(map(str, group))} ({best:.2f})")
    return values


def save_merges(folder: Path, values: dict[int, str]) -> None:
    """`merges` as a column of the sorter's own folder; not where a person has saved theirs in Phy."""
    if saved_by_hand(folder):
        return
    if values:
        write_column(folder / MERGES, "slay", {u: values.get(u, "") for u in clusters(folder)})
    else:
        (folder / MERGES).unlink(missing_ok=True)
