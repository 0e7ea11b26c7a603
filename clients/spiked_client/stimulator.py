"""The other end of a trigger socket: what a stimulator's own program uses to receive commands.

    with Stimulator("tcp://127.0.0.1:5580", "pulser") as stimulator:
        while True:
            if (wanted := stimulator.receive(1.0)) is not None:
                fire(wanted.pattern, wanted.electrodes)
                stimulator.answer(wanted)

The daemon's output of kind "zmq" binds a ROUTER, the stimulator connects a DEALER. A message is one
MessagePack map with `v`, the protocol's version, and `op`:

| from       | op        | fields                                                                             |
|------------|-----------|------------------------------------------------------------------------------------|
| stimulator | ready     | name; at the start and twice a second: who is silent for 2 s gets no commands      |
| daemon     | welcome   | output                                                                             |
| daemon     | taken     | error; another stimulator has the socket. There is one at a time: no command is    |
|            |           | ever carried out twice                                                             |
| daemon     | stimulate | number, rule, sample, pattern, electrodes, amplitude_ua, width_us, decided_ns      |
| stimulator | done      | number, ok, text; who is behind with them gets no further commands                 |
| daemon     | halt      | emergency stop: no command that came before is to be carried out any more          |
| stimulator | leave     |                                                                                    |

`electrodes` are channel indices of the stream, `sample` is the sample number of what triggered the command;
amplitude and width may be nil. A command that cannot be delivered at once is never delivered later.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgpack
import zmq

from spiked_client import protocol
from spiked_client.access import ClientKey, load_key
from spiked_client.errors import ClientError
from spiked_client.protocol import ProtocolError

READY_S = 0.5
ABSENT_S = 0.02  # until it is said again to a daemon that was not there
TRIGGER_ADDRESS = "tcp://127.0.0.1:5580"


@dataclass(frozen=True)
class Wanted:
    """One stimulation that is to be carried out now; `received_ns` is monotonic."""

    number: int
    rule: str
    sample: int
    pattern: str
    electrodes: tuple[int, ...]
    amplitude_ua: float | None
    width_us: float | None
    decided_ns: int
    received_ns: int


def encode(op: str, **fields: Any) -> bytes:
    """One message of the trigger socket."""
    return bytes(msgpack.packb({**fields, "v": protocol.VERSION, "op": op}))


def decode(data: bytes) -> dict[str, Any]:
    """The map of one message; raises ProtocolError."""
    message = protocol.decode_map(data)
    if not isinstance(message.get("op"), str):
        raise ProtocolError("trigger message without op")
    return message


class Stimulator:
    """Receives the commands of one output, one after the other; used from one thread.

    `receive` also tells the daemon that this side is alive: call it at least once a second. A daemon that uses keys
    wants a key file of the role stimulate (`keys`, or SPIKED_KEYS). Commands that came before an emergency stop are not handed
    out after it.
    """

    def __init__(
        self,
        address: str = TRIGGER_ADDRESS,
        name: str = "stimulator",
        *,
        keys: Path | str | ClientKey | None = None,
    ) -> None:
        self.address, self.name = address, name
        self._key = keys if isinstance(keys, ClientKey) else load_key(keys)
        self.output: str | None = None  # the daemon's name for this connection, once it has said so
        self._ready_at = 0.0
        self._inbox: deque[Wanted] = deque()

    def __enter__(self) -> Self:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.ipv6 = "[" in self.address
        if self._key is not None:
            self._key.secure(self._socket)
        self._socket.connect(self.address)
        return self

    def __exit__(self, *exc: object) -> None:
        self._say("leave")
        self._socket.close(100)
        self._context.term()

    def receive(self, timeout: float) -> Wanted | None:
        """The next command, or None when none comes within `timeout` seconds.

        Raises ClientError when another stimulator has the socket.
        """
        until = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            if now >= self._ready_at:
                there = self._say("ready", name=self.name)
                self._ready_at = now + (READY_S if there else ABSENT_S)
            self._fetch()
            if self._inbox:
                return self._inbox.popleft()
            left = min(until, self._ready_at) - now
            if not self._socket.poll(max(round(1000 * left), 0)) and time.monotonic() >= until:
                return None

    def answer(self, wanted: Wanted, ok: bool = True, text: str = "") -> None:
        """Say that the command was carried out, or why not."""
        self._say("done", number=wanted.number, ok=ok, text=text)

    def _say(self, op: str, **fields: Any) -> bool:
        try:
            self._socket.send(encode(op, **fields), zmq.NOBLOCK)
        except zmq.Again:  # the daemon is not there
            self.output = None
            return False
        return True

    def _fetch(self) -> None:
        """Everything that has come: a stop may lie behind the commands that it ends."""
        while self._socket.poll(0):
            self._read(self._socket.recv(), time.monotonic_ns())

    def _read(self, data: bytes, received_ns: int) -> None:
        try:
            message = decode(data)
            if message["op"] == "stimulate":
                self._inbox.append(_wanted(message, received_ns))
        except ProtocolError:
            return
        if message["op"] == "welcome":
            self.output = str(message.get("output", ""))
        elif message["op"] == "taken":
            raise ClientError(f"{self.address}: {message.get('error')}")
        elif message["op"] == "halt":
            while self._inbox:
                self.answer(self._inbox.popleft(), False, "stopped before it was carried out")


def _wanted(m: dict[str, Any], received_ns: int) -> Wanted:
    try:
        return Wanted(
            int(m["number"]), str(m["rule"]), int(m["sample"]), str(m["pattern"]), tuple(int(e) for e in m["electrodes"]),
            None if m["amplitude_ua"] is None else float(m["amplitude_ua"]), None if m["width_us"] is None else float(m["width_us"]),
            int(m["decided_ns"]), received_ns,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise ProtocolError(f"command that lacks or garbles a field ({e})") from e
