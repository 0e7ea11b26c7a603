"""What the disk does beside the flushes: syncing in the background, and letting go of a file that
cannot be written.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import h5py


class Syncer:
    """fsync every `period_s` on its own thread, so that a slow disk does not hold up the flushes.

    The caller sets `wrote` to the sample number it has written and calls `tick` after each flush; `synced`
    is the number that has reached the disk. `tick` and `close` raise OSError when a sync failed.
    """

    def __init__(self, fd: int, period_s: float) -> None:
        self.fd, self.period_s = fd, period_s
        self.wrote = self.synced = 0
        self._error: OSError | None = None
        self._due = time.monotonic() + period_s
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        if self._error is not None:
            raise self._error
        if time.monotonic() < self._due or (self._thread is not None and self._thread.is_alive()):
            return
        self._due = time.monotonic() + self.period_s
        self._thread = threading.Thread(target=self._sync, args=(self.wrote,), name="fsync", daemon=True)
        self._thread.start()

    def _sync(self, wrote: int) -> None:
        try:
            os.fdatasync(self.fd)
            self.synced = wrote
        except OSError as e:
            self._error = e

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error


def boot() -> int:
    """A number of this life of the computer: what was written in another one may not all have reached the disk."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    return int(text.replace("-", "")[:15], 16)


def abandon(f: h5py.File) -> None:
    """Close a file without a further byte reaching it, as if the process had been killed.

    HDF5 cannot close a file on a full disk, and tries again at exit: its descriptor is turned to memory
    first.
    """
    memory = os.memfd_create("abandoned")
    os.dup2(memory, f.id.get_vfd_handle())
    os.close(memory)
    try:
        f.close()
    except (OSError, RuntimeError):
        return  # it has nothing left to damage
