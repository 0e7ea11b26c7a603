"""A recording on disk as a live source."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np

from spiked.config import Stream
from spiked.errors import ConfigError, SourceError
from spiked.sources.recordings import Recording, open_recording
from spiked.stream import Block, EventKind, StreamEvent, StreamInfo

REAL_TIME_BLOCK_MS, FAST_BLOCK_MS = 5.0, 20.0
BATCH_MS = 30.0  # most that one read hands over, in recording time
LONGEST_SILENCE_S = 1.0  # a gap in the file lasts as long as it did, at most this


class ReplaySource:
    """Plays a recording at `speed` x real time; speed 0 hands over as fast as it is asked.

    Samples that the file lacks, or holds as zeros for lost ones, come as jumps of `first_sample`, as they do
    on a live stream. Events come right before the block that holds them. One thread calls everything.
    """

    flow_controlled = True  # may be asked to wait: whoever writes the ring waits for its readers

    def __init__(self, cfg: Stream, clock: Callable[[], float] = time.monotonic) -> None:
        if cfg.path is None:
            raise ConfigError(f"stream {cfg.name}: a replay needs path = '...'")
        self.cfg, self._clock = cfg, clock
        self.exhausted = False
        self.counters = {"blocks": 0, "samples": 0, "events": 0, "gaps": 0, "samples_lost": 0}
        self._recording: Recording | None = None
        self._index, self._started_s, self._stop = 0, 0.0, threading.Event()

    def open(self, stop: threading.Event) -> StreamInfo:
        """Open the recording. Raises ConfigError or RecordingError when it cannot be read as configured."""
        cfg = self.cfg
        number = None if isinstance(cfg.uv_per_bit, str) else cfg.uv_per_bit
        assert cfg.path is not None
        self._stop = stop
        recording = open_recording(
            cfg.path, probe=cfg.probe, stream=cfg.name, well=cfg.well, fs_hz=cfg.fs_hz, gain_uv=number
        )
        self._recording, fs = recording, recording.info.fs_hz
        silence = np.clip([n for _, n in recording.gaps], 0, LONGEST_SILENCE_S * fs)
        self._gap_at = np.array([i for i, _ in recording.gaps], np.int64)
        self._silence = np.concatenate([[0.0], np.cumsum(silence)])
        self._block = max(
            1, recording.info.samples(REAL_TIME_BLOCK_MS if 0 < cfg.speed <= 1 else FAST_BLOCK_MS)
        )
        self._batch = max(self._block, recording.info.samples(BATCH_MS))
        self._index, self.exhausted = 0, False
        self._rewind_clock()
        annotations = {
            **recording.info.annotations,
            "replay_of": str(recording.path),
            "format": recording.info.source,
        }
        return dataclasses.replace(recording.info, name=cfg.name, source="replay", annotations=annotations)

    def seek(self, sample: int) -> None:
        """Go on at the first sample whose device number is `sample` or later; for a restarted process."""
        recording = self._opened()
        low, high = 0, recording.n_samples
        while low < high:
            middle = (low + high) // 2
            if recording.device_sample(middle) < sample:
                low = middle + 1
            else:
                high = middle
        self._index = low
        self._rewind_clock()

    def _opened(self) -> Recording:
        if self._recording is None:
            raise SourceError(f"stream {self.cfg.name}: the replay was not opened; open it first")
        return self._recording

    def _rewind_clock(self) -> None:
        """The sample at the current index is due now."""
        self._started_s = self._clock() - self._due_s(self._index)

    def _due_s(self, index: int) -> float:
        """When the sample at `index` is due, in seconds after the first one; 0 when not paced."""
        if self.cfg.speed == 0:
            return 0.0
        silence = self._silence[np.searchsorted(self._gap_at, index, side="right")]
        return float(index + silence) / self._opened().info.fs_hz / self.cfg.speed

    def read(self, timeout_s: float) -> list[Block | StreamEvent]:
        """The blocks that are due, 30 ms of recording at most; waits up to `timeout_s` for the first one."""
        recording = self._opened()
        out: list[Block | StreamEvent] = []
        begin = self._index
        while self._index < recording.n_samples and self._index - begin < self._batch:
            stop = min(self._index + self._block, recording.n_samples)
            wait = self._started_s + self._due_s(stop - 1) - self._clock()
            if wait > 0 and (out or self._stop.wait(min(wait, timeout_s)) or wait > timeout_s):
                break
            self._take(recording, stop, out)
            if self.cfg.speed == 0:
                break
        self.exhausted = self._index >= recording.n_samples
        return out

    def _take(self, recording: Recording, stop: int, out: list[Block | StreamEvent]) -> None:
        """Append the events and blocks of samples [here, stop) by index."""
        start, self._index = self._index, stop
        for e in recording.events_in(start, stop):
            stim = e.kind is EventKind.TTL and e.line in self.cfg.stim_lines
            out.append(dataclasses.replace(e, kind=EventKind.STIM) if stim else e)
            self.counters["events"] += 1
        arrived = 0
        for a, b in recording.runs(start, stop):
            out.append(Block(recording.device_sample(a), recording.read(a, b), time.monotonic_ns()))
            self.counters["blocks"] += 1
            arrived += b - a
        self.counters["samples"] += arrived
        self.counters["samples_lost"] += stop - start - arrived
        a, b = np.searchsorted(self._gap_at, [start, stop])
        self.counters["gaps"] += int(b - a)
        self.counters["samples_lost"] += sum(max(n, 0) for _, n in recording.gaps[a:b])

    def close(self) -> None:
        if self._recording is not None:
            self._recording.close()
            self._recording = None
