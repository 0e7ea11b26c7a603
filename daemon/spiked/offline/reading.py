"""The recording as a sorter sees it, read from where it lies: no second copy of it is made on disk.

Codes less the device's zero code, zero where nothing was recorded. Floating-point recordings are scaled to FLOAT_UV microvolt
per code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import OfflineError
from spiked.offline.session import StreamFiles, open_stream
from spiked.sources.formats.recording import Plain
from spiked.stream import StreamInfo
from spiked_client.protocol import SPIKE

FLOAT_UV = 0.195  # microvolt per code for float recordings: +-6.4 mV in int16
PIECE_BYTES = 32 << 20
DTYPES = ("int16", "int32", "float32")
Say = Callable[[float, str], None]


def is_float(stream: StreamFiles) -> bool:
    return stream.dtype.startswith("float")


def gain_uv(stream: StreamFiles) -> np.ndarray:
    """(channels,) microvolt per code of what Codes gives."""
    return np.full(stream.n_channels, FLOAT_UV) if is_float(stream) else stream.gain_uv


def stream_info(stream: StreamFiles) -> StreamInfo:
    """The stream as the live rooms know it."""
    names = stream.channel_ids or tuple(map(str, range(stream.n_channels)))
    return StreamInfo(
        stream.name, stream.fs_hz, names, tuple(map(tuple, stream.positions_um.tolist())), stream.dtype,
        tuple(stream.gain_uv.tolist()), stream.zero_code,
    )  # fmt: skip


class Codes:
    """(samples, channels) like an array: rows by slice, then columns by anything numpy takes.

    `data` is what `stream.codes()` gives. Values beyond the type are clipped; `sign` -1 turns the signal over.
    """

    ndim = 2

    def __init__(self, stream: StreamFiles, data: Any, dtype: str = "int16", sign: int = 1) -> None:
        self.stream, self.shape, self.dtype = stream, (stream.n_samples, stream.n_channels), np.dtype(dtype)
        self._data, self._sign = data, sign
        self._as_it_is = (
            stream.dtype == dtype and sign == 1 and stream.zero_code == 0 and not is_float(stream)
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, *columns = key if isinstance(key, tuple) else (key,)
        if not isinstance(rows, slice):
            raise TypeError(f"rows of a recording are read by slice, not by {rows!r}")
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise TypeError("rows of a recording are read one after the other")
        out = self._codes(start, max(stop, start))
        return out[:, columns[0]] if columns else out

    def _codes(self, start: int, stop: int) -> np.ndarray:
        if stop == start:
            return np.zeros((0, self.shape[1]), self.dtype)
        raw = np.asarray(self._data[start:stop])
        if self._as_it_is:
            y = raw if raw.flags.writeable else raw.copy()
        elif (small := self._small(raw)) is not None:
            y = small
        else:
            x = centred(raw, self.stream, start, whole=self.dtype.kind == "i")
            y = fitted(x if self._sign == 1 else -x, self.dtype)
        silence(y, start, self.stream)
        return y

    def _small(self, raw: np.ndarray) -> np.ndarray | None:
        """What most devices give, whose few bits fit into int16 at every step: in half the time. None for other codes."""
        zero = round(self.stream.zero_code)
        if self.dtype != np.int16 or raw.dtype.kind not in "iu" or abs(zero) > 16_383:
            return None
        if raw.min() < -16_384 or raw.max() > 16_383:
            return None
        codes = raw.astype(np.int16, copy=False)
        return (
            np.subtract(codes, zero, dtype=np.int16)
            if self._sign == 1
            else np.subtract(zero, codes, dtype=np.int16)
        )


def centred(x: np.ndarray, stream: StreamFiles, start: int, whole: bool = True) -> np.ndarray:
    """Codes around zero, wide enough for the device's range. OfflineError('environment') where a sample is not finite."""
    if is_float(stream):
        if not np.isfinite(x).all():
            where = start + int(np.argmin(np.isfinite(x).all(1)))
            raise OfflineError(
                f"sample {where} is not finite; the recording is damaged", "environment", "export"
            )
        scaled = (x.astype(np.float64) - stream.zero_code) * (stream.gain_uv / FLOAT_UV)
        return np.rint(scaled) if whole else scaled
    plain = np.rint(x) if x.dtype.kind == "f" and whole else x  # freed of an artifact
    return plain.astype(np.int32 if whole else np.float64) - round(stream.zero_code)


def fitted(x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`x` in `dtype`, clipped where it does not fit."""
    if dtype.kind == "i":
        limits = np.iinfo(dtype)
        x = np.clip(x, limits.min, limits.max)
    return x.astype(dtype)


def silence(codes: np.ndarray, start: int, stream: StreamFiles) -> None:
    """Zero in place what was never recorded in `codes`, whose first sample is `start`."""
    stop = start + len(codes)
    for a, b in stream.gaps[(stream.gaps[:, 1] > start) & (stream.gaps[:, 0] < stop)]:
        codes[max(a - start, 0) : b - start] = 0
    for a, b, channels in stream.partial:
        if a < stop and b > start:
            codes[max(a - start, 0) : b - start, channels] = 0


@contextmanager
def opened(stream: StreamFiles, dtype: str = "int16", sign: int = 1) -> Iterator[Codes]:
    with stream.codes() as data:
        yield Codes(stream, data, dtype, sign)


def pieces(stream: StreamFiles) -> Iterator[tuple[int, int]]:
    """[start, stop) of the whole recording in pieces of PIECE_BYTES."""
    step = max(PIECE_BYTES // (4 * stream.n_channels), 1)
    for start in range(0, stream.n_samples, step):
        yield start, min(start + step, stream.n_samples)


def scan(stream: StreamFiles, say: Say) -> int:
    """How many samples do not fit into int16. Only floating-point recordings need to be read for it.

    Raises OfflineError('environment') at the first sample that is not finite: a sorter would lose all around it, silently.
    """
    if not is_float(stream):
        return 0
    clipped = 0
    with stream.codes() as data:
        for start, stop in pieces(stream):
            say(start / stream.n_samples, f"checking every sample, {start / stream.fs_hz:.0f} s")
            x = centred(np.asarray(data[start:stop]), stream, start)
            clipped += int(((x > 32767) | (x < -32768)).sum())
    return clipped


def plain_file(stream: StreamFiles) -> Plain | None:
    """The file that Phy can map for the traces of this stream, where the recording is one of plain int16 samples."""
    from spiked.offline.foreign import Foreign, open_any

    if not isinstance(stream, Foreign) or len(stream.epochs) != 1:
        return None
    with open_any(stream.epochs[0].path, stream.choice) as recording:
        return recording.plain


# ---- from another process ---------------------------------------------------------------------------------------------


def source_of(stream: StreamFiles) -> dict[str, Any]:
    """What `stream_of` finds the stream by, in JSON's types."""
    from spiked.offline.foreign import Foreign

    source: dict[str, Any] = {
        "name": stream.name,
        "positions_um": stream.positions_um.tolist(),
        "n_samples": stream.n_samples,
    }
    if not isinstance(stream, Foreign):
        return {**source, "session_file": str(stream.nwb.resolve())}
    choice = {k: str(v) if isinstance(v, Path) else v for k, v in stream.choice._asdict().items()}
    return {**source, "paths": [str(e.path.resolve()) for e in stream.epochs], "choice": choice}


def stream_of(source: dict[str, Any]) -> StreamFiles:
    """The stream that `source_of` told of."""
    from spiked.offline.foreign import open_stream as open_foreign_stream
    from spiked.sources.formats.recording import Choice

    if "session_file" in source:
        stream = open_stream(Path(source["session_file"]))
    else:
        choice = dict(source["choice"])
        if choice.get("probe"):
            choice["probe"] = Path(choice["probe"])
        paths = [Path(p) for p in source["paths"]]
        stream = open_foreign_stream(source["name"], paths, paths[0].parent, Choice(**choice))
    n = min(int(source["n_samples"]), stream.n_samples)  # fewer: the first part of it
    return replace(stream, positions_um=np.asarray(source["positions_um"], float), n_samples=n)


@dataclass(frozen=True)
class BinaryStream(StreamFiles):
    """A plain int16 file, less zero code, as a stream of its own. `nwb` is its path."""

    @contextmanager
    def codes(self) -> Iterator[Any]:
        yield np.memmap(self.nwb, "<i2", "r").reshape(-1, self.n_channels)

    def live_spikes(self) -> np.ndarray:
        return np.zeros(0, SPIKE)


def binary_stream(job: dict[str, Any]) -> StreamFiles:
    """The binary of a sort's description."""
    path, gain = Path(job["binary"]), np.asarray(job["gain_uv"], float)
    return BinaryStream(
        name="recording",
        nwb=path,
        spikes=path,
        truth=path,
        fs_hz=float(job["fs_hz"]),
        n_samples=path.stat().st_size // (2 * len(gain)),
        n_channels=len(gain),
        dtype="int16",
        first_sample=0,
        gain_uv=gain,
        zero_code=0.0,
        positions_um=np.asarray(job["positions_um"], float),
        gaps=np.zeros((0, 2), np.int64),
    )


class Reader:
    """Codes of a stream for whoever reads now and then, from any thread or process: the file of a session is opened for
    every read, because its units are written into it meanwhile; what is not ours stays open."""

    def __init__(self, stream: StreamFiles) -> None:
        self.stream = stream
        self._open: Codes | None = None
        self._stack = ExitStack()

    def read(self, start: int, stop: int) -> np.ndarray:
        """(samples, channels) int16."""
        if type(self.stream) is StreamFiles:
            with opened(self.stream) as codes:
                return codes[start:stop]
        if self._open is None:
            self._open = self._stack.enter_context(opened(self.stream))
        return self._open[start:stop]

    def close(self) -> None:
        self._stack.close()
        self._open = None
