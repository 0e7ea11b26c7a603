"""A plain monitor for the terminal: rates, latency, blindness, gaps, losses, jobs and alarms, once a second.

    python -m spiked_client.watch --port 5572

On a terminal the screen is redrawn; into a file or pipe goes one line per stream and second.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from spiked_client.control import CONTROL_PORT
from spiked_client.errors import ClientError
from spiked_client.order import Batch
from spiked_client.subscribe import SyncClient

WINDOW_S = 5.0
EVERY_S = 1.0
TOPICS = ("spikes", "mua", "gaps", "health", "session")
HOME_AND_CLEAR = "\x1b[H\x1b[J"


class StreamView:
    """What came from one stream over the last seconds. Times are this machine's monotonic ns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gaps = self.gap_samples = 0
        self.missed = self.replayed = self.restarts = 0
        self.late = self.messages = 0
        self._since_ns = 0
        self._spikes: deque[tuple[int, Counter[int]]] = deque()
        self._mua: deque[tuple[int, int]] = deque()
        self._delays: deque[tuple[int, float, float]] = deque()  # when, to publication ms, on to here ms
        self._blind: deque[tuple[int, float, int]] = deque()  # when, blind samples, covered samples

    def add(self, batch: Batch, channels: int) -> None:
        """Note one message of this stream."""
        now = batch.received_ns
        self._since_ns = self._since_ns or now
        self.missed += batch.missed.count if batch.missed else 0
        self.replayed += batch.replayed
        self.restarts += batch.restarted
        kind = batch.message.kind
        if kind == "gaps":
            self.gaps += len(batch.gaps)
            self.gap_samples += int((batch.gaps["stop"] - batch.gaps["start"]).sum())
        elif kind == "mua":
            self._mua.append((now, len(batch.spikes)))
        elif kind == "spikes":
            self._add_spikes(batch, channels)

    def _add_spikes(self, batch: Batch, channels: int) -> None:
        now, stamps = batch.received_ns, batch.stamps
        self.messages += 1
        self.late += bool(batch.header.get("deadline_missed"))
        units, counts = np.unique(batch.spikes["unit"], return_counts=True)
        self._spikes.append((now, Counter(dict(zip(units.tolist(), counts.tolist(), strict=True)))))
        if not batch.replayed and "arrival" in stamps and "published" in stamps:
            published = stamps["published"]
            self._delays.append((now, (published - stamps["arrival"]) / 1e6, (now - published) / 1e6))
        if isinstance(batch.first, int) and isinstance(batch.stop, int) and batch.stop > batch.first:
            self._blind.append((now, blind_samples(batch.blind, channels), batch.stop - batch.first))

    def forget(self, now_ns: int) -> None:
        """Drop what is older than the window."""
        for kept in (self._spikes, self._mua, self._delays, self._blind):
            while kept and kept[0][0] < now_ns - WINDOW_S * 1e9:
                kept.popleft()

    def seconds(self, now_ns: int) -> float:
        """Length of the window so far."""
        return min(max((now_ns - self._since_ns) / 1e9, 0.1), WINDOW_S)

    def rates_hz(self, now_ns: int) -> dict[int, float]:
        """Unit -> Hz, the most active first."""
        total: Counter[int] = Counter()
        for _, counts in self._spikes:
            total.update(counts)
        return {unit: n / self.seconds(now_ns) for unit, n in total.most_common()}

    def mua_hz(self, now_ns: int) -> float:
        """Unsorted detections per second, all electrodes together."""
        return sum(n for _, n in self._mua) / self.seconds(now_ns)

    def delays_ms(self) -> tuple[float, float, float] | None:
        """(p50, p99) from arrival to publication, the median from there to here; None without messages."""
        if not self._delays:
            return None
        p50, p99 = np.percentile(self.made_ms(), (50, 99))
        return float(p50), float(p99), float(np.median([d for _, _, d in self._delays]))

    def made_ms(self) -> np.ndarray:
        """From arrival to publication, each message of the window."""
        return np.array([d for _, d, _ in self._delays])

    def blind_fraction(self) -> float:
        """Of the samples looked at, the part in which spikes could not be seen."""
        covered = sum(c for _, _, c in self._blind)
        return min(sum(b for _, b, _ in self._blind) / covered, 1.0) if covered else 0.0


def blind_samples(blind: np.ndarray, channels: int) -> float:
    """Samples blinded, where an interval on one of `channels` counts for its share; overlaps count once."""
    whole = blind[blind["channel"] < 0]
    total, reached = 0.0, None
    for start, stop in sorted(zip(whole["start"].tolist(), whole["stop"].tolist(), strict=True)):
        start = start if reached is None else max(start, reached)
        total += max(stop - start, 0)
        reached = stop if reached is None else max(stop, reached)
    single = blind[blind["channel"] >= 0]
    return total + float((single["stop"] - single["start"]).sum()) / max(channels, 1)


def event_line(header: dict[str, Any]) -> str:
    """A session event in one line; nothing for those that only tell progress."""
    event = str(header.get("event", ""))
    if event == "calibration" or (event == "offline" and "state" not in header):
        return ""
    hidden = ("run", "event", "about", "todo", "folder")
    said = {k: v for k, v in header.items() if isinstance(v, str) and v and k not in hidden}
    return " ".join([event, *(f"{k}={v}" for k, v in said.items())])


def job_lines(status: dict[str, Any]) -> list[str]:
    """The offline jobs of a status: how many in which state, then those that run."""
    told = status.get("jobs")
    if not isinstance(told, dict) or not told:
        return []
    counts = [f"{n} {state}" for state, n in told.items() if isinstance(n, int) and n]
    out = [f"jobs: {', '.join(counts) or 'none'}"]
    now = told.get("now")
    for job in now if isinstance(now, list) else ():
        if isinstance(job, dict):
            overall = job.get("overall")
            share = f" {100 * overall:.0f} %" if isinstance(overall, int | float) else ""
            out.append(f"  {job.get('session')}: {job.get('stage')}{share} {job.get('text', '')}".rstrip())
    return out


def alarm_lines(status: dict[str, Any]) -> list[str]:
    """The alarms that stand, worst first."""
    told = status.get("alarms")
    out = []
    for a in told if isinstance(told, list) else ():
        if isinstance(a, dict):
            at = " ".join(str(a[k]) for k in ("stream", "process", "reader", "gpu", "socket") if k in a)
            out.append(
                f"{a.get('level')}: {a.get('figure')} {at} {a.get('value')}; {a.get('todo')}".replace(
                    "  ", " "
                )
            )
    return out


class Monitor:
    """Collects batches of all topics and draws them as text."""

    def __init__(self, top: int = 12) -> None:
        self.top = top
        self.streams: dict[str, StreamView] = {}
        self.status: dict[str, Any] = {}
        self.event = ""
        self._heard_ns = 0

    def add(self, batch: Batch) -> None:
        """Note one message."""
        self._heard_ns = batch.received_ns
        if batch.topic == "health":
            self.status = batch.header
        elif batch.topic == "session":
            self.event = event_line(batch.header) or self.event
        elif batch.stream:
            view = self.streams.setdefault(batch.stream, StreamView(batch.stream))
            channels = self._told(batch.stream).get("channels")
            view.add(batch, channels if isinstance(channels, int) else 1)

    def _told(self, stream: str) -> dict[str, Any]:
        streams = self.status.get("streams")
        told = streams.get(stream) if isinstance(streams, dict) else None
        return told if isinstance(told, dict) else {}

    def _recorded_s(self, stream: str) -> float:
        samples, fs_hz = (self._told(stream).get(k) for k in ("samples", "fs_hz"))
        return (
            samples / fs_hz if isinstance(samples, int) and isinstance(fs_hz, int | float) and fs_hz else 0.0
        )

    def _line(self, view: StreamView, now_ns: int) -> str:
        rates = {u: hz for u, hz in view.rates_hz(now_ns).items() if u >= 0}
        delays = view.delays_ms()
        made = (
            "latency -" if delays is None else f"latency {delays[0]:.1f}/{delays[1]:.1f} ms +{delays[2]:.1f}"
        )
        return (
            f"{view.name}: {self.status.get('state', '-')} {self._recorded_s(view.name):.1f} s | "
            f"{len(rates)} units {sum(rates.values()):.1f} Hz, mua {view.mua_hz(now_ns):.1f} Hz | {made} | "
            f"late {view.late}/{view.messages} | blind {100 * view.blind_fraction():.1f} % | "
            f"gaps {view.gaps} ({view.gap_samples} samples) | "
            f"messages lost {view.missed} replayed {view.replayed} restarts {view.restarts}"
            f"{self._calibrating(view.name)}"
        )

    def _calibrating(self, stream: str) -> str:
        """How far a calibration is, or that the last one failed; else nothing."""
        told = self._told(stream).get("calibration")
        if not isinstance(told, dict) or told.get("state") not in ("collecting", "calculating", "failed"):
            return ""
        fraction = told.get("fraction")
        share = f" {100 * fraction:.0f} %" if isinstance(fraction, int | float) else ""
        return f" | calibration {told['state']}{'' if told['state'] == 'failed' else share}"

    def _bars(self, view: StreamView, now_ns: int) -> list[str]:
        rates = [(u, hz) for u, hz in view.rates_hz(now_ns).items() if u >= 0][: self.top]
        most = max((hz for _, hz in rates), default=0.0)
        return [f"  unit {u:5d} {hz:8.2f} Hz {'#' * round(30 * hz / most)}" for u, hz in rates]

    def units_fire(self, now_ns: int) -> bool:
        """Whether units of every stream were heard lately."""
        streams = self.status.get("streams")
        names = streams if isinstance(streams, dict) else {}
        views = [self.streams.get(name) for name in names]
        return bool(views) and all(v is not None and any(u >= 0 for u in v.rates_hz(now_ns)) for v in views)

    def lines(self, now_ns: int, *, bars: bool) -> list[str]:
        """The screen; `bars` adds a bar per unit."""
        out = []
        for _, view in sorted(self.streams.items()):
            view.forget(now_ns)
            out.append(self._line(view, now_ns))
            out += self._bars(view, now_ns) if bars else []
        if not out:
            out.append(
                f"{self.status.get('rig', 'daemon')}: {self.status.get('state', '-')}, no stream publishes"
            )
        quiet_s = (now_ns - self._heard_ns) / 1e9
        if self._heard_ns and quiet_s > 2 * EVERY_S:
            out.append(f"nothing heard for {quiet_s:.0f} s")
        if bars:
            out += [*job_lines(self.status), *alarm_lines(self.status)]
            out += [f"last event: {self.event or '-'}", str(self.status.get("error") or "")]
        return out


def watch(
    control_port: int = CONTROL_PORT,
    seconds: float | None = None,
    out: TextIO | None = None,
    *,
    host: str = "127.0.0.1",
    wait_s: float = 10.0,
    top: int = 12,
    keys: Path | str | None = None,
    until_units: bool = False,
) -> bool:
    """Write the monitor to `out` (None: standard output) for `seconds` (None: until interrupted).

    With `until_units` it ends as soon as units of every stream fire; False where they did not in time. Raises DaemonAbsent when nobody answers within `wait_s`, AccessError when `keys` (a key file) are not taken.
    """
    out = sys.stdout if out is None else out
    redraw = out.isatty()
    monitor = Monitor(top)
    with (
        SyncClient(host, control_port, wait_s=wait_s, keys=keys) as client,
        client.messages(TOPICS) as messages,
    ):
        start = draw_at = time.monotonic()
        while seconds is None or time.monotonic() < start + seconds:
            draw_at += EVERY_S
            while (left := draw_at - time.monotonic()) > 0:
                batch = messages.get(left)
                if batch is not None:
                    monitor.add(batch)
            lines = monitor.lines(time.monotonic_ns(), bars=redraw)
            stamp = time.strftime("%H:%M:%S ")
            out.write(
                HOME_AND_CLEAR + "\n".join([stamp, *lines, ""])
                if redraw
                else stamp + f"\n{stamp}".join(lines) + "\n"
            )
            out.flush()
            draw_at = max(draw_at, time.monotonic() - EVERY_S)
            if until_units and monitor.units_fire(time.monotonic_ns()):
                return True
    return not until_units


def main(argv: list[str] | None = None) -> int:
    """Command line of the monitor."""
    parser = argparse.ArgumentParser(
        prog="python -m spiked_client.watch", description="Watch a spiked daemon."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=CONTROL_PORT, help="control port (default %(default)s)")
    parser.add_argument("--keys", default=None, help="key file for a daemon that uses keys")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this long")
    parser.add_argument("--top", type=int, default=12, help="units to show (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        watch(args.port, args.seconds, host=args.host, top=args.top, keys=args.keys)
    except ClientError as e:
        sys.stderr.write(f"{e}\n")
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
