"""The limits of stimulation for all streams of a session together: several live processes, one account.

The account is a small mapped file that each process changes under a lock, so that two of them cannot both use up the
last of what is left. It lies beside the rings, outlives a live process that dies, and goes with the session.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spiked.act.safety import Safety
from spiked.config import Act

ROWS = 8192  # stimuli of one second; of more, the newest
HEAD = np.dtype([("count", "<i8"), ("last_ns", "<i8"), ("rows", "<i8"), ("begun", "<i8")])
ROW = np.dtype([("ns", "<i8"), ("charge", "<f8")])
SUFFIX = ".stimuli"


class SharedSafety(Safety):
    """A Safety whose count, last stimulus and last second are those of all who opened `path`."""

    def __init__(self, path: Path, limits: Act, count: int = 0) -> None:
        """`count`: stimuli that this stream's ledger already holds; used when the account begins."""
        super().__init__(limits, count)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        with self._locked():
            size = HEAD.itemsize + ROWS * ROW.itemsize
            if os.fstat(self._fd).st_size < size:
                os.posix_fallocate(self._fd, 0, size)
            self._map = mmap.mmap(self._fd, size)
            self._head = np.frombuffer(self._map, HEAD, 1)
            self._rows = np.frombuffer(self._map, ROW, ROWS, HEAD.itemsize)
            if not self._head["begun"][0]:
                self._head[0] = (count, -1, 0, 1)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _load(self) -> None:
        head = self._head[0]
        self.count = int(head["count"])
        self._last_ns = None if head["last_ns"] < 0 else int(head["last_ns"])
        rows = self._rows[: int(head["rows"])]
        self._recent.clear()
        self._recent.extend((int(ns), float(charge)) for ns, charge in rows)
        self._charge = float(rows["charge"].sum())

    def _store(self) -> None:
        rows = list(self._recent)[-ROWS:]
        self._rows[: len(rows)] = rows
        last = -1 if self._last_ns is None else self._last_ns
        self._head[0] = (self.count, last, len(rows), 1)

    def _not_before(self, now_ns: int) -> int:
        """Who was held up after a look at the clock comes after all that others sent meanwhile, not before it."""
        return max(now_ns, self._last_ns or 0, self._recent[-1][0] if self._recent else 0)

    def refusal(self, now_ns: int, charge_nc: float | None, pulses: int = 1) -> str:
        with self._locked():
            self._load()
            return super().refusal(self._not_before(now_ns), charge_nc, pulses)

    def take(self, now_ns: int, charge_nc: float | None, pulses: int = 1) -> str:
        with self._locked():
            self._load()
            now_ns = self._not_before(now_ns)
            refusal = super().refusal(now_ns, charge_nc, pulses)
            if not refusal:
                super().sent(now_ns, charge_nc, pulses)
                self._store()
            return refusal

    def seen(self, at_ns: int) -> None:
        with self._locked():
            self._load()
            super().seen(at_ns)
            self._store()

    def sent(self, now_ns: int, charge_nc: float | None, pulses: int = 1) -> None:
        with self._locked():
            self._load()
            super().sent(self._not_before(now_ns), charge_nc, pulses)
            self._store()

    def told(self) -> dict[str, Any]:
        with self._locked():
            self._load()
        return super().told()


def account(runtime: Path, supervisor: int, session: str) -> Path:
    """Where the account of a session lies."""
    return runtime / f"spiked-{supervisor}-{session}{SUFFIX}"
