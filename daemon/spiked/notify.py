"""What the daemon tells systemd: that it is ready, how it is, and that samples advance (sd_notify(3)).

`WATCHDOG=1` is never sent because time has passed while samples should come. In a session that records, each
stream must have moved on since the last time: in the ring (acquire) and, where there is more to write, in the
file (record). The live path is not asked: a recording is not ended because sorting is stuck.
A stream whose source is gone while others go on is the session's business, and is not waited for here.
While there is nothing to advance (no session, a session that waits for its first sample, one that is being closed)
the event loop that sends the message is all that could be stuck. Each of those waits has an end of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

SILENCE_SLACK_S = 20.0  # a silent source ends the session after silence_s; the watchdog comes after that
EXTENSION_S = 30.0


def notify(text: str) -> None:
    """One datagram to systemd where it supervises us, else nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.connect("\0" + address[1:] if address.startswith("@") else address)
        s.send(text.encode())


def watchdog_s(silences_s: list[float], told_us: str | None) -> float | None:
    """How long samples may stand still before systemd acts, for a session with these `silence_s`.

    Never less than the unit's own WatchdogSec (`told_us`: WATCHDOG_USEC of the environment); None without one.
    """
    if not told_us or not told_us.isdigit() or int(told_us) == 0:
        return None
    return max(int(told_us) / 1e6, max(silences_s, default=0.0) + SILENCE_SLACK_S)


class Advance:
    """Whether the sample path has moved on since it was last seen to."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int | None]] = {}

    def moved(self, status: dict[str, Any]) -> bool:
        """True when systemd may be told WATCHDOG=1. `status` is what `spiked status` prints."""
        if status.get("state") != "recording":
            self._seen.clear()
            return True
        coming = {
            n: s
            for n, s in status.get("streams", {}).items()
            if s.get("state", "recording") in ("starting", "recording")
        }  # one that was lost is told of, and must not take the others with it
        now = {name: _position(s) for name, s in coming.items()}
        moved = all(self._advanced(name, *position) for name, position in now.items())
        if moved:
            self._seen = now
        return moved

    def _advanced(self, name: str, received: int, written: int | None) -> bool:
        before, written_before = self._seen.get(name, (-1, -1))
        if received <= before or written is None:
            return received > before
        caught_up = written_before is not None and written_before >= before >= 0
        return written > (-1 if written_before is None else written_before) or caught_up


def _position(stream: dict[str, Any]) -> tuple[int, int | None]:
    """Samples in the ring, and in the file (-1: the recorder has not said yet, None: nothing is recorded)."""
    recorded = "record" in stream.get("pids", {}) or "record" in stream.get("processes", {})
    record = stream.get("processes", {}).get("record") or {}
    return int(stream.get("samples") or 0), int(record.get("samples", -1)) if recorded else None


def line(status: dict[str, Any]) -> str:
    """One line for `systemctl status`: what the daemon does and whether anything is wrong."""
    state, session, waits = str(status.get("state", "idle")), status.get("session"), status.get("waits_for")
    if waits:
        return f"STATUS=recording begins when samples come; {waits}"
    if not session:
        return f"STATUS={state}; `spiked start` begins a session"
    parts = [f"{state} {session}"]
    for name, s in status.get("streams", {}).items():
        if s.get("state") in ("lost", "failed"):
            parts.append(f"{name}: {s['state'].upper()}")
            continue
        if not s.get("fs_hz"):
            parts.append(f"{name}: waiting for its first sample")
            continue
        told = f"{name}: {s['samples'] / s['fs_hz']:.0f} s of {s['channels']} channels, {s['gaps']} gaps"
        live = s.get("processes", {}).get("live") or {}
        parts.append(f"{told}, {live['units']} units" if live.get("units") else told)
    if "disk_free_gb" in status:
        parts.append(f"{status['disk_free_gb']} GB free")
    if error := status.get("error"):
        parts.append(str(error).splitlines()[0])
    return "STATUS=" + "; ".join(parts)


class Teller:
    """What the supervisor says to systemd once a second. `WATCHDOG_USEC` of the environment is the unit's."""

    def __init__(self, silences_s: list[float]) -> None:
        self._advance = Advance()
        self._interval_s = watchdog_s(silences_s, os.environ.get("WATCHDOG_USEC"))
        self._last_line = ""

    def starting(self, text: str) -> None:
        """Before READY: what takes time (a recovery, say) and that it is being done."""
        notify(f"STATUS={text}\nEXTEND_TIMEOUT_USEC={EXTENSION_S * 1e6:.0f}")

    def ready(self) -> None:
        interval = f"\nWATCHDOG_USEC={self._interval_s * 1e6:.0f}" if self._interval_s else ""
        notify(f"READY=1{interval}")

    def tell(self, status: dict[str, Any], stopping: bool) -> None:
        """STATUS when it changed, WATCHDOG=1 when samples advanced, more time while a session is being closed."""
        said = line(status)
        lines = [] if said == self._last_line else [said]
        self._last_line = said
        if self._advance.moved(status):
            lines.append("WATCHDOG=1")
        if stopping and status.get("state") in ("recording", "stopping", "finalizing"):
            lines.append(f"EXTEND_TIMEOUT_USEC={EXTENSION_S * 1e6:.0f}")
        if lines:
            notify("\n".join(lines))

    def stopping(self, why: str, within_s: float = EXTENSION_S) -> None:
        """`within_s`: how long it may be until the next word, or the end."""
        notify(f"STOPPING=1\nSTATUS=stopping: {why}\nEXTEND_TIMEOUT_USEC={within_s * 1e6:.0f}")
