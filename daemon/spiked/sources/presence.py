"""Whether a stream's program is there and sends, found out without opening the stream."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import zmq

from spiked.config import Stream
from spiked.sources import wire_maxwell, wire_openephys, wire_spikeglx

WAIT_S = 2.0
DEFAULTS = {
    "openephys": wire_openephys.DEFAULT_ADDRESS,
    "maxwell": wire_maxwell.DEFAULT_ADDRESS,
    "spikeglx": wire_spikeglx.DEFAULT_ADDRESS,
}


def address_of(stream: Stream) -> str:
    """Where its samples come from; "" for a replay."""
    return stream.address or DEFAULTS.get(stream.source, "")


def reach(host: str, port: int, wait_s: float = WAIT_S) -> str:
    """ "" when somebody listens there, else why not."""
    try:
        socket.create_connection((host, port), wait_s).close()
    except OSError as e:
        return e.strerror or str(e)
    return ""


def sends(address: str, wait_s: float = WAIT_S) -> bool:
    """Whether a publisher sends anything within this time."""
    with zmq.Context() as context, context.socket(zmq.SUB) as s:
        s.linger = 0
        s.subscribe(b"")
        s.connect(address)
        return bool(s.poll(int(wait_s * 1000)))


def absent(stream: Stream) -> str:
    """ "" when the stream's samples can be had now, as far as can be seen from outside; else why not.

    SpikeGLX tells samples only when it is asked for them: that it listens has to do.
    """
    address = address_of(stream)
    where = urlsplit(address)
    if stream.source == "replay":
        return ""
    if where.scheme == "tcp" and (error := reach(where.hostname or "", where.port or 0)):
        return f"nobody at {address} ({error})"
    if stream.source != "spikeglx" and not sends(address):
        return f"{address} is there but sent nothing for {WAIT_S:g} s"
    return ""
