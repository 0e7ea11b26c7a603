"""What reads the messages of our own clients: topics, requests, operations, with real messages to begin from."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from spiked.bench.fuzz import Decoder, Message
from spiked.bench.fuzz_seeds import CHANNELS, FS, WEIGHTS, spikes
from spiked_client import protocol
from spiked_client.errors import UnknownStream
from spiked_client.protocol import BLIND, LEDGER, ProtocolError


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

    server, runner = ControlServer("127.0.0.1", 0, {}), asyncio.Runner()
    runner.run(server.start())

    async def read(frames: Message) -> Any:
        return server._read([b"peer"], frames)

    def close() -> None:
        runner.run(server.close())
        runner.close()

    return Decoder("control request", _requests(), lambda f: runner.run(read(f)), close=close)


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
