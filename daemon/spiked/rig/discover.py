"""Acquisition programs on this computer, found by asking at their usual ports."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from spiked.errors import SpikedError
from spiked.sources import wire_maxwell, wire_openephys
from spiked.sources.presence import DEFAULTS, reach
from spiked.sources.spikeglx_link import SpikeGlxLink, streams_of
from spiked.sources.spikeglx_probe import describe
from spiked.sources.wire_spikeglx import Refused, WireError

LISTEN_S = 1.5
ASK_S = 1.0  # for an answer of Open Ephys' HTTP server
OE_HTTP = 37497  # Open Ephys' own port for questions
PROGRAMS = {"openephys": "Open Ephys", "maxwell": "MaxLab Live", "spikeglx": "SpikeGLX"}


@dataclass(frozen=True)
class Found:
    """One stream that could be recorded. `options` are keys of [[stream]]."""

    source: str
    address: str
    text: str
    options: dict[str, Any] = field(default_factory=dict)


def discover(
    host: str = "127.0.0.1", addresses: dict[str, str] | None = None, only: str | None = None
) -> list[Found]:
    """Everything that answers at the usual ports of `host`, or at `addresses` (source -> tcp://...); `only` one source."""
    looks: dict[str, Callable[[str], list[Found]]] = {"openephys": _openephys, "maxwell": _maxwell, "spikeglx": _spikeglx}  # fmt: skip
    out = []
    for source, look in looks.items():
        if only not in (None, source):
            continue
        usual = urlsplit(DEFAULTS[source])
        address = (addresses or {}).get(source) or f"tcp://{host}:{usual.port}"
        for one in _openephys_addresses(address) if source == "openephys" else [address]:
            where = urlsplit(one)
            if not reach(where.hostname or "", where.port or 0):
                out += look(one)
    return out


def _openephys_addresses(address: str) -> list[str]:
    """That one, and the data ports of all ZMQ Interfaces in the signal chain, where the GUI tells them."""
    host = urlsplit(address).hostname or "127.0.0.1"
    told = _http(host, "processors").get("processors")
    ports: list[int] = []
    for processor in told if isinstance(told, list) else []:
        for parameter in processor.get("parameters", []) if isinstance(processor, dict) else []:
            if isinstance(parameter, dict) and parameter.get("name") == "data_port":
                ports += [int(parameter["value"])] if str(parameter.get("value")).isdigit() else []
    return list(dict.fromkeys([address, *(f"tcp://{host}:{port}" for port in ports)]))


def _messages(address: str) -> list[list[bytes]]:
    """What a publisher sends within LISTEN_S."""
    import zmq

    out: list[list[bytes]] = []
    until = time.monotonic() + LISTEN_S
    with zmq.Context() as context, context.socket(zmq.SUB) as s:
        s.linger = 0
        s.subscribe(b"")
        s.connect(address)
        while (left := until - time.monotonic()) > 0 and len(out) < 5000:
            if s.poll(int(left * 1000) + 1):
                out.append(s.recv_multipart())
    return out


def _openephys(address: str) -> list[Found]:
    program = PROGRAMS["openephys"]
    channels, rate, name = set(), 0.0, ""
    for frames in _messages(address):
        if len(frames) < 3 or frames[0] != wire_openephys.DATA:
            continue
        try:
            header = wire_openephys.parse_header(frames[1])
            fields = wire_openephys.data_fields(header)
        except (wire_openephys.WireError, ValueError, KeyError):
            continue
        channels.add(fields[1])
        rate, name = fields[4], str(header.get("content", {}).get("stream", ""))
    told = _openephys_http(urlsplit(address).hostname or "127.0.0.1")
    if channels:
        text = f"{program}: {name or 'a stream'}, {len(channels)} channels at {rate:g} Hz"
        return [Found("openephys", address, text)]
    state = f" ({told})" if told else ""
    return [Found("openephys", address, f"{program}: listens, but sends nothing yet{state}; press play")]


def _openephys_http(host: str) -> str:
    """What the GUI says it is doing: IDLE, ACQUIRE or RECORD; "" where it does not answer."""
    return str(_http(host, "status").get("mode", ""))


def _http(host: str, what: str) -> dict[str, Any]:
    """An answer of Open Ephys' HTTP server; {} where there is none."""
    try:
        with urllib.request.urlopen(f"http://{host}:{OE_HTTP}/api/{what}", timeout=ASK_S) as reply:
            told = json.load(reply)
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _maxwell(address: str) -> list[Found]:
    columns, wells = 0, set()
    for frames in _messages(address):
        if len(frames) > 1 and len(frames[0]) == len(wire_maxwell.frame_head(0)) and not len(frames[1]) % 4:
            columns = max(columns, len(frames[1]) // 4)
            wells.add(frames[0][6])  # the number is 48 bits
    text = f"{columns} columns" if columns else "listens, but sends nothing yet; power the array up"
    if len(wells) > 1:
        return [
            Found("maxwell", address, f"{PROGRAMS['maxwell']}: well {w}, {text}", {"well": w})
            for w in sorted(wells)
        ]
    return [Found("maxwell", address, f"{PROGRAMS['maxwell']}: {text}")]


def _spikeglx(address: str) -> list[Found]:
    program = PROGRAMS["spikeglx"]
    try:
        link = SpikeGlxLink(address)
    except OSError:
        return []
    try:
        streams = [(device, n, _spikeglx_text(link, device, n, address)) for device, n in streams_of(link)]
    except Refused:
        return [Found("spikeglx", address, f"{program}: listens, but no run was set up yet")]
    except (OSError, WireError):
        return []
    finally:
        link.close()
    return [
        Found("spikeglx", address, f"{program}: {text}", {"device": device, "probe_index": n})
        for device, n, text in streams
    ]


def _spikeglx_text(link: SpikeGlxLink, device: str, number: int, address: str) -> str:
    """What a stream of SpikeGLX is, in words."""
    try:
        info = describe(link, device, number, device, address).info
    except SpikedError as e:
        return f"{device} {number} ({e})"
    of = " ".join(str(info.annotations[k]) for k in ("part", "serial") if info.annotations.get(k))
    return f"{device} {number}, {info.n_channels} channels at {info.fs_hz:g} Hz{f' ({of})' if of else ''}"
