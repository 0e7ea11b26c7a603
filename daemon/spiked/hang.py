"""A process that is alive and does nothing: it is killed while the ring still holds what it has not done.

Every process of a stream tells, several times a second, how far it got, also when there is nothing to do. One that
falls silent for too long hangs (a driver, a disk, a deadlock); killed, it is restarted from the ring like one that died.
What cannot be mended so is the watchdog's (spiked.notify), which restarts the daemon.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from spiked.processes.child import Child

ACQUIRE_S = 10.0  # what comes meanwhile waits in the kernel's and ZeroMQ's buffers
RECORD_RING = 0.6  # of the ring's seconds: the rest is for its successor to begin in
RECORD_STARTS_S = 60.0  # until its first word; acquire may wait for its source, live compiles
LIVE_S = 60.0  # nothing of the recording depends on it, and swapping in large calibrations takes a while
LOOK_S = 1.0  # at most so much counts between two looks: a computer that slept has no hanging processes


class Hangs:
    """`look` at the processes again and again; yields those that said nothing for too long, once each."""

    def __init__(self, ring_s: float) -> None:
        self.patience = {"acquire": ACQUIRE_S, "record": RECORD_RING * ring_s, "live": LIVE_S}
        self._looked: float | None = None
        self._heard: dict[int | None, int] = {}  # pid -> time of its newest message
        self._silent_s: dict[int | None, float] = {}

    def look(
        self, processes: Iterable[tuple[str, Child]], now: float | None = None
    ) -> Iterator[tuple[str, Child, float]]:
        """(role, process, seconds without a word). One that has not begun to tell is still starting."""
        now = time.monotonic() if now is None else now
        step = min(now - self._looked, LOOK_S) if self._looked is not None else 0.0
        self._looked = now
        for role, child in processes:
            told = child.last.get("progress")
            patience = self.patience[role] if told else RECORD_STARTS_S
            if not child.running or (told is None and role != "record"):
                continue
            at = int(told.get("t_ns", 0)) if told else -1
            if self._heard.get(child.pid) != at:
                self._heard[child.pid], self._silent_s[child.pid] = at, 0.0
                continue
            self._silent_s[child.pid] += step
            if self._silent_s[child.pid] > patience:
                self._silent_s[child.pid] = float("-inf")
                yield role, child, patience
