"""Editing a closed session file so that a kill at any moment leaves either the old file or the new one.

HDF5 outside SWMR changes its metadata in place and in any order; a process killed while it does so leaves a
file nobody can open. Here HDF5 works on an overlay: what it appends goes to the file's end, where the old
file does not look, and what it changes is kept in memory. `commit` writes the changes to a redo log, syncs
it, applies it, and deletes it; whoever opens the file next applies a complete log again and drops an
incomplete one.
"""

from __future__ import annotations

import fcntl
import io
import os
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from spiked.errors import RecordingError
from spiked.record import superblock
from spiked.record.nwbfile import LIBVER, first_line

PAGE = 4096
MAGIC = b"SPKDREDO"
HEAD = struct.Struct("<8sqqq")  # magic, size before, size after, pages
WAIT_S = 5.0


class Overlay(io.RawIOBase):
    """The file as HDF5 sees it while it is edited (h5py's driver for file objects reads and writes
    through it).
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.base = self.size = os.fstat(self.fd).st_size
        self.pages: dict[int, bytearray] = {}
        self.logged = False
        self._at = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self.fd < 0:  # HDF5 closing what it could not close before
            view[:] = bytes(len(view))
            return len(view)
        start, stop = self._at, min(self._at + len(view), self.size)
        n = max(0, stop - start)
        got = os.preadv(self.fd, [view[:n]], start) if n else 0
        view[got:n] = bytes(n - got)
        for page in range(start // PAGE, -(-stop // PAGE)) if self.pages and n else ():
            if (new := self.pages.get(page)) is not None:
                a, b = max(start, page * PAGE), min(stop, page * PAGE + len(new))
                view[a - start : b - start] = new[a - page * PAGE : b - page * PAGE]
        self._at = start + n
        return n

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.fd < 0:
            return len(view)
        start, stop = self._at, self._at + len(view)
        old = max(0, min(stop, self.base) - start)
        for page in range(start // PAGE, -(-(start + old) // PAGE)) if old else ():
            new = self._page(page)
            a, b = max(start, page * PAGE), min(start + old, page * PAGE + len(new))
            new[a - page * PAGE : b - page * PAGE] = view[a - start : b - start]
        at = start + old
        while at < stop:
            at += os.pwrite(self.fd, view[at - start :], at)
        self.size = max(self.size, stop)
        self._at = stop
        return len(view)

    def _page(self, page: int) -> bytearray:
        if page not in self.pages:
            n = min(PAGE, self.base - page * PAGE)
            self.pages[page] = bytearray(os.pread(self.fd, n, page * PAGE))
        return self.pages[page]

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        if self.size > self.base and self.fd >= 0:
            os.ftruncate(self.fd, self.size)
        return self.size

    def commit(self) -> None:
        """Make the edit the file. RecordingError when a reader keeps the file open."""
        if not self.pages and self.size == self.base:
            return
        os.fsync(self.fd)
        _lock(self.fd, self.path)
        body = b"".join(struct.pack("<qi", n, len(p)) + p for n, p in sorted(self.pages.items()))
        log = HEAD.pack(MAGIC, self.base, self.size, len(self.pages)) + body
        new = redo_path(self.path).with_suffix(".new")
        with open(new, "wb") as f:
            f.write(log + struct.pack("<I", zlib.crc32(log)))
            f.flush()
            os.fsync(f.fileno())
        new.rename(redo_path(self.path))
        self.logged = True
        _sync_folder(self.path)
        _apply(_changes(log), self.size, self.fd)
        redo_path(self.path).unlink()

    def rollback(self) -> None:
        """The file as it was; once the redo log is there, the next one to open the file completes it
        instead.
        """
        if not self.logged:
            os.ftruncate(self.fd, self.base)

    def release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def redo_path(path: Path) -> Path:
    return path.with_name(path.name + ".redo")


def _sync_folder(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    """HDF5 readers hold a shared lock on the whole file; nothing is changed under them."""
    until = time.monotonic() + WAIT_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise RecordingError(
                    f"another program has {path} open; close it, then run `spiked recover {path.parent}`"
                ) from None
            time.sleep(0.05)


def _changes(log: bytes) -> list[tuple[int, bytes]]:
    """(offset, bytes) of every change in a log without its sum. Raises ValueError where the log contradicts itself."""
    _, base, size, n = HEAD.unpack_from(log)
    if not 0 <= base <= 1 << 62 or not 0 <= size <= 1 << 62 or not 0 <= n <= len(log) // 12:
        raise ValueError("impossible sizes")
    at, out = HEAD.size, []
    for _ in range(n):
        if at + 12 > len(log):
            raise ValueError("a page is missing")
        page, length = struct.unpack_from("<qi", log, at)
        at += 12
        if (
            not 0 <= page <= base // PAGE
            or not 0 <= length <= min(PAGE, base - page * PAGE)
            or at + length > len(log)
        ):
            raise ValueError("a page outside the file")
        out.append((page * PAGE, log[at : at + length]))
        at += length
    return out


def _apply(changes: list[tuple[int, bytes]], size: int, fd: int) -> None:
    for offset, data in changes:
        os.pwrite(fd, data, offset)
    os.ftruncate(fd, size)
    os.fsync(fd)


def replay(path: Path) -> bool:
    """Complete an edit whose process died while applying it; True when there was one."""
    redo = redo_path(path)
    redo.with_suffix(".new").unlink(missing_ok=True)
    if not redo.exists():
        return False
    log = redo.read_bytes()
    whole = len(log) > HEAD.size + 4 and log.startswith(MAGIC)
    if whole and zlib.crc32(log[:-4]) == struct.unpack("<I", log[-4:])[0]:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = HEAD.unpack_from(log)[2]
            changes = _changes(log[:-4])
            if size > os.fstat(fd).st_size:  # what was appended is in the file before the log is written
                raise ValueError("the file is shorter than when the log was written")
            _apply(changes, size, fd)
        except ValueError as e:
            raise RecordingError(
                f"{redo} does not fit {path} ({e}); restore both from a copy, or remove the log"
            ) from e
        finally:
            os.close(fd)
    redo.unlink()
    return True


@contextmanager
def editing(path: Path, clear_flags: bool = False) -> Iterator[h5py.File]:
    """The file open for any change h5py or pynwb makes, committed at the end of the block, untouched if it
    raises.

    `clear_flags`: also when its writer died. The caller holds the WriterLock. RecordingError names damage.
    """
    replay(path)
    try:
        overlay = Overlay(path)
    except OSError as e:
        raise RecordingError(
            f"cannot open {path} for writing: {e.strerror}; check its owner and the disk"
        ) from e
    try:
        block = superblock.parse(os.pread(overlay.fd, superblock.SIZE, 0), path)
        if block.open_for_write:
            if not clear_flags:
                raise RecordingError(f"{path} was not closed properly; run `spiked recover {path.parent}`")
            overlay.write(block.cleared(overlay.size))
            overlay.truncate(max(overlay.size, block.eof))
        with _opened(overlay) as f:
            yield f
        overlay.commit()
    except (OSError, RuntimeError, KeyError, ValueError) as e:  # what h5py raises on full disks and damage
        overlay.rollback()
        raise RecordingError(f"{path} cannot be edited: {first_line(e)}; it is left as it was") from e
    except BaseException:
        overlay.rollback()
        raise
    finally:
        overlay.release()


@contextmanager
def _opened(overlay: Overlay) -> Iterator[h5py.File]:
    try:
        f = h5py.File(overlay, "r+", libver=LIBVER)
    except (OSError, RuntimeError) as e:
        raise RecordingError(
            f"{overlay.path} is damaged and cannot be opened ({first_line(e)}); restore it from a copy"
        ) from e
    try:
        yield f
    finally:
        f.close()
