"""Files whose writer died: closed properly, cut to what is known to be whole, and finalized."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from spiked.errors import RecordingError
from spiked.record import superblock
from spiked.record.disk import boot
from spiked.record.edit import PAGE, editing, replay
from spiked.record.finalize import complete, finalize, require_session_file
from spiked.record.lock import WriterLock
from spiked.record.nwbfile import (
    DAMAGED,
    DATA,
    EVENTS,
    GAPS,
    P_EVENTS,
    P_FIRST,
    P_GAPS,
    P_SAMPLES,
    POSITION,
    STREAM,
    SYNCED,
    first_line,
)  # fmt: skip
from spiked.stream import StreamInfo

ZEROS = 64  # bytes in a row that no stream holds, unless it is dead
AT = {"start_time": "start_sample", "timestamp": "sample"}
# columns in which no row is zero; the times are, of a row at the first sample
PARTS = {
    GAPS: ("reason", "start_time", "stop_time", "start_sample", "stop_sample", "n_channels"),
    EVENTS: ("kind", "timestamp", "sample"),
}


@dataclass(frozen=True)
class Recovered:
    """One file. `repaired`: its writer had died; `finalized`: units and tables were still to be completed; `cut`: samples
    at its end that had not reached the disk when the power went.
    """

    path: Path
    samples: int
    seconds: float
    gaps: int
    repaired: bool
    finalized: bool
    cut: int = 0

    def __str__(self) -> str:
        done = [word for word, on in (("repaired", self.repaired), ("finalized", self.finalized)) if on]
        what = " and ".join(done) if done else "nothing to do"
        if self.cut:
            what += f", without {self.cut} samples that had not reached the disk"
        return f"{self.path}: {what}; {self.samples} samples, {self.seconds:.3f} s, {self.gaps} gaps"


@dataclass(frozen=True)
class Report:
    """What `recover` found and did; its text is one line per file."""

    folder: Path
    files: tuple[Recovered, ...]

    @property
    def repaired(self) -> bool:
        return any(f.repaired for f in self.files)

    @property
    def samples(self) -> int:
        return sum(f.samples for f in self.files)

    def __str__(self) -> str:
        return "\n".join(map(str, self.files)) or f"{self.folder}: nothing was recorded"


def recover(path: Path | str, wait_s: float = 0.0) -> Report:
    """Make every session file of a folder (or the one file) whole: closed, consistent, finalized.

    `wait_s`: how long a recorder that is just closing its file is waited for.

    RecordingError, the file untouched, when it is still being written, is damaged, or is not a session file.
    In a folder all files are seen to before the first error is raised. A sound file is left alone, byte for
    byte.
    """
    path = Path(path)
    if not path.is_dir():
        return Report(path.parent, (_recover_file(path, wait_s),))
    files = sorted(path.glob("*.nwb"))
    if not files and not (path / "session.toml").exists():
        raise RecordingError(f"{path} is not a session folder; give the folder or the .nwb file of a session")
    for part in path.glob("*.nwb.part"):  # made and never named: holds no sample
        part.unlink()
    done, errors = [], []
    for file in files:
        try:
            done.append(_recover_file(file, wait_s))
        except RecordingError as e:
            errors.append(e)
    if errors:
        raise errors[0]
    return Report(path, tuple(done))


def _recover_file(path: Path, wait_s: float) -> Recovered:
    if not path.exists():
        raise RecordingError(f"{path} does not exist; give the folder or the .nwb file of a session")
    try:
        return _recovered(path, wait_s)
    except DAMAGED as e:
        raise RecordingError(
            f"{path} is damaged ({type(e).__name__}: {first_line(e)}); it is left as it was. Restore it from a copy"
        ) from e


def _recovered(path: Path, wait_s: float) -> Recovered:
    superblock.read(path)
    with WriterLock(path, wait_s):
        replay(path)
        broken, cut = superblock.read(path).open_for_write, 0
        if broken:
            size = path.stat().st_size
            with editing(path, clear_flags=True) as f:
                require_session_file(f, path)
                cut = _repair(f, path, size)
                complete(f, path, path.parent)
    finalized = broken or finalize(path)
    return _tell(path, broken, finalized, cut)


def _repair(f: h5py.File, path: Path, file_size: int) -> int:
    """Cut samples and tables to what the position says is whole; how many samples are cut that it called whole.

    That happens where the power went: parts of the file reach the disk in any order, so that the position may be ahead
    of the samples. What was noted as synced must be there, else the file was cut short by somebody.
    """
    position = f[POSITION][:]
    samples, data = int(position[P_SAMPLES]), f[DATA]
    synced, life = f[SYNCED][:].tolist() if SYNCED in f else (0, boot())
    stored = min(samples, len(data), _stored(data, samples, file_size))
    power_cut = synced > 0 and life != boot()
    if power_cut:
        gaps = int(position[P_GAPS])
        told = _whole_rows(f, GAPS, gaps, *PARTS[GAPS])
        stored = min(stored, synced) if told < gaps else _certain(f, path, synced, stored)
    if samples < 0 or (stored < samples and not 0 < synced <= stored):
        raise RecordingError(
            f"{path} was cut short: samples from row {max(stored, 0)} of {samples} on are missing; "
            "restore it from a copy"
        )
    lengths = [(data, stored)]
    for table, word in ((GAPS, P_GAPS), (EVENTS, P_EVENTS)):
        if table in f:
            columns = [c for c in f[table].values() if isinstance(c, h5py.Dataset)]
            rows, there = int(position[word]), min(len(c) for c in columns)
            if rows < 0 or (there < rows and not synced):
                raise RecordingError(
                    f"{path} is damaged: {table} has {there} rows where {rows} were written; restore it from a copy"
                )
            if power_cut:
                there = _whole_rows(f, table, there, *PARTS[table])
            lengths += [(c, min(rows, there)) for c in columns]
    for dataset, n in lengths:
        if len(dataset) != n:
            dataset.resize(n, axis=0)
    if stored < samples:
        f[POSITION][P_SAMPLES] = stored
    return samples - stored


def _whole_rows(f: h5py.File, table: str, rows: int, *columns: str) -> int:
    """Rows before the first one of which a part never came to the disk: it reads as zero there."""
    if table not in f:
        return 0
    n = min([rows, *(len(f[table][c]) for c in columns)])
    empty = np.zeros(n, bool)
    for c in columns:
        values = f[table][c][:n]
        zero = (
            values == values.dtype.type()
            if values.dtype.kind != "O"
            else np.array([not v for v in values], bool)
        )
        if c in AT.values():
            zero &= f[POSITION][P_FIRST] > 0
        elif c in AT:
            zero &= f[table][AT[c]][:n] != f[POSITION][P_FIRST]
        empty |= zero
    return int(np.argmax(empty)) if empty.any() else n


def _stored(data: h5py.Dataset, samples: int, file_size: int) -> int:
    """Rows before the first one that the file is too short to hold: it must not read as zeros."""
    row = data.shape[1] * data.dtype.itemsize
    rows_per_chunk = data.chunks[0]
    missing = [samples]

    def look(chunk: object) -> None:
        first = chunk.chunk_offset[0]  # type: ignore[attr-defined]
        needed = min(rows_per_chunk, samples - first) * row
        if needed > 0 and chunk.byte_offset + needed > file_size:  # type: ignore[attr-defined]
            missing.append(first + max(0, file_size - chunk.byte_offset) // row)  # type: ignore[attr-defined]

    data.id.chunk_iter(look)
    return min(missing)


def _certain(f: h5py.File, path: Path, synced: int, stored: int) -> int:
    """Rows before the first empty page after the sync: what is zero there, and no gap, never came to the disk."""
    data, rows = f[DATA], f[DATA].chunks[0]
    size, first = data.shape[1] * data.dtype.itemsize, int(f[POSITION][P_FIRST]) + synced
    quiet = np.zeros(max(0, stored - synced), bool)  # in a gap: zero, as it should be
    if GAPS in f:
        for start, stop in zip(f[GAPS]["start_sample"][:], f[GAPS]["stop_sample"][:], strict=False):
            quiet[max(0, start - first) : max(0, stop - first)] = True
    with open(path, "rb", buffering=0) as raw:
        for chunk in range(synced // rows * rows, stored, rows):
            here, there = max(chunk, synced), min(chunk + rows, stored)
            at = data.id.get_chunk_info_by_coord((chunk, 0)).byte_offset
            if at is None:  # never written: the recorder had lost it, or the power went before
                if not quiet[here - synced : there - synced].all():
                    return here
                continue
            begin, end = at + (here - chunk) * size, at + (there - chunk) * size
            body = os.pread(raw.fileno(), end - begin, begin)
            found = [here + n for n in _silent(body, size, quiet[here - synced : there - synced])]
            for page in range(begin // PAGE * PAGE, end, PAGE):
                a, b = max(page, begin), min(page + PAGE, end)
                top, bottom = chunk + (a - at) // size, chunk - (at - b) // size
                if not any(body[a - begin : b - begin]) and not quiet[top - synced : bottom - synced].all():
                    found.append(top)
                    break
            if found:
                return min(found)
    return stored


def _silent(body: bytes, row: int, quiet: np.ndarray) -> list[int]:
    """The first of the rows outside gaps that are zero from end to end: a page may have come half filled."""
    rows = np.frombuffer(body, np.uint8)[: len(body) // row * row].reshape(-1, row)
    zero = ~rows.any(1) & ~quiet[: len(rows)]
    few = -(-ZEROS // row)  # zero rows at a time: of one or two channels a row may be zero by itself
    runs = np.convolve(zero, np.ones(few), "valid") >= few
    return np.flatnonzero(runs)[:1].tolist()


def _tell(path: Path, repaired: bool, finalized: bool, cut: int) -> Recovered:
    with h5py.File(path, "r") as f:
        info = StreamInfo.from_json(f[STREAM][()])
        samples = len(f[DATA])
        gaps = len(np.asarray(f[GAPS]["id"])) if GAPS in f else 0
    return Recovered(path, samples, samples / info.fs_hz, gaps, repaired, finalized, cut)
