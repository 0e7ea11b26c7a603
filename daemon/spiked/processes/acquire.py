"""acquire: source socket -> integrity check -> ring. Light: no torch, no h5py."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from spiked import config as configuration
from spiked import marks
from spiked.errors import ConfigError, SourceError, SpikedError
from spiked.integrity import Integrity
from spiked.priority import raise_priority
from spiked.processes.link import Link
from spiked.ring import Ring, RingWriter
from spiked.sources.base import Source, open_source
from spiked.sources.replay import ReplaySource
from spiked.sources.spikeglx import SpikeGlxSource
from spiked.stream import Block, StreamInfo
from spiked.timing import ClockFit, Histogram, told

READ_S = 0.02
TELL_S = 0.25
DRAIN_S = 2.0


def stream_config(config: configuration.Config, name: str) -> configuration.Stream:
    """The [[stream]] section of that name."""
    for stream in config.stream:
        if stream.name == name:
            return stream
    raise ConfigError(f"no [[stream]] named {name} in the session's configuration")


def _as_before(cfg: configuration.Stream, info: StreamInfo) -> configuration.Stream:
    """The same stream, with what the first life of this process learned about its sample type fixed."""
    if cfg.source != "openephys" or cfg.uv_per_bit != "auto":
        return cfg
    return cfg.model_copy(update={"uv_per_bit": "float" if info.dtype == "float32" else info.gain_uv[0]})


def _ring(path: Any, info: StreamInfo, link: Link) -> Ring | None:
    """The ring the supervisor makes once it knows the stream; None when told to stop instead."""
    link.tell("stream", info=info.to_json())
    while not link.stop.is_set():
        command = link.next_command(0.05)
        if command and command.get("op") == "ring":
            return Ring(path)
    return None


class Acquire:
    """The loop. `step` moves whatever the source has into the ring."""

    def __init__(
        self,
        source: Source,
        ring: Ring,
        info: StreamInfo,
        silence_s: float,
        link: Link,
        readers: tuple[str, ...],
    ) -> None:
        self.source, self.ring, self.link, self.silence_s, self.readers = (
            source,
            ring,
            link,
            silence_s,
            readers,
        )
        wait_s = 10.0 if "record" in readers else 0.0
        self.integrity = Integrity(RingWriter(ring, info), wait_s=wait_s, meanwhile=self._tell)
        self._last_sample_s = time.monotonic()
        self._told_s = 0.0
        self._speed = source.cfg.speed if isinstance(source, ReplaySource) else 1.0  # 0: no clock at all
        self._received_ms, self._resets = Histogram(), 0
        self._clock = ClockFit(info.fs_hz * (self._speed or 1))
        self._row_bytes = info.n_channels * np.dtype(info.dtype).itemsize

    def step(self, timeout_s: float) -> bool:
        """One batch; False when there was nothing."""
        items = self.source.read(timeout_s)
        for item in items:
            self.integrity.accept(item)
        blocks = [i for i in items if isinstance(i, Block)]
        if blocks:
            self._last_sample_s = time.monotonic()
            self._note(blocks)
        if getattr(self.source, "flow_controlled", False):
            self._wait_for_readers()
        self._tell()
        return bool(items)

    def _note(self, blocks: list[Block]) -> None:
        """What the health message tells: how long the oldest of a batch waited for the ring, and the device's clock."""
        self._received_ms.add((time.monotonic_ns() - blocks[0].recv_ns) / 1e6)
        if self.integrity.counters["resets"] != self._resets:
            self._resets = self.integrity.counters["resets"]
            self._clock.restart()
        self._clock.add(self.ring.next_sample, blocks[-1].recv_ns)

    def _wait_for_readers(self) -> None:
        """A replay as fast as it goes must not lap the readers; a device cannot be asked to wait."""
        room = self.ring.capacity // 2
        while self.ring.next_sample - self._slowest() > room and not self.link.stop.is_set():
            time.sleep(0.001)
            self._commands()
            self._last_sample_s = time.monotonic()
            self._tell()

    def _slowest(self) -> int:
        return min((self.ring.reader_position(n) for n in self.readers), default=self.ring.next_sample)

    def _tell(self, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._told_s > TELL_S:
            self._told_s = now
            counters = {**self.source.counters, **self.integrity.counters, "told_dropped": self.link.dropped}
            self.link.tell(
                "progress", samples=self.ring.committed, counters=counters, ring=self._readers_behind(), row_bytes=self._row_bytes, clock=self._clock.told() if self._speed else None, stages=told(acquire=self._received_ms),
            )  # fmt: skip

    def _readers_behind(self) -> dict[str, Any]:
        ring = self.ring
        behind = {
            name: min(ring.committed, ring.next_sample - ring.reader_position(name)) for name in self.readers
        }
        return {"capacity": ring.capacity, "behind": behind}

    def _commands(self) -> None:
        """Marks that come over the control port become events: nobody else may write into the ring.

        `forget` names a reader that is gone for good and must not be waited for.
        """
        while command := self.link.next_command():
            if command.get("op") == "forget":
                self.readers = tuple(r for r in self.readers if r != command.get("reader"))
            if command.get("op") != "mark":
                continue
            ring = self.ring
            try:
                mark = marks.event(command, ring.first_sample, ring.next_sample, ring.info.fs_hz)
            except SpikedError as e:
                self.link.tell("log", level="warning", text=f"a mark was left out: {e}")
            else:
                self.integrity.writer.add_event(mark)

    def run(self) -> None:
        """Until told to stop, the source is exhausted, or it has been silent for too long."""
        while not self.link.stop.is_set():
            self._commands()
            silent = time.monotonic() - self._last_sample_s  # before the look: samples may lie there unread
            if not self.step(READ_S):
                if getattr(self.source, "exhausted", False):
                    break
                if silent > self.silence_s:
                    raise SourceError(
                        f"stream {self.ring.info.name}: no samples for {silent:.0f} s; "
                        "check that acquisition still runs, and its cables and network"
                    )
        self._drain()
        self._commands()  # a mark that came right before the stop

    def _drain(self) -> None:
        """What had been received when the stop came belongs to the session."""
        until = time.monotonic() + DRAIN_S
        while (
            not getattr(self.source, "flow_controlled", False) and time.monotonic() < until and self.step(0.0)
        ):
            pass


def main(args: argparse.Namespace, link: Link) -> None:
    config = configuration.load(args.session / "session.toml")
    cfg = stream_config(config, args.stream)
    ring = Ring(args.ring) if args.ring.exists() else None
    if ring is not None:
        cfg = _as_before(cfg, ring.info)
    source = open_source(cfg)
    raise_priority("acquire_network", config.rig.priority)  # for the socket's thread, which starts with it
    try:
        try:
            info = source.open(link.stop)
        except SourceError:
            if not link.stop.is_set():
                raise
        if link.stop.is_set():
            return
        ring = ring or _ring(args.ring, info, link)
        if ring is None:
            return
        if isinstance(source, ReplaySource | SpikeGlxSource) and ring.committed:
            source.seek(ring.device_sample(ring.next_sample))
        wanted = (("record", config.record.enabled), ("live", config.live.enabled and cfg.spikes))
        got = raise_priority("acquire", config.rig.priority)
        link.tell("log", level="info", text=f"acquire runs at {got} priority")
        acquire = Acquire(source, ring, info, cfg.silence_s, link, tuple(name for name, on in wanted if on))
        try:
            acquire.run()
            ring.end()  # after an error the supervisor decides whether the stream is over
        finally:
            acquire.integrity.finish()
            acquire._tell(force=True)
    finally:
        source.close()
    link.tell("done", samples=ring.committed)
