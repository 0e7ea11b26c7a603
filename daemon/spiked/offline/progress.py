"""What an offline job is doing, said at least every few seconds."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STAGES = (
    "preflight",
    "canary",
    "export",
    "sort",
    "analyze",
    "labels",
    "slay",
    "merge",
    "nwb",
    "library",
    "phy",
    "compare",
    "report",
)
# Share of a job's time per stage, from sessions of a minute or two on two CPU cores.
SHARES = dict(
    zip(STAGES, (0.01, 0.02, 0.02, 0.66, 0.11, 0.01, 0.03, 0.02, 0.01, 0.08, 0.01, 0.01, 0.01), strict=True)
)


@dataclass(frozen=True)
class Step:
    """One progress message. `fraction` is of the stage, `overall` of the whole job, both 0 to 1."""

    stage: str
    fraction: float
    overall: float
    text: str

    def as_event(self) -> dict[str, Any]:
        return {
            "event": "progress",
            "stage": self.stage,
            "fraction": round(self.fraction, 4),
            "overall": round(self.overall, 4),
            "text": self.text,
        }


class Progress:
    """Hands every step to `tell`, and repeats the last one with its age when nothing new came for `beat_s`.

    Use as a context manager: the beat runs on a thread that ends with the block. `tell` is called from either
    thread, one call at a time.
    """

    def __init__(self, tell: Callable[[Step], None] | None = None, beat_s: float = 3.0) -> None:
        self._tell = tell or (lambda step: None)
        self._beat_s = beat_s
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._last: Step | None = None
        self._changed = self._spoken = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="offline-progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def say(self, stage: str, fraction: float, text: str) -> None:
        """`fraction` of `stage` is done. The same text again within 0.2 s is dropped."""
        fraction = min(max(fraction, 0.0), 1.0)
        before = sum(SHARES[s] for s in STAGES[: STAGES.index(stage)])
        step = Step(stage, fraction, round(min(before + fraction * SHARES[stage], 1.0), 9), text)
        now = time.monotonic()
        with self._lock:
            if self._last is not None and step.text == self._last.text and now - self._spoken < 0.2:
                return
            self._last, self._changed = step, now
            self._speak(step, now)

    def _speak(self, step: Step, now: float) -> None:
        self._spoken = now
        self._tell(step)

    def _beat(self) -> None:
        while not self._done.wait(self._beat_s / 4):
            now = time.monotonic()
            with self._lock:
                if self._last is not None and now - self._spoken >= self._beat_s:
                    s = self._last
                    text = f"{s.text} ({now - self._changed:.0f} s)"
                    self._speak(Step(s.stage, s.fraction, s.overall, text), now)


_BAR = re.compile(r"(\d+)%\|[^|]*\|\s*(\d+)/(\d+)")

# Kilosort4's own stage headers, in order, with the share of its time each takes on a CPU.
PHASES = (
    ("Computing preprocessing variables", "whitening", 0.02),
    ("Computing drift correction", "drift", 0.03),
    ("Extracting spikes using templates", "detection", 0.60),
    ("First clustering", "first clustering", 0.05),
    ("Extracting spikes using cluster waveforms", "extraction", 0.20),
    ("Final clustering", "final clustering", 0.07),
    ("Merging clusters", "merging", 0.01),
    ("Saving to phy", "saving", 0.02),
)


def bar(text: str) -> tuple[int, int] | None:
    """(done, total) of the last tqdm bar in a piece of a child's stderr, or None."""
    found = _BAR.findall(text)
    return (int(found[-1][1]), int(found[-1][2])) if found else None


def phases(log: str) -> list[int]:
    """Which of PHASES a kilosort4.log says were begun."""
    return [k for k, (header, _, _) in enumerate(PHASES) if header in log]


def sort_fraction(at: int, within: float) -> float:
    """Share of a Kilosort4 run that is done, `within` 0 to 1 of phase `at`."""
    if at < 0:
        return 0.0
    return round(sum(p[2] for p in PHASES[:at]) + PHASES[at][2] * within, 9)  # or it goes back by a bit
