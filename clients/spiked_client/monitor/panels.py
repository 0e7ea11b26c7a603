"""The monitor's panels: each draws one thing from the model as text of the size it has. Drawing only, no sockets."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from rich.style import Style
from rich.text import Text
from textual.widgets import Static

from spiked_client.figures import hours_left
from spiked_client.judge import Judged
from spiked_client.monitor.model import Feed, Model, StreamModel
from spiked_client.monitor.raster import BLIND, GAP, UNHEARD, bars, draw
from spiked_client.watch import job_lines

LEVELS = {"good": "green", "warning": "yellow", "bad": "bold red"}
PALETTE = ("cyan", "green", "yellow", "magenta", "blue", "bright_red", "bright_cyan", "bright_green")
BLIND_STYLE, GAP_STYLE = Style(bgcolor="grey30"), Style(bgcolor="dark_red")
LATENCY_EDGES = np.geomspace(0.2, 200.0, 61)  # ms


class Panel(Static):
    """A titled box. `stream` is the one that is looked at."""

    TITLE: ClassVar[str] = ""
    can_focus = True

    def __init__(self, feed: Feed, number: int) -> None:
        super().__init__(id=type(self).__name__.lower())
        self.feed, self.stream = feed, ""
        self.border_title = f"{number} {self.TITLE}"

    def redraw(self, stream: str) -> None:
        """Draw what is known now."""
        self.stream = stream
        width, height = self.size.width, self.size.height
        if width > 0 and height > 0:
            with self.feed.use() as model:
                text = self.draw(model, model.streams.get(stream), width, height)
            text.no_wrap, text.overflow = True, "crop"
            self.update(text)

    def draw(self, model: Model, stream: StreamModel | None, width: int, height: int) -> Text:
        """The panel's text."""
        raise TypeError("use a panel")


def order(stream: StreamModel, by: str) -> list[int]:
    """The units, the topmost first: by depth, by rate, or by their ids."""
    seen = {u for u in stream.spikes.units if u >= 0} | set(stream.units)
    rates = stream.view.rates_hz(time.monotonic_ns()) if by == "rate" else {}
    keys = {
        "depth": lambda u: (-stream.units.get(u, (0.0, 0.0))[0], u), "rate": lambda u: (-rates.get(u, 0.0), u), "id": lambda u: (u,),
    }  # fmt: skip
    return sorted(seen, key=keys[by])


class RasterPanel(Panel):
    """Spikes of the last seconds; unsorted ones per electrode until there are units."""

    TITLE = "Raster"
    ORDERS: ClassVar[tuple[str, ...]] = ("depth", "rate", "id")

    def __init__(self, feed: Feed, number: int) -> None:
        super().__init__(feed, number)
        self.seconds, self.by, self.frozen_at = 4.0, "depth", 0
        self._ordered: tuple[tuple[str, str, int], float, list[int]] = (("", "", 0), 0.0, [])

    def _order(self, stream: StreamModel) -> list[int]:
        """Twice a second is enough."""
        now, key = time.monotonic(), (stream.name, self.by, len(stream.spikes.units))
        if self._ordered[0] != key or now - self._ordered[1] > 0.5:
            self._ordered = (key, now, order(stream, self.by))
        return self._ordered[2]

    def draw(self, model: Model, stream: StreamModel | None, width: int, height: int) -> Text:
        if stream is None or not stream.stop:
            return Text("no stream publishes yet")
        spikes = stream.spikes.all()
        units = self._order(stream)
        field, n = ("unit", len(units)) if units else ("channel", stream.channels)
        spikes = spikes if units else stream.mua.all()
        what = f"{n} units by {self.by}" if units else f"unsorted, {n} electrodes"
        stop = self.frozen_at or stream.stop
        first = stop - int(self.seconds * stream.fs_hz)
        self.border_title = (
            f"1 Raster {stream.name}: {what}, {self.seconds:g} s{' FROZEN' if self.frozen_at else ''}"
        )
        rows = spikes[field].astype(np.int64)
        if units:
            ids = np.sort(units)
            at = np.argsort(units, kind="stable")
            rows = at[np.clip(np.searchsorted(ids, rows), 0, len(ids) - 1)]
        gutter = 5 if width > 40 else 0
        blind = [(a, b) for a, b, _ in stream.blind]
        sent = [e["sample"] for e in stream.ledger if e["outcome"] == "sent"]
        drawn = draw(
            spikes["sample"],
            rows,
            n,
            first,
            stop,
            width - gutter,
            height - 1,
            blind,
            list(stream.gaps),
            list(stream.unheard),
            [*stream.stims, *sent],
        )
        out = Text(" " * gutter + drawn.marks + "\n", style="bright_white")
        for i, line in enumerate(drawn.lines):
            if gutter:
                label = (
                    f"{units[drawn.rows[i]] if units else drawn.rows[i]:>4} "
                    if i < len(drawn.rows)
                    else " " * gutter
                )
                out.append(label, "dim")
            _on_ground(out, line, drawn.ground, PALETTE[i % len(PALETTE)])
            out.append("\n")
        return out


def _on_ground(out: Text, line: str, ground: np.ndarray, colour: str) -> None:
    """A line of dots, its columns on grey where blind, on red where samples are missing, dotted where nothing was heard."""
    cuts = [0, *(np.flatnonzero(np.diff(ground)) + 1).tolist(), len(line)]
    for a, b in pairwise(cuts):
        kind = int(ground[a]) if a < len(ground) else 0
        if kind == UNHEARD:
            out.append("·" * (b - a), "dim")
            continue
        under = {BLIND: BLIND_STYLE, GAP: GAP_STYLE}.get(kind, Style())
        out.append(line[a:b], Style(color=colour) + under)


class RatesPanel(Panel):
    """The most active units of the last five seconds."""

    TITLE = "Rates"

    def draw(self, model: Model, stream: StreamModel | None, width: int, height: int) -> Text:
        if stream is None:
            return Text("")
        now = time.monotonic_ns()
        rates = {u: hz for u, hz in stream.view.rates_hz(now).items() if u >= 0}
        known = max(len(rates), len(stream.units))
        out = Text(
            f"{known} units {sum(rates.values()):.0f} Hz, mua {stream.view.mua_hz(now):.0f} Hz\n", "bold"
        )
        most = max(rates.values(), default=0.0)
        for i, (unit, hz) in enumerate(list(rates.items())[: max(height - 1, 0)]):
            out.append(f"{unit:>5} {hz:7.2f} ")
            out.append("█" * max(round((width - 14) * hz / most), 0) + "\n", PALETTE[i % len(PALETTE)])
        return out


class LatencyPanel(Panel):
    """How long it took from arrival to publication, and what was lost or could not be seen."""

    TITLE = "Latency and losses"

    def draw(self, model: Model, stream: StreamModel | None, width: int, height: int) -> Text:
        if stream is None:
            return Text("")
        view = stream.view
        made = view.made_ms()
        out = Text()
        if len(made):
            p50, p90, p99 = np.percentile(made, (50, 90, 99))
            judged = model.judge.standing.get(("spike_latency_ms", (stream.name,)))
            out.append(
                f"p50 {p50:.1f} p90 {p90:.1f} p99 {p99:.1f} ms\n", LEVELS[judged.level] if judged else "bold"
            )
        else:
            out.append("no messages in the last 5 s\n", "yellow")
        minute = _minute(model, stream.name)
        lines = [
            f"late {view.late}/{view.messages}  minute p99 {minute}", f"gaps {view.gaps} ({view.gap_samples} samples)",
            f"blind {100 * view.blind_fraction():.1f} %" + "".join(f" {name} {100 * part:.1f}" for name, part in stream.blind_by_reason(5.0).items()),
            f"messages lost {view.missed} replayed {view.replayed}",
        ]  # fmt: skip
        rows = min(max(height - 2 - len(lines), 0), 8)
        if len(made) and rows:
            columns = min(width, 60)
            edges = np.geomspace(LATENCY_EDGES[0], LATENCY_EDGES[-1], columns + 1)
            counts, _ = np.histogram(np.clip(made, edges[0], edges[-1]), edges)
            out.append("\n".join(bars(counts, rows)) + "\n", "cyan")
            out.append(_axis(columns) + "\n", "dim")
        out.append("\n".join(lines))
        return out


def _minute(model: Model, stream: str) -> str:
    judged = model.judge.standing.get(("spike_latency_ms", (stream,)))
    return "-" if judged is None or judged.value != judged.value else f"{judged.value:.1f} ms"


def _axis(columns: int) -> str:
    line = [" "] * columns
    low, high = np.log(LATENCY_EDGES[0]), np.log(LATENCY_EDGES[-1])
    for ms in (1, 10, 100):
        at = int((np.log(ms) - low) / (high - low) * columns)
        for i, c in enumerate(f"{ms} ms" if ms == 100 else str(ms)):
            if at + i < columns:
                line[at + i] = c
    return "".join(line)


SHOWN = (  # figure, what it is called here, how it is written
    ("live_behind_ms", "behind", "{:.0f} ms"), ("live_chunk_ms", "chunk p99", "{:.2f} ms"), ("live_deadline_missed", "deadline missed", "{:.0f}/min"),
    ("live_skipped_samples", "skipped", "{:.0f}/min"), ("ring_fill_ratio", "ring", "{:.0%}"), ("record_ms", "write p99", "{:.0f} ms"),
    ("disk_hours_left", "disk", "{:.3g} h"), ("disk_free_gb", "disk free", "{:.0f} GB"), ("gaps", "gaps", "{:.0f}/min"), ("blind_ratio", "blind", "{:.1%}"),
    ("clock_error_ppm", "clock off", "{:.1f} ppm"), ("doubtful_units_ratio", "doubtful units", "{:.0%}"), ("gpu_memory_ratio", "GPU memory", "{:.0%}"),
    ("gpu_celsius", "GPU", "{:.0f} °C"), ("mqtt_connected", "MQTT", "{:.0f}"), ("mqtt_outbox", "MQTT waiting", "{:.0f}"), ("unwanted_messages", "unwanted", "{:.0f}/min"),
)  # fmt: skip


class HealthPanel(Panel):
    """The judged figures, the worst first, in the colours of their limits."""

    TITLE = "Health"

    def draw(self, model: Model, stream: StreamModel | None, width: int, height: int) -> Text:
        out = Text()
        name = stream.name if stream else ""
        lines = [line for line in (_health(j, name) for j in model.judge.standing.values()) if line]
        lines.sort(key=lambda x: x[0])
        for _, level, text in lines[:height]:
            out.append("● ", LEVELS[level])
            out.append(text + "\n", "" if level == "good" else LEVELS[level])
        if not lines:
            out.append("nothing is told yet")
        return out


def _health(j: Judged, stream: str) -> tuple[tuple[int, int], str, str] | None:
    """(place, level, text); None for what belongs to another stream, or is good and not among those shown."""
    if "stream" in j.figure.labels and j.labels[0] != stream:
        return None
    place = next((i for i, (name, _, _) in enumerate(SHOWN) if name == j.figure.name), len(SHOWN))
    if place == len(SHOWN) and j.level == "good":
        return None
    name, form = (SHOWN[place][1], SHOWN[place][2]) if place < len(SHOWN) else (j.figure.name, "{:.3g}")
    rest = " ".join(label for label, of in zip(j.labels, j.figure.labels, strict=True) if of != "stream")
    value = "-" if j.value != j.value else form.format(j.value)
    return (
        (("bad", "warning", "good").index(j.level), place),
        j.level,
        " ".join(x for x in (name, rest, value) if x),
    )


class LogPanel(Panel):
    """Offline jobs, the newest decisions to stimulate, and the newest events."""

    TITLE = "Jobs, stimuli, events"

    def draw(self, model: Model, stream: StreamModel | None, width: int, height: int) -> Text:
        out = Text()
        jobs = job_lines(model.status) or ["jobs: none"]
        room = max(height - len(jobs), 0)
        ledger = [_decision(e) for e in (stream.ledger if stream else ())]
        decisions = ledger[-(room // 2 or 1) :] if ledger else []
        events = list(model.events)[-max(room - len(decisions), 0) :] if room > len(decisions) else []
        for line in jobs[:height]:
            out.append(line + "\n", "bold")
        for line in decisions:
            out.append(line + "\n", "magenta")
        for line in events:
            out.append(line + "\n")
        return out


def _decision(e: dict[str, Any]) -> str:
    why = f" ({e['reason']})" if e["reason"] else ""
    took = "" if e["ms"] is None else f" {e['ms']:.1f} ms"
    return f"#{e['number']} {e['rule']}: {e['outcome']}{why}{took}{' seen' if e['seen'] else ''}"


def summary(model: Model, problem: str, names: list[str], current: str, now_ns: int) -> tuple[Text, str]:
    """The two lines on top, and what state the monitor is in: live, stale or absent."""
    status, age = model.status, model.age_s(now_ns)
    state = "absent" if not model.health_ns else "stale" if age > 3 or problem else "live"
    out = Text()
    at = f" {names.index(current) + 1}/{len(names)}" if current in names else ""
    out.append(f" {status.get('rig', 'spiked')} ", "reverse")
    out.append(
        {"live": " ● live", "stale": f" ● STALE {age:.0f} s", "absent": " ● no daemon"}[state],
        "green" if state == "live" else "bold red",
    )
    out.append(f"  {status.get('state', '-')}", "bold")
    out.append(f"{_recorded(status, current)}  {current}{at}  {status.get('session') or 'no session'}")
    hours = hours_left(status)
    out.append("" if hours is None else f"  disk {hours:.0f} h")
    out.append("\n")
    alarms = model.judge.alarms
    if state != "live":
        out.append(problem or f"nothing was heard for {age:.0f} s; what is shown is old", "red")
    elif status.get("error"):
        out.append(str(status["error"]), "bold red")
    elif _stopped(status):
        out.append("STIMULATION IS STOPPED until clear_stop", "bold red")
    elif alarms:
        out.append(
            f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''}: {alarms[0].line()}",
            LEVELS[alarms[0].level],
        )
    else:
        out.append(_calibrating(status, current) or "no alarms", "dim")
    out.no_wrap, out.overflow = True, "ellipsis"
    return out, state


def _of(status: dict[str, Any], stream: str) -> dict[str, Any]:
    streams = status.get("streams")
    told = streams.get(stream) if isinstance(streams, dict) else None
    return told if isinstance(told, dict) else {}


def _recorded(status: dict[str, Any], stream: str) -> str:
    samples, fs = (_of(status, stream).get(k) for k in ("samples", "fs_hz"))
    if not isinstance(samples, int) or not isinstance(fs, int | float) or not fs:
        return ""
    seconds = int(samples / fs)
    return f" {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _stopped(status: dict[str, Any]) -> bool:
    streams = status.get("streams")
    for s in streams.values() if isinstance(streams, dict) else ():
        processes = s.get("processes") if isinstance(s, dict) else None
        live = processes.get("live") if isinstance(processes, dict) else None
        act = live.get("act") if isinstance(live, dict) else None
        if isinstance(act, dict) and act.get("stopped"):
            return True
    return False


def _calibrating(status: dict[str, Any], stream: str) -> str:
    told = _of(status, stream).get("calibration")
    if not isinstance(told, dict) or told.get("state") not in ("collecting", "calculating", "failed"):
        return ""
    fraction = told.get("fraction")
    share = f" {100 * fraction:.0f} %" if isinstance(fraction, int | float) else ""
    return f"calibration {told['state']}{share} {told.get('stage') or ''}".rstrip()


__all__ = [
    "HealthPanel",
    "LatencyPanel",
    "LogPanel",
    "Panel",
    "RasterPanel",
    "RatesPanel",
    "summary",
]
