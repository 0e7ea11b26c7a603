"""Append-only record files of the live path in the session folder; what a crash leaves is whole records."""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

import numpy as np

from spiked_client.protocol import BLIND, SPIKE, UNIT


class Spool:
    """`<stream>.spikes.bin`, `<stream>.blind.bin`, `<stream>.units.bin`: raw little-endian records."""

    def __init__(self, session: Path, stream: str) -> None:
        self._spikes = self._open(session / f"{stream}.spikes.bin", SPIKE)
        self._blind = self._open(session / f"{stream}.blind.bin", BLIND)
        self._units_path = session / f"{stream}.units.bin"
        self.last_sample = self._last(session / f"{stream}.spikes.bin")
        self._open_blind: np.ndarray | None = None

    @staticmethod
    def _open(path: Path, dtype: np.dtype) -> FileIO:
        f = open(path, "ab", buffering=0)  # noqa: SIM115 - what was told must outlive a killed process
        f.truncate(f.tell() // dtype.itemsize * dtype.itemsize)
        return f

    @staticmethod
    def _last(path: Path) -> int:
        """Newest sorted spike's sample number, -1 when there is none."""
        n = path.stat().st_size // SPIKE.itemsize
        tail = np.fromfile(path, SPIKE, offset=max(0, n - 4096) * SPIKE.itemsize)
        tail = tail[tail["unit"] >= 0]
        return int(tail["sample"].max()) if len(tail) else -1

    @staticmethod
    def _append(f: FileIO, records: np.ndarray) -> None:
        """Raises OSError when the disk has no room for all of it; what follows later is whole records all the same."""
        data = records.tobytes()
        if (written := f.write(data)) < len(data):
            f.truncate(os.fstat(f.fileno()).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f.name)

    def spikes(self, records: np.ndarray) -> None:
        self._append(self._spikes, records)

    def blind(self, records: np.ndarray) -> None:
        """Whole-array stretches that touch are kept as one."""
        for row in records:
            last = self._open_blind
            if (
                last is not None
                and row["channel"] == -1 == last["channel"]
                and row["reason"] == last["reason"]
                and (row["start"] <= last["stop"])
            ):
                last["stop"] = max(row["stop"], last["stop"])
                continue
            self._put_blind()
            self._open_blind = row.copy()

    def _put_blind(self) -> None:
        if self._open_blind is not None:
            self._append(self._blind, self._open_blind)
            self._open_blind = None

    def units(self, records: np.ndarray) -> None:
        """The units in use now; replaces what was there."""
        self._units_path.write_bytes(records.astype(UNIT).tobytes())

    def flush(self) -> None:
        for f in (self._spikes, self._blind):
            f.flush()

    def close(self) -> None:
        self._put_blind()
        for f in (self._spikes, self._blind):
            f.close()
