"""A session folder as the offline room reads it: which streams were recorded, and from which sample on.

Readers are tolerant of what is absent (spikes, gaps, truth), strict about what would make a sorting wrong
(rate, positions, gain).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spiked.config import Config, load
from spiked.errors import ConfigError, OfflineError
from spiked.offline.lock import is_written
from spiked.stream import StreamInfo
from spiked_client.protocol import SPIKE

log = logging.getLogger(__name__)

SERIES = "acquisition/ElectricalSeries"


@dataclass(frozen=True)
class StreamFiles:
    """One recorded stream. Spikes carry the device's sample numbers: index = sample - first_sample."""

    name: str
    nwb: Path
    spikes: Path
    truth: Path
    fs_hz: float
    n_samples: int
    n_channels: int
    dtype: str
    first_sample: int
    gain_uv: np.ndarray  # (channels,) microvolt per code
    zero_code: float
    positions_um: np.ndarray  # (channels, 2) float64
    gaps: np.ndarray  # (gaps, 2) int64, sample indices into the file, half open, sorted, disjoint
    partial: tuple[tuple[int, int, np.ndarray], ...] = ()  # start, stop, (channels,) bool that never arrived
    channel_ids: tuple[str, ...] = ()  # the device's names; () where the file does not say

    @property
    def duration_s(self) -> float:
        return self.n_samples / self.fs_hz

    @property
    def blind_s(self) -> float:
        """Seconds that never arrived."""
        return float((self.gaps[:, 1] - self.gaps[:, 0]).sum()) / self.fs_hz

    @contextmanager
    def codes(self) -> Iterator[Any]:
        """The (samples, channels) HDF5 dataset in the device's codes; close it by leaving the block."""
        with opened_file(self.nwb) as f:
            yield f[SERIES]["data"]

    @contextmanager
    def file(self) -> Iterator[Any]:
        """The open HDF5 file; close it by leaving the block."""
        with opened_file(self.nwb) as f:
            yield f

    def fingerprint(self) -> list[Any]:
        """Changes when the recording does, not when tables are added to its file."""
        said = [self.n_samples, self.n_channels, self.first_sample, self.fs_hz, self.dtype]
        lost = [self.gaps.tolist(), [(a, b) for a, b, _ in self.partial]]
        seen = hashlib.sha256(self.positions_um.tobytes() + self.gain_uv.tobytes())
        with self.codes() as data:
            for start in np.linspace(0, max(self.n_samples - 1000, 0), 5).astype(int).tolist():
                seen.update(np.ascontiguousarray(data[start : start + 1000]).tobytes())
        return [*said, *lost, seen.hexdigest()]

    def live_spikes(self) -> np.ndarray:
        """(spikes,) records of SPIKE as the live sorter wrote them, sorted and unsorted; may be empty."""
        if not self.spikes.is_file():
            return np.zeros(0, SPIKE)
        whole = self.spikes.stat().st_size // SPIKE.itemsize  # a crash may leave half a record at the end
        return np.fromfile(self.spikes, SPIKE, count=whole)

    def true_spikes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(sample indices into the file, units) of a simulated recording, or None."""
        if not self.truth.is_file():
            return None
        with np.load(self.truth, allow_pickle=False) as z:
            return np.asarray(z["samples"], np.int64), np.asarray(z["units"], np.int64)


@dataclass(frozen=True)
class Session:
    """A session folder. `config` is None where session.toml is absent or from another version."""

    path: Path
    streams: dict[str, StreamFiles]
    config: Config | None

    def stream(self, name: str | None) -> StreamFiles:
        """The named stream, or the only one."""
        if name is None and len(self.streams) == 1:
            return next(iter(self.streams.values()))
        if name is None or name not in self.streams:
            raise OfflineError(
                f"{self.path}: stream {name or '?'} is not one of {', '.join(self.streams)}; name one of them"
            )
        return self.streams[name]

    def to_sort(self) -> list[StreamFiles]:
        """All streams but those that the configuration says hold no spikes."""
        streams = self.config.stream if self.config else ()
        recorded_only = {s.name for s in streams if not s.spikes}
        return [s for name, s in self.streams.items() if name not in recorded_only]

    def owns(self, stream: StreamFiles) -> bool:
        """Whether the stream was recorded by this session, and is not a file of somebody else's."""
        return stream.nwb.resolve().parent == self.path.resolve()

    def folder(self, stream: StreamFiles, sorter: str) -> Path:
        """Where a sorter's results for this stream go."""
        base = self.path / "offline" / sorter
        return base if len(self.streams) == 1 else base / stream.name

    def report(self, stream: StreamFiles, suffix: str) -> Path:
        """report.md, .json or .html; with several streams, report.<stream>.md."""
        return self.path / (
            f"report.{suffix}" if len(self.streams) == 1 else f"report.{stream.name}.{suffix}"
        )


def open_session(path: Path | str) -> Session:
    """Read a session folder's metadata. OfflineError('environment') where it cannot be sorted."""
    path = Path(path)
    files = sorted(path.glob("*.nwb"))
    if not files:
        raise OfflineError(f"{path} has no .nwb file; give the folder of a finished session")
    config = None
    if (path / "session.toml").is_file():
        try:
            config = load(path / "session.toml")
        except ConfigError:
            config = None  # another version's configuration does not stop a sorting
    names = {s.name for s in config.stream} if config else set()
    own = [f for f in files if f.stem in names]
    if own and len(own) < len(files):  # an export or a copy that somebody keeps beside the recording
        others = ", ".join(f.name for f in files if f not in own)
        log.warning("%s: %s is no stream of this session and is left alone", path.name, others)
        files = own
    return Session(path, {f.stem: open_stream(f) for f in files}, config)


@contextmanager
def opened_file(path: Path) -> Iterator[Any]:
    import h5py

    try:
        f = h5py.File(path, "r", locking=False)
    except OSError as e:
        if is_written(path):
            raise OfflineError(
                f"{path} is still being written; end that session first",
                stage="preflight",
                name="still_written",
            ) from e
        line = str(e).splitlines()[0]
        raise OfflineError(
            f"cannot read {path.name}: {line}; close its writer, or run `spiked recover`", stage="preflight"
        ) from e
    with f:
        yield f


def open_stream(path: Path) -> StreamFiles:
    """The stream in one file of a session. OfflineError('environment') where it cannot be sorted."""
    with opened_file(path) as f:
        if SERIES not in f:
            raise OfflineError(
                f"{path.name} has no {SERIES}; it was not written by spiked", stage="preflight"
            )
        series = f[SERIES]
        data = series["data"]
        n_samples, n_channels = data.shape
        n_samples = _whole(f, n_samples)
        gain, zero = _gain(f, series, n_channels)
        first = _first_sample(f, series)
        gaps, partial = _gaps(f, first, n_samples, n_channels)
        return StreamFiles(
            name=path.stem,
            nwb=path,
            spikes=path.with_name(f"{path.stem}.spikes.bin"),
            truth=path.with_name(f"{path.stem}.truth.npz"),
            fs_hz=_rate(series, path),
            n_samples=n_samples,
            n_channels=n_channels,
            dtype=str(data.dtype),
            first_sample=first,
            gain_uv=gain,
            zero_code=zero,
            positions_um=_positions(f, series, path),
            gaps=gaps,
            partial=partial,
            channel_ids=_names(f, series, n_channels),
        )


def _rate(series: Any, path: Path) -> float:
    if "starting_time" in series and "rate" in series["starting_time"].attrs:
        return float(series["starting_time"].attrs["rate"])
    raise OfflineError(f"{path.name} does not say its sampling rate; it cannot be sorted", stage="preflight")


def _first_sample(f: Any, series: Any) -> int:
    """The device's number of the file's first sample; 0 where the file does not say."""
    for where in (series, series["data"], f):
        if "first_sample" in where.attrs:
            return int(where.attrs["first_sample"])
    return 0


def _positions(f: Any, series: Any, path: Path) -> np.ndarray:
    table = f.get("general/extracellular_ephys/electrodes")
    if table is None or "rel_x" not in table or "rel_y" not in table:
        raise OfflineError(
            f"{path.name} has no electrode positions (rel_x, rel_y); record with a probe file",
            stage="preflight",
        )
    rows = series["electrodes"][:] if "electrodes" in series else np.arange(len(table["rel_x"]))
    return np.column_stack([table["rel_x"][:][rows], table["rel_y"][:][rows]]).astype(float)


def _names(f: Any, series: Any, n_channels: int) -> tuple[str, ...]:
    """The device's names of the channels; () where the file has none."""
    stream = f.get("scratch/stream")
    if stream is not None:
        return StreamInfo.from_json(stream[()]).channel_ids
    table = f.get("general/extracellular_ephys/electrodes")
    if table is None or "channel_name" not in table:
        return ()
    rows = series["electrodes"][:] if "electrodes" in series else np.arange(n_channels)
    names = table["channel_name"][:][rows]
    return tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names)


def _whole(f: Any, n_samples: int) -> int:
    """Samples that were written whole: fewer than the dataset's rows when a recording broke off."""
    position = f.get("scratch/position")
    whole = int(position[1]) if position is not None and len(position) > 1 else 0
    return min(whole, n_samples) if whole else n_samples


def _gain(f: Any, series: Any, n_channels: int) -> tuple[np.ndarray, float]:
    """Microvolt per code (channels,) and the code of zero: the stream's own words, else NWB's conversion."""
    stream = f.get("scratch/stream")
    if stream is not None:
        info = StreamInfo.from_json(stream[()])
        return info.gains.astype(float), info.zero_code
    attrs = series["data"].attrs
    conversion, offset = float(attrs.get("conversion", 1.0)), float(attrs.get("offset", 0.0))
    gain = np.full(n_channels, conversion * 1e6)
    if "channel_conversion" in series:
        gain = gain * series["channel_conversion"][:]
    return gain, -offset / conversion if conversion else 0.0


def _gaps(
    f: Any, first: int, n_samples: int, n_channels: int
) -> tuple[np.ndarray, tuple[tuple[int, int, np.ndarray], ...]]:
    """(gaps of all channels: sorted, disjoint, in the file; gaps of some channels with their mask)."""
    table = f.get("intervals/invalid_times")
    if table is None or "start_sample" not in table or not len(table["start_sample"]):
        return np.zeros((0, 2), np.int64), ()
    raw = np.column_stack([table["start_sample"][:], table["stop_sample"][:]]).astype(np.int64) - first
    raw = np.clip(raw, 0, n_samples)
    mask = np.ones((len(raw), n_channels), bool)
    if "channels" in table and "n_channels" in table:
        listed = np.unpackbits(table["channels"][:], axis=1, count=n_channels).astype(bool)
        some = (table["n_channels"][:] < n_channels) & listed.any(1)
        mask[some] = listed[some]
    real = raw[:, 1] > raw[:, 0]
    whole = mask.all(1)
    partial = tuple(
        (int(a), int(b), m) for (a, b), m in zip(raw[real & ~whole], mask[real & ~whole], strict=True)
    )
    return joined(raw[real & whole]), partial


def joined(intervals: np.ndarray) -> np.ndarray:
    """(n, 2) half-open intervals sorted, and overlapping or touching ones made one."""
    out: list[list[int]] = []
    for start, stop in sorted(intervals.tolist()):
        if out and start <= out[-1][1]:
            out[-1][1] = max(out[-1][1], stop)
        else:
            out.append([start, stop])
    return np.array(out, np.int64).reshape(-1, 2)
