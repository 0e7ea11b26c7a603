"""What the report says beyond the stages' own results: quality by SpikeInterface, what the stream lost, what was
stimulated, how late live was, how the probe moved. Plain numbers; missing or undefined ones are None.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from spiked.act import report as stimulation
from spiked.act.ledger import path_of, read
from spiked.errors import OfflineError
from spiked.offline.session import StreamFiles, joined
from spiked.record import sync
from spiked_client.protocol import BLIND, BLIND_REASONS

METRICS = (
    "num_spikes",
    "firing_rate",
    "presence_ratio",
    "snr",
    "isi_violation",
    "rp_violation",
    "amplitude_cutoff",
)
PRESENCE_BINS = 10  # parts of the session that a unit may be present in
DRIFT_POINTS = 300


def known(value: Any) -> float | int | None:
    """A number as JSON knows it: None for nan and infinity."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value)


def collect(stream: StreamFiles, analyzer: Any | None, sorter_folder: Path) -> dict[str, Any]:
    """All of it, under the keys of report.json. `analyzer` holds the curated units; None where there is none."""
    kinds, marks = events(stream)
    return {
        "quality": {} if analyzer is None else quality(analyzer, stream.duration_s),
        "gap_spans": gap_spans(stream),
        "blind": blind(stream),
        "stimuli": stimuli(stream),
        "events": kinds,
        "stim_marks_s": marks,
        "live_latency": latency(stream),
        "clock": sync.figures(stream.nwb.parent, stream.name),
        "drift": drift(sorter_folder, stream.fs_hz),
    }


def quality(analyzer: Any, duration_s: float) -> dict[str, dict[str, float | int | None]]:
    """{unit: {SpikeInterface's metric: value}}; a metric that needs more spikes than there are is None.

    isi_violations_* counts intervals below 1.5 ms, rp_* is Llobet et al. 2022 with a period of 1 ms,
    amplitude_cutoff the share of spikes lost below the threshold (it needs 500 spikes).
    """
    with warnings.catch_warnings():  # about units with few spikes: None says it
        warnings.simplefilter("ignore")
        table = analyzer.compute(
            "quality_metrics",
            metric_names=list(METRICS),
            metric_params={"presence_ratio": {"bin_duration_s": duration_s / PRESENCE_BINS}},
        ).get_data()
    return {
        str(int(unit)): {name: known(row[name]) for name in table.columns} for unit, row in table.iterrows()
    }


def blind(stream: StreamFiles) -> dict[str, Any]:
    """When live could not see spikes: {"seconds" (of any channel), "share" (of all channels' time), "reasons":
    {reason: {"intervals", "seconds", "share"}}, "spans": [[start_s, stop_s]] of intervals blind on all channels}.
    """
    path = stream.nwb.with_name(f"{stream.name}.blind.bin")
    rows = (
        np.fromfile(path, BLIND, path.stat().st_size // BLIND.itemsize)
        if path.is_file()
        else np.zeros(0, BLIND)
    )
    first, n = stream.first_sample, stream.n_samples
    start, stop = (np.clip(rows[k] - first, 0, n) for k in ("start", "stop"))
    real = stop > start
    rows, start, stop = rows[real], start[real], stop[real]

    def told(mine: np.ndarray) -> dict[str, Any]:
        spans = np.column_stack([start[mine], stop[mine]])
        merged = joined(spans)
        width = np.where(rows["channel"][mine] < 0, stream.n_channels, 1)
        dead = float((np.diff(spans, axis=1)[:, 0] * width).sum()) if len(spans) else 0.0
        return {
            "intervals": len(np.unique(spans, axis=0)) if len(spans) else 0,
            "seconds": float((merged[:, 1] - merged[:, 0]).sum() / stream.fs_hz),
            "share": dead / max(n * stream.n_channels, 1),
        }

    reasons = {
        BLIND_REASONS[r] if 0 <= r < len(BLIND_REASONS) else "unknown": told(rows["reason"] == r)
        for r in np.unique(rows["reason"]).tolist()
    }
    everywhere = rows["channel"] < 0
    spans = joined(np.column_stack([start[everywhere], stop[everywhere]]))
    return {**told(np.ones(len(rows), bool)), "reasons": reasons, "spans": (spans / stream.fs_hz).tolist()}


def gap_spans(stream: StreamFiles) -> list[list[float]]:
    """[[start_s, stop_s]] in which no channel was recorded."""
    return (stream.gaps / stream.fs_hz).tolist()


def stimuli(stream: StreamFiles) -> dict[str, Any] | None:
    """The stimulus ledger's summary per rule, and `times_s` of what was sent; None where nothing was decided."""
    ledger = read(path_of(stream.nwb.parent, stream.name))
    if not len(ledger):
        return None
    sent = ledger["sent_sample"][ledger["sent_sample"] >= 0] - stream.first_sample
    return {**stimulation.summary(ledger, stream.fs_hz), "times_s": (np.sort(sent) / stream.fs_hz).tolist()}


def events(stream: StreamFiles) -> tuple[dict[str, int], list[float]]:
    """({kind: how many} of the TTL edges, stimulation marks and messages in the file, times of the marks in s)."""
    try:
        with stream.file() as f:
            table = f["acquisition/events"]
            kinds = [k.decode() if isinstance(k, bytes) else str(k) for k in table["kind"][...]]
            times = table["timestamp"][...]
    except (KeyError, OfflineError):  # no events, or a file that is not ours
        return {}, []
    marks = [float(t) for t, kind in zip(times, kinds, strict=True) if kind == "stim"]
    return {k: kinds.count(k) for k in sorted(set(kinds))}, marks


def latency(stream: StreamFiles) -> dict[str, Any] | None:
    """What the live process wrote of itself when it ended; None where it was not there."""
    try:
        text = stream.nwb.with_name(f"{stream.name}.latency.json").read_text(encoding="utf-8")
        told = json.loads(text)
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def drift(sorter_folder: Path, fs_hz: float) -> dict[str, Any]:
    """How the probe moved, as Kilosort saw it: {"why": "" or why it is not known, "times_s", "um": per block}."""
    unknown: dict[str, Any] = {
        "why": "not estimated: drift correction was off",
        "times_s": [],
        "um": [],
        "range_um": None,
    }
    try:
        with np.load(sorter_folder / "drift.npz", allow_pickle=False) as z:
            shift, batch_size = np.asarray(z["um"], float), float(z["batch_size"])
    except (OSError, KeyError, ValueError, TypeError):
        return unknown | {"why": "not known: the sorter left no drift.npz"}
    if not shift.size or shift.ndim != 2:
        return unknown
    keep = np.unique(np.linspace(0, len(shift) - 1, min(len(shift), DRIFT_POINTS)).astype(int))
    batch_s = batch_size / fs_hz
    return {
        "why": "",
        "times_s": (keep * batch_s).round(2).tolist(),
        "um": shift[keep].T.round(2).tolist(),
        "range_um": float(np.ptp(shift, axis=0).max()),
    }
