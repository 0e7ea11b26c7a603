"""Maxwell `.raw.h5`, the 2016 layout (`/sig`) and the newer one (`/data_store`, `/wells`), with h5py alone.

Row i of the newer layout is amplifier channel `routed/channels[i]`, whatever the order of the mapping table.
Samples are ADC codes around 512; `settings/lsb` is volt per code at the electrode, 0 in some files, and then
follows from the amplifier gain (3.3 V over 1024 codes). The vendor's compression filter is not free software
and has to be on HDF5_PLUGIN_PATH.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, RecordingError
from spiked.sources.formats.recording import (
    EVENTS,
    Choice,
    Paged,
    Recording,
    event_table,
    jumps,
    word_events,
)
from spiked.stream import EventKind, StreamInfo

ADC_V, ADC_CODES, ZERO_CODE = 3.3, 1024, 512
OLD_RATE_HZ = 20_000.0


class MaxwellRecording(Recording):
    """One well of a Maxwell file. Channels that the mapping does not place are left out and annotated."""

    def __init__(self, path: Path, file: Any, parts: dict[str, Any], choice: Choice) -> None:
        raw, frames = parts["raw"], parts["frames"]
        _check_filters(raw, path)
        routing = _routing(parts["mapping"])
        rows = [(r, c) for r, c in parts["rows"] if c in routing]
        if not rows:
            raise RecordingError(
                f"{path} routes no electrode; export the recording again with its configuration"
            )
        n = int(raw.shape[1])
        if frames is not None and len(frames) != n:
            raise RecordingError(f"{path}: {n} samples but {len(frames)} frame numbers; copy the file again")
        xy = tuple((routing[c][1], routing[c][2]) for _, c in rows)
        positions, known = choice.positions(len(rows), xy)
        info = StreamInfo(
            name=path.name.removesuffix(".h5").removesuffix(".raw"),
            fs_hz=choice.rate(parts["rate"], path),
            channel_ids=tuple(str(c) for _, c in rows),
            positions_um=positions,
            dtype="uint16",
            gain_uv=(choice.gain_uv or _lsb_uv(parts["settings"], path),) * len(rows),
            zero_code=ZERO_CODE,
            code_min=0,
            code_max=ADC_CODES - 1,
            geometry_known=known,
            source="maxwell",
            annotations={
                "electrodes": [routing[c][0] for _, c in rows],
                "unplaced_channels": [c for _, c in parts["rows"] if c not in routing],
                "well": parts["well"],
            },
        )
        first = int(frames[0]) if frames is not None and n else 0
        super().__init__(path, info, n, first, jumps(frames, n) if frames is not None else ())
        self._raw = raw
        take = np.array([r for r, _ in rows])
        self._low, self._high = int(take.min()), int(take.max()) + 1
        self._take = take - self._low
        chunk = raw.chunks[1] if raw.chunks else 1
        self._pages = Paged(self._load, n, 2 * (self._high - self._low), chunk)
        self._on_close.append(file.close)
        self.set_events(np.concatenate([np.zeros(0, EVENTS), *parts["events"]]))

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return self._pages(start, stop)

    def _load(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._raw[self._low : self._high, start:stop]).T[:, self._take]


def open_maxwell(path: Path, file: Any, choice: Choice) -> MaxwellRecording:
    """An open HDF5 file as a Maxwell recording; `choice.well` and `choice.stream` ("rec0001") pick one."""
    try:
        parts = _old(file, path) if "sig" in file else _new(file, path, choice)
    except KeyError as e:
        raise RecordingError(
            f"{path} lacks part of a Maxwell recording ({e.args[0]}); copy or export it again"
        ) from e
    return MaxwellRecording(path, file, parts, choice)


def _old(file: Any, path: Path) -> dict[str, Any]:
    sig = file["sig"]
    n_channels = min(sig.shape[0], ADC_CODES)
    mapping = file["mapping"][...]
    frames = _Frames(sig) if sig.shape[0] > ADC_CODES + 1 else None
    if frames is not None and sig.shape[1] > 1 and not frames[-2:].any():
        frames = None  # some exports leave the counter rows empty
    events = []
    if "bits" in file and len(file["bits"]):
        events.append(_bits(file["bits"][...]))
    if "proc0/spikeTimes" in file:
        events.append(_spikes(file["proc0/spikeTimes"][...]))
    return {
        "raw": sig,
        "frames": frames,
        "mapping": mapping,
        "rows": [(c, c) for c in sorted({int(c) for c in mapping["channel"] if 0 <= c < n_channels})],
        "settings": file["settings"],
        "rate": OLD_RATE_HZ,
        "well": 0,
        "events": events,
    }


class _Frames:
    """Frame numbers of the 2016 layout: the last two rows are their low and high 16 bits."""

    def __init__(self, sig: Any) -> None:
        self._sig = sig

    def __len__(self) -> int:
        return int(self._sig.shape[1])

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            at = slice(*at.indices(len(self)))
        pair = np.asarray(self._sig[-2, at]).astype(np.int64), np.asarray(self._sig[-1, at]).astype(np.int64)
        return pair[0] + (pair[1] << 16)


def _new(file: Any, path: Path, choice: Choice) -> dict[str, Any]:
    group, well = _record(file, path, choice)
    if "groups/routed/raw" not in group:
        raise RecordingError(f"{path} holds spikes only, no raw traces; record with raw data switched on")
    routed = group["groups/routed"]
    raw = routed["raw"]
    rows = [(i, int(c)) for i, c in enumerate(routed["channels"][...].ravel())]
    if len(rows) != raw.shape[0]:
        raise RecordingError(
            f"{path}: {raw.shape[0]} rows of samples but {len(rows)} channels; export it again"
        )
    events = []
    if "spikes" in group:
        events.append(_spikes(group["spikes"][...]))
    if "events" in group:
        events.append(_stims(group["events"][...]))
    if "bits" in file and hasattr(file["bits"], "keys"):
        events += [_bits(b[...]) for b in file["bits"].values() if getattr(b.dtype, "names", None) and len(b)]
    settings = group["settings"]
    rate = float(np.ravel(settings["sampling"][...])[0]) if "sampling" in settings else OLD_RATE_HZ
    return {
        "raw": raw,
        "frames": routed.get("frame_nos"),
        "mapping": settings["mapping"][...],
        "rows": rows,
        "settings": settings,
        "rate": rate,
        "well": well,
        "events": events,
    }


def _record(file: Any, path: Path, choice: Choice) -> tuple[Any, int]:
    """The group of the wanted well and recording, and the well's number."""
    wells = (
        {int(name.removeprefix("well")): g for name, g in file["wells"].items()} if "wells" in file else {}
    )
    if not wells:
        wells = {0: file["data_store"]}
    well = choice.well
    if well not in wells:
        if len(wells) > 1 or well:
            raise ConfigError(
                f"{path} holds wells {', '.join(map(str, sorted(wells)))}; choose one with well = ..."
            )
        well = next(iter(wells))
    records = wells[well]
    names = sorted(records)
    if not names:
        raise RecordingError(f"{path}: well {well} holds no recording; choose another")
    if choice.stream in names:
        return records[choice.stream], well
    if len(names) > 1:
        raise ConfigError(f"{path}: well {well} holds {', '.join(names)}; name the stream after one of them")
    return records[names[0]], well


def _routing(mapping: np.ndarray) -> dict[int, tuple[int, float, float]]:
    """Channel -> (electrode, x, y); a channel listed twice (newer firmware) counts once."""
    routing: dict[int, tuple[int, float, float]] = {}
    for row in mapping:
        if row["channel"] >= 0:
            routing.setdefault(int(row["channel"]), (int(row["electrode"]), float(row["x"]), float(row["y"])))
    return routing


def _lsb_uv(settings: Any, path: Path) -> float:
    lsb = float(np.ravel(settings["lsb"][...])[0]) if "lsb" in settings else 0.0
    if lsb > 0:
        return lsb * 1e6
    gain = float(np.ravel(settings["gain"][...])[0]) if "gain" in settings else 0.0
    if gain <= 0:
        raise RecordingError(f"{path} says neither its lsb nor its gain; give gain_uv")
    return ADC_V / ADC_CODES / gain * 1e6


def _spikes(table: np.ndarray) -> np.ndarray:
    """The device's own spikes; `line` is the amplifier channel, as in channel_ids."""
    return event_table(table["frameno"], EventKind.DEVICE_SPIKE, table["channel"], 1, table["amplitude"])


def _stims(table: np.ndarray) -> np.ndarray:
    """Marks set with maxlab's system.Event, which labs put where they stimulate."""
    messages = [
        m.decode("utf-8", "replace") if isinstance(m, bytes) else str(m) for m in table["eventmessage"]
    ]
    return event_table(table["frameno"], EventKind.STIM, table["eventid"], 1, table["eventtype"], messages)


def _bits(table: np.ndarray) -> np.ndarray:
    return word_events(table["frameno"], table["bits"])


def _check_filters(raw: Any, path: Path) -> None:
    """Raise RecordingError if the samples are compressed with a filter that HDF5 cannot find."""
    import h5py

    plist = raw.id.get_create_plist()
    for i in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            raise RecordingError(
                f"{path} is compressed with Maxwell's HDF5 filter ({code} {name.decode(errors='replace')}), "
                "which is not installed; set HDF5_PLUGIN_PATH to the folder of MaxLab's libcompression.so"
            )
