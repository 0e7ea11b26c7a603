"""Between a source and the ring: every sample number once, every hole filled and told.

The ring's numbering has no holes. Where the device's counter jumps forward, zeros are written and listed as
a gap; where it jumps back (a file that loops, a device that was restarted) the numbering goes on and the jump
is listed as a reset. sample = device counter + offset, and the offset changes only at a reset.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import numpy as np

from spiked.ring import GAP_REASONS, H_OFFSET, RingWriter
from spiked.stream import Block, EventKind, Flag, Gap, StreamEvent

log = logging.getLogger(__name__)

REPEAT_S = 0.25  # going back less than this within an acquisition is a repetition, not a reset
REMEMBERED_RESETS = 1024
WARN_EVERY_NS = 1_000_000_000


class Integrity:
    """Policy, no I/O but the ring's. Events that come before the first block wait for it (4096 of them).

    `max_gap_s`: a longer hole is not filled with zeros but treated as a reset, and said so.
    `wait_s`: how long a long fill waits for the recorder, per step; 0 where nothing records. `meanwhile` is called
    again and again while it lasts.
    """

    def __init__(
        self, writer: RingWriter, max_gap_s: float = 600.0, wait_s: float = 10.0, meanwhile: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.writer, self._meanwhile = writer, meanwhile
        self.counters = dict.fromkeys(
            ("gaps", "gap_samples", "partial_blocks", "partial_samples", "duplicate_samples", "resets",
             "events", "events_before_start"), 0,
        )  # fmt: skip
        self.resets: deque[StreamEvent] = deque(maxlen=REMEMBERED_RESETS)  # in the ring's numbering
        fs = writer.ring.info.fs_hz
        self._max_gap, self._repeat, self._wait_s = int(max_gap_s * fs), int(REPEAT_S * fs), wait_s
        self._owed = self._unfinished_fill()
        self._restarted = writer.started
        self._offset = int(writer.ring.header[H_OFFSET])
        started = writer.started
        self._next: int | None = writer.next_sample + self._owed - self._offset if started else None
        self._repeated = 0  # samples dropped as repetition since the last that were not
        self._segment = 0  # device counter at which the present offset began
        self._before: tuple[int, int] | None = None  # (device counter, offset) where the last segment ended
        self._early: list[StreamEvent] = []
        self._warned_ns = 0

    def accept(self, item: Block | StreamEvent) -> list[Gap]:
        """Put one item into the ring. Returns what was found missing, in the ring's sample numbers."""
        if isinstance(item, StreamEvent):
            self._event(item)
            return []
        return self._block(item)

    def finish(self) -> None:
        """No more will come: tell events that were waiting for a block."""
        early, self._early = self._early, []
        if self.writer.started:
            for e in early:
                self._event(e)

    def _unfinished_fill(self) -> int:
        """Samples of a gap that was told whole by a process that died while it filled it."""
        rows, _, _ = self.writer.ring.rows("gaps", self.writer.ring.count("gaps") - 1)
        if not self.writer.started or not len(rows) or GAP_REASONS[rows[-1]["reason"]] == "partial":
            return 0
        return max(0, int(rows[-1]["stop"]) - self.writer.next_sample)

    # ---- blocks

    def _block(self, block: Block) -> list[Gap]:
        if not len(block.data):
            return []
        if self._owed:
            self.writer.write_zeros(self._owed, block.recv_ns, Flag.GAP, self._wait_s, self._meanwhile)
            self._owed = 0
        told: list[Gap] = []
        flags = Flag.NONE
        if self._next is None:
            self.writer.start_at(block.first_sample)
            self._segment = self._next = block.first_sample
        ahead = block.first_sample - self._next
        if ahead < 0:
            if not self._is_reset(block, -ahead):
                block = self._trim(block, -ahead)
                if not len(block.data):
                    return []
            else:
                told.append(self._reset(block, "went back"))
                flags |= Flag.RESET
        elif ahead > self._max_gap:
            told.append(self._reset(block, "jumped ahead too far to fill"))
            flags |= Flag.RESET
        elif ahead:
            told.append(self._fill(ahead, block.recv_ns))
        self._repeated = 0
        if self._restarted:
            flags |= Flag.RESTART
            self._restarted = False
        self._write(block, flags, told)
        if self._early:
            self.finish()
        return told

    def _is_reset(self, block: Block, back: int) -> bool:
        """Whether a counter that went back means a new count, rather than samples sent twice."""
        if block.new_acquisition or back > self._repeat:
            return True
        return self._repeated + len(block.data) > 2 * self._repeat  # a loop shorter than the window

    def _trim(self, block: Block, back: int) -> Block:
        known = min(back, len(block.data))
        self.counters["duplicate_samples"] += known
        self._repeated += known
        return Block(
            block.first_sample + known, block.data[known:], block.recv_ns, block.missing, reason=block.reason
        )

    def _reset(self, block: Block, how: str) -> Gap:
        """Let the numbering go on at this block's counter."""
        assert self._next is not None
        here = self.writer.next_sample
        self._before = (self._next, self._offset)
        self._offset = here - block.first_sample
        self._segment = block.first_sample
        self.writer.set_offset(self._offset)
        self.writer.add_gap(here, here, "reset")
        text = f"counter reset device={block.first_sample}"
        event = StreamEvent(here, EventKind.MESSAGE, 0, 1, float(block.first_sample), text)
        self.writer.add_event(event)
        self.resets.append(event)
        self.counters["resets"] += 1
        self._warn(f"counter {how} from {self._next} to {block.first_sample} at sample {here}", block.recv_ns)
        return Gap(here, here, "reset", self.writer.ring.info.n_channels)

    def _fill(self, n: int, recv_ns: int) -> Gap:
        """Zeros for n samples that never came."""
        here = self.writer.next_sample
        reason = "restart" if self._restarted else "lost"
        flags = Flag.GAP | (Flag.RESTART if self._restarted else Flag.NONE)
        self.writer.add_gap(here, here + n, reason)
        self.writer.write_zeros(n, recv_ns, flags, self._wait_s, self._meanwhile)
        self.counters["gaps"] += 1
        self.counters["gap_samples"] += n
        self._warn(f"gap of {n} samples at {here} ({reason})", recv_ns)
        return Gap(here, here + n, reason, self.writer.ring.info.n_channels)

    def _warn(self, text: str, now_ns: int) -> None:
        """At most one line a second; the counters have them all."""
        if not self._warned_ns or now_ns - self._warned_ns >= WARN_EVERY_NS:
            self._warned_ns = now_ns
            log.warning("%s", text)

    def _write(self, block: Block, flags: Flag, told: list[Gap]) -> None:
        here, n = self.writer.next_sample, len(block.data)
        missing = block.missing
        if missing is not None and missing.any():
            absent = int(np.count_nonzero(missing))
            whole = absent == len(missing)
            reason = block.reason if whole else "partial"
            flags |= Flag.GAP if whole else Flag.PARTIAL
            self.writer.add_gap(here, here + n, reason, missing)
            self.counters["gaps" if whole else "partial_blocks"] += 1
            self.counters["gap_samples" if whole else "partial_samples"] += n
            told.append(Gap(here, here + n, reason, absent))
        self.writer.write(block.data, block.recv_ns, flags)
        self._next = block.first_sample + n

    # ---- events

    def _event(self, e: StreamEvent) -> None:
        if self._next is None:
            if len(self._early) < 4096:
                self._early.append(e)
            return
        sample = e.sample + self._offset_at(e.sample)
        if sample < self.writer.ring.first_sample:
            self.counters["events_before_start"] += 1
            return
        self.counters["events"] += 1
        self.writer.add_event(StreamEvent(sample, e.kind, e.line, e.state, e.value, e.text))

    def _offset_at(self, device: int) -> int:
        """The offset for an event: a spike may be told just after a reset although it lies before it."""
        assert self._next is not None
        if self._before is None:
            return self._offset
        end, offset = self._before
        fs = self.writer.ring.info.fs_hz
        beyond = max(self._segment - device, device - self._next - round(fs), 0)
        return offset if abs(end - device) < beyond else self._offset
