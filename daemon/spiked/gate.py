"""The door of listening ZeroMQ sockets: who may connect, how many, how often, and who has to leave again.

Authentication is ZAP (RFC 27): libzmq asks about every connection before its first message. With keys every socket is
CURVE-encrypted and takes only the keys of the access list; without, anybody who reaches loopback. Either way
connections are counted, and what is not ZeroMQ is turned away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket as sockets
import struct
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from spiked.errors import ConfigError
from spiked_client.access import ROLES, AccessList, Entry, read_server
from spiked_client.errors import AccessError

log = logging.getLogger(__name__)

LOOK_S = 0.25  # from one look at the connections and the access list to the next
AT_ONCE = 256  # events of one socket in a row
MOST_REST_S = 0.02
BYTES_RECEIVED = 128  # offset in Linux's struct tcp_info
HANDSHAKE_MS = 3000  # a connection that has not said who it is by then is closed
COMINGS_PER_S = 50.0  # connections to one socket, beyond a burst in which everybody comes back at once
DEAD_AFTER = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 20,
    zmq.TCP_KEEPALIVE_INTVL: 5,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 30_000,  # also of a peer that does not read: it comes back and asks for what it missed
}
EVENTS = (
    zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)  # fmt: skip
LOCAL = Entry("local", ROLES[-1])  # who comes over loopback where no keys are used


class Allowance:
    """So much a second for each peer, of which `burst` can be saved up. Remembers the last `peers` of them."""

    def __init__(self, per_s: float, burst: float, peers: int = 1024) -> None:
        self.per_s, self.burst, self._peers = per_s, burst, peers
        self._left: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # peer -> left, when

    def take(self, peer: bytes, amount: float = 1.0) -> float:
        """Spend it; 0.0, or the seconds until there is enough (then nothing was spent)."""
        now = time.monotonic()
        left, since = self._left.pop(peer, (self.burst, now))
        left = min(left + (now - since) * self.per_s, self.burst)
        enough = left >= min(amount, self.burst)
        self._left[peer] = (left - amount if enough else left, now)
        if len(self._left) > self._peers:
            self._left.popitem(last=False)
        return 0.0 if enough else (min(amount, self.burst) - left) / self.per_s


@dataclass
class _Door:
    """One guarded socket: what is known of its connections."""

    name: str
    least: str  # role
    clears: bool  # everybody has to connect again when somebody may no longer
    monitor: Any
    open: dict[int, float]  # descriptor -> accepted at
    bytes: Allowance | None = None  # that each connection may send us
    heard: dict[int, int] = field(default_factory=dict)  # descriptor -> bytes so far
    unknown: int = 0  # accepted, not yet authenticated
    failed: bool = False  # the next disconnection is that of a failed handshake
    port: int = 0


class Gate:
    """Guards the sockets of one ZeroMQ context; has a thread of its own. `close` it after the sockets and before the
    context.

    `keys`: the folder of `spiked keys init`, or None. At most `peers` connections per socket. Raises ConfigError
    when the keys cannot be used. `counters`: refused_keys (not in the access list, or its role is too low),
    refused_handshakes (no key, the wrong server's, or not ZeroMQ), refused_peers (too many, too often), refused_bytes
    (connections that sent more than they may), revoked.
    """

    def __init__(self, context: Any, keys: Path | None, peers: int, counters: Counter[str]) -> None:
        self.counters, self._context, self._peers = counters, context, peers
        self.access, self._secret = open_keys(keys)
        self._told = ""
        self._before = self.access.entries if self.access else ()
        self._doors: list[_Door] = []
        self._joining = threading.Lock()
        self._comings = Allowance(COMINGS_PER_S, 2.0 * peers)
        self._zap = context.socket(zmq.ROUTER)
        self._zap.linger = 0
        self._zap.bind("inproc://zeromq.zap.01")
        name = f"inproc://gate-{id(self)}"
        self._bell, self._rung = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._bell.linger = self._rung.linger = 0
        self._rung.bind(name)
        self._bell.connect(name)
        self._thread = threading.Thread(target=self._watch, name="gate", daemon=True)
        self._thread.start()

    def guard(
        self,
        socket: Any,
        name: str,
        *,
        per_s: float,
        burst: float,
        least: str = ROLES[0],
        clears: bool = False,
    ) -> None:
        """Guard a socket that is not bound yet: keys of at least this role, and so many bytes from each connection.

        See `_Door.clears`. A subscriber that sends subscriptions without end would fill the publisher's memory, and
        libzmq has no limit for that.
        """
        socket.zap_domain = name.encode()
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        for option, value in DEAD_AFTER.items():
            socket.setsockopt(option, value)
        if self._secret:
            socket.curve_server = True
            socket.curve_secretkey = self._secret.encode()
        door = _Door(
            name,
            least,
            clears,
            socket.get_monitor_socket(EVENTS),
            {},
            Allowance(per_s, burst, 4 * self._peers),
        )
        with self._joining:
            self._doors.append(door)
        self._bell.send(b"door")

    def who(self, frame: Any) -> Entry | None:
        """Who sent this frame (received with copy=False), by the access list of this moment; None: nobody any more."""
        if self.access is None:
            return LOCAL
        try:
            return self.access.client_of_key(str(frame.get("User-Id")))
        except zmq.ZMQError:
            return None

    def close(self) -> None:
        """End the thread. The guarded sockets take nobody new from now on."""
        if not self._bell.closed:
            self._bell.send(b"")
            self._thread.join(5.0)
            self._bell.close(0)

    # ---- the thread --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._rung, zmq.POLLIN)
        known: list[_Door] = []
        try:
            while True:
                ready = dict(poller.poll(round(1000 * LOOK_S)))
                start = time.monotonic()
                if self._rung in ready and not self._rung.recv():
                    return
                with self._joining:
                    new = self._doors[len(known) :]
                for door in new:
                    poller.register(door.monitor, zmq.POLLIN)
                known += new
                try:
                    self._turn(known, self._zap in ready)
                except Exception:  # a thread that ends would leave the door shut, and libzmq waiting
                    log.exception("the gate stumbled")
                # The live thread shares the interpreter: a flood of connections gets half of it at most.
                time.sleep(min(time.monotonic() - start, MOST_REST_S))
        finally:
            with self._joining:
                for door in self._doors:
                    door.monitor.close(0)
            self._zap.close(0)
            self._rung.close(0)

    _looked = 0.0

    def _turn(self, doors: list[_Door], asked: bool) -> None:
        for door in doors:  # first: who asks is counted already
            self._look(door)
        if asked:
            self._decide(doors)
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            for door in doors:
                self._weigh(door)
            self._look_up(doors)

    def _look(self, door: _Door) -> None:
        """Follow who came and went."""
        for _ in range(AT_ONCE):
            try:
                event = parse_monitor_message(door.monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.ZMQError:
                return
            kind, value = event["event"], int(event["value"])
            if kind == zmq.EVENT_LISTENING:
                door.port = int(event["endpoint"].rpartition(b":")[2])
            elif kind == zmq.EVENT_ACCEPTED:
                self._came(door, value)
            elif kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                door.unknown = max(door.unknown - 1, 0)
            elif kind == zmq.EVENT_DISCONNECTED:
                self._left(door, value)
            elif kind != zmq.EVENT_MONITOR_STOPPED:
                door.failed = True
                if kind != zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # those were counted when they were decided
                    self.counters["refused_handshakes"] += 1

    def _came(self, door: _Door, descriptor: int) -> None:
        door.open[descriptor] = time.monotonic()
        door.heard[descriptor] = 0
        door.unknown += 1
        # Those who say who they are are told that there is no room; a flood of others is not waited for.
        if len(door.open) > 2 * self._peers or self._comings.take(door.name.encode()):
            self.counters["refused_peers"] += 1
            _hang_up(descriptor, door.port)

    def _left(self, door: _Door, descriptor: int) -> None:
        since = door.open.pop(descriptor, 0.0)
        door.heard.pop(descriptor, None)
        failed, door.failed = door.failed, False
        if failed:
            door.unknown = max(door.unknown - 1, 0)
        elif (
            door.unknown and time.monotonic() - since < HANDSHAKE_MS / 1000
        ):  # it never said a word of ZeroMQ
            door.unknown -= 1
            self.counters["refused_handshakes"] += 1

    def _weigh(self, door: _Door) -> None:
        """End connections that send us more than they may."""
        for descriptor, before in door.heard.items():
            now = _received(descriptor)
            door.heard[descriptor] = max(now, before)
            who = b"%d %d" % (descriptor, round(1000 * door.open[descriptor]))
            if now > before and door.bytes is not None and door.bytes.take(who, now - before):
                self.counters["refused_bytes"] += 1
                _hang_up(descriptor, door.port)

    def _decide(self, doors: list[_Door]) -> None:
        """Answer what libzmq asks (ZAP 1.0)."""
        while True:
            try:
                frames = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            if len(frames) < 8 or frames[2] != b"1.0":
                continue
            asker, _, version, number, domain, _address, _identity, mechanism, *credentials = frames
            door = next((d for d in doors if d.name.encode() == domain), None)
            status, user = self._verdict(door, mechanism, credentials)
            answer = [version, number, status, b"", user, b""]
            with contextlib.suppress(zmq.ZMQError):
                self._zap.send_multipart([asker, b"", *answer], zmq.NOBLOCK)

    def _verdict(self, door: _Door | None, mechanism: bytes, credentials: list[bytes]) -> tuple[bytes, bytes]:
        """(status, user id): 200 welcome, 300 no room, 400 no."""
        if door is None:
            return b"400", b""
        user = b""
        if self.access is not None:
            shown = z85.encode(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else b""
            found = self.access.client_of_key(shown.decode())
            if found is None or ROLES.index(found.role) < ROLES.index(door.least):
                self.counters["refused_keys"] += 1
                return b"400", b""
            user = shown
        if len(door.open) > self._peers:
            self.counters["refused_peers"] += 1
            return b"300", b""
        return b"200", user

    def _look_up(self, doors: list[_Door]) -> None:
        """Who may no longer has to leave: sockets that only send cannot tell their peers apart, so all come again."""
        if self.access is None:
            return
        if self.access.error != self._told:
            self._told = self.access.error
            if self._told:
                log.error("%s", self._told)
        self.access.refresh()
        before, self._before = self._before, self.access.entries
        gone = [e for e in before if e.key and e not in self._before] if before is not self._before else []
        if gone:
            self.counters["revoked"] += len(gone)
            for door in doors:
                for descriptor in door.open if door.clears else ():
                    _hang_up(descriptor, door.port)


def open_keys(keys: Path | None) -> tuple[AccessList | None, str]:
    """The access list and the daemon's secret key; (None, "") without keys. Raises ConfigError."""
    if keys is None:
        return None, ""
    try:
        return AccessList(keys), read_server(Path(os.path.expanduser(keys)))[1]
    except AccessError as e:
        raise ConfigError(str(e)) from e


def _received(descriptor: int) -> int:
    """Bytes that came over this connection so far; 0 where the kernel does not tell."""
    try:
        ours = sockets.socket(fileno=os.dup(descriptor))
    except OSError:
        return 0
    with ours, contextlib.suppress(OSError, struct.error):
        told = ours.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, BYTES_RECEIVED + 8)
        return int(struct.unpack_from("=Q", told, BYTES_RECEIVED)[0])
    return 0


def _hang_up(descriptor: int, port: int) -> None:
    """End a connection of libzmq's to our `port`: libzmq sees that its peer left. The descriptor stays libzmq's."""
    try:
        ours = os.dup(descriptor)
    except OSError:
        return  # gone already
    try:
        connection = sockets.socket(fileno=ours)
    except OSError:
        os.close(ours)
        return
    with connection, contextlib.suppress(OSError):
        if connection.getsockname()[1] == port:  # else the number was given to something else meanwhile
            connection.shutdown(sockets.SHUT_RDWR)
