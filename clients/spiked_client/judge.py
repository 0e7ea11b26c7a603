"""Judges the figures of one health message after the other: what is good, what is bad, and what just changed.

Pure: time comes in with the message. Memory is bounded by the labels there are, at most MAX_SERIES of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from spiked_client.figures import FIGURES, Figure, Labels, Status

WINDOW_S = 60.0
STEP_S = 2.0  # between the points a window keeps
RAISE_S, CLEAR_S = 3.0, 15.0  # a value must stay bad, and good, for so long before it counts
FORGET_S = 10.0  # figures that are not told any more
LEAST = 100  # observations that a percentile needs
MAX_SERIES = 20_000


@dataclass(frozen=True)
class Judged:
    """One figure as it stands. `value` is the judged number: see `figure.judged_by`."""

    figure: Figure
    labels: Labels
    value: float
    level: str

    def as_dict(self) -> dict[str, Any]:
        """For messages: the alarm, its limits, and what to do."""
        f = self.figure
        return {
            "figure": f.name, **dict(zip(f.labels, self.labels, strict=True)), "level": self.level, "value": round(self.value, 4),
            "judged_by": f.judged_by, "good": f.good, "bad": f.bad, "about": f.about, "todo": f.todo,
        }  # fmt: skip

    def line(self) -> str:
        """One line for a person."""
        at = f" of {', '.join(self.labels)}" if self.labels else ""
        how = {"value": "", "increase": " within a minute", "p99": " (99th percentile of a minute)"}[
            self.figure.judged_by
        ]
        limit = self.figure.bad if self.level == "bad" else self.figure.good
        if self.level == "good":
            return f"{self.figure.name}{at} is good again: {self.value:.4g}{how}"
        return (
            f"{self.figure.name}{at}: {self.value:.4g}{how}, {self.level} from {limit:g}; {self.figure.todo}"
        )


def percentile(edges: list[float], n: list[float], q: float) -> float:
    """The q quantile (0..1) of a histogram, linear within a bin; NaN while empty, the last edge beyond it."""
    total = sum(n)
    if total <= 0:
        return float("nan")
    want, seen, low = q * total, 0.0, 0.0
    for edge, count in zip(edges, n, strict=False):
        if count and seen + count >= want:
            return low + (edge - low) * (want - seen) / count
        seen, low = seen + count, edge
    return float(edges[-1])


class _Window:
    """The last minute of a counter or histogram, as sums that start anew when the process that counts does."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, tuple[float, ...]]] = deque()
        self._raw: tuple[float, ...] = ()
        self._sum: tuple[float, ...] = ()

    def add(self, now: float, raw: tuple[float, ...]) -> tuple[float, ...]:
        """How much each number grew within the window."""
        if len(raw) != len(self._raw):
            self._points.clear()
            self._sum = (0.0,) * len(raw)
        elif any(new < old for new, old in zip(raw, self._raw, strict=True)):  # counted anew from 0
            self._sum = tuple(s + new for s, new in zip(self._sum, raw, strict=True))
        else:
            self._sum = tuple(s + new - old for s, new, old in zip(self._sum, raw, self._raw, strict=True))
        self._raw = raw
        if not self._points or now - self._points[-1][0] >= STEP_S:
            self._points.append((now, self._sum))
        while len(self._points) > 1 and self._points[1][0] <= now - WINDOW_S:
            self._points.popleft()
        return tuple(s - was for s, was in zip(self._sum, self._points[0][1], strict=True))


@dataclass
class _Series:
    window: _Window
    level: str = "good"
    wanted: str = "good"  # the level it seems to have now ...
    since: float = 0.0  # ... since then
    heard: float = 0.0


class Judge:
    """`update` with every health message; `now` is seconds of any clock that does not go back."""

    def __init__(self, figures: tuple[Figure, ...] = FIGURES) -> None:
        self._figures = [f for f in figures if f.good is not None]
        self._series: dict[tuple[str, Labels], _Series] = {}
        self.standing: dict[tuple[str, Labels], Judged] = {}  # of every judged figure, as it is now

    def update(self, status: Status, now: float) -> list[Judged]:
        """What became better or worse with this message."""
        changed = []
        for figure in self._figures:
            for labels, value in figure.read(status):
                series = self._of(figure, labels, now)
                if series is not None:
                    was = series.level
                    judged = self._judge(figure, labels, series, value, now)
                    self.standing[figure.name, labels] = judged
                    changed += [judged] if judged.level != was else []
        return changed + self._forget(now)

    @property
    def alarms(self) -> list[Judged]:
        """What is not good now and calls somebody, the worst first."""
        found = [j for j in self.standing.values() if j.level != "good" and j.figure.alarm]
        return sorted(found, key=lambda j: (j.level != "bad", j.figure.name, j.labels))

    def _of(self, figure: Figure, labels: Labels, now: float) -> _Series | None:
        series = self._series.get((figure.name, labels))
        if series is None:
            if len(self._series) >= MAX_SERIES:
                return None
            series = self._series[figure.name, labels] = _Series(_Window(), since=now)
        series.heard = now
        return series

    def _judge(self, figure: Figure, labels: Labels, series: _Series, value: Any, now: float) -> Judged:
        if figure.kind == "gauge":
            number = float(value)
        elif figure.kind == "counter":
            (number,) = series.window.add(now, (float(value),))
        else:
            grew = list(series.window.add(now, tuple(value["n"])))
            number = percentile(value["edges"], grew, 0.99) if sum(grew) >= LEAST else float("nan")
        wanted = figure.level(number)
        if wanted != series.wanted:
            series.wanted, series.since = wanted, now
        worse = ("good", "warning", "bad").index(wanted) > ("good", "warning", "bad").index(series.level)
        wait = (RAISE_S if figure.kind == "gauge" else 0.0) if worse else CLEAR_S
        if wanted != series.level and now - series.since >= wait:
            series.level = wanted
        return Judged(figure, labels, number, series.level)

    def _forget(self, now: float) -> list[Judged]:
        """Figures that nobody tells any more are neither good nor bad; their alarms end."""
        ended = []
        for key in [k for k, s in self._series.items() if now - s.heard > FORGET_S]:
            del self._series[key]
            last = self.standing.pop(key)
            if last.level != "good":
                ended.append(Judged(last.figure, last.labels, last.value, "good"))
        return ended
