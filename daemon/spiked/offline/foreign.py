"""Recordings that no session of ours holds: any format our readers or SpikeInterface open, one file or several.

Several files become one recording, end to end, for which the sorter finds one set of units; the epochs say which
samples are whose. Sample numbers are indices from 0, whatever the device's counter said.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, OfflineError, RecordingError
from spiked.offline.session import Session, StreamFiles, joined
from spiked.sources.formats.recording import Choice, Recording
from spiked.sources.recordings import open_recording

# SpikeInterface's readers of formats that we do not read ourselves, by what the file's name ends in.
READERS = {
    ".rhd": "read_intan", ".rhs": "read_intan", ".ns5": "read_blackrock", ".ns6": "read_blackrock",
    ".plx": "read_plexon", ".pl2": "read_plexon2", ".brw": "read_biocam", ".smr": "read_ced", ".smrx": "read_ced",
    ".edf": "read_edf", ".rec": "read_spikegadgets",
}  # fmt: skip
KEPT_OPEN = 64


@dataclass(frozen=True)
class Epoch:
    """One recording among those that were joined: samples [start, stop) of the whole."""

    name: str
    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Foreign(StreamFiles):
    """A stream read through `open_any`. `nwb` is the first file's path."""

    epochs: tuple[Epoch, ...] = ()
    choice: Choice = field(default_factory=Choice)
    truth_spikes: tuple[np.ndarray, np.ndarray] | None = None

    @contextmanager
    def codes(self) -> Iterator[Any]:
        """Something to slice: (samples, channels) of the whole, in the device's codes."""
        joined = _Joined(self.epochs, self.choice)
        try:
            yield joined
        finally:
            joined.close()

    def fingerprint(self) -> list[Any]:
        """The files, and what was said of them: another gain, rate, probe or well is another recording."""
        said = [
            self.name,
            self.choice.well,
            self.choice.stream,
            self.n_samples,
            self.n_channels,
            self.fs_hz,
            self.dtype,
            self.zero_code,
        ]
        places = hashlib.sha256(self.positions_um.tobytes() + self.gain_uv.tobytes()).hexdigest()
        return [*said, places, *(part for e in self.epochs for part in _files(e.path))]

    def true_spikes(self) -> tuple[np.ndarray, np.ndarray] | None:
        return self.truth_spikes


class _Joined:
    """Several recordings as one array, for slices of rows. The last KEPT_OPEN that were read stay open: a day in files of a
    minute each is more files than a process may have."""

    def __init__(self, epochs: tuple[Epoch, ...], choice: Choice) -> None:
        self._epochs, self._choice = epochs, choice
        self._open: dict[Epoch, Recording] = {}
        self._reading = threading.Lock()  # one thread must not close what another reads

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop = rows.start or 0, rows.stop
        with self._reading:
            pieces = [
                self._recording(e).read(max(start, e.start) - e.start, min(stop, e.stop) - e.start)
                for e in self._epochs
                if e.start < stop and e.stop > start
            ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _recording(self, epoch: Epoch) -> Recording:
        recording = self._open.pop(epoch, None) or open_any(epoch.path, self._choice)
        self._open[epoch] = recording  # the last is the one that was read last
        if len(self._open) > KEPT_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return recording

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def open_foreign(paths: list[Path], out: Path, choice: Choice) -> Session:
    """The streams of these recordings, joined in this order; one stream per well where there are several.

    Raises ConfigError or RecordingError in one line where a file cannot be opened or does not fit the first.
    """
    wells = _wells(paths[0]) if choice.well is None else []
    if len(wells) < 2:
        return Session(out, {"recording": open_stream("recording", paths, out, choice)}, None)
    names = {f"well{w:03d}": w for w in wells}
    return Session(
        out, {n: open_stream(n, paths, out, choice._replace(well=w)) for n, w in names.items()}, None
    )


def open_any(path: Path, choice: Choice) -> Recording:
    """`open_recording`, and what SpikeInterface reads beyond it."""
    reader = "read_mda_recording" if (path / "raw.mda").is_file() else READERS.get(path.suffix.lower())
    if reader is None:
        return open_recording(path, **choice._asdict())
    try:
        import spikeinterface.extractors as se
    except ImportError as e:
        raise ConfigError(f"{path} is read by SpikeInterface; pip install 'spiked[offline]'") from e
    from spiked.sources.formats.spikeinterface_folder import SpikeInterfaceRecording

    stream = {"stream_name": choice.stream} if choice.stream else {}
    try:
        found = getattr(se, reader)(path, **stream)
    except Exception as e:  # every reader has its own way to fail
        why = " ".join(f"{type(e).__name__} {e}".split())[:160]
        raise RecordingError(f"SpikeInterface cannot open {path} ({why}); check the file") from e
    return SpikeInterfaceRecording(path, found, choice)


def _wells(path: Path) -> list[int]:
    """Numbers of the wells of a Maxwell file; [] for any other."""
    if path.suffix != ".h5":
        return []
    import h5py

    try:
        with h5py.File(path, "r") as f:
            return sorted(int(name.removeprefix("well")) for name in f["wells"]) if "wells" in f else []
    except (OSError, ValueError):
        return []  # open_recording says what is wrong with it


def open_stream(name: str, paths: list[Path], out: Path, choice: Choice) -> Foreign:
    """Read what the files say of themselves; they are closed again."""
    first: Recording | None = None
    epochs: list[Epoch] = []
    holes: list[tuple[int, int]] = []
    truths: list[tuple[np.ndarray, np.ndarray]] = []
    at = 0
    for path in paths:
        with open_any(path, choice) as r:
            first = first or r
            _fits(first, r)
            epochs.append(Epoch(path.name, path, at, at + r.n_samples))
            holes += [(at + a, at + b) for a, b in r.invalid]
            if r.ground_truth is not None and not r.gaps:
                truths.append((r.ground_truth.samples - r.first_sample + at, r.ground_truth.units))
            at += r.n_samples
    assert first is not None
    info = first.info
    if not info.geometry_known:
        raise OfflineError(
            f"{paths[0]} has no electrode positions; give them with --probe FILE.json", stage="preflight"
        )
    complete = len(truths) == len(paths)
    return Foreign(
        name=name,
        nwb=paths[0],
        spikes=out / "no.spikes.bin",
        truth=out / "no.truth.npz",
        fs_hz=info.fs_hz,
        n_samples=at,
        n_channels=info.n_channels,
        dtype=info.dtype,
        first_sample=0,
        gain_uv=info.gains.astype(float),
        zero_code=info.zero_code,
        positions_um=info.positions.astype(float),
        gaps=joined(np.array(holes, np.int64).reshape(-1, 2)),
        channel_ids=info.channel_ids,
        epochs=tuple(epochs),
        choice=choice,
        truth_spikes=(np.concatenate([s for s, _ in truths]), np.concatenate([u for _, u in truths])) if complete else None,
    )  # fmt: skip


def _fits(first: Recording, other: Recording) -> None:
    """Only recordings of the same electrodes can be joined."""
    a, b = first.info, other.info
    for what, same in (
        ("sampling rate", a.fs_hz == b.fs_hz),
        ("number of channels", a.n_channels == b.n_channels),
        ("electrode positions", a.positions_um == b.positions_um),
        ("sample type", (a.dtype, a.zero_code) == (b.dtype, b.zero_code)),
        ("gain", np.allclose(a.gains, b.gains) if a.n_channels == b.n_channels else True),
    ):
        if not same:
            raise ConfigError(f"{other.path} differs from {first.path} in its {what}; they cannot be joined")


def _files(path: Path) -> list[Any]:
    """Size and date of what a recording consists of."""
    parts = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [[str(p.relative_to(path.parent)), p.stat().st_size, p.stat().st_mtime_ns] for p in parts]
