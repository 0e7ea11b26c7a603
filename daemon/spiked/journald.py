"""Log records to systemd's journal, with their fields, where the journal is who reads our stderr.

`journalctl -u spiked SPIKED_EVENT=restart` then finds what `log.jsonl` would. The protocol is a datagram of
KEY=value lines (systemd.io/JOURNAL_NATIVE_PROTOCOL); a value with line breaks goes with its length instead.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from typing import Any

SOCKET = "/run/systemd/journal/socket"
PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
MAX_VALUE = 4096  # of a field other than the message; the whole has to fit a datagram
MAX_MESSAGE = 32768


def priority(level: int) -> int:
    """syslog's number for a logging level."""
    return next((p for at, p in sorted(PRIORITY.items(), reverse=True) if level >= at), 7)


def is_journal(fd: int = 2) -> bool:
    """True when this descriptor is the journal's stream (JOURNAL_STREAM, systemd.exec(5))."""
    device, colon, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        at = os.fstat(fd)
    except OSError:
        return False
    return bool(colon) and (device, inode) == (str(at.st_dev), str(at.st_ino))


def encode(fields: Mapping[str, Any]) -> bytes:
    """One datagram. Keys become upper case letters, digits and underscores."""
    out = b""
    for key, value in fields.items():
        name = re.sub(r"[^A-Z0-9_]", "_", key.upper()).strip("_").encode()[:64]
        text = str(value).encode("utf-8", "replace")
        text = text[: MAX_MESSAGE if name == b"MESSAGE" else MAX_VALUE]
        out += (
            name + (b"=" + text if b"\n" not in text else b"\n" + struct.pack("<Q", len(text)) + text) + b"\n"
        )
    return out


class Journald(logging.Handler):
    """Sends records to the journal; where that fails, as a line with its priority (`<3>...`) to stderr.

    A record's `about` (a mapping) becomes fields SPIKED_<NAME>.
    """

    def __init__(self, path: str = SOCKET) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # a journal that does not read must not hold up the daemon

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except (TypeError, ValueError):
            self.handleError(record)
            return
        level = priority(record.levelno)
        about = getattr(record, "about", None) or {}
        fields = {
            "MESSAGE": text, "PRIORITY": level, "SYSLOG_IDENTIFIER": "spiked", "LOGGER": record.name,
            **{f"SPIKED_{k}": v for k, v in about.items() if v is not None},
        }  # fmt: skip
        try:
            self._socket.sendto(encode(fields), self._path)
        except OSError:
            sys.stderr.write("".join(f"<{level}>{line}\n" for line in text.splitlines() or [""]))
            sys.stderr.flush()

    def close(self) -> None:
        self._socket.close()
        super().close()
