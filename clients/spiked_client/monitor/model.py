"""What the monitor knows: the last seconds of every stream, the newest status, and how old all of it is.

`Feed` reads on a thread of its own and follows a daemon that goes away and comes back; everything else is plain data.
Times are this machine's monotonic ns.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spiked_client.access import ClientKey
from spiked_client.errors import ClientError
from spiked_client.judge import Judge
from spiked_client.order import Batch
from spiked_client.protocol import BLIND_REASONS, OUTCOMES, REASONS
from spiked_client.subscribe import SyncClient
from spiked_client.watch import StreamView, event_line

LIVE_TOPICS = ("spikes", "mua", "gaps", "stim", "health", "session")
PAST_TOPICS = ("units", "ledger")  # rare: what was told before we came matters
KEPT_S = 20.0
ROW = np.dtype([("sample", "<i8"), ("unit", "<i4"), ("channel", "<u2")])
MAX_SPIKES = 400_000  # kept per stream
STALE_S = 3.0
RETRY_S = 1.0
LEDGER_ROWS, EVENT_ROWS, GAP_ROWS = 200, 100, 100


class Recent:
    """Records of the last seconds, (sample, unit, channel), in the order in which they came. Cheap to add to and to take whole."""

    def __init__(self) -> None:
        self._whole, self._new = np.zeros(0, ROW), list[np.ndarray]()
        self.units: set[int] = set()  # that were seen, since `clear`

    def add(self, spikes: np.ndarray) -> None:
        """Records of dtype SPIKE."""
        if len(spikes):
            self._new.append(spikes[list(ROW.names or ())].astype(ROW))

    def all(self) -> np.ndarray:
        """Everything that is kept."""
        if self._new:
            self._whole = np.concatenate([self._whole, *self._new])
            self.units |= set(np.unique(np.concatenate(self._new)["unit"]).tolist())
            self._new = []
        return self._whole

    def forget(self, oldest: float) -> None:
        """Drop what lies before a sample number, and the oldest of too many."""
        whole = self.all()
        first = int(np.searchsorted(whole["sample"] >= oldest, True))
        self._whole = whole[max(first, len(whole) - MAX_SPIKES) :]

    def clear(self) -> None:
        """Another session."""
        self._whole, self._new, self.units = np.zeros(0, ROW), [], set()


class StreamModel:
    """One stream: its StreamView for figures, and what the raster draws. Spikes are (sample, unit, channel) arrays."""

    def __init__(self, name: str) -> None:
        self.name, self.view = name, StreamView(name)
        self.fs_hz, self.channels, self.stop = 20_000.0, 1, 0
        self.units: dict[int, tuple[float, float]] = {}  # unit -> depth (um), rate when calibrated (Hz)
        self.spikes, self.mua = Recent(), Recent()
        self.blind: deque[tuple[int, int, int]] = deque()  # of the whole array: start, stop, reason
        self.unheard: deque[tuple[int, int]] = deque(maxlen=1000)  # samples whose messages did not come here
        self.stims: deque[int] = deque(maxlen=1000)
        self.gaps: deque[tuple[int, int]] = deque(maxlen=GAP_ROWS)
        self.ledger: deque[dict[str, Any]] = deque(maxlen=LEDGER_ROWS)
        self._session = ""  # of the ledger
        self.heard_ns = 0

    def add(self, batch: Batch) -> None:
        """One message of this stream."""
        kind = batch.message.kind
        if kind == "units":
            rows = batch.unit_table
            self.units = {
                int(u): (float(y), float(r)) for u, y, r in rows[["unit", "y_um", "rate_hz"]].tolist()
            }
            return
        if kind == "ledger":
            self._add_ledger(batch)
            return
        self.heard_ns = batch.received_ns
        self.view.add(batch, self.channels)
        if kind == "spikes" and isinstance(batch.first, int) and isinstance(batch.stop, int):
            self._cover(batch.first, batch.stop)
        if kind in ("spikes", "mua"):
            (self.spikes if kind == "spikes" else self.mua).add(batch.spikes)
            whole = batch.blind[batch.blind["channel"] < 0]
            for start, stop, reason in whole[["start", "stop", "reason"]].tolist():
                self._add_blind(start, stop, reason)
        elif kind == "gaps":
            self.gaps.extend(batch.gaps[["start", "stop"]].tolist())
        elif kind == "stim":
            rising = (batch.stims["state"] == 1) & (batch.stims["kind"] == 2)  # a stimulus, not any TTL edge
            self.stims.extend(batch.stims["sample"][rising].tolist())

    def _add_blind(self, start: int, stop: int, reason: int) -> None:
        """Neighbours of one reason become one."""
        if self.blind and self.blind[-1][2] == reason and self.blind[-1][0] <= start <= self.blind[-1][1]:
            first, last, _ = self.blind.pop()
            start, stop = first, max(stop, last)
        self.blind.append((start, stop, reason))

    def _cover(self, first: int, stop: int) -> None:
        """The messages of sorted spikes leave no hole among each other: what lies between two was not heard."""
        if stop < self.stop - self.fs_hz:  # another session: its numbers begin anew
            for kept in (self.spikes, self.mua, self.blind, self.stims, self.gaps, self.unheard):
                kept.clear()
            self.stop = 0
        if first > self.stop:
            self.unheard.append((self.stop, first))
        self.stop = max(self.stop, stop)

    def _add_ledger(self, batch: Batch) -> None:
        found, session = batch.message.arrays.get("ledger"), str(batch.header.get("run")).rpartition("-")[0]
        if session != self._session:  # its numbers begin anew
            self._session = session
            self.ledger.clear()
        for row in found if found is not None else ():
            entry = {
                "number": int(row["number"]), "rule": row["rule"].decode("utf-8", "replace") or "client", "outcome": _name(OUTCOMES, row["outcome"]),
                "reason": _name(REASONS, row["reason"]), "sample": int(row["sample"]), "ms": _ms(row["trigger_ns"], row["sent_ns"]),
                "seen": bool(row["artifact_sample"] >= 0),
            }  # fmt: skip
            for i, known in enumerate(self.ledger):
                if known["number"] == entry["number"]:
                    self.ledger[i] = entry
                    break
            else:
                self.ledger.append(entry)

    def told(self, status: dict[str, Any]) -> None:
        """What the health message says of this stream."""
        fs, channels = status.get("fs_hz"), status.get("channels")
        self.fs_hz = float(fs) if isinstance(fs, int | float) and fs > 0 else self.fs_hz
        self.channels = channels if isinstance(channels, int) and channels > 0 else self.channels

    def forget(self, now_ns: int) -> None:
        """Drop what nobody draws any more."""
        self.view.forget(now_ns)
        oldest = self.stop - KEPT_S * self.fs_hz
        self.spikes.forget(oldest)
        self.mua.forget(oldest)
        while self.blind and self.blind[0][1] < oldest:
            self.blind.popleft()

    def blind_by_reason(self, seconds: float) -> dict[str, float]:
        """Part of the last seconds in which the whole array was blind, by reason."""
        first = int(self.stop - seconds * self.fs_hz)
        out: dict[str, float] = {}
        for start, stop, reason in self.blind:
            if stop > first:
                name = _name(BLIND_REASONS, reason)
                out[name] = out.get(name, 0.0) + (stop - max(start, first)) / (seconds * self.fs_hz)
        return out


def _name(names: tuple[str, ...], index: Any) -> str:
    i = int(index)
    return names[i] if 0 <= i < len(names) else str(i)


def _ms(start_ns: Any, stop_ns: Any) -> float | None:
    return (int(stop_ns) - int(start_ns)) / 1e6 if start_ns > 0 and stop_ns > 0 else None


class Model:
    """Everything that was heard. Not thread-safe by itself: see Feed."""

    def __init__(self) -> None:
        self.streams: dict[str, StreamModel] = {}
        self.status: dict[str, Any] = {}
        self.judge = Judge()
        self.events: deque[str] = deque(maxlen=EVENT_ROWS)
        self.health_ns = self.heard_ns = 0

    def add(self, batch: Batch) -> None:
        """Note one message."""
        self.heard_ns = max(self.heard_ns, batch.received_ns)
        if batch.topic == "health":
            self.status, self.health_ns = batch.header, batch.received_ns
            self.judge.update(batch.header, batch.received_ns / 1e9)
            self._know(batch.header)
        elif batch.topic == "session":
            if line := event_line(batch.header):
                self.events.append(time.strftime("%H:%M:%S ") + line)
        elif batch.stream:
            self.streams.setdefault(batch.stream, StreamModel(batch.stream)).add(batch)

    def _know(self, status: dict[str, Any]) -> None:
        """The streams there are, in the order told, not in that of their messages; those of an earlier session go."""
        told = status.get("streams")
        if not isinstance(told, dict) or not told:
            return
        self.streams = {str(n): self.streams.get(str(n)) or StreamModel(str(n)) for n in told}
        for name, about in told.items():
            self.streams[str(name)].told(about if isinstance(about, dict) else {})

    def names(self) -> list[str]:
        """Streams, in the order of the configuration; none before the daemon told them."""
        return list(self.streams) if self.health_ns else []

    def age_s(self, now_ns: int) -> float:
        """Seconds since the last health message; infinite before the first."""
        return (now_ns - self.health_ns) / 1e9 if self.health_ns else float("inf")


class Feed(threading.Thread):
    """Keeps `model` fed; take it with `use`. `problem` is the line that says why nothing comes."""

    def __init__(self, host: str, port: int, keys: Path | str | ClientKey | None = None) -> None:
        super().__init__(name="feed", daemon=True)
        self.model, self.problem = Model(), ""
        self._where: tuple[str, int] = (host, port)
        self._keys, self._lock, self._quit = keys, threading.Lock(), threading.Event()

    @contextlib.contextmanager
    def use(self) -> Iterator[Model]:
        """The model, for as long as it takes to draw it."""
        with self._lock:
            yield self.model

    def run(self) -> None:
        """Until `close`."""
        while not self._quit.is_set():
            try:
                self._read()
            except ClientError as e:
                self.problem = str(e)
                self._quit.wait(RETRY_S)

    def _read(self) -> None:
        host, port = self._where
        with SyncClient(host, port, wait_s=2.0, keys=self._keys) as client:
            live, past = client.messages(LIVE_TOPICS), client.messages(PAST_TOPICS, from_start=True)
            looked = 0.0
            while not self._quit.is_set():
                batch = live.get(0.1)
                if batch is not None:
                    self._add(batch)
                if (now := time.monotonic()) - looked > 0.25:
                    looked = now
                    while (batch := past.get(0.002)) is not None:
                        self._add(batch)
                    with self._lock:
                        for s in self.model.streams.values():
                            s.forget(time.monotonic_ns())

    def _add(self, batch: Batch) -> None:
        self.problem = ""
        with self._lock:
            self.model.add(batch)

    def close(self) -> None:
        """Stop reading."""
        self._quit.set()
        self.join(5.0)
