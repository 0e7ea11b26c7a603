"""Parts of the recording tests: a stream whose every sample is known, a ring fed with it, a recorder process.

Run as a program (`python record_rig.py RING FILE`) it is a recorder process to be killed.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from spiked import config as configuration
from spiked.ring import Ring, RingWriter
from spiked.stream import EventKind, StreamEvent, StreamInfo

FIRST = 5000


def stream(n_channels: int = 32, fs_hz: float = 20000.0, dtype: str = "uint16", **more) -> StreamInfo:
    settings = {
        "gain_uv": (6.3,) * n_channels,
        "zero_code": 512.0 if dtype == "uint16" else 0.0,
        "source": "maxwell",
    }
    return StreamInfo(
        name="probe", fs_hz=fs_hz, channel_ids=tuple(f"E{7 * i}" for i in range(n_channels)),
        positions_um=tuple((17.5 * (i % 4), 17.5 * (i // 4)) for i in range(n_channels)), dtype=dtype,
        **{**settings, **more},
    )  # fmt: skip


def config(**record) -> configuration.Config:
    record = {"min_free_gb": 0.0, **record}
    return configuration.parse(
        {"stream": [{"name": "probe", "source": "replay", "path": "x"}], "record": record}
    )


def samples(start: int, stop: int, info: StreamInfo) -> np.ndarray:
    """What the device sends for sample numbers [start, stop); never zero."""
    s, c = np.arange(start, stop, dtype=np.int64)[:, None], np.arange(info.n_channels)[None]
    return ((s * 31 + c * 1009) % 32000 + 1).astype(info.dtype)


class Feed:
    """Writes the known stream into a ring, in real time on a thread with `start`, or at once with `put`."""

    def __init__(self, ring: Ring, first: int = FIRST) -> None:
        self.ring, self.writer = ring, RingWriter(ring)
        self.writer.start_at(first)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def put(self, n: int) -> None:
        at = self.writer.next_sample
        self.writer.write(samples(at, at + n, self.ring.info), time.monotonic_ns())

    def gap(self, n: int) -> None:
        at = self.writer.next_sample
        self.writer.add_gap(at, at + n, "lost")
        self.writer.write(np.zeros((n, self.ring.info.n_channels), self.ring.info.dtype), time.monotonic_ns())

    def event(self, line: int, text: str = "") -> None:
        self.writer.add_event(StreamEvent(self.writer.next_sample, EventKind.TTL, line, 1, 2.0**line, text))

    def start(self, speed: float = 1.0, piece_ms: float = 5.0) -> None:
        n = self.ring.info.samples(piece_ms)

        def run() -> None:
            begun, sent = time.monotonic(), 0
            while not self._stop.is_set():
                due = int((time.monotonic() - begun) * self.ring.info.fs_hz * speed)
                while sent + n <= due:
                    if (sent // n) % 40 == 0:
                        self.event((sent // n) % 16, f"edge {self.writer.next_sample}")
                    self.put(n)
                    sent += n
                time.sleep(0.002)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.writer.end()


def recorder(ring: Path, path: Path) -> subprocess.Popen[str]:
    """A process that records the ring into the file."""
    return subprocess.Popen(
        [sys.executable, "-W", "error::ResourceWarning", __file__, str(ring), str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


if __name__ == "__main__":
    from spiked.record.writer import SessionWriter

    writer = SessionWriter(
        sys.argv[2], Ring(sys.argv[1]), config(), session_id="kills",
        on_lost=lambda gap: print(f"lost {gap.start} {gap.stop}", flush=True),
    )  # fmt: skip
    print("ready", flush=True)
    writer.run()
