"""The clock of a stream, from the session's clocks.json, as a table of its NWB file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spiked.stream import StreamInfo

FILE, MODULE, TABLE = "clocks.json", "sync", "clock"
TEXTS = {
    "sample": "Sample number of this stream",
    "reference_sample": "Sample number (a fraction too) of the reference stream at the same instant",
    "ratio": "Reference samples per sample around it",
    "error_ms": "Standard deviation, milliseconds",
    "method": "pulses: sync pulses seen by both; arrival: when samples reached the computer",
    "segment": "Counts up where a clock jumped; nothing may be interpolated across",
}


def rows_of(session_dir: Path, stream: str) -> tuple[str, list[dict[str, Any]]]:
    """(name of the reference stream, rows); no rows where no clock is known."""
    try:
        told = json.loads((session_dir / FILE).read_text(encoding="utf-8"))
        columns, table = told["columns"], told["streams"][stream]["table"]
        return str(told["reference"]), [dict(zip(columns, row, strict=True)) for row in table]
    except (OSError, ValueError, KeyError, TypeError):
        return "", []


def add_clock(nwb: Any, info: StreamInfo, first: int, reference: str, rows: list[dict[str, Any]]) -> None:
    """Put the table into an open file, unless it has one."""
    from hdmf.common import DynamicTable, VectorData

    if MODULE in nwb.processing:
        return
    seconds = (np.array([r["sample"] for r in rows]) - first) / info.fs_hz
    columns = [VectorData(name="timestamp", description="The sample in seconds of this file", data=seconds)]
    columns += [
        VectorData(name=name, description=text, data=[r[name] for r in rows]) for name, text in TEXTS.items()
    ]
    module = nwb.create_processing_module(MODULE, "Clocks of the session's streams")
    text = f"Sample numbers of stream {info.name} as those of stream {reference}"
    module.add(DynamicTable(name=TABLE, description=text, columns=columns))


def figures(session_dir: Path, stream: str) -> dict[str, Any] | None:
    """What became of a stream's clock, for reports; None where none was kept.

    reference: name of the first stream. ppm: against it, computer_ppm: against the computer's clock. error_ms: the
    largest and the middle one of the table. steps: jumps, as they were told.
    """
    try:
        told = json.loads((session_dir / FILE).read_text(encoding="utf-8"))
        mine = told["streams"][stream]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    _, rows = rows_of(session_dir, stream)
    errors = [float(r["error_ms"]) for r in rows]
    methods = [str(r["method"]) for r in rows]
    return {
        "reference": told["reference"],
        "ppm": mine.get("ppm"),
        "computer_ppm": mine.get("computer_ppm"),
        "method": max(set(methods), key=methods.count) if methods else mine.get("method"),
        "rows": len(rows),
        "error_ms": {"median": float(np.median(errors)), "max": max(errors)} if errors else None,
        "pulses": mine.get("pulses"),
        "steps": mine.get("steps", []),
    }


def lines(session_dir: Path) -> list[str]:
    """One line for every stream of a session with several, or with a jump."""
    try:
        streams = json.loads((session_dir / FILE).read_text(encoding="utf-8"))["streams"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    told = {name: figures(session_dir, name) for name in streams}
    return [sentence(name, f) for name, f in told.items() if f and (len(told) > 1 or f["steps"])]


def sentence(stream: str, f: dict[str, Any]) -> str:
    """A clock in words."""
    jumps = "".join(f"; JUMPED by {s['ms']:+.1f} ms near sample {s['sample']}" for s in f["steps"])
    own = "" if f["computer_ppm"] is None else f"{f['computer_ppm']:+.2f} ppm against the computer"
    if stream == f["reference"]:
        return f"clock of {stream}: the reference{', ' * bool(own)}{own}{jumps}"
    if f["error_ms"] is None:
        return f"clock of {stream}: not known against {f['reference']}{jumps}"
    by = "sync pulses" if f["method"] == "pulses" else "arrival times"
    return (
        f"clock of {stream}: {f['ppm'] or 0:+.2f} ppm against {f['reference']} by {by}, known to "
        f"{f['error_ms']['median']:.3g} ms (at worst {f['error_ms']['max']:.3g} ms){jumps}"
    )
