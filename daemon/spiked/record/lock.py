"""Who writes a session file. The lock lies on the file itself and vanishes with the process, however it dies.

HDF5 releases its own lock as soon as SWMR starts, so that readers can come. This one is an
open-file-description lock (fcntl(2), F_OFD_SETLK) on a byte far behind the end: it never meets HDF5's
whole-file flock.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from pathlib import Path

from spiked.errors import RecordingError

BYTE = 1 << 62


class WriterLock:
    """Held from the constructor to `release`. `fd` is open for reading and writing, free for fsync."""

    def __init__(self, path: Path, wait_s: float = 0.0) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise RecordingError(
                f"cannot open {path} for writing: {e.strerror}; check its owner and the disk"
            ) from e
        until = time.monotonic() + wait_s
        while not self._try():
            if time.monotonic() >= until:
                os.close(self.fd)
                raise RecordingError(f"{path} is being written by a running process; end that session first")
            time.sleep(0.02)

    def _try(self) -> bool:
        want = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, BYTE, 1, 0)
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, want)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
