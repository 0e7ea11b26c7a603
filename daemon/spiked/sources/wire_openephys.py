"""Bytes of the Open Ephys "ZMQ Interface" plugin: headers, TTL payloads, spikes.

A message is [envelope, JSON header, payload]. Data come as one message per channel and block. The plugin
sends as many bytes of the header as the text has characters, so that any non-ASCII name cuts its end off.
Wire of plugin 0.3 to 1.0 (GUI 0.6 to 1.0).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

DATA, EVENT = b"DATA\x00", b"EVENT\x00"
DEFAULT_ADDRESS = "tcp://127.0.0.1:5556"
TTL_TYPE = 3

# message_num, channel_num, num_samples, sample_num, sample_rate. A rate cut short must not match; headers
# in any other order go the slow way.
DATA_HEADER = re.compile(
    rb'\{\s*+"message_num":\s*+(-?\d+),\s*+"type":\s*+"data",\s*+"content":\s*+\{\s*+"stream":\s*+"[^"\\]*+",'
    rb'\s*+"channel_num":\s*+(\d+),\s*+(?:"channel_name":\s*+"[^"\\]*+",\s*+)?"num_samples":\s*+(\d+),'
    rb'\s*+"sample_num":\s*+(-?\d+),\s*+"sample_rate":\s*+([0-9.eE+-]+)[\s,}]'
)


class WireError(ValueError):
    """Bytes that are no message of this plugin; counted and dropped by whoever received them."""


def parse_header(raw: bytes) -> dict[str, Any]:
    """The JSON header; one cut short is closed again, without its last value, which may have been cut too."""
    try:
        d = json.loads(raw)
    except ValueError:
        d = _repair(raw)
    except RecursionError:
        raise WireError("header without end of brackets") from None
    if not isinstance(d, dict):
        raise WireError("header is not a JSON object")
    return d


def _repair(raw: bytes) -> Any:
    text = raw.decode("utf-8", "ignore")
    for _ in range(4):
        text, comma, _ = text.rpartition(",")
        if not comma:
            break
        try:
            return json.loads(text + _closing(text))
        except (ValueError, RecursionError):
            continue
    raise WireError("header is not JSON")


def _closing(text: str) -> str:
    """The brackets that close what `text` leaves open."""
    stack, inside, escaped = [], False, False
    for c in text:
        if inside:
            inside, escaped = not (c == '"' and not escaped), c == "\\" and not escaped
        elif c == '"':
            inside = True
        elif c in "{[":
            stack.append("}" if c == "{" else "]")
        elif c in "}]" and stack:
            stack.pop()
    return ('"' if inside else "") + "".join(reversed(stack))


def data_fields(header: dict[str, Any]) -> tuple[int, int, int, int, float, str]:
    """message_num, channel_num, num_samples, sample_num, sample_rate, channel_name of a data header."""
    try:
        c = header["content"]
        out = (
            int(header["message_num"]), int(c["channel_num"]), int(c["num_samples"]),
            int(c["sample_num"]), float(c["sample_rate"]), str(c.get("channel_name", "")),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise WireError(f"data header lacks or garbles a field ({e})") from e
    if not (0 <= out[1] < 1 << 16 and 0 < out[2] < 1 << 24 and abs(out[3]) < 1 << 62 and 0 < out[4] < 1e7):
        raise WireError("data header with impossible numbers")
    return out


def parse_ttl(payload: bytes) -> tuple[int, int, int]:
    """(line, 0-based; state; whole TTL word after the change) of the 10-byte payload."""
    if len(payload) != 10:
        raise WireError(f"TTL payload of {len(payload)} bytes, 10 expected")
    line, state, word = struct.unpack("<BBQ", payload)
    return line, state, word


def parse_spike(spike: Any, payload: bytes) -> tuple[int, str, float]:
    """(sample of the peak, electrode name, value of largest magnitude) of a spike message."""
    try:
        n = int(spike["num_channels"]) * int(spike["num_samples"])
        sample, name = int(spike["sample_num"]), str(spike.get("electrode", ""))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise WireError(f"spike header lacks or garbles a field ({e})") from e
    if n <= 0 or len(payload) != 4 * n:
        raise WireError(f"spike payload of {len(payload)} bytes, {4 * n} expected")
    wave = np.frombuffer(payload, "<f4")
    if abs(sample) >= 1 << 62 or not np.isfinite(wave).all():
        raise WireError("spike with impossible numbers")
    return sample, name, float(wave[np.argmax(np.abs(wave))])


class DataHeaders:
    """Data headers as the plugin writes them: CRLF pretty print, cut short by non-ASCII names."""

    def __init__(self, stream: str, names: Sequence[str], fs_hz: float) -> None:
        self._fs = repr(float(fs_hz))
        texts = [
            f',\r\n  "type": "data",\r\n  "content": {{\r\n    "stream": "{stream}",\r\n'
            f'    "channel_num": {i},\r\n    "channel_name": "{name}",\r\n    "num_samples": '
            for i, name in enumerate(names)
        ]
        self._middles = [t.encode() for t in texts]
        self._cuts = [len(t) - len(t.encode()) or None for t in texts]  # characters less than bytes
        self._tail = b""

    def block(self, n: int, sample_num: int, unix_ms: int) -> None:
        """What all channels of the next block share."""
        self._tail = (
            f'{n},\r\n    "sample_num": {sample_num},\r\n    "sample_rate": {self._fs}\r\n  }},\r\n'
            f'  "data_size": {4 * n},\r\n  "timestamp": {unix_ms}\r\n}}'
        ).encode()

    def __call__(self, message_num: int, channel: int) -> bytes:
        head = b'{\r\n  "message_num": %d%b%b' % (message_num, self._middles[channel], self._tail)
        return head[: self._cuts[channel]]


def ttl_message(
    message_num: int, sample_num: int, line: int, state: int, word: int, stream: str, unix_ms: int
) -> list[bytes]:
    """A TTL event as the plugin sends it."""
    text = (
        f'{{\r\n  "message_num": {message_num},\r\n  "type": "event",\r\n'
        f'  "content": {{\r\n    "stream": "{stream}",\r\n'
        f'    "source_node": 100,\r\n    "type": {TTL_TYPE},\r\n    "sample_num": {sample_num}\r\n  }},\r\n'
        f'  "data_size": 10,\r\n  "timestamp": {unix_ms}\r\n}}'
    )
    return [EVENT, text.encode()[: len(text)], struct.pack("<BBQ", line, state, word)]
