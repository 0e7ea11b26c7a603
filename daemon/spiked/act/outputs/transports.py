"""Connections that never make their owner wait: ZeroMQ requests, and text over TCP.

Both offer `send(data) -> bool` (False: there is no connection now), `receive() -> bytes | None`, `renew()`
(give up on what is under way and connect again) and `close()`.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from typing import Protocol
from urllib.parse import urlsplit

import zmq

from spiked.errors import ConfigError, SourceError

REACH_S = 1.0  # how long a peer may take to accept a first connection
RETRY_S = 0.5  # from one attempt to connect to the next
GIVE_UP_S = 5.0  # an attempt that hangs this long is given up


class Transport(Protocol):
    """One connection to one peer."""

    def send(self, data: bytes) -> bool: ...

    def receive(self) -> bytes | None: ...

    def renew(self) -> None: ...

    def close(self) -> None: ...


def host_and_port(address: str, default: str, schemes: tuple[str, ...]) -> tuple[str, str, int]:
    """(address, host, port) of `address`, or of `default` where it is empty. Raises ConfigError."""
    address = address or default
    try:
        parts = urlsplit(address)
        if parts.scheme not in schemes or not parts.hostname or not parts.port:
            raise ValueError
        return address, parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"output address {address!r} must look like {default}") from None


def reach(name: str, host: str, port: int) -> None:
    """Raise SourceError unless somebody listens there. ZeroMQ itself would never say."""
    try:
        socket.create_connection((host, port), REACH_S).close()
    except OSError as e:
        raise SourceError(
            f"output {name}: nobody listens on {host}:{port} ({e.strerror or e}); start the program, or correct the address"
        ) from e


class ZmqRequests:
    """A REQ socket to a REP one: one request, one reply."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._context = zmq.Context()
        self._connect()
        self._socket.poll(round(1000 * REACH_S), zmq.POLLOUT)  # the first command finds a connection

    def _connect(self) -> None:
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        # Nothing is queued for a peer that is not there: it would arrive as an old command.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(self._address)

    def send(self, data: bytes) -> bool:
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def receive(self) -> bytes | None:
        try:
            return bytes(self._socket.recv(zmq.NOBLOCK))
        except zmq.ZMQError:
            return None

    def renew(self) -> None:
        """A REQ socket waits for its reply for ever; only a new one can ask again, and a late reply finds nobody."""
        self._socket.close(0)
        self._connect()

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


class TcpBytes:
    """A TCP connection, made again in the background when it breaks. Raises SourceError for an unknown host."""

    def __init__(self, host: str, port: int) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as e:
            raise SourceError(f"no host {host!r} ({e.strerror or e}); correct the output's address") from e
        self._family, self._where = found[0], found[4]
        self._socket: socket.socket | None = None
        self._connecting, self._started, self._retry_at = False, 0.0, 0.0
        self._start()

    def _start(self) -> None:
        self._socket = socket.socket(self._family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun = self._socket.connect_ex(self._where)
        self._connecting, self._started = begun == errno.EINPROGRESS, time.monotonic()
        if begun not in (0, errno.EINPROGRESS):
            self._drop()

    def _connected(self) -> socket.socket | None:
        if self._socket is None:
            if time.monotonic() >= self._retry_at:
                self._start()
            return None
        if self._connecting:
            if not select.select([], [self._socket], [], 0)[1]:
                if time.monotonic() > self._started + GIVE_UP_S:
                    self._drop()
                return None
            if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._drop()
                return None
            self._connecting = False
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._connecting = None, False
        self._retry_at = self._started + RETRY_S

    def send(self, data: bytes) -> bool:
        connection = self._connected()
        if connection is None:
            return False
        try:
            sent = connection.send(data)
        except OSError:
            sent = -1
        if sent != len(data):  # a request cut short cannot be taken back, only given up
            self._drop()
            return False
        return True

    def receive(self) -> bytes | None:
        """What came; b"" once when the peer has closed the connection."""
        connection = self._connected()
        if connection is None:
            return None
        try:
            data = connection.recv(65536)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            data = b""
        if not data:
            self._drop()
        return data

    def renew(self) -> None:
        self._drop()
        self._retry_at = 0.0

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
        self._socket, self._retry_at = None, float("inf")
