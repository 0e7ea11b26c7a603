"""The session's clocks while it runs: what the rings tell goes into `spiked.clocks`, what that says goes to everybody.

Once a second; no sample is looked at. `clocks.json` in the session folder holds it all, for the NWB files, the report
and whoever converts sample numbers later (`spiked_client.clocks`).
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.clocks.aligned import COLUMNS, Clocks
from spiked.clocks.arrival import Step
from spiked.journal import Journal
from spiked.stream import EventKind, Flag
from spiked.track import Track

FILE = "clocks.json"
LOOK_S = 1.0
SAVE_S = 10.0


class Timekeeper:
    """`look` once in a while, `finish` before the rings go. `tell` gets a news item per step."""

    def __init__(self, folder: Path, journal: Journal, tell: Callable[[dict[str, Any]], None]) -> None:
        self._path, self._journal, self._tell = folder / FILE, journal, tell
        self.clocks: Clocks | None = None
        self._rows: dict[str, dict[str, int]] = {}  # stream -> table -> next row
        self._lines: dict[str, int | None] = {}
        self._looked_s = self._saved_s = 0.0
        self._failed = False
        self._saving: threading.Thread | None = None

    def begin(self, tracks: Iterable[Track]) -> None:
        """All streams are known. A replay faster or slower than life has no clock."""
        real = [t for t in tracks if t.ring is not None and (t.cfg.source != "replay" or t.cfg.speed == 1)]
        if not real:
            return
        self.clocks = Clocks({t.name: t.ring.info.fs_hz for t in real if t.ring is not None})
        for t in real:
            assert t.ring is not None
            self._rows[t.name] = {"chunks": 0, "events": 0}
            told = t.ring.info.annotations.get("sync_line")
            self._lines[t.name] = t.cfg.sync_line if t.cfg.sync_line is not None else told

    def look(self, tracks: Iterable[Track]) -> bool:
        """Take in what came; True when a second has passed and there is something to tell."""
        now = time.monotonic()
        if self.clocks is None or now - self._looked_s < LOOK_S:
            return False
        self._looked_s = now
        try:
            self._look(tracks)
            if now - self._saved_s > SAVE_S:
                self._saved_s = now
                self._save(final=False)
        except Exception as e:  # noqa: BLE001 - no clock is worth a recording
            self._give_up(e)
        return True

    def _look(self, tracks: Iterable[Track]) -> None:
        assert self.clocks is not None
        for t in tracks:
            if t.ring is not None and t.name in self._rows:
                self._take(t)
        for name, step in self.clocks.update():
            self._alarm(name, step)

    def _give_up(self, e: Exception) -> None:
        """What was saved so far stays in clocks.json."""
        self.clocks = None
        text = f"the clocks of this session are no longer compared ({type(e).__name__}: {e}); the recording goes on"
        self._journal.note("error", text, level="error", trace=traceback.format_exc(limit=20))
        self._tell({"event": "error", "text": text})

    def _take(self, t: Track) -> None:
        assert t.ring is not None and self.clocks is not None
        next_row = self._rows[t.name]
        rows, next_row["chunks"], _ = t.ring.rows("chunks", next_row["chunks"])
        resets = np.flatnonzero(rows["flags"] & int(Flag.RESET))
        for part in np.split(rows, resets):
            if len(part) and part["flags"][0] & int(Flag.RESET):
                self.clocks.reset(t.name, int(part["first"][0]))
            real = part[(part["flags"] & int(Flag.GAP)) == 0]
            for name, step in self.clocks.arrived(
                t.name, real["first"] + real["count"] - 1, real["arrival_ns"]
            ):
                self._alarm(name, step)
        events, next_row["events"], _ = t.ring.rows("events", next_row["events"])
        line = self._lines[t.name]
        if line is not None and len(events):
            kinds = (int(EventKind.TTL), int(EventKind.STIM))
            rising = np.isin(events["kind"], kinds) & (events["line"] == line) & (events["state"] == 1)
            self.clocks.edges(t.name, events["sample"][rising])

    def _alarm(self, name: str, step: Step) -> None:
        assert self.clocks is not None
        between = "" if step.method == "arrival" else f", or that of {self.clocks.reference},"
        by = f"{1000 * abs(step.seconds):.1f} ms"
        what = (
            f"{by} more passed than it counted: samples were lost without a word, or it was restarted"
            if step.seconds > 0
            else f"it counted {by} more than passed, or its samples come sooner than before"
        )
        by_whom = "the computer's clock" if step.method == "arrival" else "the pulses that both get"
        text = f"the clock of {name}{between} jumped near sample {step.sample}: by {by_whom}, {what}"
        self._journal.note(
            "clock_step", text, level="error", stream=name, sample=step.sample, ms=1000 * step.seconds
        )
        self._tell({"event": "clock_step", "stream": name, "sample": step.sample, "ms": 1000 * step.seconds, "method": step.method, "text": text})  # fmt: skip

    # ---- what others see

    def told(self) -> dict[str, dict[str, Any]]:
        """Stream -> its clock's figures."""
        return {} if self.clocks is None else self.clocks.told()

    def news(self) -> dict[str, Any]:
        """The message of the topic `clock`."""
        return {"reference": self.clocks.reference if self.clocks else None, "streams": self.told()}

    def everything(self, final: bool = False) -> dict[str, Any]:
        """What `clocks.json` holds and the control port answers."""
        if self.clocks is None:
            return {"reference": None, "columns": list(COLUMNS), "streams": {}}
        told = self.told()
        for name, s in self.clocks.streams.items():
            told[name]["steps"] = [
                {"sample": x.sample, "ms": 1000 * x.seconds, "method": x.method} for x in s.steps
            ]
            told[name]["starts"] = s.starts
            told[name]["table"] = self.clocks.table(name, final)
        return {"reference": self.clocks.reference, "columns": list(COLUMNS), "streams": told}

    def _save(self, final: bool) -> None:
        """Beside the event loop, but for the last time: a disk that hangs must not hold up who stops stimulation."""
        text = json.dumps({"version": 1, **self.everything(final)})
        if self._saving is not None and self._saving.is_alive():
            if not final:
                return
            self._saving.join(SAVE_S)
        if final:
            self._write(text)
            return
        self._saving = threading.Thread(target=self._write, args=(text,), name="clocks", daemon=True)
        self._saving.start()

    def _write(self, text: str) -> None:
        new = self._path.with_name(FILE + ".new")
        try:
            new.write_text(text, encoding="utf-8")
            new.replace(self._path)
        except OSError as e:
            if not self._failed:
                self._journal.note("error", f"{self._path}: {e.strerror}", level="error")
            self._failed = True

    def finish(self, tracks: Iterable[Track]) -> None:
        """The last look, and the table fitted from both sides."""
        if self.clocks is not None:
            self._looked_s = 0.0
            self.look(tracks)
        if self.clocks is not None:
            try:
                self._save(final=True)
            except Exception as e:  # noqa: BLE001
                self._give_up(e)
