"""The stimulus ledger: one LEDGER record per decision, appended again whenever more is known of it.

What a killed process leaves is whole records; the last one of every number counts (protocol.newest).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import numpy as np

from spiked_client.protocol import LEDGER, OUTCOMES, newest

SYNC_S = 0.1  # between two fsyncs, on a thread of their own


def path_of(session: Path, stream: str) -> Path:
    return session / f"{stream}.ledger.bin"


def read(path: Path) -> np.ndarray:
    """The newest record of every decision, by number; a torn last record is left out, a missing file is empty."""
    try:
        n = path.stat().st_size // LEDGER.itemsize
    except FileNotFoundError:
        return np.zeros(0, LEDGER)
    return newest(np.fromfile(path, LEDGER, n))


class Ledger:
    """The file, for appending. `next_number`, `sent` and `decided` (rule -> sample of its last decision) go on where an earlier life of the
    process stopped."""

    def __init__(self, session: Path, stream: str) -> None:
        self.path = path_of(session, stream)
        before = read(self.path)
        self.next_number = int(before["number"].max(initial=0)) + 1
        self.sent = int(np.isin(before["outcome"], [OUTCOMES.index(x) for x in ("sent", "failed")]).sum())
        rules = before["rule"]
        self.decided = {
            r.decode("utf-8", "replace"): int(before["sample"][rules == r].max())
            for r in np.unique(rules)
            if r
        }
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        size = os.fstat(self._file).st_size
        os.ftruncate(self._file, size // LEDGER.itemsize * LEDGER.itemsize)
        self._news, self._closing = threading.Event(), False
        self._trouble: OSError | None = None  # of the thread that syncs: some file systems find out only then
        self._syncing = threading.Thread(target=self._sync, name="ledger", daemon=True)
        self._syncing.start()

    def number(self) -> int:
        """A fresh number."""
        self.next_number += 1
        return self.next_number - 1

    def append(self, record: np.ndarray) -> None:
        """One LEDGER record. It outlives the process from here on, and a power cut from the next fsync.

        Raises OSError, also of the last fsync.
        """
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise trouble
        data = record.tobytes()
        if (written := os.write(self._file, data)) < len(data):  # the disk had room for a part
            os.ftruncate(
                self._file, os.fstat(self._file).st_size - written
            )  # what follows must be whole records
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._news.set()

    def _sync(self) -> None:
        while not self._closing:
            self._news.wait()
            self._news.clear()
            try:
                os.fsync(self._file)
            except OSError as e:
                self._trouble = e
            time.sleep(SYNC_S)

    def close(self) -> None:
        self._closing = True
        self._news.set()
        self._syncing.join(2.0)
        with contextlib.suppress(OSError):  # told already, and the end of a session must not fail for it
            os.fsync(self._file)
        os.close(self._file)
