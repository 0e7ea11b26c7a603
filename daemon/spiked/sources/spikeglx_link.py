"""One connection to SpikeGLX's command server: strictly one request, one reply."""

from __future__ import annotations

import socket

import numpy as np

from spiked.errors import ConfigError
from spiked.sources.wire_spikeglx import (
    DEFAULT_ADDRESS,
    MAX_LINE,
    Refused,
    WireError,
    binary_header,
    numbers,
    request,
)

CONNECT_S = 2.0
REPLY_S = 5.0  # a reply that takes longer means that the other side is gone


def host_and_port(address: str) -> tuple[str, int]:
    """Of tcp://host:port. Raises ConfigError."""
    head, _, port = (address or DEFAULT_ADDRESS).removeprefix("tcp://").rpartition(":")
    if not head or not port.isdigit():
        raise ConfigError(f"address {address!r} must look like {DEFAULT_ADDRESS}")
    return head.strip("[]"), int(port)


class SpikeGlxLink:
    """Raises OSError when the server is not there, closes or says nothing, Refused when it answers ERROR, and
    WireError when what it says is not SpikeGLX. After OSError or WireError the connection is of no use."""

    def __init__(self, address: str) -> None:
        host, port = host_and_port(address)
        self._socket = socket.create_connection((host, port), CONNECT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(REPLY_S)
        self._buffer = bytearray()

    def ask(self, *words: object) -> list[str]:
        """The reply's lines, without the OK."""
        self._socket.sendall(request(*words))
        lines: list[str] = []
        while (line := self._end_of_reply()) is not None:
            lines.append(line)
        return lines

    def numbers(self, n: int, *words: object) -> list[float]:
        """The `n` numbers of a one-line reply."""
        return numbers(self.ask(*words), n)

    def count(self, *words: object) -> int:
        """A reply that is one whole number."""
        return int(self.numbers(1, *words)[0])

    def fetch(self, js: int, ip: int, start: int, most: int, channels: str, width: int) -> np.ndarray:
        """(samples, width) int16 from sample `start` on; none when there are none yet."""
        self._socket.sendall(request("FETCH", js, ip, start, most, channels, 1))
        line = self._end_of_reply()
        head = None if line is None else binary_header(line)
        if head is None:
            raise WireError(f"{(line or 'OK')[:60]!r} in the place of samples")
        n_channels, n, first = head
        if n_channels != width or n > most or first != start:
            raise WireError(f"{line!r} is not what was asked for ({width} channels from sample {start})")
        data = np.empty((n, width), "<i2")
        self._into(data.reshape(-1).view(np.uint8).data if n else memoryview(bytearray()))
        if self._end_of_reply() is not None:
            raise WireError("samples without an OK")
        return data

    def _end_of_reply(self) -> str | None:
        """One more line; None for the OK."""
        line = self._line()
        if line == "OK":
            return None
        if line == "ERROR" or line.startswith("ERROR "):
            raise Refused(line[6:].strip())
        return line

    def _line(self) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE:
                raise WireError("a line without an end")
            self._more()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line.decode("utf-8", "replace").rstrip("\r")

    def _more(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data

    def _into(self, view: memoryview) -> None:
        k = min(len(self._buffer), len(view))
        view[:k] = self._buffer[:k]
        del self._buffer[:k]
        while k < len(view):
            n = self._socket.recv_into(view[k:])
            if not n:
                raise ConnectionError("the server closed the connection")
            k += n

    def close(self) -> None:
        self._socket.close()


def streams_of(link: SpikeGlxLink) -> list[tuple[str, int]]:
    """(device, number) of everything the server acquires. Raises Refused when no run was ever set up."""
    out: list[tuple[str, int]] = []
    for device, js in (("imec", 2), ("onebox", 1), ("nidq", 0)):
        out += [(device, ip) for ip in range(link.count("GETSTREAMNP", js))]
    return out
