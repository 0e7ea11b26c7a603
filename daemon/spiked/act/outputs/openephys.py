"""Open Ephys: a TTL line of the Network Events plugin, or a message to all processors over HTTP.

Both are events for the recording and for boards that Open Ephys drives (`ACQBOARD TRIGGER 3 1`). The GUI stamps
them with the first sample of its next audio block, 14 ms later in the median at the default buffer; the plugin
takes a TTL while nothing is acquired, says so in no way, and drops it.
"""

from __future__ import annotations

import json
import re

from spiked.act.outputs.exchange import Exchange, Words
from spiked.act.outputs.transports import TcpBytes, ZmqRequests, host_and_port, reach
from spiked.config import Output
from spiked.errors import ConfigError

EVENTS_ADDRESS = "tcp://127.0.0.1:5556"
HTTP_ADDRESS = "http://127.0.0.1:37497"
LINES = 256


def open_output(config: Output) -> Exchange:
    """Either kind; raises ConfigError or SourceError."""
    return _network_events(config) if config.kind == "network_events" else _message(config)


def _network_events(config: Output) -> Exchange:
    lines = {}
    for pattern, line in config.patterns.items():
        if not isinstance(line, int) or not 1 <= line <= LINES:
            raise ConfigError(
                f"output {config.name}: {pattern} = {line!r} must be a TTL line from 1 to {LINES}"
            )
        lines[pattern] = line
    address, host, port = host_and_port(config.address, EVENTS_ADDRESS, ("tcp",))
    reach(config.name, host, port)

    def state(pattern: str, up: int) -> bytes:
        return f"TTL Line={lines[pattern]} State={up}".encode()

    words = Words(
        raise_=lambda p: state(p, 1) if p in lines else None,
        lower=lambda p: state(p, 0),
        pulse_ns=round(config.pulse_ms * 1e6),
        patterns=tuple(lines),
        judge=_handled,
    )
    return Exchange(
        config.name, f"Network Events at {address}", ZmqRequests(address), words, config.timeout_ms
    )


def _handled(reply: bytes) -> tuple[bool, str]:
    text = reply.decode("utf-8", "replace").strip()
    return text.startswith("TTLHandled"), text


def _message(config: Output) -> Exchange:
    address, host, port = host_and_port(config.address, HTTP_ADDRESS, ("http",))
    reach(config.name, host, port)
    requests = {p: _put(host, port, str(text)) for p, text in config.patterns.items()}
    return Exchange(
        config.name, f"Open Ephys at {address}", TcpBytes(host, port), Words(raise_=requests.get, judge=_status), config.timeout_ms
    )  # fmt: skip


def _put(host: str, port: int, text: str) -> bytes:
    body = json.dumps({"text": text}).encode()
    head = (
        f"PUT /api/message HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: keep-alive\r\n\r\n"
    )
    return head.encode() + body


def _status(reply: bytes) -> tuple[bool, str] | None:
    """The answer once it is whole, by its Content-Length."""
    head, blank, body = reply.partition(b"\r\n\r\n")
    if not blank:
        return None
    length = re.search(rb"(?i)\r\ncontent-length:\s*(\d+)", head)
    if length and len(body) < int(length[1]):
        return None
    first = head.split(b"\r\n", 1)[0].decode("latin-1")
    status = first.split(" ", 2)
    ok = len(status) > 1 and status[0].startswith("HTTP/") and status[1].startswith("2")
    return ok, f"{first} {body.decode('utf-8', 'replace')}".strip()
