"""The line between a child process and the supervisor: JSON lines out on stdout, commands in on stdin.

Telling never blocks: when the supervisor does not read, progress is dropped and counted, so a stuck
supervisor cannot stall the sample path. When stdin closes, the supervisor is gone and `stop` is set.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from spiked.ring import Ring

PENDING_BYTES = 1 << 16  # of lines that wait for the supervisor to read; a single longer line waits whole
DROPPED = ("progress", "log")  # beyond that; what is told once is kept


def wait_for_ring(path: Path, link: Link) -> Ring | None:
    """The ring once the supervisor has made it; None when told to stop first."""
    while not path.exists():
        if link.stop.wait(0.02):
            return None
    return Ring(path)


class Link:
    """The child's end."""

    def __init__(self, name: str) -> None:
        self.name, self.dropped = name, 0
        self.stop = threading.Event()
        self.orphaned = False
        self.commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._fd = os.dup(sys.stdout.fileno())
        os.set_blocking(self._fd, False)
        # whatever a library prints must not tear the line protocol
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._pending = b""
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="link", daemon=True).start()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: object) -> None:
        # on a thread: this may interrupt the main thread inside the event's own lock, which is not reentrant
        threading.Thread(target=self.stop.set, name="sigterm", daemon=True).start()

    def _listen(self) -> None:
        # os.read, not sys.stdin: a buffered reader held by a thread aborts the interpreter's shutdown
        fd, rest = sys.stdin.fileno(), b""
        while data := os.read(fd, 65536):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                try:
                    command = json.loads(line)
                except ValueError:
                    continue
                if command.get("op") == "stop":
                    self.stop.set()
                self.commands.put(command)
        self.orphaned = True
        self.stop.set()

    def tell(self, event: str, **fields: Any) -> None:
        """One event to the supervisor; one of those that come again and again is dropped when it does not listen."""
        line = (
            json.dumps({"event": event, "process": self.name, "t_ns": time.monotonic_ns(), **fields}) + "\n"
        )
        with self._lock:
            before = len(self._pending)
            data = self._pending + line.encode()
            try:
                n = os.write(self._fd, data)
            except BlockingIOError:
                n = 0
            except OSError:  # the supervisor is gone
                self._pending = b""
                return
            self._pending = data[n:]
            if event in DROPPED and before and n <= before and len(self._pending) > PENDING_BYTES:
                self.dropped += 1  # keep what was pending, drop the new line
                self._pending = data[n:before]

    def flush(self, patience_s: float = 0.0) -> None:
        """Send on what the pipe had no room for; waits at most `patience_s` for a supervisor that reads slowly."""
        until = time.monotonic() + patience_s
        while self._pending:
            with self._lock:
                try:
                    self._pending = self._pending[os.write(self._fd, self._pending) :]
                    continue
                except BlockingIOError:
                    pass
                except OSError:  # the supervisor is gone
                    self._pending = b""
                    return
            if time.monotonic() >= until:
                return
            time.sleep(0.005)

    def next_command(self, timeout_s: float = 0.0) -> dict[str, Any] | None:
        """The oldest unread command, or None. Also sends on what could not be told at once."""
        self.flush()
        try:
            return self.commands.get(timeout=timeout_s) if timeout_s else self.commands.get_nowait()
        except queue.Empty:
            return None
