"""Packages that do not work together, found before the sorter is started. No imports: the versions alone."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Mapping

NEEDED = {
    "kilosort4": ("kilosort", "spikeinterface", "torch"),
    "kilosort2": ("spikeinterface",),
    "dartsort": ("dartsort", "spikeinterface", "torch"),
}
LOOKED_AT = ("kilosort", "spikeinterface", "slay", "dartsort", "torch", "numpy", "zarr", "h5py")


def installed() -> dict[str, str]:
    """{package: version} of those that matter here and are there."""
    found = {}
    for name in LOOKED_AT:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def conflicts(have: Mapping[str, str], sorter: str) -> tuple[list[str], list[str]]:
    """(what keeps the sorter from running, what only limits the steps after it), each "what; what to do"."""
    errors = [
        f"{sorter} needs the package {name}, which is not installed; pip install 'spiked[{'dartsort' if name == 'dartsort' else 'offline'}]'"
        for name in NEEDED.get(sorter, ())
        if name not in have
    ]
    numpy, si, ks = (_number(have.get(name)) for name in ("numpy", "spikeinterface", "kilosort"))
    if sorter == "kilosort4" and ks:
        if ks < (4, 0, 16) or (si >= (0, 105) and ks < (4, 1, 1)):
            errors.append(
                f"SpikeInterface {have['spikeinterface']} does not run kilosort {have['kilosort']}; pip install 'kilosort>=4.1.7'"
            )
        elif ks < (4, 1, 7) and numpy >= (2, 4):
            errors.append(
                f"kilosort {have['kilosort']} does not work with numpy {have['numpy']}; pip install 'kilosort>=4.1.7'"
            )
    if "zarr" in have and _number(have["zarr"]) >= (3,) and si < (0, 106) and si:
        errors.append(
            f"SpikeInterface {have['spikeinterface']} does not work with zarr {have['zarr']}; pip install 'zarr<3'"
        )
    return errors, _warnings(have, si)


def _warnings(have: Mapping[str, str], si: tuple[int, ...]) -> list[str]:
    told = []
    if "slay" not in have:
        why = " (it exists for Python 3.11 only)" if sys.version_info[:2] != (3, 11) else ""
        told.append(
            f"SLAy is not installed{why}: merges are SpikeInterface's own; pip install 'spiked[offline]'"
        )
    elif si >= (0, 105):
        told.append(
            f"SLAy {have['slay']} cannot be imported beside SpikeInterface {have['spikeinterface']}: merges are "
            "SpikeInterface's own; pip install 'spikeinterface>=0.104,<0.105'"
        )
    return told


def _number(version: str | None) -> tuple[int, ...]:
    """Its leading numbers; () for None."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[a-z+]", version or "")[0])[:3])
