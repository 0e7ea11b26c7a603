"""Peers of the outputs, each behind a real socket or terminal and as the real program answers.

What a peer does with a request is its `mood`: "well", "slow" (it answers once the mood is another one), "silent", "refuses" or "leaves".
"""

from __future__ import annotations

import itertools
import os
import pty
import socket
import socketserver
import termios
import threading
import time
import tty
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import zmq

from spiked.act.outputs.base import Ack, Command, Output, open_output
from spiked.act.outputs.transports import TcpBytes
from spiked.config import Output as OutputConfig
from spiked.rehearsal import free_ports
from spiked_client.stimulator import Stimulator, Wanted

PATIENT_MS = 20_000.0  # for an answer that is meant to come, also from a busy computer
SLOWEST_S = 30.0
_numbers = itertools.count(1)


def opened(kind: str, address: str = "", **options: Any) -> Output:
    return open_output(OutputConfig(name="out", kind=kind, address=address, **options))


def command(pattern: str = "tetanus", **more: Any) -> Command:
    given = {
        "rule": "r",
        "sample": 4711,
        "electrodes": (3, 4),
        "amplitude_ua": 5.0,
        "width_us": None,
        "decided_ns": time.monotonic_ns(),
    }
    return Command(number=next(_numbers), pattern=pattern, **{**given, **more})


def acks(output: Output, n: int = 1, within_s: float = 30.0) -> list[Ack]:
    """The next n, polled as the live process does; every poll must be quick."""
    out: list[Ack] = []
    until = time.monotonic() + within_s
    while len(out) < n and time.monotonic() < until:
        out += quickly(output.poll)
        time.sleep(0.0005)
    assert len(out) == n, f"{len(out)} of {n} acks came: {out}"
    return out


def _stood_in_line_s() -> dict[str, float]:
    """How long each thread of this process was ready to run and others ran, and how long the whole computer stood still.

    Of all threads: one that has the interpreter's lock and stands in line holds up those that want it.
    """
    stood = {}
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{task}/schedstat", encoding="ascii") as f:
            stood[task] = int(f.read().split()[1]) / 1e9
    with open("/proc/stat", encoding="ascii") as f:
        stood["host"] = int(f.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return stood


def _since_s(before: dict[str, float]) -> float:
    """What came to it; a thread that has ended takes none of it away."""
    return sum(max(s - before.get(task, 0.0), 0.0) for task, s in _stood_in_line_s().items())


_line: tuple[float, dict[str, float]] = (0.0, {})  # when it was looked at, and what it was


_calls: Counter[str] = Counter()  # of `quickly` in a test
_held: Counter[str] = Counter()  # those that were held up


def quickly(call: Any, *args: Any) -> Any:
    """Run it and see that it did not wait for anybody but the processor.

    Once in a test, or in a hundred calls, the kernel may hold it up (a terminal's lock whose holder waits for a processor): a call that
    waits for a peer does so every time, and for longer.
    """
    global _line
    if time.monotonic() - _line[0] > 0.05:  # not at every call: there are many threads to look at
        _line = time.monotonic(), _stood_in_line_s()
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    _calls[test] += 1
    cpu, begun = time.thread_time(), time.monotonic()
    result = call(*args)
    took, used = time.monotonic() - begun, time.thread_time() - cpu
    if took > 0.03:
        line = _since_s(_line[1])
        _held[test] += took - line > 0.05 or used - line > 0.03
        assert _held[test] <= 1 + _calls[test] // 100 and took - line < 0.5, (
            f"took {took * 1000:.1f} ms, {used * 1000:.1f} ms of them working, {line * 1000:.1f} ms in line; {_held[test]} of {_calls[test]} calls"
        )
    return result


def given_up(output: Output, c: Command, after_ms: float) -> Ack:
    """The ack of a command that nobody answers: it comes with the first poll after so long, and with none before."""
    begun = time.monotonic()
    quickly(output.send, c)
    left = time.monotonic()  # it was sent by then
    while True:
        asked = time.monotonic()
        told = quickly(output.poll)
        if told or asked > left + after_ms / 1000:
            break
        time.sleep(0.001)
    (ack,) = told
    assert ack.number == c.number and not ack.ok and time.monotonic() > begun + after_ms / 1000
    return ack


def connected(output: Output) -> bool:
    """Whether the next request of an Exchange would leave."""
    transport: Any = output._transport  # type: ignore[attr-defined]
    if isinstance(transport, TcpBytes):
        return transport._connected() is not None
    return bool(transport._socket.poll(0, zmq.POLLOUT))


def ready(output: Output) -> None:
    """Until nothing is in the way of the next command: a connection, no line up, no answer awaited, no pause."""
    o: Any = output

    def there() -> bool:
        assert quickly(output.poll) == []
        return not (o._open or o._ends or o._paused_until > time.monotonic_ns()) and connected(output)

    eventually(there)


def eventually(what: Callable[[], Any], within_s: float = 30.0) -> None:
    until = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.002)


def sent_and_done(output: Output, c: Command, within_s: float = 30.0) -> Ack:
    quickly(output.send, c)
    (ack,) = acks(output, within_s=within_s)
    assert ack.number == c.number and ack.ack_ns >= ack.sent_ns
    return ack


def dawdle(peer: Any) -> None:
    """As long as it is slow: what a test sees meanwhile does not depend on how busy the computer is."""
    until = time.monotonic() + SLOWEST_S
    while peer.mood == "slow" and time.monotonic() < until:
        time.sleep(0.001)


class ZmqPeer(threading.Thread):
    """A REP socket; `answer(text) -> text`."""

    def __init__(self, port: int, answer: Any) -> None:
        super().__init__(name="peer", daemon=True)
        self.port, self.answer, self.mood = port, answer, "well"
        self.got: list[tuple[str, float]] = []
        self._quit = threading.Event()

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def run(self) -> None:
        with zmq.Context() as context:
            rep = self._bound(context)
            while not self._quit.is_set():
                if not rep.poll(20):
                    continue
                text = rep.recv().decode()
                self.got.append((text, time.monotonic()))
                if self.mood == "silent":  # a REP that never answers has to be given up by both sides
                    rep.close(0)
                    rep = self._bound(context)
                    continue
                dawdle(self)
                rep.send(self.answer(text, self.mood).encode())
            rep.close(0)

    def _bound(self, context: zmq.Context[Any]) -> Any:
        rep = context.socket(zmq.REP)
        for _ in range(3000):
            try:
                rep.bind(self.address)
                return rep
            except zmq.ZMQError:
                time.sleep(0.01)
        raise AssertionError("port stays taken")

    def __enter__(self) -> Self:
        self.start()
        wait_listening(self.port)
        return self

    def __exit__(self, *exc: object) -> None:
        self.mood = "well"
        self._quit.set()
        self.join(30)


def wait_listening(port: int) -> None:
    for _ in range(3000):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.01)
    raise AssertionError("the peer does not listen")


def network_events(port: int = 0) -> ZmqPeer:
    """The plugin: TTL Line=<1..256> State=<0/1>, anything else is NotHandled."""

    def answer(text: str, mood: str) -> str:
        words = text.split()
        if mood == "refuses" or len(words) != 3 or words[0] != "TTL":
            return "NotHandled"
        line, state = (int(w.split("=")[1]) for w in words[1:])
        return f"TTLHandled: Line={line} State={state}"

    return ZmqPeer(port or free_ports(1)[0], answer)


def maxlab(port: int = 0) -> ZmqPeer:
    """mxwserver's text port: sequences that were prepared are known."""

    def answer(text: str, mood: str) -> str:
        verb, _, name = text.partition(" ")
        known = verb == "sequence_send" and name in ("tetanus", "probe_pulse")
        return "OK" if known and mood != "refuses" else "Error: unknown sequence"

    return ZmqPeer(port or free_ports(1)[0], answer)


class _Line(socketserver.StreamRequestHandler):
    """One connection of the SpikeGLX command server: lines in, OK or ERROR out; five errors end it."""

    server: TcpPeer

    def handle(self) -> None:
        errors = 0
        self.server.connections.append(self.connection)
        while errors < 5 and (line := self.rfile.readline()):
            text = line.decode().strip()
            self.server.got.append((text, time.monotonic()))
            dawdle(self.server)
            mood, verb = self.server.mood, text.split()[0].upper() if text else ""
            if mood == "leaves":
                return
            if mood == "silent":
                continue
            if verb == "NOOP" or (verb == "NIDOSET" and mood != "refuses" and text.split()[-1].isdigit()):
                errors = 0
                self.wfile.write(b"OK\n")
            else:
                errors += 1
                self.wfile.write(b"ERROR NIDOSET: no such device\n")


class _Http(socketserver.StreamRequestHandler):
    """The GUI's HTTP server: PUT /api/message, connection kept."""

    server: TcpPeer

    def handle(self) -> None:
        self.server.connections.append(self.connection)
        while first := self.rfile.readline():
            length = 0
            while (header := self.rfile.readline().strip()) != b"":
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            body = self.rfile.read(length).decode()
            self.server.got.append((f"{first.decode().strip()} {body}", time.monotonic()))
            dawdle(self.server)
            mood = self.server.mood
            if mood == "leaves":
                return
            if mood == "silent":
                continue
            ok = first.startswith(b"PUT /api/message ") and mood != "refuses"
            answer = b'{"info": ""}' if ok else b"no"
            status = b"200 OK" if ok else b"400 Bad Request"
            head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
                status,
                len(answer),
            )
            self.wfile.write(head)
            self.wfile.flush()
            time.sleep(0.002)  # head and body in two pieces
            self.wfile.write(answer)


class TcpPeer(socketserver.ThreadingTCPServer):
    """A TCP server with a mood."""

    allow_reuse_address, daemon_threads = True, True

    def __init__(self, handler: type[socketserver.StreamRequestHandler], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.mood = "well"
        self.got: list[tuple[str, float]] = []
        self.connections: list[socket.socket] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.mood = "well"
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error here."""


def spikeglx(port: int = 0) -> TcpPeer:
    return TcpPeer(_Line, port)


def gui_http(port: int = 0) -> TcpPeer:
    return TcpPeer(_Http, port)


class Board(threading.Thread):
    """A microcontroller at the other end of a terminal pair: notes bytes, echoes them."""

    def __init__(self) -> None:
        super().__init__(name="board", daemon=True)
        self.mood = "well"
        self.got: list[tuple[int, float]] = []
        self._master, self._slave = pty.openpty()
        tty.setraw(self._slave, termios.TCSANOW)
        self.path = os.ttyname(self._slave)
        self._quit = threading.Event()

    def run(self) -> None:
        os.set_blocking(self._master, False)
        while not self._quit.wait(0.0005):
            try:
                data = os.read(self._master, 64)
            except OSError:
                continue
            self.got += [(b, time.monotonic()) for b in data]
            dawdle(self)
            if self.mood != "silent":
                os.write(self._master, data)

    def unplug(self) -> None:
        """The terminal is gone, as when the cable is pulled."""
        self.mood = "silent"
        self._quit.set()
        self.join(30)
        os.close(self._master)
        self._master = -1  # the other end stays: its number would be given to the next terminal of anybody

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._master >= 0:
            self.unplug()
        os.close(self._slave)


@contextmanager
def closing(output: Output) -> Iterator[Output]:
    try:
        yield output
    finally:
        output.close()


class _Telling(Stimulator):
    """Notes what it refused: commands that an emergency stop overtook."""

    def __init__(self, address: str, refused: list[int]) -> None:
        super().__init__(address)
        self._refused = refused

    def answer(self, wanted: Wanted, ok: bool = True, text: str = "") -> None:
        if not ok:
            self._refused.append(wanted.number)
        super().answer(wanted, ok, text)


class OwnStimulator(threading.Thread):
    """A stimulator's own program: carries every command out at once."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address, self.wanted, self._leave = address, list[Wanted](), threading.Event()
        self.refused: list[int] = []

    def run(self) -> None:
        with _Telling(self.address, self.refused) as s:
            while not self._leave.is_set():
                if (wanted := s.receive(0.1)) is not None:
                    s.answer(wanted)
                    self.wanted.append(wanted)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave.set()
        self.join(30)
