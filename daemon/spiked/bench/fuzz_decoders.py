"""Everything in the daemon and its clients that reads what others wrote, with real messages to begin from."""

from __future__ import annotations

import asyncio
import json
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import zmq

from spiked.bench.fuzz import Decoder, Message
from spiked.errors import ConfigError, OfflineError, RecordingError, SourceError
from spiked_client import access, protocol
from spiked_client.errors import AccessError, ClientError, UnknownStream
from spiked_client.protocol import BLIND, LEDGER, SPIKE, ProtocolError

FS, CHANNELS = 20_000.0, 4
WEIGHTS = {
    "replay answer": 0.3, "operation": 0.3, "configuration": 0.1, "probe file": 0.03, "sequences": 0.01, "templates": 0.01, "session file": 0.001, "redo log": 0.2,
    "electrode map": 0.3, "access list": 0.3, "key file": 0.3, "ledger": 0.2, "spool": 0.3, "state file": 0.3,
}  # fmt: skip


def spikes(n: int = 3) -> np.ndarray:
    out = np.zeros(n, SPIKE)
    out["sample"], out["unit"], out["amplitude_uv"] = np.arange(n) * 100 + 1000, np.arange(n) % 2, -60
    return out


def _published() -> list[Message]:
    header = {
        "first": 1000,
        "stop": 1300,
        "stamps": {"arrival": 5, "published": 9},
        "latency_ms": {"n": 3, "mean": 1.0, "max": 2.0},
    }
    blind, ledger = np.zeros(1, BLIND), np.zeros(2, LEDGER)
    return [
        protocol.encode("spikes.A", 4, "run-1", header, spikes=spikes(), blind=blind),
        protocol.encode("ledger.A", 5, "run-1", None, ledger=ledger),
        protocol.encode(
            "health",
            6,
            "run-1",
            {"streams": {"A": {"samples": 5, "rates_hz": {3: 1.5}}}, "state": "recording"},
        ),
    ]


# ---- the wire of our own clients -------------------------------------------------------------------------------


def published_message(_folder: Path) -> Decoder:
    return Decoder("published message", _published(), protocol.decode, (ProtocolError,))


def replay_answer(_folder: Path) -> Decoder:
    """What the replay port answers, at the client."""
    from spiked_client.errors import Incompatible
    from spiked_client.order import Order

    stored = [
        protocol.encode("spikes.A", n, "run-1", {"first": n, "stop": n + 1}, spikes=spikes(1))
        for n in (4, 5, 6)
    ]
    head: dict[str, Any] = {
        "run": "run-1",
        "topic": "spikes.A",
        "newest": 9,
        "gone": 0,
        "next": 7,
        "sizes": [[len(p) for p in m] for m in stored],
    }
    body = b"".join(p for m in stored for p in m)
    seeds = [
        [protocol.encode_reply(1, True, **head), body],
        [protocol.encode_reply(1, True, **{**head, "gone": 3}), body],
        [protocol.encode_reply(1, False, error="over 200 requests a second", retry_ms=5)],
    ]
    late = protocol.encode("spikes.A", 10, "run-1", {"first": 10, "stop": 11}, spikes=spikes(1))

    def feed(frames: Message) -> None:
        for past in (False, True):
            order = Order(from_start=past)
            order._last["spikes.A"] = ("run-1", 3)
            steps = order.past("spikes.A") if past else order.take(late)
            try:
                next(steps)
                for _ in range(40):
                    steps.send(frames or [b""])
            except StopIteration:
                continue

    return Decoder("replay answer", seeds, feed, (Incompatible,))


def reply(_folder: Path) -> Decoder:
    from spiked_client.control import read_reply
    from spiked_client.errors import Incompatible, Refused

    seeds = [
        [protocol.encode_reply(7, True, state="idle", streams={})],
        [protocol.encode_reply(7, False, error="no")],
    ]
    return Decoder("reply", seeds, lambda f: read_reply("status", 7, f or [b""]), (Refused, Incompatible))


def endpoints(_folder: Path) -> Decoder:
    from spiked_client.wiring import wire

    told = {
        "streams": {"A": {"pub": "tcp://0.0.0.0:5570", "replay": "tcp://127.0.0.1:5571", "run": "r"}},
        "health": "tcp://127.0.0.1:5573",
    }
    seeds = [[protocol.encode_reply(7, True, **told)]]

    def feed(frames: Message) -> None:
        wire(("spikes", "gaps.A", "health"), protocol.decode_map(b"".join(frames)), "rig")

    return Decoder("endpoints", seeds, feed, (ProtocolError, UnknownStream))


REQUESTS: tuple[dict[str, Any], ...] = (
    {"op": "calibrate", "stream": "s"}, {"op": "cancel_calibration"}, {"op": "mark_stim", "sample": 1500, "line": 2, "text": "p", "value": 1.5, "stream": "s"},
    {"op": "arm", "triggers": ["t"], "lease_s": 5.0}, {"op": "renew", "lease": "abc"}, {"op": "disarm", "lease": "abc"},
    {"op": "set_limits", "limits": {"max_per_s": 10, "max_nc_per_pulse": 2.0}}, {"op": "stop_stimulation", "why": "smoke"}, {"op": "clear_stop"},
    {"op": "stimulate", "lease": "abc", "output": "o", "pattern": "p", "electrodes": [1, 2], "amplitude_ua": 5.0, "width_us": 200.0, "pulses": 1},
    {"op": "set_trigger", "trigger": {"name": "t", "when": "unit", "units": [0], "refractory_ms": 10.0, "delay_ms": 2.0}},
    {"op": "set_trigger", "trigger": {"name": "q", "when": "sequence", "units": [0, 1], "intervals_ms": [[1, 10]], "probability": 0.5}},
    {"op": "set_trigger", "trigger": {"name": "b", "when": "burst", "count": 2, "window_ms": 20.0, "blind": "array"}},
    {"op": "set_trigger", "trigger": {"name": "r", "when": "rate", "units": [0], "rate_hz": 2.0, "window_ms": 500.0}},
    {"op": "remove_trigger", "name": "t"}, {"op": "triggers"}, {"op": "describe"}, {"op": "template", "stream": "s", "unit": 1},
    {"op": "snippets", "stream": "s", "samples": [1200], "channels": [0, 1], "before": 10, "after": 20},
)  # fmt: skip


def _requests() -> list[Message]:
    return [[protocol.encode_request(i + 1, **r)] for i, r in enumerate(REQUESTS)]


def control_request(_folder: Path) -> Decoder:
    """The control port's own reading, behind its real socket."""
    from spiked.publish.control import ControlServer

    server = ControlServer("127.0.0.1", 0, {})

    def close() -> None:
        asyncio.run(server.close())

    return Decoder("control request", _requests(), lambda f: server._read([b"peer"], f), close=close)


def replay_request(_folder: Path) -> Decoder:
    from spiked.publish.zmq_pub import Publisher

    publisher = Publisher("127.0.0.1", 0, 0, "run-1", replay_messages=64)
    for _ in range(80):
        publisher.send("spikes.A", {"first": 0, "stop": 1}, spikes=spikes())
    server = publisher._replay
    assert server is not None
    ask = {"topic": "spikes.A", "run": "run-1", "from": 20, "to": 70}
    seeds = [
        [protocol.encode_request(3, **ask)],
        [protocol.encode_request(4, topic="gaps.A", **{"from": 1, "to": 2})],
    ]

    def feed(frames: Message) -> None:
        server._requests._left.clear()
        server._bytes._left.clear()
        server._answer(frames, b"peer")

    return Decoder("replay request", seeds, feed, close=publisher.close)


class _Live:
    """The live process's end of an operation: what would travel as JSON does, and a reply must come."""

    running = True

    def __init__(self, folder: Path) -> None:
        from spiked import config as configuration
        from spiked.live.acting import Acting
        from spiked.ring import Ring
        from spiked.stream import StreamInfo

        positions = tuple((0.0, 20.0 * c) for c in range(CHANNELS))
        self.info = StreamInfo(
            "s", FS, tuple(map(str, range(CHANNELS))), positions, "int16", (1.0,) * CHANNELS
        )
        data = {
            "stream": [{"name": "s", "source": "maxwell"}],
            "trigger": [{"name": "t", "when": "unit", "units": [0]}],
        }
        self.config = configuration.parse(data)
        self.ring = Ring.create(folder / "fuzz.ring", self.info, 0.1)
        self.answer: dict[str, Any] = {}
        link = SimpleNamespace(tell=self._told, orphaned=False)
        pipeline = SimpleNamespace(units=None, mark_stim=lambda *_a: None, stims_found=lambda: ())
        publisher = SimpleNamespace(send=lambda *_a, **_k: 1)
        self.acting = Acting(self.config, self.info, folder, link, publisher, pipeline, 0)  # type: ignore[arg-type]
        self.now_ns, self.at = 1_000_000_000, 1000

    def _told(self, event: str, **fields: Any) -> None:
        told = json.loads(json.dumps({"event": event, **fields}))
        if event == "answer":
            self.answer = told

    async def ask(self, op: str, _timeout_s: float, **fields: Any) -> dict[str, Any]:
        self.acting.answer(json.loads(json.dumps({"op": op, "id": 1, **fields})))
        if "failed inside" in self.answer.get("error", ""):
            raise AssertionError(self.answer["error"])
        self.run()
        return {k: v for k, v in self.answer.items() if k not in ("event", "id")}

    def command(self, op: str, **fields: Any) -> None:
        json.loads(json.dumps({"op": op, **fields}))

    def run(self) -> None:
        """A few spikes through whatever rules there are now."""
        self.now_ns, self.at = self.now_ns + 10_000_000, self.at + 200
        some = spikes(4)
        some["sample"] = self.at + np.array([0, 40, 80, 120])
        engine = self.acting.engine
        engine.clock.chunk(self.at + 200, self.now_ns)
        engine.process(some, np.zeros(0, BLIND), self.at + 200, self.now_ns)
        engine.poll(self.now_ns)
        engine.take_news()


def operation(folder: Path) -> Decoder:
    """A request all the way: the control port's reading, the supervisor's operation, the live process's answer."""
    from spiked import marks
    from spiked.errors import SpikedError
    from spiked.integrity import Integrity
    from spiked.publish.control import read_request
    from spiked.ring import RingWriter
    from spiked.service import Service
    from spiked.stream import Block

    live = _Live(folder)
    writer = RingWriter(live.ring, live.info)
    Integrity(writer).accept(Block(1000, np.zeros((1500, CHANNELS), np.int16), 5))

    class Acquire:
        running = True

        def command(self, op: str, **fields: Any) -> None:
            command = json.loads(json.dumps({"op": op, **fields}))
            if op == "mark":
                writer.add_event(marks.event(command, live.ring.first_sample, live.ring.next_sample, FS))

    track = SimpleNamespace(
        name="s", ring=live.ring, children={"live": live, "acquire": Acquire()}, endpoints={}, lives={}
    )
    session = SimpleNamespace(
        state="recording",
        folder=folder,
        tracks={"s": track},
        journal=SimpleNamespace(note=lambda *_a, **_k: None),
    )
    service = Service(live.config)
    service.session = session  # type: ignore[assignment]
    names = {r["op"] for r in REQUESTS}
    handlers = {op: h for op, h in service._handlers().items() if op in names}
    loop = asyncio.new_event_loop()
    before = live.acting.engine.triggers

    def feed(frames: Message) -> None:
        request: dict[str, Any] = {}
        read_request(frames, request)
        handler = handlers.get(request["op"])
        if handler is not None:
            try:
                protocol.encode_reply(1, True, **(loop.run_until_complete(handler(request)) or {}))
            finally:
                if len(live.acting.engine.triggers) > 8 or live.acting.engine.arming.armed:
                    live.acting.engine.arming.disarm()
                    live.acting.engine.set_triggers(before)

    def close() -> None:
        loop.close()
        live.acting.close()

    return Decoder("operation", _requests(), feed, (ProtocolError, SpikedError), WEIGHTS["operation"], close)


# ---- samples ---------------------------------------------------------------------------------------------------


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


# ---- stimulators -----------------------------------------------------------------------------------------------


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


# ---- files -----------------------------------------------------------------------------------------------------


def _file(
    path: Path,
    seeds: list[bytes],
    read: Callable[[Path], Any],
    name: str,
    errors: tuple[type[BaseException], ...],
) -> Decoder:
    """A decoder of a file's content."""

    def feed(frames: Message) -> None:
        path.write_bytes(b"".join(frames))
        path.chmod(0o600)
        read(path)

    return Decoder(name, [[s] for s in seeds], feed, errors, WEIGHTS.get(name, 1.0))


def configuration(folder: Path) -> Decoder:
    from spiked import config

    full = config.parse({
        "stream": [{"name": "a", "source": "maxwell"}, {"name": "b", "source": "openephys", "stim_lines": [1]}],
        "output": [{"name": "o", "kind": "zmq", "address": "tcp://127.0.0.1:5580"}],
        "trigger": [{"name": "t", "when": "sequence", "units": [1, 2], "intervals_ms": [[1, 5]], "stream": "a", "output": "o"}],
    })  # fmt: skip
    texts = [
        config.dump(full).encode(),
        b'[[stream]]\nname = "x"\nsource = "replay"\npath = "r"\n[live]\ncalibrate_s = 5\n',
    ]
    return _file(folder / "rig.toml", texts, config.load, "configuration", (ConfigError,))


def _keys() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def access_list(folder: Path) -> Decoder:
    entries = (
        access.Entry("anna", "control", key=_keys()[0]),
        access.Entry("wall", "watch", token_sha256=access.hash_token("t")),
    )
    return _file(
        folder / "access.toml",
        [access.dump_access(entries).encode()],
        lambda p: access.read_access(p.parent),
        "access list",
        (AccessError,),
    )


def key_file(folder: Path) -> Decoder:
    key = access.ClientKey("anna", "watch", _keys()[0], *_keys())
    return _file(folder / "anna.key", [key.dump().encode()], access.load_key, "key file", (AccessError,))


def task(_folder: Path) -> Decoder:
    from spiked.offline.task import Task

    seeds = [
        Task(
            ("/data/a.nwb", "/data/b.nwb"),
            "/data/out",
            "",
            {"well": 1, "fs_hz": 20000.0},
            {"sorter": "kilosort4"},
        ).dump()
    ]

    def feed(frames: Message) -> None:
        found = Task.load(b"".join(frames).decode("utf-8", "replace"))
        found.key, found.name, found.folder, found.is_session, found.dump()

    return Decoder("task", [[s.encode()] for s in seeds], feed, (OfflineError,))


def stream_description(_folder: Path) -> Decoder:
    from spiked.stream import StreamInfo

    info = StreamInfo(
        "s", FS, ("a", "b"), ((0.0, 1.0), (2.0, 3.0)), "int16", (1.0, 2.0), annotations={"x": [1]}
    )

    def feed(frames: Message) -> None:
        found = StreamInfo.from_json(b"".join(frames))
        found.positions, found.samples(1.0), found.same_wire(info)

    return Decoder("stream description", [[info.to_json().encode()]], feed, (ConfigError,))


def superblock(_folder: Path) -> Decoder:
    from spiked.record import superblock as block

    head = bytearray(block.SIGNATURE + bytes([3, 8, 8, 5]) + bytes(block.SIZE - 16))
    seed = bytes(head[:44]) + block.lookup3(bytes(head[:44])).to_bytes(4, "little")

    def feed(frames: Message) -> None:
        block.parse(b"".join(frames), Path("x")).cleared(4096)

    return Decoder("superblock", [[seed]], feed, (RecordingError,))


def electrode_map(folder: Path) -> Decoder:
    from spiked.sources.electrode_map import read_electrode_map

    return _file(
        folder / "m.cfg",
        [b"0(1000)17.5/35;1(1001)35/35;\n2(1002)5.25e1/35;"],
        read_electrode_map,
        "electrode map",
        (ConfigError,),
    )


def probe_file(folder: Path) -> Decoder:
    import probeinterface

    from spiked.sources.probe import positions_for

    probe = probeinterface.generate_linear_probe(num_elec=CHANNELS)
    probe.set_device_channel_indices(np.arange(CHANNELS))
    path = folder / "seed.json"
    probeinterface.write_probeinterface(path, probe)
    return _file(
        folder / "p.json",
        [path.read_bytes()],
        lambda p: positions_for(p, CHANNELS),
        "probe file",
        (ConfigError,),
    )


def ledger(folder: Path) -> Decoder:
    from spiked.act.ledger import read
    from spiked.act.report import summary

    records = np.zeros(4, LEDGER)
    records["number"], records["rule"], records["outcome"], records["reason"] = (
        [1, 2, 2, 3],
        b"r",
        [5, 0, 4, 5],
        [0, 0, 1, 0],
    )
    records["sent_ns"], records["ack_ns"] = 10, 20
    return _file(
        folder / "s.ledger.bin", [records.tobytes()], lambda p: json.dumps(summary(read(p), FS)), "ledger", ()
    )


def spool(folder: Path) -> Decoder:
    from spiked.live.spool import Spool

    def read(path: Path) -> None:
        one = Spool(path.parent, "f")
        one.close()

    return _file(folder / "f.spikes.bin", [spikes(20).tobytes()], read, "spool", ())


def state_file(folder: Path) -> Decoder:
    from spiked.service import unfinished

    seed = json.dumps({"state": "recording", "pid": 4_000_000, "started": "2026-01-01T00:00:00", "error": ""})
    return _file(folder / "state.json", [seed.encode()], unfinished, "state file", ())


def redo_log(folder: Path) -> Decoder:
    import struct
    import zlib

    from spiked.record import edit

    body = edit.HEAD.pack(edit.MAGIC, 4096, 8192, 1) + struct.pack("<qi", 0, 16) + bytes(16)
    victim = folder / "victim.nwb"

    def feed(frames: Message) -> None:
        log = b"".join(frames)
        if log[:1] != b"!":  # as if the sum had been right: what is in it must still make sense
            log = log[:-4] + struct.pack("<I", zlib.crc32(log[:-4]))
        victim.write_bytes(bytes(4096))
        edit.redo_path(victim).write_bytes(log)
        edit.replay(victim)

    return Decoder(
        "redo log",
        [[body + struct.pack("<I", zlib.crc32(body))]],
        feed,
        (RecordingError,),
        WEIGHTS["redo log"],
    )


def sequences(folder: Path) -> Decoder:
    from spiked.sort.parameters import RTSortParameters
    from spiked.sort.sequences import Sequences

    n, of_each = np.ones(2, np.float32), np.ones(3)
    one = Sequences(
        FS, ("0", "1", "2", "3"), np.zeros((4, 2)), 1.0, 0.0, RTSortParameters(), unit_ids=np.arange(2), roots=np.array([0, 2]),
        root_amp_mean=n, root_amp_sd=n, root_amplitude_uv=-n, min_loose=n, min_inner=n, n_spikes=n, rate_hz=n, ptr=np.array([0, 2, 3]),
        electrode=np.array([0, 1, 2]), latency=of_each, latency_sd=of_each, amp=of_each, amp_sd=of_each,
        prob=of_each, flags=of_each,
    )  # fmt: skip
    one.save(folder / "seed.sequences.h5")
    return _hdf5(folder / "x.sequences.h5", folder / "seed.sequences.h5", Sequences.load, "sequences")


def templates(folder: Path) -> Decoder:
    from spiked.templates.library import Templates

    n = np.ones(2, np.float32)
    one = Templates(
        FS, ("0", "1"), np.zeros((2, 2)), np.tile([1.0, 0, 0, 1, 0, 0], (1, 1)), np.ones(3), np.eye(2), 4, np.eye(2, 8), np.arange(2), np.array([0, 1]),
        -n, n, n, n, n, n, n, np.array([0, 1, 2]), np.array([0, 1]), np.ones((2, 2)), np.array([0, 1, 2]), np.array([0, 1]), np.ones((2, 10)),
    )  # fmt: skip
    one.save(folder / "seed.templates.h5")
    return _hdf5(folder / "x.templates.h5", folder / "seed.templates.h5", Templates.load, "templates")


def _hdf5(path: Path, seed: Path, load: Callable[[Path], Any], name: str) -> Decoder:
    """A reader of HDF5: messages are the file's content as JSON, from which a sound file is made. The format is libhdf5's affair."""
    import h5py

    with h5py.File(seed, "r") as f:
        attributes = {k: v.item() if isinstance(v, np.generic) else v for k, v in f.attrs.items()}
        content = {"attributes": attributes, "datasets": {k: v[()].tolist() for k, v in f.items()}}

    def feed(frames: Message) -> None:
        try:
            told = json.loads(b"".join(frames))
            with h5py.File(path, "w") as f:
                for k, v in told["attributes"].items():
                    f.attrs[k] = v
                for k, v in told["datasets"].items():
                    f[k] = v
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RuntimeError):
            return  # no file can say that
        with np.errstate(all="ignore"):
            load(path)

    return Decoder(name, [[json.dumps(content).encode()]], feed, (ConfigError,), WEIGHTS[name])


def session_file(folder: Path) -> Decoder:
    """A session's NWB file in which something is other than it should be: `spiked recover`, and whoever reads recordings."""
    import shutil

    import h5py

    from spiked import config
    from spiked.errors import SpikedError
    from spiked.record.recover import recover
    from spiked.record.writer import SessionWriter
    from spiked.ring import Ring, RingWriter
    from spiked.sources.recordings import open_recording
    from spiked.stream import EventKind, StreamEvent, StreamInfo

    positions = tuple((0.0, 20.0 * c) for c in range(CHANNELS))
    info = StreamInfo(
        "s", FS, tuple(map(str, range(CHANNELS))), positions, "int16", (1.0,) * CHANNELS, source="maxwell"
    )
    ring = Ring.create(folder / "s.ring", info, 1.0)
    writer = RingWriter(ring)
    writer.start_at(1000)
    writer.write(np.ones((4000, CHANNELS), np.int16), 5)
    writer.add_gap(2000, 2100, "lost")
    writer.add_event(StreamEvent(1500, EventKind.STIM, 0, 1, 0.0, "p"))
    ring.end()
    settings = config.parse({"stream": [{"name": "s", "source": "maxwell"}], "record": {"min_free_gb": 0.0}})
    with warnings.catch_warnings():  # pynwb's own
        warnings.simplefilter("ignore")
        SessionWriter(folder / "s.nwb", ring, settings, session_id="x").run()
    names: list[str] = []
    with h5py.File(folder / "s.nwb", "r") as f:
        f.visit(names.append)
    path = folder / "x.nwb"

    def feed(frames: Message) -> None:
        shutil.copy(folder / "s.nwb", path)
        with h5py.File(path, "r+") as f:
            _disturb(f, names, random.Random(b"".join(frames)))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for read in (recover, _whole_recording):
                with suppress(SpikedError):
                    read(path)

    def _whole_recording(path: Path) -> None:
        with open_recording(path) as recording:
            recording.read(0, min(100, recording.n_samples))
            len(recording.invalid), len(recording.events)

    return Decoder("session file", [[b"s.nwb"]], feed, (), WEIGHTS["session file"])


def _disturb(f: Any, names: list[str], rng: random.Random) -> None:
    """Some objects or attributes of an HDF5 file gone, cut short, or replaced by something else."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(names)
        strange = rng.choice(
            (
                0,
                -1,
                1 << 62,
                1e300,
                float("nan"),
                "x",
                b"\xff",
                np.zeros(0),
                np.zeros((2, 3), "<i8"),
                [b"a", b"b"],
                np.full(9, -5),
                7.5,
            )
        )
        with suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RuntimeError):
            item, attributes = f[name], list(f[name].attrs)
            what = rng.randrange(5)
            if what == 0:
                del f[name]
            elif what == 1 and attributes:
                del item.attrs[rng.choice(attributes)]
            elif what == 2 and attributes:
                item.attrs[rng.choice(attributes)] = strange
            elif what == 3 and hasattr(item, "shape") and item.shape:
                short, kept = item[: rng.randrange(len(item) + 1)], dict(item.attrs)
                del f[name]
                f[name] = short
                f[name].attrs.update(kept)
            else:
                kept = dict(item.attrs)
                del f[name]
                f[name] = strange
                f[name].attrs.update(kept)


MAKERS: OrderedDict[str, Callable[[Path], Decoder]] = OrderedDict(
    (make.__name__.replace("_", " "), make)
    for make in (
        published_message, replay_answer, reply, endpoints, control_request, replay_request, operation, open_ephys, maxwell, spikeglx, trigger_socket,
        text_replies, mqtt_command, configuration, access_list, key_file, task, stream_description, superblock, electrode_map, probe_file, ledger,
        spool, state_file, redo_log, sequences, templates, session_file,
    )
)  # fmt: skip
NAMES = tuple(MAKERS)


def all_decoders(folder: Path) -> Iterator[Decoder]:
    """Each in a folder of its own under `folder`."""
    for name, make in MAKERS.items():
        place = folder / name.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        decoder = make(place)
        assert decoder.name == name
        yield decoder
