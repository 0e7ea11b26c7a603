"""The session file: valid NWB in which every dataset exists, extendable, before the first sample comes.

pynwb writes the empty file, so that it is valid by construction; what pynwb cannot make (text columns of
fixed length, without which HDF5's single-writer-multiple-reader mode refuses to append) is put in with h5py.

    acquisition/ElectricalSeries   samples (samples, channels) in device codes; microvolt from conversion and
    offset acquisition/events             TTL edges, stimulations, device messages, counter resets
    intervals/invalid_times        gaps
    stimulus/presentation/stimuli  the stimulus ledger, once the session is over
    scratch/position               how far the file is whole: what a restart and a recovery go by
    scratch/synced                 how far of that had reached the disk: what a recovery after a power cut goes by
    scratch/stream                 the StreamInfo as JSON
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from spiked.config import Config
from spiked.errors import RecordingError
from spiked.stream import StreamInfo

SERIES = "acquisition/ElectricalSeries"
DATA = f"{SERIES}/data"
EVENTS = "acquisition/events"
GAPS = "intervals/invalid_times"
POSITION = "scratch/position"
SYNCED = "scratch/synced"
STREAM = "scratch/stream"
# HDF5 1.10 is the oldest format with SWMR, and what the most readers understand
LIBVER = ("v110", "v110")
CHUNK_BYTES = 1 << 20
CHUNK_S = 1.0
TABLE_CHUNK = 256
EMPTY = {"shape": (0,), "maxshape": (None,), "chunks": (TABLE_CHUNK,)}

# words of scratch/position (int64)
(P_FIRST, P_SAMPLES, P_GAPS, P_EVENTS, P_RING_GAP, P_RING_EVENT, P_RING_FIRST, P_FINAL) = range(8)
POSITION_TEXT = (
    "first sample number, whole samples, whole rows of invalid_times and of events, next rows of the ring's "
    "gap and event tables, the ring's first sample number, 1 once finalized"
)


@dataclass(frozen=True)
class Column:
    """A column of an extendable table. Text is UTF-8 of `width` bytes while recording."""

    name: str
    dtype: str  # numpy's, or "text"
    text: str
    width: int = 0

    @property
    def stored(self) -> Any:
        return h5py.string_dtype("utf-8", self.width) if self.dtype == "text" else np.dtype(self.dtype)


GAP_COLUMNS = (
    Column("start_time", "f8", "Start of the gap, in seconds"),
    Column("stop_time", "f8", "End of the gap, in seconds"),
    Column("start_sample", "i8", "First sample number that never arrived"),
    Column("stop_sample", "i8", "First sample number after the gap"),
    Column(
        "reason",
        "text",
        "lost: never arrived; partial: some channels never arrived; restart: acquisition restarted",
        16,
    ),
    Column("n_channels", "i4", "How many channels are affected"),
    Column("channels", "u1", "Affected channels, one bit each, highest bit first (numpy.packbits)"),
)
EVENT_COLUMNS = (
    Column("timestamp", "f8", "When it happened, in seconds"),
    Column("sample", "i8", "Sample number"),
    Column("kind", "text", "ttl, stim, device_spike or message", 16),
    Column("line", "i4", "TTL line counted from 0, or event number"),
    Column("state", "i4", "1: on or rising, 0: off or falling"),
    Column("value", "f8", "TTL word, stimulus amplitude or another number the event carries"),
    Column("text", "text", "Message", 96),
)


def chunk_rows(info: StreamInfo) -> int:
    """Samples per HDF5 chunk: about 1 MB, at most a second."""
    row = info.n_channels * np.dtype(info.dtype).itemsize
    return int(max(16, min(CHUNK_BYTES // row, info.fs_hz * CHUNK_S)))


def gain(info: StreamInfo) -> tuple[float, float, np.ndarray | None]:
    """(conversion, offset, channel_conversion): volt = code * conversion * channel_conversion + offset."""
    uv = np.asarray(info.gain_uv, float)
    if np.all(uv == uv[0]):
        return uv[0] * 1e-6, -info.zero_code * uv[0] * 1e-6, None
    return 1e-6, 0.0, uv  # NWB has one offset for all; the electrodes table then has one each


def create(
    path: Path, info: StreamInfo, config: Config, session_start: datetime, session_id: str, first_sample: int,
    ring_first: int = 0,
) -> None:  # fmt: skip
    """Make the empty session file; it appears under its name only when it is complete.

    `session_start` (with a time zone) is the time of the first sample, `first_sample` its number,
    `ring_first` the number of the first sample the ring ever held. RecordingError when the file exists or
    cannot be written.
    """
    if path.exists():
        raise RecordingError(f"{path} exists; nothing is overwritten, give another name or move it away")
    part = path.with_name(path.name + ".part")
    position = np.zeros(8, np.int64)
    position[[P_FIRST, P_RING_FIRST]] = first_sample, ring_first
    try:
        with h5py.File(part, "w", libver=LIBVER) as f:
            _write_nwb(f, info, config, session_start, session_id, position)
        with h5py.File(part, "r+", libver=LIBVER) as f:
            for table, columns in ((GAPS, GAP_COLUMNS), (EVENTS, EVENT_COLUMNS)):
                for c in columns:
                    if c.dtype == "text":
                        replace(f[table], c.name, dtype=c.stored, **EMPTY)
            f[SERIES].attrs["first_sample"] = np.int64(first_sample)
        with open(part, "r+b") as written:
            os.fsync(written.fileno())
        part.rename(path)
        for folder in (
            path.parent,
            path.parent.parent,
        ):  # the names too: a new session's folder is as new as its file
            fd = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    except (OSError, RuntimeError) as e:
        part.unlink(missing_ok=True)
        raise RecordingError(
            f"cannot create {path}: {first_line(e)}; check the disk and the folder's owner"
        ) from e


def _write_nwb(
    f: h5py.File, info: StreamInfo, config: Config, start: datetime, session_id: str, position: np.ndarray
) -> None:
    from pynwb import H5DataIO, NWBFile
    from pynwb.ecephys import ElectricalSeries

    rig = config.rig
    nwb = NWBFile(
        session_description=rig.description or f"Recording of {info.name} on rig {rig.name}",
        identifier=f"{session_id}/{info.name}",
        session_id=session_id,
        session_start_time=start if start.tzinfo else start.astimezone(),
        experimenter=[rig.experimenter] if rig.experimenter else None,
        lab=rig.lab or None,
        institution=rig.institution or None,
        keywords=["extracellular electrophysiology", info.source or "spiked"],
        subject=_subject(config),
    )
    conversion, offset, per_channel = gain(info)
    series: dict[str, Any] = {} if per_channel is None else {"channel_conversion": per_channel}
    data = np.empty((0, info.n_channels), info.dtype)
    nwb.add_acquisition(
        ElectricalSeries(
            name="ElectricalSeries",
            description="Device codes; samples that never arrived are zero and listed in invalid_times",
            data=H5DataIO(data, maxshape=(None, info.n_channels), chunks=(chunk_rows(info), info.n_channels)),
            electrodes=_electrodes(nwb, info),
            starting_time=0.0,
            rate=float(info.fs_hz),
            conversion=conversion,
            offset=offset,
            **series,
        )
    )
    nwb.add_acquisition(
        _table("events", "TTL edges, stimulations and device messages", EVENT_COLUMNS, info, False)
    )
    nwb.invalid_times = _table(
        "invalid_times", "Samples that never arrived (zero in the data)", GAP_COLUMNS, info, True
    )
    nwb.add_scratch(position, name="position", description=POSITION_TEXT)
    text = "whole samples that were certainly on the disk when this was written; which life of the computer wrote it"
    nwb.add_scratch(np.zeros(2, np.int64), name="synced", description=text)
    nwb.add_scratch(info.to_json(), name="stream", description="The stream as it was acquired (JSON)")
    with nwb_io(f, "w") as io:
        io.write(nwb)


def _subject(config: Config) -> Any:
    from pynwb.file import Subject

    s = config.subject
    return Subject(
        subject_id=s.id, species=s.species, sex=s.sex, age=s.age, description=s.description or None
    )


def _electrodes(nwb: Any, info: StreamInfo) -> Any:
    """One row per channel. No positions where the geometry is not known: a wrong probe is worse than none."""
    device = nwb.create_device(name=info.source or "device", description=f"Source of stream {info.name}")
    where = "relative to the probe" if info.geometry_known else "of the electrodes are not known"
    group = nwb.create_electrode_group(
        name=info.name,
        description=f"{info.n_channels} channels; positions {where}",
        location="unknown",
        device=device,
    )
    columns = {"channel_name": "The device's name of the channel", "gain_uv": "Microvolt per code"}
    if info.geometry_known:
        columns |= {
            "rel_x": "Position across the probe, micrometre",
            "rel_y": "Position along the probe, micrometre",
        }
    own_offset = gain(info)[2] is not None and info.zero_code != 0
    if own_offset:
        columns["offset"] = "Volt at code 0"
    for name, text in columns.items():
        nwb.add_electrode_column(name=name, description=text)
    for i, channel in enumerate(info.channel_ids):
        row: dict[str, Any] = {"channel_name": channel, "gain_uv": float(info.gain_uv[i])}
        if info.geometry_known:
            row |= {"rel_x": float(info.positions_um[i][0]), "rel_y": float(info.positions_um[i][1])}
        if own_offset:
            row["offset"] = -info.zero_code * info.gain_uv[i] * 1e-6
        nwb.add_electrode(id=i, group=group, location="unknown", **row)
    return nwb.create_electrode_table_region(region=list(range(info.n_channels)), description="all channels")


def _table(name: str, text: str, columns: tuple[Column, ...], info: StreamInfo, intervals: bool) -> Any:
    from hdmf.common import DynamicTable, ElementIdentifiers, VectorData
    from pynwb import H5DataIO
    from pynwb.epoch import TimeIntervals

    def empty(dtype: Any, *more: int) -> Any:
        return H5DataIO(np.empty((0, *more), dtype), maxshape=(None, *more), chunks=(TABLE_CHUNK, *more))

    made = []
    for c in columns:
        more = (-(-info.n_channels // 8),) if c.name == "channels" else ()
        dtype = "S1" if c.dtype == "text" else c.dtype
        made.append(VectorData(name=c.name, description=c.text, data=empty(dtype, *more)))
    ids = ElementIdentifiers(name="id", data=empty("i8"))
    kind = TimeIntervals if intervals else DynamicTable
    return kind(name=name, description=text, columns=made, id=ids)


@contextmanager
def nwb_io(f: h5py.File, mode: str) -> Iterator[Any]:
    """pynwb on an open file, which it closes at the end.

    What pynwb says about its own future is not the operator's business.
    """
    from pynwb import NWBHDF5IO

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        io = NWBHDF5IO(file=f, mode=mode)
        try:
            yield io
        finally:
            io.close()


def replace(group: h5py.Group, name: str, **how: Any) -> h5py.Dataset:
    """Put another dataset (arguments of create_dataset) in the place of one, keeping its attributes."""
    attrs = dict(group[name].attrs)
    del group[name]
    new = group.create_dataset(name, **how)
    for key, value in attrs.items():
        new.attrs[key] = value
    return new


# What h5py, numpy and pynwb raise where a file is not what it was made as.
DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RuntimeError,
    OSError,
    MemoryError,
)


def first_line(e: BaseException) -> str:
    """An exception's text, one line."""
    text = getattr(e, "strerror", None) or str(e)
    return str(text).splitlines()[0] if str(text) else type(e).__name__
