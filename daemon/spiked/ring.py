"""The ring: one writer, any number of readers, in a memory-mapped file that outlives them all.

Samples sit at `index % capacity`; `index` counts from the first sample ever written and
`sample = first_sample + index`, so numbering has no holes (gaps are zero-filled by the writer and listed).
Besides the samples the file holds three small rings: chunks (when each arrived, flags), gaps and events.
A writer first stores, then advances a counter; a reader copies first, then checks that the writer did not
lap it meanwhile. Counters are aligned 64-bit words, and x86-64 keeps the order of stores; on a processor that
does not, the ring would need barriers that Python does not offer.
"""

from __future__ import annotations

import mmap
import os
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np

from spiked.errors import Overrun, SpikedError, StreamChanged
from spiked.stream import Chunk, Flag, StreamEvent, StreamInfo

MAGIC = 0x0173_706B_6452_4E47
VERSION = 1
HEADER_BYTES = 4096
INFO_BYTES = 1 << 20
MAX_CHANNELS = 4096

CHUNK = np.dtype([("first", "<i8"), ("count", "<i4"), ("flags", "<i4"), ("arrival_ns", "<i8")])
GAP = np.dtype(
    [
        ("start", "<i8"),
        ("stop", "<i8"),
        ("reason", "<i4"),
        ("n_channels", "<i4"),
        ("mask", "u1", MAX_CHANNELS // 8),
    ]
)
EVENT = np.dtype(
    [
        ("sample", "<i8"),
        ("kind", "<i4"),
        ("line", "<i4"),
        ("state", "<i4"),
        ("_", "<i4"),
        ("value", "<f8"),
        ("text", "S96"),
    ]
)
TABLES = (("chunks", CHUNK, 1 << 16), ("gaps", GAP, 1 << 12), ("events", EVENT, 1 << 15))
GAP_REASONS = ("lost", "partial", "restart", "device", "reset")

# header words (int64)
(H_MAGIC, H_VERSION, H_CAPACITY, H_CHANNELS, H_COMMITTED, H_FIRST, H_ENDED, H_INFO, H_OFFSET, H_WRITER) = (
    range(10)
)
H_COUNT = {"chunks": 16, "gaps": 17, "events": 18}
H_READER = 64  # one word per named reader: the sample number it has safely consumed
READERS = ("record", "live")
LOOK_BACK = 4096  # chunks before the newest read whose arrival is looked up
NO_FLAG = Flag.NONE


def _layout(info: StreamInfo, capacity: int) -> tuple[dict[str, int], int]:
    at, offset = {}, HEADER_BYTES + INFO_BYTES
    for name, dtype, n in TABLES:
        at[name] = offset
        offset += dtype.itemsize * n
    offset = -(-offset // 4096) * 4096
    at["data"] = offset
    return at, offset + capacity * info.n_channels * np.dtype(info.dtype).itemsize


class Ring:
    """The mapped file. `create` makes one (supervisor); `attach` opens one; both give the same object."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with open(self.path, "r+b") as f:
            size = os.fstat(f.fileno()).st_size
            if size < HEADER_BYTES + INFO_BYTES:
                raise SpikedError(f"{self.path} is not a ring (only {size} bytes); delete it and start again")
            self._map = mmap.mmap(f.fileno(), size)
        self.header = np.frombuffer(self._map, np.int64, HEADER_BYTES // 8)
        if self.header[H_MAGIC] != MAGIC or self.header[H_VERSION] != VERSION:
            raise SpikedError(
                f"{self.path} is not a ring of this version of spiked; delete it and start again"
            )
        n = int(self.header[H_INFO])
        self.info = StreamInfo.from_json(bytes(self._map[HEADER_BYTES : HEADER_BYTES + n]))
        self.capacity = int(self.header[H_CAPACITY])
        at, _ = _layout(self.info, self.capacity)
        self.tables = {name: np.frombuffer(self._map, dtype, n, at[name]) for name, dtype, n in TABLES}
        count = self.capacity * self.info.n_channels
        flat = np.frombuffer(self._map, np.dtype(self.info.dtype), count, at["data"])
        self.data = flat.reshape(self.capacity, self.info.n_channels)

    @classmethod
    def create(cls, path: Path | str, info: StreamInfo, seconds: float = 20.0) -> Ring:
        """Make a ring file of `seconds` capacity. Raises SpikedError when the tmpfs has no room for it."""
        if info.n_channels > MAX_CHANNELS:
            raise SpikedError(
                f"stream {info.name}: {info.n_channels} channels; a stream may have {MAX_CHANNELS}"
            )
        capacity = max(int(seconds * info.fs_hz), 1024)
        text = info.to_json().encode()
        if len(text) > INFO_BYTES:
            raise SpikedError(
                f"stream {info.name}: its description takes {len(text)} bytes; shorten annotations"
            )
        _, size = _layout(info, capacity)
        path = Path(path)
        beside = path.with_name(path.name + ".new")  # who waits for the ring must never see half of it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
        except OSError as e:
            raise SpikedError(f"cannot make a ring in {path.parent} ({e.strerror}); check rig.runtime") from e
        try:
            os.posix_fallocate(fd, 0, size)
            head = np.zeros(HEADER_BYTES // 8, np.int64)
            head[[H_MAGIC, H_VERSION, H_CAPACITY, H_CHANNELS, H_INFO]] = (
                MAGIC, VERSION, capacity, info.n_channels, len(text),
            )  # fmt: skip
            os.pwrite(fd, head.tobytes() + text, 0)
            beside.replace(path)
        except OSError as e:
            beside.unlink(missing_ok=True)
            raise SpikedError(
                f"no room for a ring of {size / 1e6:.0f} MB in {path.parent} ({e.strerror}); lower ring_s or enlarge /dev/shm"
            ) from e
        finally:
            os.close(fd)
        return cls(path)

    @property
    def committed(self) -> int:
        """Samples written since the ring began."""
        return self.header.item(H_COMMITTED)

    @property
    def first_sample(self) -> int:
        """Sample number of the first sample ever written."""
        return self.header.item(H_FIRST)

    @property
    def next_sample(self) -> int:
        """Sample number that will be written next."""
        return self.first_sample + self.committed

    @property
    def oldest_sample(self) -> int:
        """Oldest sample number still held."""
        return self.first_sample + max(0, self.committed - self.capacity)

    @property
    def ended(self) -> bool:
        """True once the writer declared that nothing more will come."""
        return bool(self.header[H_ENDED])

    @property
    def forsaken(self) -> bool:
        """True once nobody can write any more, for want of a supervisor: it ended, or its writer is gone or never came."""
        return self.ended or not _runs(int(self.header[H_WRITER]))

    def end(self) -> None:
        self.header[H_ENDED] = 1

    def device_sample(self, sample: int) -> int:
        """The device's own counter for a sample number written after the last counter reset."""
        return sample - int(self.header[H_OFFSET])

    def reader_position(self, name: str) -> int:
        """Sample number up to which the named reader has consumed."""
        return int(self.header[H_READER + READERS.index(name)])

    def count(self, table: str) -> int:
        """Rows ever written to a side table."""
        return int(self.header[H_COUNT[table]])

    def rows(self, table: str, since: int) -> tuple[np.ndarray, int, int]:
        """Rows of a side table from row number `since`: (copy, next row number, rows lost by lapping)."""
        t = self.tables[table]
        end = int(self.header[H_COUNT[table]])
        start = max(since, end - len(t) + 1, 0)
        out = t[np.arange(start, end) % len(t)]
        return out, end, start - min(since, start)

    def close(self) -> None:
        """Drop the views; the mapping goes with the last of them."""
        self.tables, self.header = {}, np.zeros(0, np.int64)
        self.data = np.zeros((0, 0))


class RingWriter:
    """The one writer. Attaching to a ring that already holds samples continues its numbering."""

    def __init__(self, ring: Ring, info: StreamInfo | None = None) -> None:
        if info is not None and not ring.info.same_wire(info):
            raise StreamChanged(
                f"stream {info.name} changed from {ring.info.n_channels} channels at {ring.info.fs_hz:g} Hz to "
                f"{info.n_channels} at {info.fs_hz:g} Hz; stop the session and start a new one"
            )
        self.ring, self._h = ring, ring.header
        self._h[H_WRITER] = os.getpid()

    @property
    def started(self) -> bool:
        return self.ring.committed > 0

    @property
    def next_sample(self) -> int:
        return self.ring.next_sample

    def start_at(self, sample: int) -> None:
        """Number of the first sample; only before anything was written."""
        if self.started:
            raise SpikedError("the ring has begun already")
        self._h[H_FIRST] = sample
        for i in range(len(READERS)):
            self._h[H_READER + i] = sample

    def set_offset(self, offset: int) -> None:
        """sample number - device counter, from here on."""
        self._h[H_OFFSET] = offset

    def _append(self, table: str, row: tuple) -> None:
        t, k = self.ring.tables[table], H_COUNT[table]
        n = int(self._h[k])
        t[n % len(t)] = row
        self._h[k] = n + 1

    def write(self, data: np.ndarray, arrival_ns: int, flags: Flag = Flag.NONE) -> None:
        """Append (samples, channels); long blocks are stored in pieces of at most a quarter ring."""
        cap, piece = self.ring.capacity, max(1, self.ring.capacity // 4)
        for a in range(0, len(data), piece):
            part = data[a : a + piece]
            index, n = self.ring.committed, len(part)
            at = index % cap
            k = min(n, cap - at)
            self.ring.data[at : at + k] = part[:k]
            if k < n:
                self.ring.data[: n - k] = part[k:]
            self._append("chunks", (self.ring.first_sample + index, n, int(flags), arrival_ns))
            self._h[H_COMMITTED] = index + n

    def write_zeros(
        self, n: int, arrival_ns: int, flags: Flag, wait_s: float = 10.0, meanwhile: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Zero-fill n samples. A fill longer than half a ring waits for `record` to keep up, `wait_s` at most a step.

        `meanwhile` is called again and again: a long fill takes minutes on a slow disk.
        """
        piece = max(1, self.ring.capacity // 8)
        zeros = np.zeros((min(n, piece), self.ring.info.n_channels), self.ring.info.dtype)
        while n > 0:
            k = min(n, len(zeros))
            deadline = time.monotonic() + wait_s
            while (
                self.next_sample + k - self.ring.reader_position("record") > self.ring.capacity * 3 // 4
                and n > self.ring.capacity // 2
                and time.monotonic() < deadline
            ):
                time.sleep(0.002)
                meanwhile()
            self.write(zeros[:k], arrival_ns, flags)
            n -= k
            meanwhile()

    def add_gap(self, start: int, stop: int, reason: str, missing: np.ndarray | None = None) -> None:
        """List a gap. `missing` (channels,) bool for a partial one."""
        n = self.ring.info.n_channels
        mask = np.ones(n, bool) if missing is None else missing
        bits = np.zeros(MAX_CHANNELS // 8, np.uint8)
        packed = np.packbits(mask)
        bits[: len(packed)] = packed
        self._append("gaps", (start, stop, GAP_REASONS.index(reason), int(mask.sum()), bits))

    def add_event(self, e: StreamEvent) -> None:
        """List an event; its sample is already in the ring's numbering."""
        text = e.text.encode("utf-8", "replace")[:96]
        self._append("events", (e.sample, int(e.kind), e.line, e.state, 0, e.value, text))

    def end(self) -> None:
        self.ring.end()


def _runs(pid: int) -> bool:
    """Whether there is a process of this number that has not ended (one nobody has waited for has)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def gap_mask(row: np.ndarray, n_channels: int) -> np.ndarray:
    """(channels,) bool of a row of the gap table."""
    return np.unpackbits(row["mask"])[:n_channels].astype(bool)


class RingReader:
    """A reader. `name` in READERS keeps its position in the ring, so that a restarted process carries on.

    With `reuse` the samples of a chunk are overwritten by the next `read`.
    """

    def __init__(self, ring: Ring, name: str | None = None, reuse: bool = False) -> None:
        self.ring, self.name = ring, name
        self._slot = None if name is None else H_READER + READERS.index(name)
        self.position = ring.oldest_sample if self._slot is None else int(ring.header[self._slot])
        self._begun = ring.committed > 0  # before, nobody knows the number of the first sample
        self._reuse, self._store = reuse, np.zeros((0, ring.info.n_channels), ring.info.dtype)
        self._chunk_row = 0
        chunks = ring.tables["chunks"]
        self._n_rows = len(chunks)
        self._firsts, self._flags, self._arrivals = chunks["first"], chunks["flags"], chunks["arrival_ns"]

    def behind(self) -> int:
        """Samples committed but not yet read."""
        if not self.ring.committed:
            return 0
        if not self._begun:
            self._begun, self.position = True, self.ring.first_sample
        self.position = max(self.position, self.ring.first_sample)
        return self.ring.next_sample - self.position

    def read(self, max_samples: int) -> Chunk | None:
        """Next samples, at most `max_samples`, never across a change of flags. None when there are none.

        Raises Overrun when the writer lapped this reader; the position then already stands at the oldest
        sample still held, so the caller reports the interval and goes on reading.
        """
        n = min(self.behind(), max_samples)
        if n <= 0:
            return None
        self._check()
        arrival, flags, n = self._chunk_meta(self.position, n)
        ring, cap = self.ring, self.ring.capacity
        at = (self.position - ring.first_sample) % cap
        k = min(n, cap - at)
        data = self._room(n)
        data[:k] = ring.data[at : at + k]
        if k < n:
            data[k:] = ring.data[: n - k]
        self._check()
        chunk = Chunk(self.position, data, arrival, flags)
        self.position += n
        return chunk

    def _room(self, n: int) -> np.ndarray:
        if not self._reuse:
            return np.empty((n, self._store.shape[1]), self._store.dtype)
        if len(self._store) < n:
            self._store = np.zeros((n, self._store.shape[1]), self._store.dtype)
        return self._store[:n]

    def _check(self) -> None:
        # one quarter ring of margin: the writer may be inside its next piece
        committed, capacity = self.ring.committed, self.ring.capacity
        newest = self.ring.first_sample + committed
        if self.position < newest - capacity + capacity // 4 and committed > capacity * 3 // 4:
            start, self.position = self.position, newest - capacity // 2
            raise Overrun(start, self.position)

    def skip_to(self, sample: int) -> None:
        self.position = sample

    def done(self) -> None:
        """Declare everything read so far consumed; a restarted process starts here."""
        if self._slot is not None:
            self.ring.header[self._slot] = self.position

    def _chunk_meta(self, sample: int, n: int) -> tuple[int, Flag, int]:
        """Arrival of the newest sample, flags, and n cut at the first change of flags."""
        size, end = self._n_rows, self.ring.header.item(H_COUNT["chunks"])
        row = self._row_of(sample, self._chunk_row, end)
        if row < 0:
            row = self._row_of(sample, 0, end)
        if row < 0:
            return 0, NO_FLAG, n
        self._chunk_row = row
        flags, last = self._flags.item(row % size), row
        for k in range(row + 1, end):
            first = self._firsts.item(k % size)
            if first >= sample + n:
                break
            if self._flags.item(k % size) != flags:
                n = first - sample
                break
            last = k
        return self._arrivals.item(last % size), Flag(flags) if flags else NO_FLAG, n

    def _row_of(self, sample: int, since: int, end: int) -> int:
        """Row of the chunk that holds a sample, from row `since` on; -1 when it is not among these."""
        since = max(since, end - self._n_rows + 1, 0)
        found = bisect_right(range(since, end), sample, key=self._first_of)
        return since + found - 1 if found else -1

    def _first_of(self, row: int) -> int:
        return self._firsts.item(row % self._n_rows)

    def arrival_ns(self, samples: np.ndarray) -> np.ndarray:
        """Monotonic arrival time of the chunk that holds each sample number; 0 where it is no longer known."""
        end = self.ring.header.item(H_COUNT["chunks"])
        out = np.zeros(len(samples), np.int64)
        for i, sample in enumerate(samples.tolist()):
            row = self._row_of(sample, self._chunk_row - LOOK_BACK, end)
            if row >= 0:
                out[i] = self._arrivals.item(row % self._n_rows)
        return out
