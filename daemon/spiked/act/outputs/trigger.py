"""The trigger socket: commands to a stimulator's own program, which says what became of each.

The messages are in `spiked_client.stimulator`, which is also the receiving end.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import zmq

from spiked.act.outputs.base import Ack, Command
from spiked.act.outputs.transports import host_and_port
from spiked.config import Output
from spiked.errors import ConfigError
from spiked.gate import Gate
from spiked_client.access import allowed
from spiked_client.protocol import ProtocolError
from spiked_client.stimulator import TRIGGER_ADDRESS, decode, encode

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SILENT_NS = 2_000_000_000  # a stimulator that did not say "ready" for so long is not there
MESSAGE_BYTES = 1 << 16
UNREAD = 64  # messages of a peer that wait; beyond it the network keeps them
AT_ONCE = 256  # messages that one poll reads: samples wait meanwhile
PEERS = 16
BYTES_PER_S, BYTES_AT_ONCE = float(1 << 18), float(1 << 20)  # from one peer


class TriggerSocket:
    """Binds `config.address`. One stimulator at a time may have it.

    With `keys` (a folder of `spiked keys`) it takes the role stimulate to connect, and to stay; without, loopback
    only. `counters`: malformed, and those of Gate.
    """

    def __init__(self, config: Output, keys: Path | None = None) -> None:
        self.name = config.name
        address, host, _ = host_and_port(config.address, TRIGGER_ADDRESS, ("tcp",))
        if host not in LOOPBACK and keys is None:
            raise ConfigError(
                f"output {self.name}: {address} is not loopback; bind it on 127.0.0.1, or set publish.keys (see `spiked keys`)"
            )
        self._names, self._welcome = config.patterns, encode("welcome", output=self.name)
        self._timeout_ms, self._patience_ns = config.timeout_ms, round(config.timeout_ms * 1e6)
        self.counters: Counter[str] = Counter()
        self._context = zmq.Context()
        try:
            self._gate = Gate(self._context, keys, PEERS, self.counters)
        except ConfigError:
            self._context.term()
            raise
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.ipv6 = ":" in host
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # who has gone is told to us, not sent to in vain
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, UNREAD)
        self._gate.guard(self._socket, "trigger", per_s=BYTES_PER_S, burst=BYTES_AT_ONCE, least="stimulate")
        try:
            self._socket.bind(address)
        except zmq.ZMQError as e:
            self.close()
            raise ConfigError(f"output {self.name}: cannot bind {address} ({e}); choose another port") from e
        self.endpoint = address
        self.there: bytes | None = None  # the stimulator's identity, while there is one
        self._who, self._heard_ns = "", 0
        self._open: dict[int, int] = {}  # number -> sent
        self._late: set[int] = (
            set()
        )  # given up and never answered: the stimulator may have them still before it
        self._idle = False  # it said that it is ready, and has answered nothing since
        self._acks: list[Ack] = []

    def send(self, command: Command) -> None:
        now = time.monotonic_ns()
        if self.there is None or now - self._heard_ns > SILENT_NS:
            self._done(command.number, 0, False, f"no stimulator is connected to {self.endpoint}; not sent")
            return
        if self._late:
            text = f"{self._who} is behind with {len(self._late)} earlier commands; this one was not sent"
            self._done(command.number, 0, False, text)
            return
        pattern = str(self._names.get(command.pattern, command.pattern))
        data = encode(
            "stimulate", number=command.number, rule=command.rule, sample=command.sample, pattern=pattern, electrodes=command.electrodes,
            amplitude_ua=command.amplitude_ua, width_us=command.width_us, decided_ns=command.decided_ns,
        )  # fmt: skip
        if self._tell(self.there, data):
            self._open[command.number] = now
        else:
            self.there = None
            self._done(command.number, 0, False, f"the stimulator {self._who!r} has gone; not sent")

    def poll(self) -> list[Ack]:
        now = time.monotonic_ns()  # before the look, not after it: what comes while we are held up is in time
        for _ in range(AT_ONCE):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.ZMQError:
                break
            self._hear([part.bytes for part in parts], parts[-1])
        if self._open:
            self._give_up(now)
        acks, self._acks = self._acks, []
        return acks

    def waiting(self) -> tuple[int, ...]:
        return ()

    def withdraw(self, number: int) -> bool:
        return False

    def halt(self) -> None:
        if self.there is not None:
            self._tell(self.there, encode("halt"))

    def take_over(self) -> None:
        """There are no lines."""

    def close(self) -> None:
        self._socket.close(0)
        self._gate.close()
        self._context.term()

    def _hear(self, frames: list[bytes], part: Any) -> None:
        client = self._gate.who(part)
        if client is None or not allowed(client.role, "stimulate"):  # its key was removed after it came
            self.counters["refused_keys"] += 1
            if frames[0] == self.there:
                self.there = None
            return
        try:
            who, data = frames
            message = decode(data)
        except (ValueError, ProtocolError):
            self.counters["malformed"] += 1
            return
        op, now = message["op"], time.monotonic_ns()
        if op == "ready":
            self._admit(who, str(message.get("name", "")), now)
        elif who != self.there:
            return
        elif op == "leave":
            self.there = None
        elif op == "done":
            self._heard_ns = now
            self._answered(message)

    def _admit(self, who: bytes, name: str, now: int) -> None:
        """The first to come has the socket, until it leaves or falls silent."""
        heard = now - self._heard_ns <= SILENT_NS
        if self.there not in (None, who) and heard and self._tell(self.there, self._welcome):
            self._tell(
                who, encode("taken", error=f"{self._who!r} has this trigger socket; end that program first")
            )
            return
        if who != self.there:
            self._tell(who, self._welcome)
            self._late.clear()
        elif self._idle:  # it asked for commands twice without one in between: none is left with it
            self._late.clear()
        self.there, self._who, self._heard_ns, self._idle = who, name, now, True

    def _answered(self, message: dict[str, Any]) -> None:
        number, self._idle = message.get("number"), False
        if isinstance(number, int):
            self._late.discard(number)
        sent = self._open.pop(number, None) if isinstance(number, int) else None
        if isinstance(number, int) and sent is not None:
            ok, text = message.get("ok") is True, str(message.get("text", ""))
            self._done(number, sent, ok, text if ok else f"{self._who} refused: {text}")

    def _give_up(self, now: int) -> None:
        for number, sent in list(self._open.items()):
            if now - sent > self._patience_ns:
                del self._open[number]
                self._late.add(number)
                text = f"{self._who} did not answer within {self._timeout_ms:g} ms; it may have acted nevertheless"
                self._done(number, sent, False, text)

    def _tell(self, who: bytes | None, data: bytes) -> bool:
        try:
            self._socket.send_multipart([who or b"", data], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _done(self, number: int, sent_ns: int, ok: bool, text: str) -> None:
        self._acks.append(Ack(number, sent_ns, time.monotonic_ns(), ok, text))
