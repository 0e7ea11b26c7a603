"""Real sockets around the sources: a publisher of given messages, and ways to drain a source."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from spiked.config import Stream
from spiked.errors import SourceError
from spiked.integrity import Integrity
from spiked.ring import Ring, RingWriter
from spiked.sources.base import Source, open_source
from spiked.sources.simulate import Sent, Signal, Wire, serve
from spiked.stream import Block, StreamEvent, StreamInfo

SHARED = Path(os.environ.get("SPIKED_SHARED", Path(__file__).parents[2] / "shared"))


def shared(name: str) -> Path:
    """A reference file, or skip."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference file {name} is not here (set SPIKED_SHARED)")
    return path


_senders: list[Any] = []  # what has is_alive()
_ports: list[int] = []  # on which they send


@contextmanager
def publishing(messages: Iterable[list[bytes]], every: int = 0, pause_s: float = 0.0) -> Iterator[str]:
    """Send these messages to the first subscriber, and leave when the network has them; yields the address."""
    context = zmq.Context()
    socket = context.socket(zmq.XPUB)
    socket.setsockopt(zmq.SNDHWM, 0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    done = threading.Event()

    def send() -> None:
        while not socket.poll(20):
            if done.is_set():
                return
        socket.recv()
        for i, m in enumerate(messages):
            if done.is_set():
                return
            socket.send_multipart(m)
            if every and i % every == every - 1:
                time.sleep(pause_s)

    def run() -> None:
        send()
        while not messages and not done.wait(0.02):  # one that says nothing stays
            pass
        socket.close(0 if done.is_set() else 60_000)
        context.term()

    thread = threading.Thread(target=run)
    _senders[:], _ports[:] = [thread], [port]
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        done.set()
        thread.join()


@contextmanager
def serving(signal: Signal, wire: Wire, **options: Any) -> Iterator[tuple[str, Callable[[], Sent]]]:
    """`serve` in a thread; yields its address and a function that waits for its report."""
    stop, bound, box = threading.Event(), threading.Event(), {}

    def run() -> None:
        box["sent"] = serve(
            signal, wire, stop=stop, on_address=told, linger_s=0.0 if stop.is_set() else 5.0, **options
        )

    def told(address: str) -> None:
        box["address"] = address
        _ports[:] = [int(address.rpartition(":")[2])]
        bound.set()

    thread = threading.Thread(target=run)
    _senders[:] = [thread]
    thread.start()
    assert bound.wait(60)

    def report() -> Sent:
        thread.join(200)
        assert not thread.is_alive()
        return box["sent"]

    try:
        yield box["address"], report
    finally:
        stop.set()
        thread.join(60)


@contextmanager
def opened(kind: str, address: str, **options: Any) -> Iterator[tuple[Source, StreamInfo]]:
    """A source of that kind, opened on the address."""
    options = {"wait_s": 10.0, **options}
    source = open_source(Stream(name="probe", source=kind, address=address, **options))
    try:
        yield source, source.open(threading.Event())
    finally:
        source.close()


def sends(sender: Any, address: str) -> None:
    """Who sends at this address, where it is neither `publishing` nor `serving`: something that has is_alive()."""
    _senders[:], _ports[:] = [sender], [int(address.rpartition(":")[2])]


def _on_the_way() -> bool:
    """Whether the kernel holds bytes that were sent and not read: whoever is to read them does not get its turn."""
    for row in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, here, there, _, queues, *_ = row.split()
        if {int(at.rpartition(":")[2], 16) for at in (here, there)} & set(_ports):
            sent, received = (int(n, 16) for n in queues.split(":"))
            if sent > 1 or received > 1:  # the end of a connection counts as one
                return True
    return False


def collect(source: Source, idle_s: float = 0.4, most_s: float = 200.0) -> list[Block | StreamEvent]:
    """Everything the source hands over until the sender is done, nothing is on the way, and it has been silent for `idle_s`."""
    out: list[Block | StreamEvent] = []
    last = begun = time.monotonic()
    empty = 0  # reads in a row: by the clock alone, a process that did not run would have heard silence
    while (time.monotonic() - last < idle_s or empty < idle_s / 0.05) and time.monotonic() - begun < most_s:
        got = source.read(0.05)
        out += got
        empty += 1
        if got or any(t.is_alive() for t in _senders) or (empty * 0.05 >= idle_s and _on_the_way()):
            last, empty = time.monotonic(), 0
    return out


def refused(kind: str, messages: list[list[bytes]], says: str, **options: Any) -> None:
    """Opened on a publisher of these messages, the source says that; on a busy computer they may take longer to come."""
    for wait_s in (0.5, 4.0, 30.0):
        with publishing(messages) as address, pytest.raises(SourceError) as told:
            opened(kind, address, wait_s=wait_s, **options).__enter__()
        if re.search(says, str(told.value)):
            return
    raise AssertionError(f"{told.value} does not say {says}")


def blocks_of(items: list[Block | StreamEvent]) -> list[Block]:
    return [i for i in items if isinstance(i, Block)]


def events_of(items: list[Block | StreamEvent]) -> list[StreamEvent]:
    return [i for i in items if isinstance(i, StreamEvent)]


@contextmanager
def into_ring(
    items: list[Block | StreamEvent], info: StreamInfo, path: Path, **options: Any
) -> Iterator[tuple[np.ndarray, Integrity, Ring]]:
    """The items through the integrity check: (samples, channels) of the ring, the check, the ring."""
    blocks = blocks_of(items)
    jumps = [b.first_sample - a.first_sample - len(a.data) for a, b in pairwise(blocks)]
    n = sum(len(b.data) for b in blocks) + sum(j for j in jumps if j > 0) + 1000
    ring = Ring.create(path, info, seconds=n / info.fs_hz)
    integrity = Integrity(RingWriter(ring, info), wait_s=0.0, **options)
    for item in items:
        integrity.accept(item)
    integrity.finish()
    try:
        yield ring.data[: ring.committed], integrity, ring
    finally:
        ring.close()


def gap_rows(ring: Ring) -> list[tuple[int, int, str, int]]:
    """(start, stop, reason, channels) of every gap the ring lists."""
    from spiked.ring import GAP_REASONS

    rows, _, lost = ring.rows("gaps", 0)
    assert lost == 0
    return [(int(r["start"]), int(r["stop"]), GAP_REASONS[r["reason"]], int(r["n_channels"])) for r in rows]


def ramp(t: np.ndarray | range, channels: int) -> np.ndarray:
    """(samples, channels) int16 made of sample number and channel: the recording behind the capture."""
    t = np.asarray(t, np.int64)
    return ((t[:, None] * 3 + np.arange(channels)[None, :] * 101) % 4001 - 2000).astype(np.int16)


def noise_codes(n: int, channels: int, seed: int = 0, spread: float = 60.0) -> np.ndarray:
    """(n, channels) int16, different everywhere."""
    return np.rint(np.random.default_rng(seed).normal(0, spread, (n, channels))).astype(np.int16)


def some_info(
    channels: int, fs_hz: float, dtype: str = "int16", gain_uv: float = 0.195, **more: Any
) -> StreamInfo:
    return StreamInfo(
        name="served",
        fs_hz=fs_hz,
        channel_ids=tuple(f"CH{i + 1}" for i in range(channels)),
        positions_um=tuple((0.0, 20.0 * i) for i in range(channels)),
        dtype=dtype,
        gain_uv=(gain_uv,) * channels,
        **more,
    )


class HeldUp:
    """A Subscriber whose reader is held up: a number stands for seconds after which nothing was found."""

    def __init__(self, *found: list[list[bytes]] | float) -> None:
        self.found = list(found)

    def drain(self, _timeout_s: float, _at_most: int) -> list[list[bytes]]:
        now = self.found.pop(0)
        if isinstance(now, list):
            return now
        time.sleep(now)
        return []

    def resize(self, _bytes: int) -> None: ...

    def close(self) -> None: ...
