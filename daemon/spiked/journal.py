"""log.jsonl: every event worth knowing, one JSON object per line; the same lines, shorter, to the terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
terminal = logging.getLogger("spiked")
WAITING = 10_000
CLOSE_S = 5.0


class Journal:
    """Append-only, written by a thread of its own: `note` never raises and never waits, for a full disk or one that hangs
    must not end or hold up a session through its log. Lines beyond WAITING are dropped and counted in `failed`.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.session = None if path is None else path.parent.name
        self.failed, self._closed = 0, False
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._writer: threading.Thread | None = None

    def note(self, event: str, text: str = "", level: str = "info", **fields: Any) -> None:
        row = {
            "time": datetime.now(UTC).isoformat(),
            "t_ns": time.monotonic_ns(),
            "level": level,
            "event": event,
            "text": text,
        }
        about = {"event": event, "session": self.session, **fields}
        terminal.log(LEVELS.get(level, logging.INFO), "%s", text or event, extra={"about": about})
        if self._file is None:
            return
        if self._closed:
            self.failed += 1
            return
        try:
            self._lines.put_nowait(json.dumps({**row, **fields}, default=str) + "\n")
        except (ValueError, queue.Full):
            self.failed += 1
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
            self._writer.start()

    def _write(self) -> None:
        assert self._file is not None
        while (line := self._lines.get()) is not None:
            try:
                self._file.write(line)
            except (OSError, ValueError):
                self.failed += 1
        try:
            self._file.close()
        except OSError:
            self.failed += 1

    def close(self) -> None:
        """When all is written, or after CLOSE_S: a disk that hangs is left to its thread."""
        if self._file is None or self._closed:
            return
        self._closed = True
        if self._writer is None:
            self._file.close()
        else:
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(None)
            self._writer.join(CLOSE_S)
