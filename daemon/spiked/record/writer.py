"""Ring -> session file, flushed every 100 ms. A plain object: the record process calls `run` or `step`.

Order of one step: samples and table rows, HDF5 flush, `scratch/position`, then the reader's position in the
ring. So what the position tells is whole whatever dies when, and a restarted writer writes from there again:
rows beyond the position are overwritten with the same content, never repeated and never skipped.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import h5py
import numpy as np

from spiked.config import Config
from spiked.errors import Overrun, RecordingError
from spiked.record import superblock
from spiked.record.disk import Syncer, abandon, boot
from spiked.record.edit import replay
from spiked.record.finalize import is_final
from spiked.record.lock import WriterLock
from spiked.record.nwbfile import (
    DATA,
    EVENTS,
    GAPS,
    LIBVER,
    P_EVENTS,
    P_FIRST,
    P_GAPS,
    P_RING_EVENT,
    P_RING_FIRST,
    P_RING_GAP,
    P_SAMPLES,
    POSITION,
    SYNCED,
    create,
    first_line,
)
from spiked.record.rows import event_rows, gap_rows, lost_row, put_rows
from spiked.ring import Ring, RingReader
from spiked.stream import Gap
from spiked.timing import Histogram

log = logging.getLogger(__name__)

STEP_S = 0.25  # samples taken from the ring at once, when behind
LOCK_WAIT_S = 5.0  # a predecessor that was killed a moment ago

Progress = Callable[[int, int, int], None]


class SessionWriter:
    """Writes one stream's file. Continues the file when it is there, else makes it when the first sample
    comes.

    `on_progress(samples, flushed_sample, bytes)` after each flush: samples in the file, the sample number up
    to which they are safe from a dead process, and their bytes. `on_lost(gap)` when the ring lapped this
    writer: the interval is zero in the file and listed there, and everybody else must be told.
    Raises RecordingError when the disk is full, fails, or falls below `record.min_free_gb`; what was flushed
    stays.
    """

    def __init__(
        self,
        path: Path | str,
        ring: Ring,
        config: Config,
        session_start: datetime | None = None,
        session_id: str = "",
        on_progress: Progress | None = None,
        on_lost: Callable[[Gap], None] | None = None,
    ) -> None:
        self.path, self.ring, self.config = Path(path), ring, config
        self.session_start, self.session_id = session_start, session_id or self.path.parent.name
        self.on_progress, self.on_lost = on_progress, on_lost
        self.reader = RingReader(ring, "record")
        self.flushes, self.continued, self.free_bytes = 0, False, 0
        self.step_ms = Histogram()  # of the steps that wrote
        self._file: h5py.File | None = None
        self._lock: WriterLock | None = None
        info = ring.info
        self.row_bytes = info.n_channels * np.dtype(info.dtype).itemsize
        self._buffer = np.empty((max(1, int(STEP_S * info.fs_hz)), info.n_channels), info.dtype)
        self._check_space()
        if self.path.exists():
            self._continue()
        else:
            importlib.import_module("pynwb")  # a second, better spent before the first sample

    # ---- opening ------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Make the file now that the ring's first sample is known."""
        self.reader.behind()
        first, start = self.reader.position, self.session_start
        if start is None:
            arrived = int(self.reader.arrival_ns(np.array([first]))[0])
            ago_ns = time.monotonic_ns() - arrived if arrived else 0
            start = datetime.now().astimezone() - timedelta(microseconds=ago_ns // 1000)
        create(self.path, self.ring.info, self.config, start, self.session_id, first, self.ring.first_sample)
        self._open()

    def _continue(self) -> None:
        """Take over the file of a writer that died."""
        self._lock = WriterLock(self.path, LOCK_WAIT_S)
        try:
            replay(self.path)
            if is_final(self.path):
                raise RecordingError(f"{self.path} is complete; start a new session")
            self.continued = superblock.clear(self.path)
        except BaseException:
            self._lock.release()
            raise
        self._open()
        p, ring = self._position, self.ring
        here = int(p[P_FIRST] + p[P_SAMPLES])
        same = self._data.shape[1] == ring.info.n_channels and p[P_RING_FIRST] == ring.first_sample
        if not same or here > ring.next_sample:
            self._leave()
            raise RecordingError(
                f"{self.path} belongs to another acquisition; run `spiked recover {self.path.parent}`, "
                "then start a session"
            )
        self.reader.skip_to(here)

    def _open(self) -> None:
        self._lock = self._lock or WriterLock(self.path, LOCK_WAIT_S)
        try:
            # no chunk cache: what is appended goes straight to the file, only its own bytes
            f = h5py.File(self.path, "r+", libver=LIBVER, rdcc_nbytes=0)
            self._data, self._position_set, self._synced_set = f[DATA], f[POSITION], f.get(SYNCED)
            self._tables = {name: f[name] for name in (GAPS, EVENTS)}
            f.swmr_mode = True
        except (OSError, KeyError, ValueError) as e:
            self._lock.release()
            raise RecordingError(
                f"cannot continue {self.path} ({first_line(e)}); run `spiked recover {self.path.parent}`"
            ) from e
        self._file, self._position = f, self._position_set[:]
        self._syncer = Syncer(self._lock.fd, self.config.record.fsync_ms / 1000)
        synced = 0
        if self._synced_set is not None:
            self._synced_set[1] = boot()
            synced = int(self._synced_set[0])
        self._syncer.wrote = self._syncer.synced = int(self._position[P_FIRST]) + synced

    # ---- the loop -----------------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Until the ring has ended, or `stop`; then drains and closes the file."""
        period = self.config.record.flush_ms / 1000
        while True:
            ended = self.ring.ended or stop()
            due = time.monotonic() + period
            while self.step():
                pass
            if ended:
                break
            time.sleep(max(0.0, due - time.monotonic()))
        self.finish()

    def step(self) -> bool:
        """Write and flush what the ring holds, at most STEP_S of it; True when it may hold more."""
        if self.ring.committed == 0:
            return False
        if self._file is None:
            self._begin()
        began = time.monotonic_ns()
        self._check_space()
        lost, n = self._take()
        try:
            for gap in lost:
                self._write_lost(gap)
            if n:
                self._write_samples(self._buffer[:n])
            rows = self._write_rows()
            if not (n or lost or rows):
                return False
            assert self._file is not None
            self._file.flush()
            self._position_set[...] = self._position
            self._position_set.flush()
            self._syncer.tick()
            self._note_synced()
        except (OSError, RuntimeError, ValueError) as e:
            self._fail(e)
        self.reader.done()
        self.flushes += 1
        self.step_ms.add((time.monotonic_ns() - began) / 1e6)
        if self.on_progress:
            self.on_progress(self.samples, self.flushed_sample, self.samples * self.row_bytes)
        for gap in lost:
            log.warning("ring lapped the recorder: samples %d to %d are lost", gap.start, gap.stop)
            if self.on_lost:
                self.on_lost(gap)
        return n == len(self._buffer) or bool(lost)

    @property
    def samples(self) -> int:
        """Samples in the file."""
        return int(self._position[P_SAMPLES]) if self._file is not None else 0

    @property
    def flushed_sample(self) -> int:
        """Sample number up to which the file survives the death of this process."""
        return (
            int(self._position[P_FIRST]) + self.samples if self._file is not None else self.ring.first_sample
        )

    @property
    def synced_sample(self) -> int:
        """Sample number up to which the file survives a power failure."""
        return self._syncer.synced if self._file is not None else self.ring.first_sample

    def _note_synced(self) -> None:
        synced = self._syncer.synced - int(self._position[P_FIRST])
        if self._synced_set is not None and synced != self._synced_set[0]:
            self._synced_set[0] = synced
            self._synced_set.flush()

    def _take(self) -> tuple[list[Gap], int]:
        """Copy samples from the ring into the buffer: (intervals lost before them, samples copied)."""
        lost: list[Gap] = []
        n = 0
        while n < len(self._buffer):
            try:
                chunk = self.reader.read(len(self._buffer) - n)
            except Overrun as e:
                if n:  # write what was copied first; the next step finds the hole
                    self.reader.skip_to(e.start)
                    break
                lost.append(Gap(e.start, e.stop, "lost", self.ring.info.n_channels))
                continue
            if chunk is None:
                break
            self._buffer[n : n + len(chunk.data)] = chunk.data
            n += len(chunk.data)
        return lost, n

    def _write_samples(self, samples: np.ndarray) -> None:
        a = self.samples
        b = a + len(samples)
        if b > len(self._data):
            self._data.resize(b, axis=0)
        self._data[a:b] = samples
        self._position[P_SAMPLES] = b
        self._syncer.wrote = self.flushed_sample

    def _write_lost(self, gap: Gap) -> None:
        """Samples the ring no longer holds: never written, so they read as zero; except where a dead
        writer got ahead.
        """
        a, b = self.samples, self.samples + gap.stop - gap.start
        ahead = min(b, len(self._data))
        for at in range(a, ahead, len(self._buffer)):
            self._data[at : min(ahead, at + len(self._buffer))] = 0
        if b > len(self._data):
            self._data.resize(b, axis=0)
        self._position[P_SAMPLES] = b
        row = lost_row(gap, self.ring.info, int(self._position[P_FIRST]))
        self._position[P_GAPS] = put_rows(self._tables[GAPS], int(self._position[P_GAPS]), row)

    def _write_rows(self) -> bool:
        """New rows of the ring's gap and event tables."""
        p, info = self._position, self.ring.info
        more = False
        for ring_table, table, mine, theirs, convert in (
            ("gaps", GAPS, P_GAPS, P_RING_GAP, gap_rows),
            ("events", EVENTS, P_EVENTS, P_RING_EVENT, event_rows),
        ):
            rows, after, missed = self.ring.rows(ring_table, int(p[theirs]))
            if missed:
                log.error(
                    "%d rows of the ring's %s were overwritten before they were recorded", missed, ring_table
                )
            if after != p[theirs]:
                p[mine] = put_rows(self._tables[table], int(p[mine]), convert(rows, info, int(p[P_FIRST])))
                p[theirs] = after
                more = True
        return more

    # ---- the end ------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Close the file properly. Nothing happens when no sample ever came."""
        if self._file is None:
            return
        try:
            self._syncer.close()
            self._file.close()
            assert self._lock is not None
            os.fsync(self._lock.fd)
        except (OSError, RuntimeError) as e:
            self._fail(e)
        self._file = None
        self._leave()

    def _check_space(self) -> None:
        """Stop while there is still room to close the file."""
        try:
            self.free_bytes = shutil.disk_usage(self.path.parent).free
        except OSError as e:
            raise RecordingError(
                f"cannot record into {self.path.parent}: {e.strerror}; check rig.sessions"
            ) from e
        least = self.config.record.min_free_gb * 1e9
        if self.free_bytes < least:
            self.finish()
            raise RecordingError(
                f"only {self.free_bytes / 1e9:.2f} GB free in {self.path.parent}, record.min_free_gb is "
                f"{self.config.record.min_free_gb:g}; the recording ended, delete or move old sessions"
            )

    def _fail(self, e: BaseException) -> None:
        """The disk refused: keep HDF5 from touching the file again, so that it stays as of the last flush."""
        assert self._file is not None
        whole = self._whole_on_disk()
        abandon(self._file)
        self._file = None
        self._leave()
        raise RecordingError(
            f"cannot write {self.path}: {first_line(e)}; {whole} samples are safe in it. Check the disk, "
            f"then run `spiked recover {self.path.parent}`"
        ) from e

    def _whole_on_disk(self) -> int:
        assert self._lock is not None
        stored = os.pread(self._lock.fd, self._position.nbytes, self._position_set.id.get_offset())
        return int(np.frombuffer(stored, "<i8")[P_SAMPLES])

    def _leave(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
