"""Live samples from SpikeGLX, over the text protocol of its command server; no vendor library.

Samples are asked for by their number: a connection that broke, or a process that was restarted, goes on where it
stopped while SpikeGLX still remembers (2 to 8 s), and nothing is lost. What it no longer has is a jump of the sample
number, which integrity fills. Samples that the probe itself lost come as zeros with the MISS bit set; they are told
as a gap of reason "device". A run that was stopped and started counts from 0 again: a reset.
"""

from __future__ import annotations

import logging
import threading
import time
from itertools import pairwise

import numpy as np

from spiked.config import Stream
from spiked.errors import SourceError, StreamChanged
from spiked.sources.base import BATCH_S, EventBudget, check_stopped
from spiked.sources.spikeglx_link import SpikeGlxLink
from spiked.sources.spikeglx_probe import Described, describe
from spiked.sources.wire_spikeglx import (
    DEFAULT_ADDRESS,
    ERROR_BITS,
    JS,
    MISS_BIT,
    NOT_RUNNING,
    TOLD_BITS,
    TOO_LATE,
    Refused,
    WireError,
)
from spiked.stream import Block, EventKind, StreamEvent, StreamInfo

log = logging.getLogger(__name__)

PACE_S = 0.0005  # between two fetches, so that each brings several samples
RETRY_S = 0.25  # between looks at a server or a run that is not there
QUIET_S = 0.03  # without samples for so long: look whether the run still goes
TOGETHER_S = 0.1  # so much of what a probe loses in one go is told as one gap
BACK_S = 0.5  # after falling too far behind, go on this much before the newest sample
REMEMBERED_S = 1.5  # the shortest history of SpikeGLX, less what asking takes
STRANGE_S, STRANGE_SHARE = 0.3, 0.0005  # how far the count after an absence may be off in the same run
LOOKS = 2  # more, before such a count is believed: whoever was held up counts late for a moment


class SpikeGlxSource:
    """A Source. Needs no configuration but `address`, `device` and `probe_index`."""

    def __init__(self, cfg: Stream) -> None:
        self.cfg = cfg
        self.address = cfg.address or DEFAULT_ADDRESS
        self.js, self.ip = JS[cfg.device], cfg.probe_index
        self.exhausted = False
        self.counters = dict.fromkeys(
            ("fetches", "samples", "too_late", "missed_samples", "link_errors", "reconnects", "runs", "refused",
             "malformed", "events_untold"), 0,
        )  # fmt: skip
        self._link: SpikeGlxLink | None = None
        self._what: Described | None = None
        self._next = 0  # sample number to ask for
        self._newest_at = (0, 0.0)  # a count of the run's samples, and when it was read
        self._seen_s = self._fetched_s = self._tried_s = 0.0
        self._running = False
        self._anew = False  # the next samples are of another run
        self._words: np.ndarray | None = None  # digital words of the last sample
        self._missed = 0  # samples before `_next` that the probe lost and that were not handed over yet
        self._owed: list[Block | StreamEvent] = []
        self._budget = EventBudget()
        self._why = ""

    # ---- opening

    def open(self, stop: threading.Event) -> StreamInfo:
        deadline = time.monotonic() + self.cfg.wait_s
        while not self._begin():
            check_stopped(stop, self.address)
            if time.monotonic() > deadline:
                raise SourceError(
                    f"no samples from SpikeGLX at {self.address} within {self.cfg.wait_s:g} s: {self._why}"
                )
            time.sleep(RETRY_S)
        assert self._what is not None
        return self._what.info

    def _begin(self) -> bool:
        """Connect and describe, once a run goes on."""
        try:
            link = self._connected()
            if link.count("ISRUNNING"):
                self._what = self._describe(link)
                if newest := self._newest(link):
                    self._start(newest)
                    return True
            self._why = "no run goes on; press Run there"
        except Refused as e:
            self._why = f"it says {e.text!r}"
        except (OSError, WireError) as e:
            self._why = f"{type(e).__name__}: {e}; is its command server enabled (Options > Command server)?"
            self._drop()
        return False

    def _describe(self, link: SpikeGlxLink) -> Described:
        return describe(link, self.cfg.device, self.ip, self.cfg.name, self.address, self.cfg.probe)

    def seek(self, sample: int) -> None:
        """Go on at this sample, as far as SpikeGLX remembers; for a restarted process."""
        if sample <= self._newest_at[0]:
            self._next = sample
        else:
            self._anew = True  # it counts from 0 again

    def close(self) -> None:
        self._drop()

    # ---- the connection and the run

    def _connected(self) -> SpikeGlxLink:
        if self._link is None:
            self._link = SpikeGlxLink(self.address)
        return self._link

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = None

    def _newest(self, link: SpikeGlxLink) -> int | None:
        """The count of the run's samples; None while there is no run."""
        if not link.count("ISRUNNING"):
            return None
        return link.count("GETSTREAMSAMPLECOUNT", self.js, self.ip) or None

    def _settle(self) -> None:
        """What the probe lost is told, also where the samples after it will never come."""
        if self._missed and self._what is not None:
            self._owed.append(self._absent(self._next, time.monotonic_ns(), self._what.info.n_channels))

    def _start(self, newest: int) -> None:
        """At the beginning of a run that has just begun, else at its newest sample."""
        assert self._what is not None
        young = newest < REMEMBERED_S * self._what.info.fs_hz
        self._settle()
        self._next = 0 if young else newest
        self._running, self._words = True, None
        self._seen_s = time.monotonic()
        self._newest_at = (newest, self._seen_s)
        self.counters["runs"] += 1

    def _look(self, link: SpikeGlxLink, away: bool = False) -> None:
        """Whether the run goes on, has ended, or is another one; `away`: the connection was broken meanwhile."""
        newest, self._tried_s = self._newest(link), time.monotonic()
        for _ in range(LOOKS if away and self._running else 0):
            if newest is None or newest < self._next or not self._strange(newest):
                break
            time.sleep(RETRY_S)
            newest = self._newest(link)
        if newest is None:
            if self._running:
                log.warning("stream %s: the run of SpikeGLX was stopped", self.cfg.name)
            self._running = False
        elif not self._running or not self._same_run(newest, away):
            self._new_run(link, newest)

    def _same_run(self, newest: int, away: bool) -> bool:
        """A count that went back is another run's; after an absence also one that is not what it should be by now."""
        strange = away and self._strange(newest)
        self._newest_at = (newest, time.monotonic())
        return newest >= self._next and not strange

    def _strange(self, newest: int) -> bool:
        """Whether the count after an absence is not what it should be by now; one longer than the absence is no new run's."""
        assert self._what is not None
        count, at_s = self._newest_at
        passed, fs = time.monotonic() - at_s, self._what.info.fs_hz
        off = abs(newest - count - passed * fs) / fs
        return newest <= (passed + STRANGE_S) * fs and off >= STRANGE_S + STRANGE_SHARE * passed

    def _new_run(self, link: SpikeGlxLink, newest: int) -> None:
        assert self._what is not None
        fresh, old = self._describe(link), self._what.info
        new = fresh.info
        if not old.same_wire(new) or (old.gain_uv, old.positions_um) != (new.gain_uv, new.positions_um):
            raise StreamChanged(
                f"stream {self.cfg.name}: SpikeGLX runs with another rate, other channels, gains or sites than before; "
                "stop the session and start a new one"
            )
        self._what, self._anew = fresh, True
        self._start(newest)
        log.warning("stream %s: a new run of SpikeGLX, from sample %d", self.cfg.name, self._next)

    # ---- samples

    def read(self, timeout_s: float) -> list[Block | StreamEvent]:
        assert self._what is not None, "open() first"
        until = time.monotonic() + timeout_s
        while True:
            out = self._try()
            left = until - time.monotonic()
            if out or left <= 0:
                return out
            if not self._running or self._link is None:
                time.sleep(min(left, RETRY_S))

    def _try(self) -> list[Block | StreamEvent]:
        try:
            return self._once()
        except Refused as e:
            self._refused(e.text)
        except WireError as e:
            self.counters["malformed"] += 1
            self._broken(str(e))
        except OSError as e:
            self.counters["link_errors"] += 1
            self._broken(str(e))
        return []

    def _broken(self, why: str) -> None:
        if self._link is not None:
            log.warning("stream %s: connection to SpikeGLX lost (%s); trying again", self.cfg.name, why)
        self._drop()

    def _refused(self, text: str) -> None:
        """An ERROR of the server. Five in a row would make it close the connection, so no request is repeated as it was."""
        if text == TOO_LATE:
            self.counters["too_late"] += 1
            log.warning("stream %s: SpikeGLX no longer has sample %d", self.cfg.name, self._next)
            self._jump()
        elif text == NOT_RUNNING:
            self._running = False
            self._tried_s = time.monotonic()
        else:
            self.counters["refused"] += 1
            raise SourceError(
                f"stream {self.cfg.name}: SpikeGLX refuses: {text[:120]}; start the run there again"
            )

    def _jump(self) -> None:
        """Near the newest sample: what lies between is lost."""
        assert self._what is not None
        try:
            newest = self._newest(self._connected())
        except (Refused, OSError, WireError) as e:
            self._broken(str(e))
            return
        if newest is None:
            self._running = False
        elif newest > self._next:
            self._settle()
            self._next = max(self._next, newest - round(BACK_S * self._what.info.fs_hz))
            self._newest_at = (newest, time.monotonic())
        else:
            self._seen_s = 0.0  # another run: look at once

    def _once(self) -> list[Block | StreamEvent]:
        now = time.monotonic()
        if self._link is None:
            if now - self._tried_s < RETRY_S:
                return []
            self._tried_s = now
            self._connected()
            self.counters["reconnects"] += 1
            self._look(self._connected(), away=True)
        link, what = self._connected(), self._what
        assert what is not None
        if not self._running or now - self._seen_s > QUIET_S:
            if now - self._tried_s < RETRY_S and not self._running:
                return []
            self._look(link)
            self._seen_s = now
            if not self._running:
                return []
        if now - self._fetched_s < PACE_S:
            time.sleep(PACE_S - (now - self._fetched_s))
        most = max(1, round(BATCH_S * what.info.fs_hz))
        data = link.fetch(self.js, self.ip, self._next, most, what.channels, what.width)
        self._fetched_s = time.monotonic()
        self.counters["fetches"] += 1
        if 0 < len(data) < most:
            self._newest_at = (self._next + len(data), self._fetched_s)
        return self._blocks(data, time.monotonic_ns(), what) if len(data) else []

    def _blocks(self, data: np.ndarray, now_ns: int, what: Described) -> list[Block | StreamEvent]:
        """Samples and the edges in them; runs of lost samples apart."""
        first, n = self._next, what.info.n_channels
        self._next += len(data)
        self._seen_s = now_ns / 1e9
        self.counters["samples"] += len(data)
        out, self._owed = self._owed, []
        missed = np.zeros(len(data), bool)
        if what.has_status:
            status = data[:, -1]
            missed = (status & MISS_BIT) != 0
            self.counters["link_errors"] += int(np.count_nonzero(status & ERROR_BITS))
        edges = [0, *(np.flatnonzero(np.diff(missed)) + 1).tolist(), len(data)]
        for a, b in pairwise(edges):
            if missed[a]:
                self.counters["missed_samples"] += b - a
                self._missed += b - a
                if b < len(data) or self._missed > TOGETHER_S * what.info.fs_hz:
                    out.append(self._absent(first + b, now_ns, n))
                continue
            if self._missed:
                out.append(self._absent(first + a, now_ns, n))
            out.append(Block(first + a, np.ascontiguousarray(data[a:b, :n]), now_ns, None, self._anew))
            self._anew = False
        self._edges(first, data[:, n:], what, missed, now_ns, out)
        return out

    def _absent(self, stop: int, now_ns: int, n_channels: int) -> Block:
        """The samples before `stop` that the probe lost, as one block of nothing."""
        k, self._missed = self._missed, 0
        anew, self._anew = self._anew, False
        absent = np.ones(n_channels, bool)
        return Block(stop - k, np.zeros((k, n_channels), np.int16), now_ns, absent, anew, "device")

    def _edges(
        self,
        first: int,
        words: np.ndarray,
        what: Described,
        missed: np.ndarray,
        now_ns: int,
        out: list[Block | StreamEvent],
    ) -> None:
        """TTL edges: lines of the digital words, then the start and sync bits of the status word."""
        if not words.shape[1]:
            return
        columns = words.astype(np.int64) & 0xFFFF
        if what.has_status:
            columns[:, -1] &= sum(1 << b for b in TOLD_BITS)
        seen = np.flatnonzero(~missed)
        if not len(seen):
            return
        columns = columns[seen]
        changed = np.vstack([columns[:1] if self._words is None else self._words, columns])
        self._words = columns[-1:]
        rows, cols = np.nonzero(np.diff(changed, axis=0))
        for r, c in zip(rows.tolist(), cols.tolist(), strict=True):
            now = int(changed[r + 1, c])
            differs = int(changed[r, c]) ^ now
            for bit in (b for b in range(16) if differs >> b & 1):
                if not self._budget.take(now_ns):
                    self.counters["events_untold"] += 1
                    continue
                line = 16 * c + bit
                kind = EventKind.STIM if line in self.cfg.stim_lines else EventKind.TTL
                out.append(StreamEvent(first + int(seen[r]), kind, line, now >> bit & 1, float(now)))
