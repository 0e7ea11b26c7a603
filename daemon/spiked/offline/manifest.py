"""Which stages of an offline job are finished, in stages.json: a rerun goes on after the last one.

A finished stage counts only while the recording and the parameters are the same and its files are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

VERSION = 1


def digest(*parts: Any) -> str:
    """A short fingerprint of anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all: written beside the target, then renamed over it."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(data, f, indent=1, default=float)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


class Manifest:
    """stages.json in `folder`: per stage what it returned, its files, and the fingerprint of what it worked on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "stages.json"
        self.stages: dict[str, dict[str, Any]] = {}
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
            if old.get("version") == VERSION:
                self.stages = dict(old["stages"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.stages = {}

    def finished(self, stage: str, inputs: str) -> bool:
        """True if the stage ran on these inputs and its files are still there."""
        entry = self.stages.get(stage)
        if entry is None or entry.get("inputs") != inputs:
            return False
        return all((self.folder / f).exists() for f in entry["files"])

    def finish(
        self, stage: str, started: float, files: list[str], result: dict[str, Any], inputs: str
    ) -> None:
        """Record a stage; `started` is its wall time (time.time()), `files` are relative to the folder."""
        self.stages[stage] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started)),
            "seconds": round(time.time() - started, 3),
            "inputs": inputs,
            "files": files,
            "result": result,
        }
        self._write()

    def forget(self, stages: tuple[str, ...]) -> None:
        """Later stages must run again because an earlier one did."""
        for stage in stages:
            self.stages.pop(stage, None)
        self._write()

    def seconds(self) -> dict[str, float]:
        return {name: entry["seconds"] for name, entry in self.stages.items()}

    def _write(self) -> None:
        write_json(self.path, {"version": VERSION, "stages": self.stages})
