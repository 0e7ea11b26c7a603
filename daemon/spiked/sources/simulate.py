"""Serve samples as a device would, over a real PUB socket: for tests, demonstrations and throughput proofs.

Open Ephys framing sends one message per channel and block, MaxLab framing one per sample. What goes wrong on
a real rig can be ordered with `Faults`.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import zmq

from spiked.errors import SourceError
from spiked.sources.simulate_stim import Stimulation
from spiked.sources.simulate_sync import SyncPulses, Untold, lost_before
from spiked.sources.wire_maxwell import SPIKE_NEW, SPIKE_OLD, frame_head, spike_part
from spiked.sources.wire_openephys import DATA, DataHeaders, ttl_message
from spiked.stream import StreamInfo

AUDIO_BLOCK_S = 1024 / 44_100  # what the Open Ephys GUI hands on at once by default
MAXWELL_BURST_S = 0.001
LOOK_S = 2.0  # a reader that leaves so soon only looked whether anything is sent: `spiked doctor`, `spiked discover`
GARBAGE = (
    [b"\x00\xff" * 20],
    [b"DATA\x00", b'{"message_num": "x"', b"1234"],
    [b"DATA\x00", b"\xfe\xed" * 40, b""],
    [b"12345678", b"\x01\x02\x03"],
    [b"EVENT\x00", b"[1, 2]", b"\x00" * 10],
    [b"", b"", b"", b""],
)
Message = list[Any]  # frames: bytes or memoryviews


class Signal(Protocol):
    """What is served. `repeats`: the same array objects come again and again, so their bytes may be kept."""

    info: StreamInfo
    repeats: bool

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        """(samples, channels) codes, n samples at a time; the last may be shorter."""
        ...


class Cycle:
    """Codes in memory, over and over (`loops` times, None: without end)."""

    def __init__(self, info: StreamInfo, codes: np.ndarray, loops: int | None = None) -> None:
        self.info, self.codes, self.loops, self.repeats = info, codes, loops, True

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        parts = [self.codes[a : a + n] for a in range(0, len(self.codes), n)]
        done = 0
        while self.loops is None or done < self.loops:
            yield from parts
            done += 1


class Stored:
    """A recording from spiked.sources.recordings, or anything with info, n_samples and read(start, stop)."""

    repeats = False

    def __init__(self, recording: Any, loop: bool = False) -> None:
        self.info, self._recording, self._loop = recording.info, recording, loop

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        total = self._recording.n_samples
        while True:
            for a in range(0, total, n):
                yield self._recording.read(a, min(a + n, total))
            if not self._loop:
                return


class Synthetic:
    """A recording made by spiked_models.synthesis, as it is made."""

    repeats = False

    def __init__(self, recording: Any, name: str) -> None:
        n = recording.n_channels
        self._recording = recording
        self.info = StreamInfo(
            name=name,
            fs_hz=recording.fs_hz,
            channel_ids=tuple(str(i) for i in range(n)),
            positions_um=tuple((float(x), float(y)) for x, y in recording.positions_um),
            dtype=str(np.dtype(recording.adc.dtype)),
            gain_uv=(recording.lsb_uv,) * n,
            zero_code=recording.zero_code,
            source="simulate",
        )

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        for codes, _ in self._recording.blocks(n):
            yield codes


@dataclass(frozen=True)
class Faults:
    """What goes wrong on purpose. Samples count from the first one served, intervals are half open."""

    drop_samples: tuple[tuple[int, int], ...] = ()  # lost on the way, on all channels
    drop_messages: tuple[tuple[int, int], ...] = ()  # messages lost on the way, counted from 0: cuts blocks
    repeat_every: int = 0  # every so many-th message is sent twice
    garbage_every: int = 0  # after every so many-th message, one that means nothing
    silence: tuple[
        tuple[int, float], ...
    ] = ()  # (sample, seconds): nothing is sent for so long, then caught up
    restart_at: int | None = None  # the device is restarted at this sample ...
    restart_counter: int | None = 0  # ... and counts from here; None: its counter goes on
    end_at_message: int | None = None  # the device dies here, perhaps in the middle of a block
    untold: Untold = ()  # (sample, n): so many are lost inside the device, whose counter does not show it

    def cuts(self) -> list[int]:
        """Samples at which a block must be cut for this."""
        at = [s for pair in self.drop_samples for s in pair]
        return sorted({*at, *([] if self.restart_at is None else [self.restart_at])})

    def drops(self, sample: int) -> bool:
        return any(a <= sample < b for a, b in self.drop_samples)


@dataclass
class Sent:
    """What was served. `first_sample` is the device's counter of the first sample."""

    first_sample: int
    samples: int = 0  # including those dropped on purpose
    dropped_samples: int = 0
    messages: int = 0
    garbage: int = 0
    ttl_edges: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0  # of the serving thread
    most_behind_s: float = 0.0  # behind the clock
    started_ns: int = 0  # monotonic; sample k from 0 existed k / fs (over the speed) later
    block_samples: int = 0  # sent at once, when the last of them exists
    restarts: list[tuple[int, int]] = field(default_factory=list)  # (sample, device counter from there)


class OpenEphysWire:
    """Blocks and TTL edges as messages of the ZMQ Interface plugin."""

    def __init__(self, info: StreamInfo, repeats: bool) -> None:
        self.block_samples = int(AUDIO_BLOCK_S * info.fs_hz)
        self._info = info
        self._kept: dict[tuple[int, int], Any] | None = {} if repeats else None
        self._headers = DataHeaders(info.name, info.channel_ids, info.fs_hz)
        self._num, self._word = 0, 0

    def restart(self) -> None:
        self._num = 0

    def skip(self, codes: np.ndarray) -> None:
        self._num += codes.shape[1]

    def messages(self, counter: int, codes: np.ndarray) -> Iterator[Message]:
        payloads = self._payloads(codes)
        self._headers.block(len(codes), counter, time.time_ns() // 1_000_000)
        for channel, payload in enumerate(payloads):
            self._num += 1
            yield [DATA, self._headers(self._num, channel), payload]

    def _payloads(self, codes: np.ndarray) -> list[Any]:
        key = (id(codes), len(codes))
        if self._kept is not None and key in self._kept:
            return self._kept[key][1]
        x = np.ascontiguousarray(codes.T).astype("<f4")
        if self._info.zero_code:
            x -= np.float32(self._info.zero_code)
        x *= self._info.gains[:, None]
        raw, k = memoryview(x.tobytes()), 4 * len(codes)
        payloads = [raw[a : a + k] for a in range(0, len(raw), k)]
        if self._kept is not None:
            self._kept[key] = (codes, payloads)  # holding `codes` keeps its id its own
        return payloads

    def ttl(self, counter: int, line: int, state: int) -> Message:
        self._num += 1
        self._word = self._word | 1 << line if state else self._word & ~(1 << line)
        return list(
            ttl_message(
                self._num, counter, line, state, self._word, self._info.name, time.time_ns() // 1_000_000
            )
        )


class MaxwellWire:
    """Samples as MaxLab messages of `n_columns` readout channels; unused columns rest at mid-range.

    Channels whose ids are numbers go to that column (amplifier channel), else they fill up from column 0.
    `spikes` are told in the third part: sample (from 0) -> [(amplifier channel, amplitude)].
    """

    def __init__(
        self,
        info: StreamInfo,
        repeats: bool,
        n_columns: int = 1027,
        well: int = 0,
        layout: Literal["new", "old"] = "new",
        spikes: dict[int, list[tuple[int, float]]] | None = None,
    ) -> None:
        if info.n_channels > n_columns:
            raise SourceError(f"{info.n_channels} channels do not fit {n_columns} columns; raise n_columns")
        self.block_samples = max(1, int(MAXWELL_BURST_S * info.fs_hz))
        self._kept: dict[tuple[int, int], Any] | None = {} if repeats else None
        self._n, self._well, self._spikes = n_columns, well, spikes or {}
        self._layout = SPIKE_NEW if layout == "new" else SPIKE_OLD
        ids = [int(c) for c in info.channel_ids if c.isdigit() and int(c) < n_columns]
        self.columns = np.array(ids if len(set(ids)) == info.n_channels else range(info.n_channels))
        self._rest = info.zero_code
        self._sample = 0

    def restart(self) -> None:
        """The counter alone tells a restart on this wire."""

    def skip(self, codes: np.ndarray) -> None:
        self._sample += len(codes)

    def messages(self, counter: int, codes: np.ndarray) -> Iterator[Message]:
        well, spikes, nothing = self._well, self._spikes, b""
        for i, row in enumerate(self._rows(codes), counter):
            extra = spikes.get(self._sample) if spikes else None
            self._sample += 1
            yield [frame_head(i, well), row, self._records(i, extra) if extra else nothing]

    def _rows(self, codes: np.ndarray) -> list[Any]:
        key = (id(codes), len(codes))
        if self._kept is not None and key in self._kept:
            return self._kept[key][1]
        x = np.full((len(codes), self._n), self._rest, "<f4")
        x[:, self.columns] = codes
        raw, k = memoryview(x.tobytes()), 4 * self._n
        rows = [raw[a : a + k] for a in range(0, len(raw), k)]
        if self._kept is not None:
            self._kept[key] = (codes, rows)
        return rows

    def _records(self, frame: int, spikes: list[tuple[int, float]]) -> bytes:
        channels, amplitudes = (np.array(column) for column in zip(*spikes, strict=True))
        return spike_part(np.full(len(spikes), frame), channels, amplitudes, self._layout, self._well)


Wire = OpenEphysWire | MaxwellWire


def make_wire(name: Literal["openephys", "maxwell"], signal: Signal, **options: Any) -> Wire:
    """The framing of a device; `options` are MaxwellWire's."""
    if name == "openephys":
        return OpenEphysWire(signal.info, signal.repeats)
    return MaxwellWire(signal.info, signal.repeats, **options)


def serve(
    signal: Signal,
    wire: Wire,
    address: str = "tcp://127.0.0.1:*",
    *,
    stop: threading.Event | None = None,
    on_address: Callable[[str], None] | None = None,
    on_progress: Callable[[Sent], None] | None = None,
    speed: float = 1.0,
    duration_s: float | None = None,
    first_sample: int = 0,
    block_samples: int | None = None,
    wait_for_subscriber_s: float | None = 60.0,
    ttl: Iterable[tuple[int, int, int]] | SyncPulses = (),
    faults: Faults | None = None,
    record_sent: Path | None = None,
    schedule: Path | None = None,
    ppm: float = 0.0,
    send_hwm: int = 0,
    linger_s: float = 10.0,
    stimulation: Stimulation | None = None,
    on_look: Callable[[], None] | None = None,
) -> Sent:
    """Serve `signal` until it ends, `duration_s` of it has gone out, or `stop` is set.

    Paced by the clock times `speed` (0: as fast as it goes); a late sender catches up and never skips. With
    `wait_for_subscriber_s` nothing is sent before somebody listens, so that a reader gets the first sample;
    raises SourceError when nobody came. With `on_look` too, a reader that leaves within LOOK_S of the first sample was not
    the one that is waited for: `on_look()` is called, and the next reader gets everything from the beginning. `ttl` are
    (sample from 0, line, state), rising; they go out before their block; SyncPulses are those that other simulators on this
    computer get at the same instants. The device's clock runs `ppm` faster than it says. `record_sent` gets every code in the signal's dtype, samples in rows, dropped ones included;
    `schedule` (blocks, 2) int64: one past each block's last sample, and the monotonic ns when it had been sent.
    `send_hwm` 0 never drops; the GUI's own is 1000 messages. `stimulation` changes the samples when commanded; the
    wire must then be made with `repeats` False.
    """
    stop = stop or threading.Event()
    context = zmq.Context()
    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.SNDHWM, send_hwm)
    try:
        try:
            socket.bind(address)
        except zmq.ZMQError as e:
            raise SourceError(f"cannot serve on {address} ({e}); choose another port") from e
        bound = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        if on_address is not None:
            on_address(bound)
        limit = None if duration_s is None else round(duration_s * signal.info.fs_hz)
        readers, edges = _Readers(socket), ttl
        looks = on_look is not None and wait_for_subscriber_s is not None
        while True:
            if wait_for_subscriber_s is not None:
                readers.wait(bound, wait_for_subscriber_s, stop)
            if looks and not isinstance(ttl, SyncPulses):
                ttl, edges = itertools.tee(ttl)
            times = None if schedule is None else array("q")
            server = _Server(
                socket, signal, copy.copy(wire) if looks else wire, first_sample, faults or Faults(), edges, stop, times,
                stimulation, readers if looks else None,
            )  # fmt: skip
            with _open_sent(record_sent) as sink:
                sent = server.run(
                    block_samples or wire.block_samples, limit, speed * (1 + ppm * 1e-6), on_progress, sink
                )
            if on_look is None or not server.looked_at:
                break
            on_look()
        if schedule is not None:
            np.save(schedule, np.array(times, np.int64).reshape(-1, 2))
        return sent
    finally:
        socket.close(round(1000 * linger_s))
        context.term()


class _Readers:
    """Who reads, as far as an XPUB socket tells: which topics somebody has subscribed to."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._topics, self._left = socket, set[bytes](), False

    def wait(self, bound: str, wait_s: float, stop: threading.Event) -> None:
        """Until somebody subscribes, or `stop`. Raises SourceError when nobody does."""
        until, over = time.monotonic() + wait_s, False
        while not stop.is_set() and not self._hear():
            if over:
                raise SourceError(
                    f"nobody subscribed to {bound} within {wait_s:g} s; start the reader, or do not wait for it"
                )
            over = time.monotonic() > until  # before the last look, not after it
            self._socket.poll(50)

    def left(self) -> bool:
        """Whether there was nobody any more, at some time since this was asked last."""
        self._hear()
        left, self._left = self._left, False
        return left

    def _hear(self) -> bool:
        while self._socket.poll(0):
            told = self._socket.recv()
            (self._topics.add if told[:1] == b"\1" else self._topics.discard)(told[1:])
            self._left = self._left or not self._topics
        return bool(self._topics)


class _NoSink:
    """Stands where no copy of what is sent is wanted."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _open_sent(path: Path | None) -> Any:
    return _NoSink() if path is None else path.open("wb")


class _Server:
    """The loop of `serve`."""

    def __init__(
        self,
        socket: Any,
        signal: Signal,
        wire: Wire,
        first_sample: int,
        faults: Faults,
        ttl: Iterable[tuple[int, int, int]] | SyncPulses,
        stop: threading.Event,
        times: array[int] | None = None,
        stimulation: Stimulation | None = None,
        readers: _Readers | None = None,
    ) -> None:
        self._readers, self.looked_at = readers, False
        self._socket, self._signal, self._wire, self._stop = socket, signal, wire, stop
        self._faults, self._cuts, self._silences = faults, faults.cuts(), sorted(faults.silence)
        self._pulses = ttl if isinstance(ttl, SyncPulses) else None
        self._ttl = iter(()) if isinstance(ttl, SyncPulses) else iter(ttl)
        self._edge = next(self._ttl, None)
        self._offset = first_sample  # device counter - sample from 0
        self._plain = not (faults.drop_messages or faults.repeat_every or faults.garbage_every) and (
            faults.end_at_message is None
        )
        self._stimulation = stimulation
        self._simple = self._plain and not self._cuts and faults.restart_at is None and self._edge is None
        self._simple = self._simple and self._pulses is None
        self._simple = self._simple and stimulation is None  # its blocks are final only when they are due
        self.sent = Sent(first_sample)
        self.times = times  # one past a block's last sample, monotonic ns when it was sent; and so on

    def run(
        self,
        block: int,
        limit: int | None,
        speed: float,
        on_progress: Callable[[Sent], None] | None,
        sink: BinaryIO | None,
    ) -> Sent:
        sent, fs = self.sent, self._signal.info.fs_hz
        begun, cpu, told = time.monotonic(), time.thread_time(), 0.0
        sent.started_ns, sent.block_samples = round(begun * 1e9), block
        if self._pulses is not None:
            self._ttl = self._pulses.edges(begun, fs * (speed or 1.0), self._faults.untold)
            self._edge = next(self._ttl, None)
        looks = self._readers is not None
        for codes in self._signal.blocks(block):
            if looks and self._readers is not None:
                looks = time.monotonic() - begun < LOOK_S  # before the last look, not after it
                if self._readers.left():
                    self.looked_at = True
                    break
            if limit is not None and sent.samples + len(codes) > limit:
                codes = codes[: limit - sent.samples]
            if not len(codes) or self._stop.is_set():
                break
            ready = self._encoded(codes) if self._simple else None
            if speed:
                stop = sent.samples + len(codes)
                self._pace(begun + (stop + lost_before(stop, self._faults.untold)) / fs / speed)
            if self._stimulation is not None:
                codes = self._stimulation.apply(
                    sent.samples, codes, lambda ns: round((ns / 1e9 - begun) * fs * speed)
                )
            if sink is not None:
                sink.write(np.ascontiguousarray(codes).tobytes())
            alive = self._block(codes, ready)
            if self.times is not None:
                self.times.extend((sent.samples, time.monotonic_ns()))
            sent.seconds, sent.cpu_s = time.monotonic() - begun, time.thread_time() - cpu
            if on_progress is not None and sent.seconds - told >= 0.5:
                told = sent.seconds
                on_progress(sent)
            if not alive:
                break
        if on_progress is not None:
            on_progress(sent)
        return sent

    def _pace(self, due: float) -> None:
        """Wait until the last sample of a block would have been acquired."""
        ahead = due - time.monotonic()
        if ahead > 0:
            self._stop.wait(ahead) if ahead > 0.1 else time.sleep(ahead)
        else:
            self.sent.most_behind_s = max(self.sent.most_behind_s, -ahead)

    def _encoded(self, codes: np.ndarray) -> list[Message]:
        """The next block's messages, made before they are due."""
        return list(self._wire.messages(self.sent.samples + self._offset, codes))

    def _block(self, codes: np.ndarray, ready: list[Message] | None = None) -> bool:
        """Send one block, cut where a fault begins or ends. False once the device has died."""
        start = self.sent.samples
        stop = start + len(codes)
        cuts = [c for c in self._cuts if start < c < stop]
        for a, b in zip([start, *cuts], [*cuts, stop], strict=True):
            piece = codes[a - start : b - start] if cuts else codes
            while self._silences and self._silences[0][0] < b:
                self._stop.wait(self._silences.pop(0)[1])
            if a == self._faults.restart_at:
                self._restart(a)
            if not self._piece(a, piece, ready):
                return False
        return True

    def _piece(self, start: int, codes: np.ndarray, ready: list[Message] | None = None) -> bool:
        sent, stop = self.sent, start + len(codes)
        sent.samples = stop
        if self._faults.drops(start):
            self._wire.skip(codes)
            sent.dropped_samples += len(codes)
            return True
        while self._edge is not None and self._edge[0] < stop:
            sample, line, state = self._edge
            if isinstance(self._wire, OpenEphysWire):
                if not self._send(self._wire.ttl(sample + self._offset, line, state)):
                    return False
                sent.ttl_edges += 1
            self._edge = next(self._ttl, None)
        for edge in self._stimulation.edges(stop) if self._stimulation is not None else ():
            if isinstance(self._wire, OpenEphysWire):
                self._send(self._wire.ttl(edge[0] + self._offset, *edge[1:]))
                sent.ttl_edges += 1
        messages = ready or self._wire.messages(start + self._offset, codes)
        if not self._plain:
            return all(self._send(m) for m in messages)
        send, more = self._socket.send, zmq.SNDMORE
        for first, second, third in messages:
            send(first, more)
            send(second, more)
            send(third)
            sent.messages += 1
        return True

    def _send(self, message: Message) -> bool:
        """One message with its faults. False once the device has died."""
        n, faults = self.sent.messages, self._faults
        if faults.end_at_message is not None and n >= faults.end_at_message:
            return False
        self.sent.messages += 1
        if not any(a <= n < b for a, b in faults.drop_messages):
            self._socket.send_multipart(message)
            if faults.repeat_every and n % faults.repeat_every == faults.repeat_every - 1:
                self._socket.send_multipart(message)
        if faults.garbage_every and n % faults.garbage_every == faults.garbage_every - 1:
            self._socket.send_multipart(list(GARBAGE[self.sent.garbage % len(GARBAGE)]))
            self.sent.garbage += 1
        return True

    def _restart(self, sample: int) -> None:
        self._wire.restart()
        if self._faults.restart_counter is not None:
            self._offset = self._faults.restart_counter - sample
        self.sent.restarts.append((sample, sample + self._offset))
