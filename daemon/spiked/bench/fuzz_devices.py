"""What reads the bytes of devices, stimulators and brokers, with real messages to begin from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from spiked.bench.fuzz import Decoder, Message
from spiked.errors import SourceError
from spiked_client.errors import ClientError


def _into_ring(folder: Path, name: str, info: Any) -> Callable[[list[Any]], None]:
    """What a source hands over goes through the integrity check into a ring."""
    from spiked.integrity import Integrity
    from spiked.ring import Ring, RingWriter

    ring = Ring.create(folder / f"{name}.ring", info, 0.2)
    integrity = Integrity(RingWriter(ring, info), max_gap_s=0.1, wait_s=0.0)

    def put(items: list[Any]) -> None:
        for item in items:
            integrity.accept(item)

    return put


def open_ephys(folder: Path) -> Decoder:
    from spiked.config import Stream
    from spiked.sources.base import Subscriber
    from spiked.sources.openephys import OpenEphysSource, Seen
    from spiked.sources.wire_openephys import DATA, EVENT, DataHeaders, data_fields, parse_header, ttl_message

    headers = DataHeaders("Neuropix", [f"CH{i}" for i in range(2)], 30_000)
    seeds: list[Message] = []
    for k in range(4):
        headers.block(12, 5000 + 12 * k, 1_700_000_000_000)
        payload = np.arange(12, dtype="<f4").tobytes()
        seeds += [[DATA, headers(2 * k + c + 1, c), payload] for c in range(2)]
    beginning = Seen()
    for frames in seeds:
        beginning.raw.append(frames)
        beginning.add(data_fields(parse_header(frames[1])), frames[2])
    spike = {
        "message_num": 11,
        "type": "spike",
        "spike": {"num_channels": 2, "num_samples": 3, "sample_num": 5010, "electrode": "E"},
    }
    seeds += [
        ttl_message(9, 5010, 3, 1, 8, "Neuropix", 1_700_000_000_000),
        [EVENT, json.dumps(spike).encode(), bytes(24)],
    ]
    source = OpenEphysSource(Stream(name="oe", source="openephys", address="tcp://127.0.0.1:1"))
    source._subscriber = Subscriber("tcp://127.0.0.1:1", 1.0, 3000)
    put = _into_ring(folder, "oe", source._settle(beginning))
    put(source._ready)
    now = 10**9

    def feed(frames: Message) -> None:
        nonlocal now
        now += 10**7
        out: list[Any] = []
        source._learn(frames)
        try:
            source._take([frames], now, out)
        finally:
            put(out)

    return Decoder("open ephys", seeds, feed, (SourceError,), close=source.close)


def maxwell(folder: Path) -> Decoder:
    from spiked.config import Stream
    from spiked.sources.base import Subscriber
    from spiked.sources.maxwell import MaxwellSource
    from spiked.sources.wire_maxwell import SPIKE_NEW, SPIKE_OLD, frame_head, spike_part

    values = np.full(8, 512, "<f4").tobytes()
    seeds: list[Message] = [[frame_head(1000 + k), values, b""] for k in range(6)]
    one = (np.array([1003]), np.array([2]), np.array([-30.0]))
    seeds += [
        [frame_head(1006 + k), values, spike_part(*one, layout)]
        for k, layout in enumerate((SPIKE_NEW, SPIKE_OLD))
    ]
    source = MaxwellSource(Stream(name="mx", source="maxwell", address="tcp://127.0.0.1:1"))
    source._subscriber = Subscriber("tcp://127.0.0.1:1", 1.0, 3000)
    put = _into_ring(folder, "mx", source._settle(seeds[:6]))
    put(source._ready)
    now = 10**9

    def feed(frames: Message) -> None:
        nonlocal now
        now += 10**7
        put(source._decode([frames], now))

    return Decoder("maxwell", seeds, feed, close=source.close)


class _Lines:
    """A connection that says what it was given, and closes."""

    def __init__(self) -> None:
        self.data: list[bytes] = []

    def recv(self, n: int) -> bytes:
        if not self.data:
            return b""
        head = self.data.pop(0)
        if len(head) > n:
            self.data.insert(0, head[n:])
        return head[:n]

    def recv_into(self, view: memoryview) -> int:
        data = self.recv(len(view))
        view[: len(data)] = data
        return len(data)

    def sendall(self, _data: bytes) -> None: ...


def spikeglx(_folder: Path) -> Decoder:
    from spiked.sources.spikeglx_link import SpikeGlxLink
    from spiked.sources.wire_spikeglx import Refused, WireError, gain_uv, geometry, geometry_lines

    link = object.__new__(SpikeGlxLink)
    lines = _Lines()
    link._socket = lines  # type: ignore[assignment]
    map_of = geometry_lines("NP1010", [(0.0, 20.0 * c) for c in range(3)]).encode() + b"OK\n"
    samples = b"BINARY_DATA 3 4 uint64(100)\n" + bytes(24) + b"OK\n"
    seeds = [
        [b"1.5 2 3\nOK\n"],
        [b"7\nOK\n"],
        [b"ERROR FETCH: Too late.\n"],
        [samples],
        [map_of],
        [b"1\n", b"2\nO", b"K\n"],
    ]

    def feed(frames: Message) -> None:
        for ask in (
            lambda: link.count("X"),
            lambda: gain_uv(*link.numbers(3, "X")),
            lambda: link.fetch(2, 0, 100, 4, "0#1#2#", 3),
            lambda: geometry(link.ask("X"), 3),
        ):
            lines.data, link._buffer = [f for f in frames if f], bytearray()
            try:
                ask()
            except (OSError, Refused, WireError):
                continue

    return Decoder("spikeglx", seeds, feed)


def trigger_socket(_folder: Path) -> Decoder:
    """What a stimulator says to the daemon, and what a daemon says to the stimulator."""
    from spiked.act.outputs.base import Command
    from spiked.act.outputs.trigger import TriggerSocket
    from spiked.config import Output
    from spiked.rehearsal import free_ports
    from spiked_client.stimulator import Stimulator, encode

    out = TriggerSocket(Output(name="o", kind="zmq", address=f"tcp://127.0.0.1:{free_ports(1)[0]}"))
    stimulator = Stimulator(out.endpoint)  # not entered: what it reads is handed to it
    seeds = [
        [b"peer", encode("ready", name="s")], [b"peer", encode("done", number=1, ok=True, text="")], [b"peer", encode("leave")],
        [b"peer", encode("stimulate", number=1, rule="r", sample=5, pattern="p", electrodes=[1], amplitude_ua=1.5, width_us=None, decided_ns=7)],
        [b"peer", encode("taken", error="x")], [b"peer", encode("welcome", output="o")],
    ]  # fmt: skip
    part, command = zmq.Frame(b""), Command(1, "r", 5, "p", (1,), None, None, 7)

    def feed(frames: Message) -> None:
        out._open[1] = 1 << 62
        out._hear(frames, part)
        out.send(command)
        out._acks.clear()
        stimulator._read(frames[-1] if frames else b"", 5)

    return Decoder("trigger socket", seeds, feed, (ClientError,), close=out.close)


def text_replies(_folder: Path) -> Decoder:
    """Answers of MaxLab, SpikeGLX and Open Ephys to a command, whole and in pieces."""
    from spiked.act.outputs import maxlab, openephys
    from spiked.act.outputs import spikeglx as lines
    from spiked.act.outputs.base import Command
    from spiked.act.outputs.exchange import Exchange, Words

    class Peer:
        def __init__(self) -> None:
            self.data: list[bytes] = []

        def send(self, _data: bytes) -> bool:
            return True

        def receive(self) -> bytes | None:
            return self.data.pop(0) if self.data else None

        def renew(self) -> None: ...

        def close(self) -> None: ...

    judges = (maxlab._answer, lines._answer, openephys._handled, openephys._status)
    body = b'HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{"a"'
    seeds: list[Message] = [
        [b"OK\n"],
        [b"ERROR no such line\n"],
        [b"TTLHandled: Channel=1"],
        [body],
        [body[:9], body[9:20], body[20:]],
    ]
    command = Command(1, "r", 5, "p", (), None, None, 7)

    def feed(frames: Message) -> None:
        for judge in judges:
            peer = Peer()
            exchange = Exchange("o", "peer", peer, Words(lambda _p: b"x", judge), 100.0)
            exchange.send(command)
            peer.data = list(frames)
            for _ in range(len(frames) + 1):
                for ack in exchange.poll():
                    ack.text.encode()

    return Decoder("text replies", seeds, feed)


def mqtt_command(_folder: Path) -> Decoder:
    from spiked.publish.mqtt_commands import Malformed, read

    seeds = [
        [json.dumps(c).encode()]
        for c in ({"id": "a", "op": "start"}, {"id": "b", "op": "mark", "sample": 5, "text": "x", "value": 1.5, "line": 1}, {"id": "c", "op": "stop_stimulation", "why": "w"})
    ]  # fmt: skip

    def feed(frames: Message) -> None:
        json.dumps(read(b"".join(frames)))

    return Decoder("mqtt command", seeds, feed, (Malformed,))
