"""One job per recording and per results folder, told apart by the system and not by a number in a file.

A lock file with a process's number in it outlives a killed process, and the number may since belong to another.
These are flock(2) locks: the system lets go of them when their holder ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from spiked.errors import OfflineError
from spiked.offline.owner import Owner
from spiked.record.lock import BYTE

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def alone(folder: Path, recording: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the results `folder`, made if need be, and the `recording` for one job; OfflineError if another has one.

    The folder's lock also works between computers that share it; the recording's, which keeps two jobs with
    different folders apart, is this computer's, because a recording may lie where nobody may write. `patience_s`
    is how long a job that is just ending is waited for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stat = recording.stat()
        places = Path(tempfile.gettempdir()) / f"spiked-{os.getuid()}"
        places.mkdir(mode=0o700, exist_ok=True)
        of_folder = (folder / "job.lock").open("a+")
        of_recording = (places / f"{stat.st_dev:x}-{stat.st_ino:x}.lock").open("a+")
    except OSError as e:
        raise OfflineError(
            f"cannot write {e.filename or folder}: {e.strerror}; {_remedy(e)}",
            "resource" if e.errno in FULL else "environment",
            "preflight",
            "disk_full" if e.errno in FULL else "read_only",
        ) from e
    with of_folder, of_recording:
        until = time.monotonic() + patience_s
        _take(of_folder, f"in {folder}", until)
        _take(of_recording, f"on {recording}", until)
        yield


def _remedy(e: OSError) -> str:
    return (
        "free space and start the job again"
        if e.errno in FULL
        else "check its owner and how the drive is mounted"
    )


def _take(lock: IO[str], where: str, until: float) -> None:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as e:
            if time.monotonic() < until:
                time.sleep(0.1)
                continue
            lock.seek(0)
            holder = Owner.read(lock.read())
            who = f" (process {holder.pid} on {holder.host})" if holder else ""
            raise OfflineError(
                f"another job is working {where}{who}; wait for it", stage="preflight", name="locked"
            ) from e
    lock.seek(0)
    lock.truncate()
    lock.write(Owner.me().dump())
    lock.flush()


def is_written(path: Path) -> bool:
    """Whether HDF5, or our own recorder, holds the file's lock for writing. False where locks do not work."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, BYTE, 1, 0)
        answer = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
        return answer[0] == fcntl.F_WRLCK
    except OSError:
        return False
    finally:
        os.close(fd)
