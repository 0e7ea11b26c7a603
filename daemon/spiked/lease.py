"""Who may use the GPU of this computer: live sorting first, then one offline job.

Two locked files. Every live process on a GPU shares `spiked-gpu.live` and never waits for anybody; an offline
job holds `spiked-gpu.job` alone, begins only while nobody holds the other, and gives up when somebody takes it.
The system lets go of both when their holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

LIVE, JOB = "spiked-gpu.live", "spiked-gpu.job"
PATIENCE_S = 5.0  # a job that looks who is there holds the other's for an instant, but may be held up in it


class Lease:
    """A file that is held while this object is open. `close` lets go of it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _take(folder: Path, name: str, how: int) -> Lease | None:
    """The lock, or None when somebody holds it. Raises OSError where there can be no such file."""
    try:
        fd = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.open(folder / name, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.fchmod(fd, 0o666)  # jobs of other users see it too, whatever the umask
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return Lease(fd)


def hold_for_live(folder: Path) -> Lease | None:
    """For a live process that uses the GPU, while it runs. `folder` is rig.runtime."""
    try:
        until = time.monotonic() + PATIENCE_S
        while (lease := _take(folder, LIVE, fcntl.LOCK_SH)) is None and time.monotonic() < until:
            time.sleep(0.001)
        return lease
    except OSError:
        return None  # live sorting goes on without the courtesy


def live_has_it(folder: Path) -> bool:
    """True while a live process of this computer uses the GPU."""
    try:
        lease = _take(folder, LIVE, fcntl.LOCK_EX)
    except OSError:
        return False
    if lease is None:
        return True
    lease.close()
    return False


def hold_for_job(folder: Path) -> Lease | None:
    """The GPU for one offline job, or None while live sorting or another job has it."""
    try:
        lease = _take(folder, JOB, fcntl.LOCK_EX)
    except OSError:
        return Lease(-1)  # no place for a lease, so nobody else can have one
    if lease is not None and live_has_it(folder):
        lease.close()
        return None
    return lease
