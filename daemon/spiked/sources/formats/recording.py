"""What every recording on disk looks like to the daemon: a lazily read array with numbers, events and gaps.

`index` counts the file's own samples from 0. The device's counter jumps where samples never reached the file:

    device sample = first_sample + index + missing samples before index
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from spiked.errors import ConfigError, RecordingError
from spiked.sources.probe import placeholder_line, positions_for
from spiked.stream import EventKind, StreamEvent, StreamInfo

EVENTS = np.dtype(
    [
        ("sample", "<i8"),
        ("kind", "<i4"),
        ("line", "<i4"),
        ("state", "<i4"),
        ("value", "<f8"),
        ("text", object),
    ]
)
SCAN = 1 << 20  # samples looked at in one go when a whole file is scanned
PAGE_BYTES = 8 << 20


class GroundTruth(NamedTuple):
    """True spikes of a simulated recording; background units are left out."""

    samples: np.ndarray  # (spikes,) int64, device samples, ascending
    units: np.ndarray  # (spikes,) int64, values of unit_ids
    unit_ids: np.ndarray  # (units,) int64
    snr: np.ndarray  # (units,) float64, NaN where the file does not say
    peak_channel: np.ndarray  # (units,) int64 column, -1 where the file does not say


class Choice(NamedTuple):
    """What the caller says about a recording; None: let the file say it, or fail clearly."""

    probe: Path | None = None
    stream: str | None = None
    well: int | None = None
    fs_hz: float | None = None
    n_channels: int | None = None
    dtype: str | None = None
    gain_uv: float | None = None
    zero_code: float | None = None

    def rate(self, in_file: float | None, path: Path) -> float:
        """The rate, from the file or the caller. Raises ConfigError if they disagree or none says it."""
        if in_file is None and self.fs_hz is None:
            raise ConfigError(f"{path} does not say its sampling rate; give fs_hz")
        if in_file is not None and self.fs_hz is not None and abs(in_file - self.fs_hz) > 1e-3 * in_file:
            raise ConfigError(
                f"{path} was sampled at {in_file:g} Hz, not {self.fs_hz:g} Hz; correct or remove fs_hz"
            )
        return float(in_file if in_file is not None else self.fs_hz or 0.0)

    def gains(self, in_file: Iterable[float]) -> tuple[float, ...]:
        """Microvolt per code of each channel: the caller's word, else the file's own."""
        told = tuple(float(g) for g in in_file)
        return told if self.gain_uv is None else (self.gain_uv,) * len(told)

    def positions(
        self, n: int, in_file: tuple[tuple[float, float], ...] | None = None
    ) -> tuple[tuple[tuple[float, float], ...], bool]:
        """Positions of n channels and whether they are real: probe file, else the file's own, else a line."""
        if self.probe is not None:
            return positions_for(self.probe, n), True
        return (in_file, True) if in_file is not None else (placeholder_line(n), False)


class Plain(NamedTuple):
    """A file whose int16 words are the samples, time by columns, from `offset` bytes on; `columns` are the stream's channels."""

    path: Path
    offset: int
    n_columns: int
    columns: np.ndarray


def plain(words: np.ndarray, columns: np.ndarray) -> Plain | None:
    """Where mapped words lie; None where they are not plain int16 of a file."""
    if not isinstance(words, np.memmap) or words.dtype != np.dtype("<i2") or not words.flags.c_contiguous:
        return None
    return Plain(Path(str(words.filename)), int(words.offset), words.shape[1], columns)


class Recording:
    """One stream of a recording, opened for reading. A context manager.

    Formats subclass it and give `_rows`. `events` are in device samples, in order of their index.
    """

    ground_truth: GroundTruth | None = None

    def __init__(
        self,
        path: Path,
        info: StreamInfo,
        n_samples: int,
        first_sample: int = 0,
        gaps: Iterable[tuple[int, int]] = (),
    ) -> None:
        if n_samples <= 0:
            raise RecordingError(f"{path} holds no samples; choose another recording")
        self.path, self.info, self.n_samples, self.first_sample = path, info, n_samples, first_sample
        self.gaps = [(int(i), int(n)) for i, n in gaps]
        self._starts = [0] + [i for i, _ in self.gaps]  # index of each gap-free stretch
        self._missing = np.concatenate([[0], np.cumsum([n for _, n in self.gaps], dtype=np.int64)]).astype(
            np.int64
        )
        self._events = np.zeros(0, EVENTS)
        self._event_index = np.zeros(0, np.int64)
        self._on_close: list[Callable[[], None]] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    @property
    def plain(self) -> Plain | None:
        """The file of plain int16 samples, for programs that map one; None where there is none."""
        return None

    def close(self) -> None:
        """Let go of the file. Arrays that were read stay valid."""
        self._closed = True
        while self._on_close:
            self._on_close.pop()()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) by index: a new (samples, channels) array in `info.dtype`.

        Raises RecordingError when the interval is outside the recording or the file cannot be read.
        """
        if self._closed:
            raise RecordingError(f"{self.path} was closed; open it again")
        if not 0 <= start <= stop <= self.n_samples:
            raise RecordingError(
                f"{self.path}: samples {start} to {stop} asked for, it holds {self.n_samples}"
            )
        try:
            return np.array(self._rows(start, stop), dtype=self.info.dtype, order="C")
        except (OSError, RuntimeError) as e:
            raise RecordingError(
                f"{self.path}: samples {start} to {stop} cannot be read ({e}); check the disk"
            ) from e

    def _rows(self, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) by index, (samples, channels); the bounds are already checked."""
        raise RecordingError(f"{self.path}: {type(self).__name__} has no samples")

    def device_sample(self, index: int) -> int:
        """The device's counter of the sample at `index`."""
        return self.first_sample + index + int(self._missing[bisect_right(self._starts, index) - 1])

    @property
    def invalid(self) -> list[tuple[int, int]]:
        """Index intervals [start, stop) that the file holds as zeros because the samples were lost."""
        return []

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Index intervals within [start, stop) without a gap inside and without invalid samples."""
        cuts = [i for i in self._starts if start < i < stop]
        for a, b in zip([start, *cuts], [*cuts, stop], strict=True):
            yield from _without(a, b, self._invalid_in(a, b))

    def _invalid_in(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [(a, b) for a, b in self.invalid if a < stop and b > start]

    def set_events(self, table: np.ndarray) -> None:
        """Take the events (dtype EVENTS, device samples); those outside the recording are left out."""
        index = self._index_of(table["sample"])
        keep = np.flatnonzero((index >= 0) & (index < self.n_samples))
        keep = keep[np.lexsort((table["sample"][keep], index[keep]))]
        self._events, self._event_index = table[keep], index[keep]

    def _index_of(self, device: np.ndarray) -> np.ndarray:
        """Index of device samples; inside a gap: the first sample after it; outside the recording: -1."""
        index = np.full(len(device), -1, np.int64)
        ends = [*self._starts[1:], self.n_samples]
        for k, (start, end) in enumerate(zip(self._starts, ends, strict=True)):
            low = self.first_sample + start + int(self._missing[k])
            lost = max(self.gaps[k - 1][1], 0) if k else 0
            here = (device >= low - lost) & (device < low + end - start) & (index < 0)
            index[here] = np.maximum(start + device[here] - low, start)
        return index

    @property
    def events(self) -> list[StreamEvent]:
        """Every event of the recording."""
        return self.events_in(0, self.n_samples)

    def events_in(self, start: int, stop: int) -> list[StreamEvent]:
        """Events that belong to samples [start, stop) by index."""
        a, b = np.searchsorted(self._event_index, [start, stop])
        return [
            StreamEvent(
                int(r["sample"]),
                EventKind(int(r["kind"])),
                int(r["line"]),
                int(r["state"]),
                float(r["value"]),
                r["text"],
            )
            for r in self._events[a:b]
        ]


def _without(start: int, stop: int, holes: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for a, b in holes:
        if a > start:
            yield start, min(a, stop)
        start = max(start, b)
    if start < stop:
        yield start, stop


class Paged:
    """Keeps the last page that was loaded, so that small reads of a chunked file decode each chunk once.

    `load(start, stop)` gives (samples, channels); pages are a whole number of `chunk` samples.
    """

    def __init__(
        self, load: Callable[[int, int], np.ndarray], n_samples: int, row_bytes: int, chunk: int = 1
    ) -> None:
        self._load, self._n = load, n_samples
        self.size = -(-max(PAGE_BYTES // max(row_bytes, 1), 256) // chunk) * chunk
        self._start, self._page = 0, np.zeros((0, 0))

    def __call__(self, start: int, stop: int) -> np.ndarray:
        if stop - start >= self.size:
            return self._load(start, stop)
        if start < self._start or stop > self._start + len(self._page):
            if start // self.size != max(stop - 1, start) // self.size:
                middle = stop // self.size * self.size
                return (
                    np.concatenate([self(start, middle), self(middle, stop)])
                    if middle < stop
                    else self(start, stop)
                )
            self._start = start // self.size * self.size
            self._page = self._load(self._start, min(self._start + self.size, self._n))
        return self._page[start - self._start : stop - self._start]


def jumps(frames: Any, n: int) -> list[tuple[int, int]]:
    """Where a counter does not go on by one: (index of the first sample after, how many are missing).

    A negative count means that the counter went back.


    `frames` is anything that slices to integers (memory map, HDF5 dataset); it is looked at in pieces.
    """
    out: list[tuple[int, int]] = []
    for a in range(0, n - 1, SCAN):
        piece = np.asarray(frames[a : min(a + SCAN + 1, n)]).astype(np.int64)
        step = np.diff(piece)
        out += [(a + 1 + int(i), int(step[i]) - 1) for i in np.flatnonzero(step != 1)]
    return out


def event_table(
    sample: Any,
    kind: EventKind,
    line: Any = 0,
    state: Any = 1,
    value: Any = 0.0,
    text: Iterable[str] | None = None,
) -> np.ndarray:
    """Events as an array of dtype EVENTS, from columns or single values."""
    table = np.zeros(len(sample), EVENTS)
    table["sample"], table["kind"] = np.asarray(sample).astype(np.int64), int(kind)
    table["line"], table["state"], table["value"] = line, state, value
    table["text"] = ""
    for i, t in enumerate(text or ()):
        table["text"][i] = t
    return table


def word_events(samples: np.ndarray, words: np.ndarray, before: int = 0) -> np.ndarray:
    """TTL edges, one event per line that changed, from digital words and when each began."""
    samples, words = np.asarray(samples).astype(np.int64), np.asarray(words).astype(np.int64)
    change = words ^ np.concatenate([[before], words[:-1]]).astype(np.int64)
    parts = [np.zeros(0, EVENTS)]
    for line in range(32):
        at = np.flatnonzero(change >> line & 1)
        if len(at):
            parts.append(event_table(samples[at], EventKind.TTL, line, words[at] >> line & 1, words[at]))
    return np.concatenate(parts)


def codes_dtype(dtype: Any) -> str:
    """The sample type the daemon carries these codes in: int16, uint16 or float32."""
    d = np.dtype(dtype)
    if d.kind in "iu" and d.itemsize == 1:
        return "int16"
    return d.newbyteorder("=").name if d.newbyteorder("=").name in ("int16", "uint16") else "float32"
