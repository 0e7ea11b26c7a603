"""What a page gets many times a second, as bytes, and the bounded queue in which it waits.

A frame of spikes, little-endian; every part starts at a multiple of its item size:

| offset | type     | what                                                                              |
|--------|----------|-----------------------------------------------------------------------------------|
| 0      | u1       | 1: spikes                                                                         |
| 1      | u1       | number of the stream, as the `streams` message lists them                         |
| 2      | u2       | 1: an old frame, from before the page came                                        |
| 4      | u4       | n, spikes                                                                         |
| 8      | u4       | m, blind intervals                                                                |
| 12     | u4       | spikes left out because they were more than MAX_SPIKES                            |
| 16     | u4       | spikes in frames that this page was too slow for, since the frame before          |
| 20     | u4       | messages of the daemon that were lost on the way to this server                   |
| 24     | f8       | base, a sample number                                                             |
| 32     | f8       | all samples before this number have been looked at                                |
| 40     | f8 f8    | m starts, then m stops of the blind intervals, sample numbers                     |
| ...    | i4 i4    | n troughs as samples after base (may be negative), n units (-1: unsorted)         |
| ...    | i4 i4    | m channels (-1: all), m reasons                                                   |
| ...    | u2 i2    | n channels, n amplitudes in microvolts                                            |
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from spiked_client.protocol import BLIND, SPIKE

HEAD = struct.Struct("<BBHIIIIIdd")
LATE = struct.Struct("<I")
LATE_AT = 16
SPIKES_FRAME, OLD = 1, 1
MAX_SPIKES = 20_000  # of one frame, thirty of which make a second


@dataclass
class Gathered:
    """What came of one stream since its last frame."""

    spikes: list[np.ndarray] = field(default_factory=list)  # dtype SPIKE
    blind: list[np.ndarray] = field(default_factory=list)  # dtype BLIND
    stop: int = 0
    lost: int = 0

    def frame(self, number: int) -> tuple[bytes, int]:
        """(bytes, spikes in it); what was gathered is forgotten."""
        spikes = np.concatenate(self.spikes) if self.spikes else np.zeros(0, SPIKE)
        blind = np.concatenate(self.blind) if self.blind else np.zeros(0, BLIND)
        left_out = max(len(spikes) - MAX_SPIKES, 0)
        if left_out:  # evenly, so that the picture stays true
            spikes = spikes[np.linspace(0, len(spikes) - 1, MAX_SPIKES).astype(np.int64)]
        data = pack(number, spikes, blind, self.stop, left_out=left_out, lost=self.lost)
        self.spikes, self.blind, self.lost = [], [], 0
        return data, len(spikes)

    def __bool__(self) -> bool:
        return bool(self.spikes or self.blind or self.lost)


def pack(
    number: int, spikes: np.ndarray, blind: np.ndarray, stop: int, *, left_out: int = 0, lost: int = 0
) -> bytes:
    """One frame of records SPIKE and BLIND; see the module."""
    base = int(spikes["sample"].min()) if len(spikes) else stop
    head = HEAD.pack(SPIKES_FRAME, number, 0, len(spikes), len(blind), left_out, 0, lost, base, stop)
    offset = np.clip(spikes["sample"] - base, 0, (1 << 31) - 1).astype("<i4")
    uv = np.nan_to_num(spikes["amplitude_uv"], nan=0.0, posinf=32767, neginf=-32768)
    parts = (
        blind["start"].astype("<f8"), blind["stop"].astype("<f8"), offset, spikes["unit"].astype("<i4"), blind["channel"].astype("<i4"),
        blind["reason"].astype("<i4"), spikes["channel"].astype("<u2"), np.clip(uv, -32768, 32767).astype("<i2"),
    )  # fmt: skip
    return head + b"".join(p.tobytes() for p in parts)


def as_old(frame: bytes) -> bytes:
    """The same frame for a page that was not there when it was new."""
    return frame[:2] + OLD.to_bytes(2, "little") + frame[4:]


class Outbox:
    """What waits for one page: at most `max_bytes`. The oldest frames of spikes are dropped first, and the page is told how many
    spikes were in them; texts are dropped only when there is nothing else, which ends the page's connection (`overrun`).

    One task puts, another takes; both in one event loop. `counters`: frames_dropped, spikes_dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        self.counters: Counter[str] = Counter()
        self.bytes = 0
        self.overrun = False
        self._max = max_bytes
        self._frames: deque[tuple[bytes, int]] = deque()
        self._texts: deque[str] = deque()
        self._told_dropped = 0
        self._some = asyncio.Event()

    def put_frame(self, data: bytes, spikes: int) -> None:
        """A frame and how many spikes are in it."""
        self._frames.append((data, spikes))
        self._grown(len(data))

    def put_text(self, text: str) -> None:
        """A JSON message; it goes before all waiting frames."""
        self._texts.append(text)
        self._grown(len(text))

    def _grown(self, size: int) -> None:
        self.bytes += size
        while self.bytes > self._max and self._frames:
            data, spikes = self._frames.popleft()
            self.bytes -= len(data)
            self.counters["frames_dropped"] += 1
            self.counters["spikes_dropped"] += spikes
        self.overrun = self.overrun or self.bytes > self._max
        self._some.set()

    def forget_frames(self) -> None:
        """The page wants another stream's."""
        self.bytes -= sum(len(data) for data, _ in self._frames)
        self._frames.clear()

    async def take(self) -> str | bytes:
        """The next message, as soon as there is one."""
        while not self._texts and not self._frames:
            self._some.clear()
            await self._some.wait()
        if self._texts:
            text = self._texts.popleft()
            self.bytes -= len(text)
            return text
        data, _ = self._frames.popleft()
        self.bytes -= len(data)
        late = self.counters["spikes_dropped"] - self._told_dropped
        self._told_dropped += late
        return data[:LATE_AT] + LATE.pack(min(late, (1 << 32) - 1)) + data[LATE_AT + 4 :] if late else data
