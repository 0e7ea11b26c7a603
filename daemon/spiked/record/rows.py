"""Rows of the ring's gap and event tables as rows of the session file's tables."""

from __future__ import annotations

import h5py
import numpy as np

from spiked.ring import GAP_REASONS
from spiked.stream import EventKind, Gap, StreamInfo

Rows = dict[str, np.ndarray]
KINDS = {int(k): k.name.lower() for k in EventKind}


def gap_rows(rows: np.ndarray, info: StreamInfo, first: int) -> Rows:
    """Gaps that touch the file. Counter resets have no length; they are told as events, not here."""
    rows = rows[(rows["stop"] > rows["start"]) & (rows["stop"] > first)]
    start = np.maximum(rows["start"], first)
    return {
        "start_time": (start - first) / info.fs_hz,
        "stop_time": (rows["stop"] - first) / info.fs_hz,
        "start_sample": start,
        "stop_sample": rows["stop"],
        "reason": np.array([GAP_REASONS[r].encode() for r in rows["reason"]], "S16"),
        "n_channels": rows["n_channels"],
        "channels": rows["mask"][:, : -(-info.n_channels // 8)],
    }


def lost_row(gap: Gap, info: StreamInfo, first: int) -> Rows:
    """The gap that this process itself found: the ring lapped it."""
    mask = np.packbits(np.ones(info.n_channels, bool))
    return {
        "start_time": np.array([(gap.start - first) / info.fs_hz]),
        "stop_time": np.array([(gap.stop - first) / info.fs_hz]),
        "start_sample": np.array([gap.start]),
        "stop_sample": np.array([gap.stop]),
        "reason": np.array([gap.reason.encode()], "S16"),
        "n_channels": np.array([info.n_channels]),
        "channels": mask[None],
    }


def event_rows(rows: np.ndarray, info: StreamInfo, first: int) -> Rows:
    """Events of the file's own time."""
    rows = rows[rows["sample"] >= first]
    return {
        "timestamp": (rows["sample"] - first) / info.fs_hz,
        "sample": rows["sample"],
        "kind": np.array([KINDS.get(int(k), "message").encode() for k in rows["kind"]], "S16"),
        "line": rows["line"],
        "state": rows["state"],
        "value": rows["value"],
        "text": rows["text"],
    }


def put_rows(table: h5py.Group, at: int, rows: Rows) -> int:
    """Write rows from row number `at` on, over whatever a dead writer left there; the next row number."""
    n = len(next(iter(rows.values())))
    if n == 0:
        return at
    for name, values in [*rows.items(), ("id", np.arange(at, at + n))]:
        column = table[name]
        if len(column) < at + n:
            column.resize(at + n, axis=0)
        column[at : at + n] = values.astype(column.dtype)  # with it the text encoding
    return at + n
