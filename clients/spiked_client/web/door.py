"""Where the page is served: the listening socket, how many connections it takes and how long they may say nothing, TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from spiked_client.access import AccessList
from spiked_client.errors import ClientError
from spiked_client.web.guard import Guard, is_loopback
from spiked_client.web.server import Pages

MAX_CONNECTIONS = 160
SEND_BYTES = 128 << 10  # of one connection, in the kernel
IDLE_S = 15.0  # a connection that asks nothing, or not to the end
HANDSHAKE_S = 5.0


class Door:
    """Makes the connections' protocols; beyond MAX_CONNECTIONS they are closed as soon as they open."""

    def __init__(self, pages: Pages, server: web.Server) -> None:
        self._pages, self._server = pages, server
        self._opening: list[tuple[float, Any]] = []

    def __call__(self) -> asyncio.BaseProtocol:
        now = time.monotonic()
        self._opening = [(t, h) for t, h in self._opening if h.transport is None and now - t < IDLE_S]
        if len(self._opening) + len(self._server.connections) >= MAX_CONNECTIONS:
            self._pages.counters["turned_away"] += 1
            return Closed()
        handler = self._server()
        self._pages.opened(handler)
        self._opening.append((now, handler))
        return handler

    async def sweep(self) -> None:
        """Close what is open and says nothing."""
        while True:
            await asyncio.sleep(1.0)
            there = set(self._server.connections)
            for connection in (c for c in self._pages.known() if self._pages.idle_s(c) > IDLE_S):
                if connection not in there:
                    self._pages.forget(connection)
                elif connection.transport is not None:
                    self._pages.counters["idle"] += 1
                    connection.transport.abort()


class Closed(asyncio.Protocol):
    """A connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
        transport.close()


def tls(cert: Path, key: Path) -> ssl.SSLContext:
    """Raises ClientError when the files are not a certificate and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as e:
        raise ClientError(f"TLS: {cert} and {key} are not a certificate and its key in PEM ({e})") from e
    return context


def guard_for(host: str, access: AccessList | None, secure: bool) -> Guard:
    """Raises ClientError for a page that would be open to a network without TLS or without tokens."""
    loopback = is_loopback(host)
    if not loopback and not (secure and access):
        raise ClientError(
            f"the page beyond this computer ({host}) needs TLS (tls_cert, tls_key) and an access list with tokens (access; see "
            "`spiked keys`); or leave host at 127.0.0.1 and use an SSH tunnel"
        )
    return Guard(access, loopback=loopback)


def _listener(host: str, port: int) -> socket.socket:
    """A socket whose connections keep little in the kernel: what a page has not read yet should be dropped here, and told."""
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    s = socket.socket(family, kind, proto)
    try:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SEND_BYTES)
        if family == socket.AF_INET6:
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        s.bind(address)
    except BaseException:
        s.close()
        raise
    return s


async def serve(
    pages: Pages, host: str, port: int, context: ssl.SSLContext | None, ready: Callable[[str], None]
) -> None:
    """Answer until cancelled; `ready` gets the page's address. Raises ClientError when the port is taken."""
    runner = web.AppRunner(
        pages.app,
        access_log=None,
        keepalive_timeout=IDLE_S,
        shutdown_timeout=1.0,
        max_line_size=4096,
        max_field_size=4096,
    )
    await runner.setup()
    assert runner.server is not None
    door = Door(pages, runner.server)
    try:
        listening = await asyncio.get_running_loop().create_server(
            door,
            sock=_listener(host, port),
            ssl=context,
            ssl_handshake_timeout=HANDSHAKE_S if context else None,
            backlog=64,
        )
    except OSError as e:
        await runner.cleanup()
        raise ClientError(
            f"the page cannot be served at {host}:{port} ({e.strerror}); choose another port or stop the program that has it"
        ) from e
    at = f"[{host}]" if ":" in host else host
    address = f"http{'s' if context else ''}://{at}:{listening.sockets[0].getsockname()[1]}/"
    sweeping = asyncio.create_task(door.sweep())
    try:
        await pages.run(lambda: ready(address))
    finally:
        sweeping.cancel()
        listening.close()
        await runner.cleanup()
