"""A program that starts subscribers quickly: it has imported everything, and each subscriber is a fork of it.

    python -m spiked.bench.nursery HOST PORT FOLDER [KEY FILE]

Reads lines on stdin: `start NAME` answers with the process id. A subscriber told by SIGTERM to end writes what it saw to
FOLDER/NAME.json; FOLDER/NAME.there says that its first message came.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from spiked_client.order import Batch
from spiked_client.subscribe import SyncClient

LAST_S = 10.0  # to look at what came before the end was asked for


class Seen:
    """What one subscriber got. Latencies are those of messages that came by themselves, monotonic ms."""

    def __init__(self) -> None:
        self.first = self.last = 0
        self.received = self.replayed = self.out_of_order = self.untold = 0
        self.missed: dict[str, int] = {}  # reason -> messages
        self.delays_ms: list[float] = []

    def take(self, batch: Batch) -> None:
        told = 0
        if batch.missed is not None:
            told = batch.missed.count
            self.missed[batch.missed.reason] = self.missed.get(batch.missed.reason, 0) + told
        self.first = self.first or batch.seq
        if self.last and batch.seq <= self.last:
            self.out_of_order += 1
        elif self.last:
            self.untold += batch.seq - self.last - 1 - told
        self.last = batch.seq
        self.received += 1
        self.replayed += batch.replayed
        arrival = batch.stamps.get("arrival")
        if arrival and not batch.replayed:
            self.delays_ms.append((batch.received_ns - arrival) / 1e6)

    def told(self) -> dict[str, Any]:
        p50, p99 = np.percentile(self.delays_ms, (50, 99)) if self.delays_ms else (0.0, 0.0)
        return {
            "first": self.first, "last": self.last, "received": self.received, "replayed": self.replayed, "missed": self.missed,
            "out_of_order": self.out_of_order, "untold": self.untold, "p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3),
        }  # fmt: skip


def subscribe(host: str, port: int, out: Path, key: str | None) -> None:
    """One subscriber, until SIGTERM."""
    ended = False

    def end(_signal: int, _frame: Any) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen = Seen()
    with SyncClient(host, port, wait_s=30.0, keys=key) as client, client.spikes() as spikes:
        while not ended:
            batch = spikes.get(0.2)
            if batch is not None:
                if not seen.received:
                    out.with_suffix(".there").touch()
                seen.take(batch)
        until = time.monotonic() + LAST_S
        while time.monotonic() < until and (batch := spikes.get(0)) is not None:
            seen.take(batch)
    beside = out.with_suffix(".new")
    beside.write_text(json.dumps(seen.told()), encoding="utf-8")
    beside.replace(out)


def main(argv: list[str]) -> int:
    host, port, folder, *key = argv
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is gone at once
    for line in sys.stdin:
        word, _, name = line.strip().partition(" ")
        if word != "start":
            continue
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            status = 1
            try:
                subscribe(host, int(port), Path(folder) / f"{name}.json", key[0] if key else None)
                status = 0
            finally:
                os._exit(status)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
