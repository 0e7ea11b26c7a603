"""Open Ephys binary format: structure.oebin, continuous.dat with sample_numbers.npy, TTL events.

https://open-ephys.github.io/gui-docs/User-Manual/Data-formats/Binary-format.html. Files before GUI 0.6 keep
sample numbers in timestamps.npy and edges in channel_states.npy; both are read. TTL lines are stored
1-based and told 0-based, as the live stream tells them.
"""

from __future__ import annotations

import json
import tokenize
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, RecordingError
from spiked.sources.formats.recording import EVENTS, Choice, Plain, Recording, event_table, jumps, plain
from spiked.stream import EventKind, StreamInfo

OEBIN = "structure.oebin"
NOT_ELECTRODES = ("ADC", "AUX", "SYNC")


class OpenEphysRecording(Recording):
    """The electrode channels of one continuous stream."""

    def __init__(
        self, folder: Path, structure: dict[str, Any], stream: dict[str, Any], choice: Choice
    ) -> None:
        source = folder / "continuous" / stream["folder_name"].strip("/")
        channels = stream["channels"]
        n_file = int(stream["num_channels"])
        if len(channels) != n_file:
            raise RecordingError(
                f"{folder / OEBIN}: {n_file} channels but {len(channels)} described; copy it again"
            )
        self._words = _map(source / "continuous.dat", n_file)
        numbers = _numbers(source, len(self._words))
        take = [i for i, c in enumerate(channels) if is_electrode(c)]
        positions, known = choice.positions(len(take))
        info = StreamInfo(
            name=stream_name(stream),
            fs_hz=choice.rate(float(stream["sample_rate"]), folder / OEBIN),
            channel_ids=tuple(channels[i].get("channel_name") or f"CH{i + 1}" for i in take),
            positions_um=positions,
            dtype="int16",
            gain_uv=choice.gains(channels[i]["bit_volts"] for i in take),
            geometry_known=known,
            source="openephys",
            annotations={"gui_version": structure.get("GUI version", "")},
        )
        first = int(numbers[0]) if numbers is not None and len(numbers) else 0
        gaps = jumps(numbers, len(self._words)) if numbers is not None else ()
        super().__init__(source, info, len(self._words), first, gaps)
        self._take = np.array(take) if take != list(range(len(take))) else slice(0, len(take))
        self._on_close.append(self._let_go)
        self.set_events(_events(folder, structure, stream))

    def _let_go(self) -> None:
        self._words = self._words[:0].copy()

    @property
    def plain(self) -> Plain | None:
        return plain(self._words, np.arange(self._words.shape[1])[self._take])

    def _rows(self, start: int, stop: int) -> np.ndarray:
        return self._words[start:stop, self._take]


def open_openephys(path: Path, choice: Choice) -> OpenEphysRecording:
    """Open the recording at or below `path`, or the stream whose own folder `path` is."""
    oebin, inside = find_oebin(path)
    folder = oebin.parent
    try:
        structure = json.loads(oebin.read_text(encoding="utf-8", errors="replace"))
        streams = [s for s in structure["continuous"] if any(is_electrode(c) for c in s["channels"])]
        stream = _choose(folder, streams, inside or choice.stream or "", bool(inside))
        return OpenEphysRecording(folder, structure, stream, choice)
    except (ValueError, KeyError, TypeError) as e:
        why = f"{type(e).__name__} {e}"[:100]
        raise RecordingError(
            f"{oebin} is not what Open Ephys writes ({why}); copy the recording again"
        ) from e


def find_oebin(path: Path) -> tuple[Path, str]:
    """structure.oebin at, below or above a path, and the stream's folder name if the path goes that deep."""
    if path.name == OEBIN:
        return path, ""
    for parent in (path, *path.parents[:4]):
        if (parent / OEBIN).is_file():
            parts = path.relative_to(parent).parts
            return parent / OEBIN, parts[1] if len(parts) > 1 and parts[0] == "continuous" else ""
    found = sorted(path.rglob(OEBIN)) if path.is_dir() else []
    if not found:
        raise RecordingError(f"{path} holds no {OEBIN}; give the folder of an Open Ephys recording")
    if len(found) > 1:
        names = ", ".join(str(p.parent.relative_to(path)) for p in found[:8])
        raise ConfigError(f"{path} holds {len(found)} recordings: {names}; give the path of one of them")
    return found[0], ""


def _choose(folder: Path, streams: list[dict[str, Any]], wanted: str, must: bool) -> dict[str, Any]:
    names = [stream_name(s) for s in streams]
    for stream in streams:
        if wanted and wanted in (stream_name(stream), stream["folder_name"].strip("/")):
            return stream
    if len(streams) == 1 and not must:
        return streams[0]
    if not streams:
        raise RecordingError(f"{folder} holds no electrode stream; choose another recording")
    listed = ", ".join(
        f"{n} (continuous/{s['folder_name'].strip('/')})" for n, s in zip(names, streams, strict=True)
    )
    raise ConfigError(f"{folder} holds the streams {listed}; name one, or give its folder as the path")


def stream_name(stream: dict[str, Any]) -> str:
    """The stream's name; its folder's where the file is too old to have one."""
    return str(stream.get("stream_name") or stream["folder_name"].strip("/"))


def is_electrode(channel: dict[str, Any]) -> bool:
    """False for analog inputs, auxiliary and sync channels."""
    name = str(channel.get("channel_name", "")).upper()
    return channel.get("units", "uV") not in ("V", "mV") and not any(x in name for x in NOT_ELECTRODES)


def _map(dat: Path, n_channels: int) -> np.ndarray:
    try:
        size = dat.stat().st_size
    except OSError as e:
        raise RecordingError(f"{dat} cannot be read ({e.strerror}); copy the recording again") from e
    if not size or size % (2 * n_channels):
        raise RecordingError(
            f"{dat} is cut off: {size} bytes are not whole samples of {n_channels} channels; copy it again"
        )
    return np.memmap(dat, "<i2", "r").reshape(-1, n_channels)


def load_npy(path: Path) -> np.ndarray:
    """An .npy file, memory-mapped. Raises RecordingError when it is absent, cut off or not an .npy file."""
    try:
        return np.load(path, mmap_mode="r")
    except OSError as e:
        raise RecordingError(f"{path} cannot be read ({e.strerror or e}); copy it again") from e
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as e:
        why = " ".join(str(e).split())[:80]
        raise RecordingError(f"{path} is cut off or is not an .npy file ({why}); copy it again") from e


def _numbers(folder: Path, n: int) -> np.ndarray | None:
    """The device's number of each sample, None if the recording does not hold them."""
    for name in ("sample_numbers.npy", "timestamps.npy"):
        if (folder / name).exists():
            numbers = load_npy(folder / name)
            if numbers.dtype.kind not in "iu":
                continue  # seconds
            if len(numbers) != n:
                raise RecordingError(
                    f"{folder}: continuous.dat holds {n} samples, {name} {len(numbers)}; "
                    "copy the recording again"
                )
            return numbers
    return None


def _events(folder: Path, structure: dict[str, Any], stream: dict[str, Any]) -> np.ndarray:
    """TTL edges of this stream; text messages too where it is the only stream (their clock is not named)."""
    parts = [np.zeros(0, EVENTS)]
    own = stream["folder_name"].strip("/")
    for entry in structure.get("events", ()):
        where = folder / "events" / entry["folder_name"].strip("/")
        same = entry.get("stream_name") == stream_name(stream) or entry["folder_name"].startswith(own + "/")
        if same and ((where / "states.npy").exists() or (where / "channel_states.npy").exists()):
            parts.append(_edges(where))
        elif (where / "text.npy").exists() and len(structure["continuous"]) == 1:
            parts.append(_messages(where))
    return np.concatenate(parts)


def _edges(where: Path) -> np.ndarray:
    new = (where / "states.npy").exists()
    states = load_npy(where / ("states.npy" if new else "channel_states.npy")).astype(np.int64)
    samples = load_npy(where / ("sample_numbers.npy" if new else "timestamps.npy"))
    words = (
        load_npy(where / "full_words.npy") if (where / "full_words.npy").exists() else np.zeros(len(states))
    )
    if not len(states) == len(samples) == len(words):
        raise RecordingError(f"{where}: its arrays differ in length; copy the recording again")
    return event_table(samples, EventKind.TTL, np.abs(states) - 1, states > 0, words)


def _messages(where: Path) -> np.ndarray:
    numbers = where / "sample_numbers.npy"
    samples = load_npy(numbers if numbers.exists() else where / "timestamps.npy")
    text = [
        t.decode("utf-8", "replace") if isinstance(t, bytes) else str(t) for t in load_npy(where / "text.npy")
    ]
    return event_table(samples, EventKind.MESSAGE, text=text)
