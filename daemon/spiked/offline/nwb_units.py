"""The curated units in the session's NWB file: processing/ecephys/curated, beside the live ones in units.

One edit (`spiked.record.edit`): a job that is killed meanwhile leaves the file as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import SpikedError
from spiked.offline.session import StreamFiles
from spiked.record.edit import editing
from spiked.record.finalize import MAX_OBS_ROWS, finalize, require_session_file
from spiked.record.lock import WriterLock
from spiked.record.nwbfile import nwb_io

MODULE, TABLE = "ecephys", "curated"
COLUMNS = {
    "label": "Verdict of the curation: good, or undetermined (too few spikes to exclude contamination)",
    "reason": "Why",
    "amplitude_uv": "Peak of the mean waveform, microvolt",
    "snr": "That peak over the noise of its electrode",
    "firing_rate": "Spikes per second of the recording",
    "contamination": "Share of foreign spikes by refractory-period violations (Hill et al. 2011), 0.5: half or more",
}


def write_units(
    stream: StreamFiles, samples: np.ndarray, units: np.ndarray, rows: list[dict[str, Any]], sorter: str
) -> dict[str, Any]:
    """Put the units into the stream's file, in the place of those of an earlier job.

    `samples` (spikes,) are indices into the recording, `rows` the labelled units (UnitLabel.as_dict). Returns
    {"units", "table", "why"}; a file that cannot be edited is left as it was and `why` says so: the units are in
    units.npz anyway.
    """
    where = f"processing/{MODULE}/{TABLE}"
    try:
        finalize(stream.nwb)
        with WriterLock(stream.nwb), editing(stream.nwb) as f:
            require_session_file(f, stream.nwb)
            if where in f:
                del f[where]
            if rows:
                _add(f, stream, samples, units, rows, sorter)
    except SpikedError as e:
        return {"units": 0, "table": "", "why": str(e)}
    return {"units": len(rows), "table": where if rows else "", "why": "" if rows else "no unit left"}


def _add(
    f: Any,
    stream: StreamFiles,
    samples: np.ndarray,
    units: np.ndarray,
    rows: list[dict[str, Any]],
    sorter: str,
) -> None:
    from pynwb.misc import Units

    edges = np.concatenate([[0], stream.gaps.ravel(), [stream.n_samples]]).reshape(-1, 2)
    seen = edges[edges[:, 1] > edges[:, 0]] / stream.fs_hz
    more = {"obs_intervals": seen} if len(seen) * len(rows) <= MAX_OBS_ROWS else {}
    with nwb_io(f, "a") as io:
        nwb = io.read()
        module = nwb.processing.get(MODULE)
        if module is None:  # an empty one counts as False
            module = nwb.create_processing_module(
                MODULE, "What was made of the raw samples after the session"
            )
        table = Units(
            name=TABLE,
            description=f"Units of {sorter} after curation and merging; the ids are those of the report",
            electrode_table=nwb.electrodes,
            resolution=1 / stream.fs_hz,
        )
        for name, text in COLUMNS.items():
            table.add_column(name, text)
        for row in rows:
            train = np.unique(samples[units == row["unit"]])
            table.add_unit(
                id=int(row["unit"]), spike_times=train / stream.fs_hz, electrodes=[int(row["channel"])], label=row["label"],
                reason=row["reason"], amplitude_uv=float(row["peak_uv"]), snr=float(row["snr"]), firing_rate=float(row["rate_hz"]),
                contamination=float(row["contamination"]), **more,
            )  # fmt: skip
        module.add(table)
        io.write(nwb)


def read_units(path: Path) -> dict[int, np.ndarray]:
    """{unit: (spikes,) seconds} as `write_units` left them; empty where there are none."""
    import h5py

    with h5py.File(path, "r") as f:
        table = f.get(f"processing/{MODULE}/{TABLE}")
        if table is None:
            return {}
        times, ends = table["spike_times"][...], table["spike_times_index"][...].astype(np.int64)
        return dict(zip(table["id"][...].tolist(), np.split(times, ends[:-1]), strict=True))
