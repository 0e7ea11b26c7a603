"""Listening sockets: where they are, and the one line when they cannot be had."""

from __future__ import annotations

from typing import Any

import zmq

from spiked.errors import ConfigError


def bind(socket: Any, host: str, port: int, what: str) -> str:
    """Bind to host:port (0: any free port) and return the address; ConfigError when the port is taken."""
    at = f"[{host}]" if ":" in host else host
    socket.linger = 0
    if ":" in host:
        socket.ipv6 = True
    try:
        socket.bind(f"tcp://{at}:{port}" if port else f"tcp://{at}:*")
    except zmq.ZMQError as e:
        socket.close(0)
        raise ConfigError(
            f"{what} cannot listen on {at}:{port}: {zmq.strerror(e.errno or 0)}; stop the program that has "
            "the port, or choose another (0 takes any free one)"
        ) from e
    return str(socket.last_endpoint.decode())
