"""The last touches on a closed session file: tidy tables, the live units, the blind intervals, the stimulus ledger and
the clock.

All of it is one edit (`spiked.record.edit`): a process that dies meanwhile leaves the file as it was, to be
finalized by the next one. Doing it twice changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from spiked.errors import RecordingError
from spiked.record.edit import editing, replay
from spiked.record.lock import WriterLock
from spiked.record.nwbfile import (
    DAMAGED,
    DATA,
    EVENT_COLUMNS,
    EVENTS,
    GAP_COLUMNS,
    GAPS,
    P_FINAL,
    P_FIRST,
    P_SAMPLES,
    POSITION,
    STREAM,
    TABLE_CHUNK,
    Column,
    first_line,
    nwb_io,
    replace,
)
from spiked.record.stimuli import stimuli_table
from spiked.record.sync import add_clock, rows_of
from spiked.stream import StreamInfo
from spiked_client.protocol import BLIND, BLIND_REASONS, LEDGER, SPIKE, UNIT, newest

MAX_OBS_ROWS = 1_000_000


def finalize(path: Path | str, session_dir: Path | str | None = None) -> bool:
    """Complete the closed file with what the live path left in `session_dir` (default: beside the file).

    True when something was done, False when it was complete already. RecordingError when the file is still
    being written, was not closed, or is not a session file.
    """
    path = Path(path)
    with WriterLock(path):
        replay(path)
        if is_final(path):
            return False
        try:
            with editing(path) as f:
                complete(f, path, Path(session_dir) if session_dir is not None else path.parent)
        except DAMAGED as e:
            raise RecordingError(
                f"{path} cannot be completed ({type(e).__name__}: {first_line(e)}); it is left as it was. Is it damaged?"
            ) from e
    return True


def is_final(path: Path) -> bool:
    """Whether `finalize` has been through the file; False for any file that cannot be opened."""
    try:
        with h5py.File(path, "r") as f:
            return POSITION in f and bool(f[POSITION][P_FINAL])
    except (OSError, RuntimeError):
        return False  # the edit will say what is wrong


def require_session_file(f: h5py.File, path: Path) -> None:
    """RecordingError unless the open file was made by this recorder."""
    for name in (DATA, POSITION, STREAM):
        if name not in f:
            raise RecordingError(f"{path} has no {name}; it was not recorded by spiked")
    for name, dimensions in ((DATA, 2), (POSITION, 1)):
        if len(getattr(f[name], "shape", ())) != dimensions:
            raise RecordingError(
                f"{path} is damaged: {name} is not what was recorded; restore it from a copy"
            )


def complete(f: h5py.File, path: Path, session_dir: Path) -> None:
    """The edit itself, on an open file, which it closes. See `finalize`."""
    require_session_file(f, path)
    position = f[POSITION]
    first, samples = int(position[P_FIRST]), int(position[P_SAMPLES])
    info = StreamInfo.from_json(f[STREAM][()])
    _cut_gaps(f, info, first, samples)
    _tidy(f, GAPS, GAP_COLUMNS, "start_sample")
    _tidy(f, EVENTS, EVENT_COLUMNS, "sample")
    gaps = _whole_gaps(f, info, first, samples)
    position[P_FINAL] = 1
    spikes = _records(session_dir / f"{path.stem}.spikes.bin", SPIKE)
    blind = _records(session_dir / f"{path.stem}.blind.bin", BLIND)
    known = _records(session_dir / f"{path.stem}.units.bin", UNIT)
    ledger = newest(_records(session_dir / f"{path.stem}.ledger.bin", LEDGER))
    spikes = spikes[
        (spikes["unit"] >= 0) & (spikes["sample"] >= first) & (spikes["sample"] < first + samples)
    ]
    blind = blind.copy()
    blind["start"], blind["stop"] = (
        np.maximum(blind["start"], first),
        np.minimum(blind["stop"], first + samples),
    )
    blind = blind[blind["stop"] > blind["start"]]
    reference, clock = rows_of(session_dir, path.stem)
    if not len(spikes) and not len(blind) and not len(ledger) and not clock:
        return
    with nwb_io(f, "a") as io:
        nwb = io.read()
        if len(spikes) and nwb.units is None:
            nwb.units = _units(nwb, info, spikes, known, first, samples, gaps)
        if len(blind) and "blind" not in (nwb.intervals or {}):
            nwb.add_time_intervals(_blind(blind, info, first))
        if len(ledger) and "stimuli" not in nwb.stimulus:
            nwb.add_stimulus(stimuli_table(ledger, info, first))
        if clock:
            add_clock(nwb, info, first, reference, clock)
        io.write(nwb)


def _records(path: Path, dtype: np.dtype) -> np.ndarray:
    """Whole records of a file of the live path; a torn last one is left out, a missing file is empty."""
    try:
        n = path.stat().st_size // dtype.itemsize
    except FileNotFoundError:
        return np.zeros(0, dtype)
    return np.fromfile(path, dtype, n)


def _tidy(f: h5py.File, table: str, columns: tuple[Column, ...], by: str) -> None:
    """Rows in the order of time, text as every NWB reader expects it; an empty table goes."""
    group = f.get(table)
    if group is None:
        return
    if len(group["id"]) == 0:
        del f[table]
        return
    order = np.argsort(group[by][:], kind="stable")
    for c in columns:
        values = group[c.name][:][order]
        if c.dtype == "text":
            texts = [v if isinstance(v, str) else v.decode("utf-8", "replace") for v in values]
            chunks, dtype = (min(TABLE_CHUNK, len(texts)),), h5py.string_dtype("utf-8")
            replace(group, c.name, data=np.array(texts, object), maxshape=(None,), chunks=chunks, dtype=dtype)
        else:
            group[c.name][...] = values


def _cut_gaps(f: h5py.File, info: StreamInfo, first: int, samples: int) -> None:
    """No gap beyond the file: one is listed before it is filled, and whoever filled it may have been ended meanwhile."""
    if GAPS not in f:
        return
    table, end = f[GAPS], first + samples
    inside = table["start_sample"][:] < end
    if (table["stop_sample"][:][inside] <= end).all() and inside.all():
        return
    for column in [c for c in table.values() if isinstance(c, h5py.Dataset)]:
        kept = column[:][inside]
        column.resize(len(kept), axis=0)
        column[...] = kept
    stops = np.minimum(table["stop_sample"][:], end)
    table["stop_sample"][...] = stops
    table["stop_time"][...] = (stops - first) / info.fs_hz


def _whole_gaps(f: h5py.File, info: StreamInfo, first: int, samples: int) -> np.ndarray:
    """(gaps, 2) file rows [start, stop) in which no channel was seen; sorted, disjoint, inside the file."""
    if GAPS not in f:
        return np.zeros((0, 2), np.int64)
    table = f[GAPS]
    rows = np.column_stack([table["start_sample"][:], table["stop_sample"][:]])[
        table["n_channels"][:] >= info.n_channels
    ]
    rows = np.clip(rows - first, 0, samples)
    joined: list[list[int]] = []
    for start, stop in sorted(rows.tolist()):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        elif stop > start:
            joined.append([start, stop])
    return np.array(joined, np.int64).reshape(-1, 2)


def _column(name: str, text: str, data: Any) -> Any:
    from hdmf.common import VectorData

    return VectorData(name=name, description=text, data=data)


def _ragged(name: str, text: str, data: Any, ends: np.ndarray) -> list[Any]:
    from hdmf.common import VectorIndex

    column = _column(name, text, data)
    return [column, VectorIndex(name=f"{name}_index", target=column, data=ends)]


def _units(
    nwb: Any,
    info: StreamInfo,
    spikes: np.ndarray,
    known: np.ndarray,
    first: int,
    samples: int,
    gaps: np.ndarray,
) -> Any:
    """The live units: strictly ascending spike times, seconds from the first sample."""
    from hdmf.common import DynamicTableRegion, ElementIdentifiers
    from pynwb.misc import Units

    order = np.lexsort((spikes["sample"], spikes["unit"]))
    unit, sample = spikes["unit"][order], spikes["sample"][order]
    again = (np.diff(unit) == 0) & (np.diff(sample) == 0)  # a restarted live process may tell a spike twice
    keep = np.concatenate([[True], ~again])
    order, unit, sample = order[keep], unit[keep], sample[keep]
    ids, starts = np.unique(unit, return_index=True)
    ends = np.append(starts[1:], len(unit))
    told = {int(u["unit"]): u for u in known}
    channel = np.zeros(len(ids), np.int64)
    amplitude = np.zeros(len(ids), np.float32)
    for i, (u, a, b) in enumerate(zip(ids.tolist(), starts, ends, strict=True)):
        mine = spikes[order[a:b]]
        channel[i] = told[u]["channel"] if u in told else np.bincount(mine["channel"]).argmax()
        amplitude[i] = told[u]["amplitude_uv"] if u in told else np.median(mine["amplitude_uv"])
    channel = np.clip(channel, 0, info.n_channels - 1)
    columns = _ragged("spike_times", "Times of the troughs, in seconds", (sample - first) / info.fs_hz, ends)
    region = DynamicTableRegion(
        name="electrodes",
        description="electrode with the largest deflection",
        data=channel,
        table=nwb.electrodes,
    )
    from hdmf.common import VectorIndex

    columns += [region, VectorIndex(name="electrodes_index", target=region, data=np.arange(1, len(ids) + 1))]
    edges = np.concatenate([[0], gaps.ravel(), [samples]]).reshape(-1, 2)
    edges = edges[edges[:, 1] > edges[:, 0]] / info.fs_hz
    if len(edges) * len(ids) <= MAX_OBS_ROWS:  # else invalid_times alone tells it
        obs = np.tile(edges, (len(ids), 1))
        columns += _ragged(
            "obs_intervals", "When the stream was seen", obs, len(edges) * np.arange(1, len(ids) + 1)
        )
    columns += [
        _column("label", "How the unit was found", ["live"] * len(ids)),
        _column("channel", "Device channel of that electrode", [info.channel_ids[c] for c in channel]),
        _column("amplitude_uv", "Deflection at the trough, microvolt", amplitude),
    ]
    return Units(
        name="units", description="Units sorted live, while the session ran", columns=columns,
        id=ElementIdentifiers(name="id", data=ids.astype(np.int64)), resolution=1 / info.fs_hz,
    )  # fmt: skip


def _blind(blind: np.ndarray, info: StreamInfo, first: int) -> Any:
    """One row per interval and reason, with the channels that were blind."""
    from pynwb.epoch import TimeIntervals

    order = np.lexsort((blind["channel"], blind["reason"], blind["stop"], blind["start"]))
    blind = blind[order]
    key = np.column_stack([blind["start"], blind["stop"], blind["reason"]])
    new = np.concatenate([[True], np.any(key[1:] != key[:-1], axis=1)])
    starts = np.flatnonzero(new)
    rows = blind[starts]
    channels = [
        np.arange(info.n_channels) if part["channel"].min() < 0 else np.unique(part["channel"])
        for part in np.split(blind, starts[1:])
    ]
    reasons = [BLIND_REASONS[r] if 0 <= r < len(BLIND_REASONS) else "unknown" for r in rows["reason"]]
    if (
        len(rows) > 1 and rows["start"][0] == rows["start"][-1]
    ):  # nwbinspector takes equal starts for an error
        reasons, channels = [", ".join(dict.fromkeys(reasons))], [np.unique(np.concatenate(channels))]
        rows = rows[-1:]
    seconds = (np.column_stack([rows["start"], rows["stop"]]) - first) / info.fs_hz
    columns = [
        _column("start_time", "Start, in seconds", seconds[:, 0]),
        _column("stop_time", "End, in seconds", seconds[:, 1]),
        _column("start_sample", "First blind sample number", rows["start"]),
        _column("stop_sample", "First sample number after it", rows["stop"]),
        _column("reason", "Why no spikes could be seen", reasons),
        *_ragged(
            "channels",
            "Rows of the electrodes table",
            np.concatenate(channels),
            np.cumsum([len(c) for c in channels]),
        ),
    ]
    text = "Intervals in which the live path could not see spikes on some channels"
    return TimeIntervals(name="blind", description=text, columns=columns)
