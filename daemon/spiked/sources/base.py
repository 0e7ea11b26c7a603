"""What every sender of samples looks like to `acquire`, and the socket that the live ones share."""

from __future__ import annotations

import threading
import time
from typing import Protocol

import zmq

from spiked.config import Stream
from spiked.errors import ConfigError, SourceError
from spiked.stream import Block, StreamEvent, StreamInfo

LEARN_S = 0.5  # how much of a live stream is looked at before its channels and sample type are settled
LEARN_WALL_S = 1.5  # ... or this much wall time, for streams that trickle
BATCH_S = 0.03  # most that one `read` hands over
COALESCE_S = 0.00002  # pause after a wake-up, so that one read takes several messages
MOST_BYTES = 8 << 20  # of one message: minutes of one channel; a longer one costs the connection
EVENTS_PER_S = 2000  # device spikes beyond this are counted, not told


class Source(Protocol):
    """Where samples come from. One thread calls all of it.

    `counters` only grow. `exhausted` turns true when nothing will ever come again (a replay at its end).
    """

    counters: dict[str, int]
    exhausted: bool

    def open(self, stop: threading.Event) -> StreamInfo:
        """Connect, wait for data, learn the stream. SourceError without data, or once `stop` is set."""
        ...

    def read(self, timeout_s: float) -> list[Block | StreamEvent]:
        """Everything that is there, in order, about 30 ms of stream at most; waits up to `timeout_s` for it.

        An event follows the block that holds its sample or, sent before it, shares its place in the stream.
        Raises StreamChanged when rate or channels changed.
        """
        ...

    def close(self) -> None: ...


def open_source(cfg: Stream) -> Source:
    """The source that the configuration names, not yet opened."""
    if cfg.source == "openephys":
        from spiked.sources.openephys import OpenEphysSource

        return OpenEphysSource(cfg)
    if cfg.source == "maxwell":
        from spiked.sources.maxwell import MaxwellSource

        return MaxwellSource(cfg)
    if cfg.source == "spikeglx":
        from spiked.sources.spikeglx import SpikeGlxSource

        return SpikeGlxSource(cfg)
    from spiked.sources.replay import ReplaySource

    return ReplaySource(cfg)


class Subscriber:
    """A SUB socket, subscribed to everything and drained by the thread that decodes.

    libzmq's own thread keeps reading the network into memory while that thread is busy. What may wait there
    is bounded by `queue_mb`, as a number of messages of `message_bytes`; beyond it the kernel's buffers fill,
    the publisher drops, and the stream's own counters tell how much (docs/decisions/0002).
    """

    def __init__(self, address: str, queue_mb: float, message_bytes: int) -> None:
        self.address, self._queue_mb = address, queue_mb
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES)
        self.resize(message_bytes)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._backlog = False
        try:
            self._socket.connect(address)
        except zmq.ZMQError as e:
            self.close()
            raise ConfigError(
                f"address {address} cannot be used ({e}); write it like tcp://127.0.0.1:5556"
            ) from e

    def resize(self, message_bytes: int) -> None:
        """Bound the queue to queue_mb of messages of this size (what libzmq adds to each is counted here)."""
        self.limit = max(1000, int(self._queue_mb * 1e6 / (message_bytes + 400)))
        self._socket.setsockopt(zmq.RCVHWM, self.limit)

    def drain(self, timeout_s: float, at_most: int) -> list[list[bytes]]:
        """Messages that are there, `at_most` so many; waits up to `timeout_s` for the first one."""
        if not self._backlog:
            if not self._socket.poll(max(0, round(timeout_s * 1000)), zmq.POLLIN):
                return []
            time.sleep(COALESCE_S)
        out: list[list[bytes]] = []
        receive, add, flags = self._socket.recv_multipart, out.append, zmq.NOBLOCK
        self._backlog = True
        try:
            for _ in range(at_most):
                add(receive(flags))
        except zmq.Again:
            self._backlog = False
        return out

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


def check_stopped(stop: threading.Event, address: str) -> None:
    if stop.is_set():
        raise SourceError(f"stopped while waiting for data from {address}")


class EventBudget:
    """At most `per_second` events of the device's own per second of stream."""

    def __init__(self, per_second: int = EVENTS_PER_S) -> None:
        self._per_second, self._left, self._until = per_second, per_second, 0

    def take(self, now_ns: int) -> bool:
        """True if one more may be told."""
        if now_ns >= self._until:
            self._until, self._left = now_ns + 1_000_000_000, self._per_second
        self._left -= 1
        return self._left >= 0
