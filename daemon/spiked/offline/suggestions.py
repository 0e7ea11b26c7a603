"""The merges as suggestions, to look at before they count: SpikeInterface's curation format, and a column for Phy.

`spikeinterface_gui.run_mainwindow(analyzer, curation=True, curation_dict=json.load(open(FILE)))` shows them on the folder `analyzer`;
`spikeinterface.curation.apply_curation` applies the file as it is, or as it was left.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spiked.offline import phy
from spiked.offline.manifest import write_json

FILE = "merges.spikeinterface.json"
OPTIONS = ("good", "mua", "noise")


def write(
    unit_ids: Iterable[Any], labels: list[dict[str, Any]], proposed: dict[str, Any], folder: Path
) -> None:
    """`unit_ids` are all of the analyzer's, `labels` the rows of the labels' stage, `proposed` as `merges.propose` returns it."""
    write_json(folder / FILE, curation([int(u) for u in unit_ids], labels, proposed["groups"]))
    output = folder / "sorter" / "sorter_output"
    if (output / "spike_clusters.npy").is_file():
        phy.save_merges(output, phy.merges(proposed["groups"], proposed["pairs"]))


def curation(
    unit_ids: list[int], labels: list[dict[str, Any]], groups: list[list[int]], removed: Iterable[int] = ()
) -> dict[str, Any]:
    """SpikeInterface's curation format, version 2."""
    told = [
        {"unit_id": r["unit"], "labels": {"quality": [r["label"]]}} for r in labels if r["label"] in OPTIONS
    ]
    return {
        "format_version": "2",
        "unit_ids": unit_ids,
        "label_definitions": {"quality": {"label_options": list(OPTIONS), "exclusive": True}},
        "manual_labels": told,
        "merges": [{"unit_ids": list(g)} for g in groups],
        "splits": [],
        "removed": sorted(removed),
    }
