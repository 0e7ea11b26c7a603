"""Live samples from the Open Ephys GUI's "ZMQ Interface" plugin.

One message per channel and block is put together again into blocks of all channels. The plugin's PUB socket
drops whole messages when a subscriber is slow, so a block at the edge of a loss may lack channels: it is
handed over with a mask. TTL edges and spikes are sent before the data they belong to, and handed over after.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spiked.config import Stream
from spiked.errors import ConfigError, SourceError, StreamChanged
from spiked.sources.base import BATCH_S, LEARN_S, LEARN_WALL_S, EventBudget, Subscriber, check_stopped
from spiked.sources.codes import Quantizer, learn_step, rail_code
from spiked.sources.heartbeat import Heartbeat
from spiked.sources.probe import load_probe, placeholder_line
from spiked.sources.wire_openephys import (
    DATA,
    DATA_HEADER,
    DEFAULT_ADDRESS,
    EVENT,
    TTL_TYPE,
    WireError,
    data_fields,
    parse_header,
    parse_spike,
    parse_ttl,
)
from spiked.stream import Block, EventKind, StreamEvent, StreamInfo

log = logging.getLogger(__name__)

IDLE_FLUSH_S = 1.0  # silence after which a block that lacks channels is handed over as it is
FAR = 1 << 62  # sample numbers beyond are nonsense
CHANGED_AFTER = 3  # consecutive blocks that lack channels although no message was lost


@dataclass
class Seen:
    """The beginning of a stream: all messages, and what the data among them say."""

    raw: list[list[bytes]] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # channel_num -> channel_name
    payloads: list[bytes] = field(default_factory=list)
    rate: float = 0.0

    def add(self, fields: tuple[int, int, int, int, float, str], payload: bytes) -> None:
        self.names.setdefault(fields[1], fields[5])
        self.payloads.append(payload)
        self.rate = self.rate or fields[4]


class OpenEphysSource:
    """A Source. Loss shows as jumps of the sample number, filled by integrity, and as blocks with a mask."""

    def __init__(self, cfg: Stream) -> None:
        self.cfg = cfg
        self.address = cfg.address or DEFAULT_ADDRESS
        self.exhausted = False
        self.counters = dict.fromkeys(
            ("messages", "malformed", "lost_messages", "duplicates", "partial_blocks", "acquisitions",
             "late_join_blocks", "inexact", "clipped", "device_spikes_untold", "heartbeats",
             "heartbeats_unanswered"), 0,
        )  # fmt: skip
        self._subscriber: Subscriber | None = None
        self._heart: Heartbeat | None = None
        self._budget = EventBudget()
        self._ready: list[Block | StreamEvent] = []
        self._failed: SourceError | None = None
        self._per_read = 1000
        self._last_num: int | None = None
        self._last_data_ns = 0
        self._new_acquisition = False
        self._held: list[StreamEvent] = []  # sent before their block
        self._electrodes: dict[str, int] = {}
        self._emitted = False
        self._lost_at_block = 0
        self._short_blocks = 0
        self._key = b""  # sample_num of the block being put together, as it stands in the header
        self._first = self._n = self._arrived = 0
        self._parts: list[bytes | None] = []

    def open(self, stop: threading.Event) -> StreamInfo:
        self._subscriber = Subscriber(self.address, self.cfg.queue_mb, 3000)
        if self.cfg.heartbeat:
            self._heart = Heartbeat(self.address, self.counters)
        return self._settle(self._first_messages(stop))

    def read(self, timeout_s: float) -> list[Block | StreamEvent]:
        if self._ready:
            out, self._ready = self._ready, []
            return out
        if self._failed is not None:
            raise self._failed
        assert self._subscriber is not None, "open() first"
        idle = time.monotonic_ns() - self._last_data_ns > IDLE_FLUSH_S * 1e9  # before the look for more
        messages = self._subscriber.drain(timeout_s, self._per_read)
        now = time.monotonic_ns()
        if self._heart is not None:
            self._heart.tick(now)
        out = []
        try:
            self._take(messages, now, out)
            if not messages and idle:
                self._finish(now, out)
                self._release(out)
        except SourceError as e:
            if not out:
                raise
            self._failed = e
        return out

    def close(self) -> None:
        for part in (self._heart, self._subscriber):
            if part is not None:
                part.close()
        self._heart = self._subscriber = None

    # ---- learning the stream

    def _first_messages(self, stop: threading.Event) -> Seen:
        """Messages until enough of the stream has been seen to settle what it is."""
        assert self._subscriber is not None
        seen, strange, begun = Seen(), 0, 0.0
        starts: set[int] = set()
        deadline = time.monotonic() + self.cfg.wait_s
        while True:
            check_stopped(stop, self.address)
            over = time.monotonic() > deadline  # before the last look, not after it
            some = self._subscriber.drain(0.1, 2000)
            seen.raw += some
            for frames in some:
                fields = self._learn(frames)
                if fields is None:
                    strange += 1
                elif fields:
                    begun = begun or time.monotonic()
                    starts.add(fields[3])
                    seen.add(fields, frames[2])
                    if max(starts) - min(starts) >= LEARN_S * seen.rate:
                        return seen
            if len(starts) > 1 and time.monotonic() - begun >= LEARN_WALL_S:
                return seen
            if over:
                raise SourceError(self._nothing(len(seen.raw), strange))

    def _learn(self, frames: list[bytes]) -> tuple[int, int, int, int, float, str] | tuple[()] | None:
        """Fields of a data message, () for another message of the plugin, None for anything else."""
        if any(b'"message_no"' in frame for frame in frames[:3]):
            raise SourceError(
                f"{self.address} speaks the wire of a ZMQ Interface plugin older than 0.3; "
                "update the plugin in Open Ephys (File > Plugin Installer)"
            )
        try:
            if len(frames) < 2 or frames[0] not in (DATA, EVENT):
                return None
            header = parse_header(frames[1])
            if frames[0] == EVENT:
                return ()
            fields = data_fields(header)
            return fields if len(frames) == 3 and len(frames[2]) == 4 * fields[2] else None
        except WireError:
            return None

    def _nothing(self, n: int, strange: int) -> str:
        if not n:
            return (
                f"no data from {self.address} within {self.cfg.wait_s:g} s; is acquisition running, and is "
                "the ZMQ Interface plugin in the signal chain on that port?"
            )
        if strange == n:
            return (
                f"{n} messages from {self.address}, none of them Open Ephys data; "
                "check the ZMQ Interface's port (default 5556)"
            )
        return (
            f"{self.address} sent {n} messages but no two blocks of samples within {self.cfg.wait_s:g} s; "
            "is acquisition running, and are channels ticked in the ZMQ Interface?"
        )

    def _settle(self, seen: Seen) -> StreamInfo:
        """Fix channels, rate and sample type, and put the messages seen so far through the ordinary path."""
        names, rate = seen.names, seen.rate
        channels = sorted(names)
        positions = self._positions(channels)
        self._column = {str(c).encode(): i for i, c in enumerate(channels)}
        self._rate, self._rate_text = rate, b""
        step = self._step(seen.payloads)
        self._codes = Quantizer(step, self.cfg.name, self.counters)
        self._parts = [None] * len(channels)
        # half a surrogate pair or a NUL, which JSON can say, cannot be written into any file
        ids = [names[c] if names[c] and names[c].isprintable() else f"CH{c + 1}" for c in channels]
        rail = rail_code(self.cfg.rail_uv, step)
        info = StreamInfo(
            name=self.cfg.name,
            fs_hz=rate,
            channel_ids=tuple(ids if len(set(ids)) == len(ids) else [f"CH{c + 1}" for c in channels]),
            positions_um=positions,
            dtype="float32" if step is None else "int16",
            gain_uv=(1.0 if step is None else step,) * len(channels),
            code_min=None if rail is None else -rail,
            code_max=rail,
            geometry_known=self.cfg.probe is not None,
            source="openephys",
            annotations={"address": self.address, "channel_nums": channels},
        )
        size = sorted(len(p) for p in seen.payloads)[len(seen.payloads) // 2]
        assert self._subscriber is not None
        self._subscriber.resize(size + 300)
        self._per_read = max(2 * len(channels), int(BATCH_S * rate * len(channels) / (size / 4)))
        try:
            self._take(seen.raw, time.monotonic_ns(), self._ready)
        except SourceError as e:  # told by the first read
            self._failed = e
        return info

    def _positions(self, channels: list[int]) -> tuple[tuple[float, float], ...]:
        """Of these device channels, not always all of the probe's. Raises ConfigError if one has none."""
        if self.cfg.probe is None:
            log.warning("stream %s: no probe file, positions are unknown", self.cfg.name)
            return placeholder_line(len(channels))
        probe = load_probe(self.cfg.probe)
        wired = probe.device_channel_indices
        if (wired < 0).all():
            wired = np.arange(len(wired))
        contact = {int(c): i for i, c in enumerate(wired) if c >= 0}
        bare = [c for c in channels if c not in contact]
        if bare:
            raise ConfigError(
                f"stream {self.cfg.name} has {len(channels)} channels but {self.cfg.probe} wires "
                f"{len(contact)} contacts, none to channel {bare[0]}; "
                "use this probe's file or untick channels in the ZMQ Interface"
            )
        return tuple((float(x), float(y)) for x, y in probe.positions[[contact[c] for c in channels]])

    def _step(self, payloads: list[bytes]) -> float | None:
        """Microvolt per int16 code; None: the values are stored as they come."""
        if self.cfg.uv_per_bit == "float":
            return None
        if self.cfg.uv_per_bit != "auto":
            return float(self.cfg.uv_per_bit)
        step = learn_step(np.frombuffer(b"".join(payloads), "<f4"))
        how = f"{step:g} uV per bit, stored as int16" if step else "no common step, stored as float32"
        log.info("stream %s: %s", self.cfg.name, how)
        return step

    # ---- every message

    def _take(self, messages: Iterable[list[bytes]], now: int, out: list[Block | StreamEvent]) -> None:
        match, counters = DATA_HEADER.match, self.counters
        for frames in messages:
            counters["messages"] += 1
            try:
                if len(frames) == 3 and frames[0] == DATA:
                    m = match(frames[1])
                    fields = m.groups() if m is not None else self._slow_fields(frames[1])
                    self._data(fields, frames[2], now, out)
                elif len(frames) == 3 and frames[0] == EVENT:
                    self._event(frames, now, out)
                elif len(frames) == 2 and frames[0] == EVENT:
                    self._count(int(parse_header(frames[1])["message_num"]), now, out)
                else:
                    counters["malformed"] += 1
            except (WireError, KeyError, TypeError, ValueError, OverflowError):
                counters["malformed"] += 1

    def _slow_fields(self, header: bytes) -> tuple[bytes, ...]:
        num, channel, n, first, rate, _ = data_fields(parse_header(header))
        return (
            str(num).encode(),
            str(channel).encode(),
            str(n).encode(),
            str(first).encode(),
            repr(rate).encode(),
        )

    def _data(self, fields: tuple[bytes, ...], payload: bytes, now: int, out: list[Any]) -> None:
        num, channel, n_text, key, rate = fields
        n, first = int(n_text), int(key)
        if len(payload) != 4 * n or not n:
            raise WireError("payload and header differ in size")
        if abs(first) > FAR:
            raise WireError("impossible sample number")
        if not self._count(int(num), now, out):
            return
        self._last_data_ns = now
        if key != self._key:
            self._finish(now, out)
            self._first, self._n, self._key = first, n, key
        if rate != self._rate_text:
            self._check_rate(rate)
        column = self._column.get(channel)
        if column is None:
            raise StreamChanged(
                f"stream {self.cfg.name}: channel {channel.decode()} was not there when the session started; "
                "stop the session and start a new one"
            )
        if n != self._n:
            self.counters["malformed"] += 1  # its block lacks this channel then
        elif self._parts[column] is not None:
            self.counters["duplicates"] += 1
        else:
            self._parts[column] = payload
            self._arrived += 1
            if self._arrived == len(self._parts):
                self._finish(now, out)

    def _count(self, num: int, now: int, out: list[Any]) -> bool:
        """Follow message_num: a hole is loss, going back a new acquisition. False for a repetition."""
        if not -(1 << 31) <= num < 1 << 31:
            raise WireError("impossible message number")
        last, self._last_num = self._last_num, num
        if last is None or num == last + 1:
            return True
        if num == last:
            self.counters["duplicates"] += 1
            return False
        if num > last and num != 1:
            self.counters["lost_messages"] += num - last - 1
        elif last > (1 << 31) - (1 << 24) and num < -(1 << 31) + (1 << 24):  # the 32-bit counter ran over
            self.counters["lost_messages"] += num - last - 1 + (1 << 32)
        else:
            self._finish(now, out)
            self._release(out)
            self._new_acquisition = True
            self.counters["acquisitions"] += 1
        return True

    def _check_rate(self, text: bytes) -> None:
        rate = float(text)
        if rate != self._rate:
            raise StreamChanged(
                f"stream {self.cfg.name} changed from {self._rate:g} Hz to {rate:g} Hz; "
                "stop the session and start a new one"
            )
        self._rate_text = text

    # ---- blocks

    def _finish(self, now: int, out: list[Any]) -> None:
        """Hand over the block being put together, if any, then the events that were sent before it."""
        arrived, self._arrived, self._key = self._arrived, 0, b""
        if not arrived:
            return
        parts, self._parts = self._parts, [None] * len(self._parts)
        missing = None
        if arrived < len(parts):
            if not self._emitted:  # joined in the middle of a block: the stream begins after it
                self.counters["late_join_blocks"] += 1
                self._held.clear()
                return
            self._incomplete(arrived)
            missing = np.array([p is None for p in parts])
        else:
            self._short_blocks = 0
        self._lost_at_block = self.counters["lost_messages"]
        silent = bytes(4 * self._n)
        x = np.frombuffer(b"".join([silent if p is None else p for p in parts]), "<f4").reshape(
            len(parts), self._n
        )
        self._emitted = True
        out.append(Block(self._first, self._codes(x), now, missing, self._new_acquisition))
        self._new_acquisition = False
        self._release(out)

    def _incomplete(self, arrived: int) -> None:
        self.counters["partial_blocks"] += 1
        if self.counters["lost_messages"] == self._lost_at_block:
            self._short_blocks += 1
        if self._short_blocks >= CHANGED_AFTER:
            raise StreamChanged(
                f"stream {self.cfg.name} changed from {len(self._parts)} channels to {arrived}; "
                "stop the session and start a new one"
            )

    def _release(self, out: list[Any]) -> None:
        if self._held:
            out.extend(self._held)
            self._held.clear()

    # ---- events

    def _event(self, frames: list[bytes], now: int, out: list[Any]) -> None:
        header = parse_header(frames[1])
        kind = header.get("type")
        num = int(header["message_num"])
        if kind == "event":
            content = header["content"]
            if int(content["type"]) != TTL_TYPE:
                self._count(num, now, out)
                return
            line, state, word = parse_ttl(frames[2])
            what = EventKind.STIM if line in self.cfg.stim_lines else EventKind.TTL
            sample = int(content["sample_num"])
            if abs(sample) > FAR:
                raise WireError("impossible sample number")
            event = StreamEvent(sample, what, line, state, float(word))
        elif kind == "spike":
            sample, name, peak = parse_spike(header.get("spike"), frames[2])
            line = self._electrodes.setdefault(name, len(self._electrodes))
            event = StreamEvent(sample, EventKind.DEVICE_SPIKE, line, 1, peak, name)
        else:
            raise WireError("unknown event")
        if not self._count(num, now, out):
            return
        if event.kind is EventKind.DEVICE_SPIKE and not self._budget.take(now):
            self.counters["device_spikes_untold"] += 1
        else:
            self._held.append(event)
