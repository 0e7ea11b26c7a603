"""MaxLab routing: which electrode each amplifier channel reads, from a .cfg or a .raw.h5 file.

A .cfg is a list of channel(electrode)x/y entries, each closed by a semicolon, in micrometre.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError

_NUMBER = r"([-+]?\d{1,12}(?:\.\d{0,30})?(?:[eE][-+]?\d{1,2})?)"
_ENTRY = re.compile(rf"\s*(-?\d{{1,9}})\s*\(\s*(-?\d{{1,9}})\s*\)\s*{_NUMBER}\s*/\s*{_NUMBER}\s*")

Row = tuple[int, int, float, float]  # amplifier channel, electrode, x, y


@dataclass(frozen=True)
class ElectrodeMap:
    """One entry per amplifier channel in use, in the file's order."""

    channels: tuple[int, ...]
    electrodes: tuple[int, ...]
    positions_um: tuple[tuple[float, float], ...]


def read_electrode_map(path: Path, well: int = 0) -> ElectrodeMap:
    """The routing of a MaxLab configuration (.cfg), or of a recording made with the same one (.h5).

    Channels below 0 (electrodes without an amplifier) and repeated rows, which some MaxLab versions write,
    are left out. Raises ConfigError when the file has no routing.
    """
    if not path.is_file():
        raise ConfigError(f"there is no electrode map {path}; save the configuration in MaxLab Scope")
    rows = _read_h5(path, well) if path.suffix in (".h5", ".hdf5") else _read_cfg(path)
    used: dict[int, Row] = {}
    for row in rows:
        if row[0] >= 0:
            used.setdefault(row[0], row)
    if not used:
        raise ConfigError(
            f"{path} routes no electrode to any channel; save the configuration in MaxLab again"
        )
    kept = used.values()
    return ElectrodeMap(tuple(used), tuple(r[1] for r in kept), tuple((r[2], r[3]) for r in kept))


def _read_cfg(path: Path) -> list[Row]:
    rows = []
    for entry in re.split(r"[;\n]", path.read_text(encoding="utf-8", errors="replace")):
        if not entry.strip():
            continue
        m = _ENTRY.fullmatch(entry)
        if m is None:
            raise ConfigError(
                f"{path}: {entry.strip()[:40]!r} is not channel(electrode)x/y; "
                "save the configuration in MaxLab"
            )
        rows.append((int(m[1]), int(m[2]), float(m[3]), float(m[4])))
    return rows


def _read_h5(path: Path, well: int) -> list[Row]:
    import h5py

    try:
        with h5py.File(path, "r") as f:
            table = np.asarray((f if "mapping" in f else _well_record(f, well, path))[_mapping(f)])
            columns = (table["channel"], table["electrode"], table["x"], table["y"])
            return [(int(c), int(e), float(x), float(y)) for c, e, x, y in zip(*columns, strict=True)]
    except (OSError, KeyError, ValueError, IndexError) as e:
        raise ConfigError(
            f"{path} holds no electrode mapping ({type(e).__name__}); give a MaxLab recording"
        ) from e


def _mapping(f: Any) -> str:
    return "mapping" if "mapping" in f else "settings/mapping"


def _well_record(f: Any, well: int, path: Path) -> Any:
    """The first recording of the well (layout of 2017 and later)."""
    records = [f["data_store"][name] for name in sorted(f["data_store"])]
    told = [r for r in records if "well_id" in r]
    mine = [r for r in told if int(np.ravel(r["well_id"][...])[0]) == well]
    if told and not mine:
        wells = sorted({int(np.ravel(r["well_id"][...])[0]) for r in told})
        raise ConfigError(f"{path} holds wells {wells}, not {well}; set well, or give that well's recording")
    return (mine or records)[0]


def write_electrode_map(path: Path, electrode_map: ElectrodeMap) -> None:
    """A .cfg that `read_electrode_map` (and MaxLab's own users) read."""
    rows = zip(electrode_map.channels, electrode_map.electrodes, electrode_map.positions_um, strict=True)
    path.write_text("".join(f"{c}({e}){x:g}/{y:g};" for c, e, (x, y) in rows) + "\n", encoding="utf-8")
