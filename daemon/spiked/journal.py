"""log.jsonl: every event worth knowing, one JSON object per line; the same lines, shorter, to the terminal."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
terminal = logging.getLogger("spiked")


class Journal:
    """Append-only. `note` never raises: a full disk must not end a session through its log."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.session = None if path is None else path.parent.name
        self.failed = 0

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
        if self._file is not None:
            try:
                self._file.write(json.dumps({**row, **fields}, default=str) + "\n")
            except (OSError, ValueError):
                self.failed += 1

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                self.failed += 1
