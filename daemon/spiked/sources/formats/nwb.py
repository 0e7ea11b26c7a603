"""NWB: one ElectricalSeries, read with h5py so that a file still being written opens too.

volts = code x conversion x channel_conversion + offset (NWB schema 2), so the code that means 0 microvolt is
-offset / (conversion x channel_conversion). invalid_times over all channels are told as `invalid`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, RecordingError
from spiked.sources.formats.recording import EVENTS, SCAN, Choice, Paged, Recording, codes_dtype
from spiked.sources.probe import placeholder_line
from spiked.stream import EventKind, StreamInfo

TABLE = "general/extracellular_ephys/electrodes"


class NwbRecording(Recording):
    """One ElectricalSeries of an NWB file."""

    def __init__(self, path: Path, file: Any, series: Any, choice: Choice) -> None:
        data = series["data"]
        if data.ndim != 2:
            raise RecordingError(f"{path}: {series.name} is {data.ndim}-dimensional, not time x channels")
        own = _own_stream(file, int(data.shape[1]))
        n, n_gaps, n_events = (int(x) for x in _whole(file, own, int(data.shape[0])))
        rate, gaps, self._t0 = _clock(series, n, path)
        info = own or _foreign_stream(path, file, series, rate)
        positions, known = choice.positions(
            info.n_channels, info.positions_um if info.geometry_known else None
        )
        info = replace(
            info, fs_hz=choice.rate(rate, path), positions_um=positions, geometry_known=known, source="nwb",
            gain_uv=choice.gains(info.gain_uv),
        )  # fmt: skip
        super().__init__(path, info, n, int(series.attrs.get("first_sample", 0)), gaps)
        self._data = data
        chunk = data.chunks[0] if data.chunks else 1
        self._pages = Paged(lambda a, b: self._data[a:b], n, data.dtype.itemsize * info.n_channels, chunk)
        self._on_close.append(file.close)
        self._invalid = self._holes(file, n_gaps)
        if own is not None and "acquisition/events" in file:
            self.set_events(_own_events(file["acquisition/events"], n_events))

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return self._pages(start, stop)

    @property
    def invalid(self) -> list[tuple[int, int]]:
        return self._invalid

    def _holes(self, file: Any, rows: int) -> list[tuple[int, int]]:
        """Index intervals of the first `rows` invalid_times that concern every channel, joined."""
        table = file.get("intervals/invalid_times")
        if table is None or "start_time" not in table:
            return []
        rows = min(rows, len(table["stop_time"]))
        edges = np.stack([table[k][:rows] for k in ("start_time", "stop_time")], 1).astype(np.float64)
        index = np.rint((edges - self._t0) * self.info.fs_hz)
        if "n_channels" in table:
            index = index[table["n_channels"][:rows] >= self.info.n_channels]
        out: list[tuple[int, int]] = []
        for a, b in np.clip(index, 0, self.n_samples).astype(int)[np.argsort(index[:, 0], kind="stable")]:
            if out and a <= out[-1][1]:
                a, b = out[-1][0], max(b, out.pop()[1])
            if b > a:
                out.append((int(a), int(b)))
        return out


def open_nwb(path: Path, file: Any, choice: Choice) -> NwbRecording:
    """The only ElectricalSeries of an open file, or the one that `choice.stream` names."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if item.attrs.get("neurodata_type") == "ElectricalSeries" and "data" in item:
            found[name] = item

    for top in ("acquisition", "processing"):
        if top in file:
            file[top].visititems(visit)
        if found:
            break
    if not found:
        raise RecordingError(f"{path} holds no ElectricalSeries; give a file with raw traces")
    named = [s for n, s in found.items() if choice.stream in (n, n.rsplit("/", 1)[-1])]
    if len(found) > 1 and len(named) != 1:
        raise ConfigError(f"{path} holds {', '.join(found)}; name the stream after one of them")
    try:
        return NwbRecording(path, file, named[0] if named else next(iter(found.values())), choice)
    except KeyError as e:
        raise RecordingError(f"{path} lacks part of an NWB recording ({e.args[0]}); write it again") from e


def _own_stream(file: Any, n_channels: int) -> StreamInfo | None:
    """The stream as this package's recorder noted it; None for files of others."""
    note = file.get("scratch/stream")
    if note is None:
        return None
    try:
        info = StreamInfo.from_json(note[()])
    except (ValueError, TypeError, KeyError, ConfigError):
        return None
    return info if info.n_channels == n_channels else None


def _whole(file: Any, own: StreamInfo | None, n: int) -> tuple[int, int, int]:
    """Samples, gaps and events that are whole: in a file whose writer lives or died, what it had vouched for.

    The recorder keeps them in words 1, 2 and 3 of scratch/position; word 7 says that it is finished.
    """
    position = file.get("scratch/position")
    if own is None or position is None or position.shape != (8,) or position[7]:
        return n, n, n
    return min(n, int(position[1])), int(position[2]), int(position[3])


def _own_events(table: Any, rows: int) -> np.ndarray:
    columns = {k: table[k][:rows] for k in ("sample", "kind", "line", "state", "value", "text")}
    kinds = {k.name.lower(): int(k) for k in EventKind}
    rows = min(len(c) for c in columns.values())
    out = np.zeros(rows, EVENTS)
    out["kind"] = [kinds.get(_text(k), 0) for k in columns["kind"][:rows]]
    out["text"] = [_text(t) for t in columns["text"][:rows]]
    for key in ("sample", "line", "state", "value"):
        out[key] = columns[key][:rows]
    return out[out["kind"] > 0]  # counter resets are no events of the device


def _foreign_stream(path: Path, file: Any, series: Any, rate: float) -> StreamInfo:
    """What another program's file says about the stream."""
    data = series["data"]
    n_channels = int(data.shape[1])
    ids, xy = _electrodes(file, series, n_channels)
    gain_uv, zero = _scale(data, series, n_channels, path)
    return StreamInfo(
        name=series.name.rsplit("/", 1)[-1],
        fs_hz=rate,
        channel_ids=ids,
        positions_um=xy or placeholder_line(n_channels),
        dtype=codes_dtype(data.dtype),
        gain_uv=tuple(float(g) for g in gain_uv),
        zero_code=zero,
        geometry_known=xy is not None,
    )


def _clock(series: Any, n: int, path: Path) -> tuple[float, list[tuple[int, int]], float]:
    """Rate, gaps and time of the first sample, from starting_time or from timestamps."""
    if "starting_time" in series:
        start = series["starting_time"]
        return float(start.attrs["rate"]), [], float(start[()])
    if "timestamps" not in series or n < 2:
        raise RecordingError(f"{path}: {series.name} has neither a rate nor timestamps; write it again")
    times = series["timestamps"]
    rate = 1.0 / float(np.median(np.diff(times[: min(n, SCAN)])))
    rate = float(round(rate)) if abs(rate - round(rate)) < 1e-3 * rate else rate
    gaps: list[tuple[int, int]] = []
    for a in range(0, n - 1, SCAN):
        step = np.rint(np.diff(times[a : min(a + SCAN + 1, n)]) * rate).astype(np.int64)
        gaps += [(a + 1 + int(i), int(step[i]) - 1) for i in np.flatnonzero(step != 1)]
    return rate, gaps, float(times[0])


def _scale(data: Any, series: Any, n_channels: int, path: Path) -> tuple[np.ndarray, float]:
    """Microvolt per code of each channel and the code of 0 microvolt."""
    volts = np.full(n_channels, float(data.attrs.get("conversion", 1.0)))
    if "channel_conversion" in series:
        volts = volts * np.asarray(series["channel_conversion"][...], np.float64)
    if not (volts > 0).all():
        raise RecordingError(f"{path}: {series.name} has a conversion that is not above 0; write it again")
    zero = -float(data.attrs.get("offset", 0.0)) / volts
    if np.ptp(zero) > 1e-3 * max(1.0, float(np.abs(zero).max())):
        raise RecordingError(
            f"{path}: the zero code of {series.name} differs between channels; convert it to one offset"
        )
    return volts * 1e6, float(round(zero[0], 6))


def _electrodes(
    file: Any, series: Any, n_channels: int
) -> tuple[tuple[str, ...], tuple[tuple[float, float], ...] | None]:
    """Channel ids and, if the table has rel_x and rel_y, positions of the series' electrodes."""
    plain = tuple(str(i) for i in range(n_channels))
    table = file.get(TABLE)
    if table is None or "electrodes" not in series or len(series["electrodes"]) != n_channels:
        return plain, None
    rows = np.asarray(series["electrodes"][...], np.int64)
    names = next((table[k] for k in ("channel_name", "channel_id", "id") if k in table), None)
    ids = plain if names is None else tuple(_text(names[...][r]) for r in rows)
    if len(set(ids)) != n_channels:
        ids = plain
    if "rel_x" not in table or "rel_y" not in table:
        return ids, None
    xy = np.stack([table["rel_x"][...], table["rel_y"][...]], 1).astype(np.float64)[rows]
    return ids, tuple((float(x), float(y)) for x, y in xy) if np.isfinite(xy).all() else None


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
