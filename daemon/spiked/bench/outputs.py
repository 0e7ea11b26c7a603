"""`spiked bench outputs`: how long every output takes to its peer and back.

The peers run in a process of their own, behind real sockets and a terminal pair, and answer at once with the words of the
real programs: what is measured is this side's share, loopback, and the wake-up of a waiting peer. The real programs' own
time comes on top. The output is polled as the live process does between chunks.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pty
import socketserver
import threading
import time
import tty
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from spiked.act.outputs.base import Ack, Command, Output, open_output
from spiked.bench.figures import spread
from spiked.bench.machine import conditions
from spiked.config import Output as OutputConfig
from spiked.errors import SpikedError
from spiked.rehearsal import free_ports
from spiked_client.stimulator import Stimulator

POLL_S = 0.00003  # as in the live process
PATTERN, SETTLE_S = "single", 1.0
PATIENCE_MS = 2000.0  # a slow answer is measured, not refused
Say = Callable[[str], None]


# ---- peers -----------------------------------------------------------------------------------------------------


def _stimulator(port: int, _ready: Any) -> None:
    with Stimulator(f"tcp://127.0.0.1:{port}", "bench") as stimulator:
        while True:
            wanted = stimulator.receive(1.0)
            if wanted is not None:
                stimulator.answer(wanted)


def _rep(port: int, ready: Any, answer: Callable[[bytes], bytes]) -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind(f"tcp://127.0.0.1:{port}")
        ready.set()
        while True:
            socket.send(answer(socket.recv()))


def _network_events(port: int, ready: Any) -> None:
    _rep(port, ready, lambda said: said.replace(b"TTL ", b"TTLHandled: "))


def _maxlab(port: int, ready: Any) -> None:
    _rep(port, ready, lambda _said: b"OK")


class _Http(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        body = b'{"info":""}'
        while self.rfile.readline():
            length = 0
            while line := self.rfile.readline().strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class _Lines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while self.rfile.readline():
            self.wfile.write(b"OK\n")


def _tcp(port: int, ready: Any, handler: type[socketserver.StreamRequestHandler]) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", port), handler) as server:
        server.daemon_threads = True
        ready.set()
        server.serve_forever()


def _message(port: int, ready: Any) -> None:
    _tcp(port, ready, _Http)


def _spikeglx(port: int, ready: Any) -> None:
    _tcp(port, ready, _Lines)


PEERS: dict[str, tuple[Callable[[int, Any], None], str, dict[str, Any]]] = {
    "zmq": (_stimulator, "tcp", {}),
    "network_events": (_network_events, "tcp", {"patterns": {PATTERN: 1}, "pulse_ms": 0.2}),
    "oe_message": (_message, "http", {"patterns": {PATTERN: "ACQBOARD TRIGGER 1 1"}}),
    "maxlab": (_maxlab, "tcp", {}),
    "spikeglx": (_spikeglx, "tcp", {"patterns": {PATTERN: "Dev4/port0/line5"}, "pulse_ms": 0.2}),
}


# ---- measuring -------------------------------------------------------------------------------------------------


def round_trips(output: Output, commands: int, every_ms: float) -> np.ndarray:
    """Milliseconds from send to acknowledgement. Raises SpikedError when a command fails."""
    took: list[float] = []
    for number in range(1, commands + 1):
        due = time.monotonic() + every_ms / 1000
        output.send(Command(number, "", 0, PATTERN, (0,), None, None, time.monotonic_ns()))
        acks: list[Ack] = []
        while time.monotonic() < due or not acks:
            acks += output.poll()
            time.sleep(POLL_S)
        if not acks[0].ok:
            raise SpikedError(f"output {output.name} failed at command {number}: {acks[0].text}")
        took.append((acks[0].ack_ns - acks[0].sent_ns) / 1e6)
    return np.array(took)


def _settled(output: Output) -> None:
    until = time.monotonic() + SETTLE_S
    while time.monotonic() < until:
        output.poll()
        time.sleep(0.001)


def _over_a_socket(kind: str, commands: int, every_ms: float) -> np.ndarray:
    peer, scheme, options = PEERS[kind]
    context, (port,) = mp.get_context("spawn"), free_ports(1)
    ready = context.Event()
    process = context.Process(target=peer, args=(port, ready), daemon=True)
    process.start()
    if kind != "zmq" and not ready.wait(30):  # the trigger socket is bound on this side
        raise SpikedError(f"the peer of {kind} did not start")
    try:
        output = open_output(
            OutputConfig.model_validate(
                {
                    "name": kind,
                    "kind": kind,
                    "address": f"{scheme}://127.0.0.1:{port}",
                    "timeout_ms": PATIENCE_MS,
                    **options,
                }
            )
        )
        try:
            _settled(output)
            while kind == "zmq" and getattr(output, "there", None) is None:
                output.poll()
                time.sleep(0.001)
            return round_trips(output, commands, every_ms)
        finally:
            output.close()
    finally:
        process.terminate()
        process.join()


def _over_a_terminal(commands: int, every_ms: float) -> np.ndarray:
    """A serial port that echoes, without the 87 us per byte of a real line at 115200 baud."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    done = threading.Event()

    def echo() -> None:
        while not done.is_set():
            os.write(master, os.read(master, 64))

    threading.Thread(target=echo, daemon=True).start()
    config = OutputConfig(name="serial", kind="serial", address=os.ttyname(slave), patterns={PATTERN: 1}, echo=True, timeout_ms=PATIENCE_MS)  # fmt: skip
    output = open_output(config)
    try:
        return round_trips(output, commands, every_ms)
    finally:
        done.set()
        output.send(Command(0, "", 0, PATTERN, (), None, None, 0))  # wakes the echo, which ends
        output.close()


def bench(commands: int = 500, every_ms: float = 10.0, say: Say = lambda _s: None) -> dict[str, Any]:
    """Round trips in ms of every kind of output."""
    machine, trips = conditions(), dict[str, Any]()
    for kind in PEERS:
        trips[kind] = spread(_over_a_socket(kind, commands, every_ms))
        say(f"{kind}: mean {trips[kind]['mean']} ms, p99 {trips[kind]['p99']} ms")
    trips["serial"] = spread(_over_a_terminal(commands, every_ms))
    say(f"serial: mean {trips['serial']['mean']} ms, p99 {trips['serial']['p99']} ms")
    return {"bench": "outputs", "machine": machine, "every_ms": every_ms, "round_trip_ms": trips}
