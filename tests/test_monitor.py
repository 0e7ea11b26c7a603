"""The terminal monitor: its raster as a pure function, and the app with textual's own Pilot on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from client_rig import HOST, Ports, Talker, blind, spikes
from hypothesis import given, settings
from hypothesis import strategies as st
from status_rig import status, stream

pytest.importorskip("textual", reason="the extra `monitor` is not installed")

from rich.text import Text

from spiked_client.monitor.app import MonitorApp, Question
from spiked_client.monitor.model import KEPT_S, Model, StreamModel
from spiked_client.monitor.panels import HealthPanel, LatencyPanel, LogPanel, RasterPanel, RatesPanel
from spiked_client.monitor.raster import BLIND, BRAILLE, GAP, NOTHING, UNHEARD, bars, draw
from spiked_client.order import Batch
from spiked_client.protocol import GAP as GAP_DTYPE
from spiked_client.protocol import LEDGER, OUTCOMES, STIM, UNIT, VERSION, Message

FS = 20_000


# ---- the raster


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(-50, 1050), st.integers(-1, 300)), max_size=200), st.integers(1, 300), st.integers(1, 60), st.integers(1, 20),
)  # fmt: skip
def test_every_spike_in_the_window_makes_a_dot_and_nothing_else_does(
    found: list[tuple[int, int]], n: int, width: int, height: int
) -> None:  # fmt: skip
    at, rows = (np.array([f[k] for f in found], np.int64) for k in (0, 1))
    r = draw(at, rows, n, 0, 1000, width, height)
    assert len(r.lines) == height and all(len(line) == width for line in r.lines)
    dark = {(y, x) for y, line in enumerate(r.lines) for x, c in enumerate(line) if c != " "}
    expected = set()
    for sample, row in found:
        if 0 <= sample < 1000 and 0 <= row < n:
            dots = 4 * height
            y = row if n <= height else (row if n <= dots else row * dots // n) // 4
            expected.add((y, sample * 2 * width // 1000 // 2))
    assert dark == expected


def test_few_units_have_a_line_each_and_many_share_dots() -> None:
    at = np.array([0, 999, 500])
    few = draw(at, np.array([0, 0, 2]), 3, 0, 1000, 10, 5)
    assert (
        few.lines[0][0] == chr(BRAILLE + 0x47)
        and few.lines[0][9] == chr(BRAILLE + 0xB8)
        and few.lines[2][5] == chr(BRAILLE + 0x47)
    )
    assert few.rows == [0, 1, 2]
    many = draw(at, np.array([0, 3, 7]), 8, 0, 1000, 10, 2)
    assert many.lines == [
        chr(BRAILLE + 0x01) + " " * 8 + chr(BRAILLE + 0x80),
        " " * 5 + chr(BRAILLE + 0x40) + " " * 4,
    ]
    assert many.rows == [0, 4]


def test_blind_and_missing_columns_and_marks() -> None:
    none = np.zeros(0, np.int64)
    r = draw(
        none,
        none,
        4,
        0,
        1000,
        10,
        2,
        blind=[(100, 350), (2000, 3000)],
        gaps=[(305, 306)],
        marks=[0, 999, 5000],
    )
    assert draw(none, none, 4, 0, 1000, 4, 1, unheard=[(-9, 260)]).ground.tolist() == [
        UNHEARD,
        UNHEARD,
        NOTHING,
        NOTHING,
    ]
    assert r.ground.tolist() == [NOTHING, BLIND, BLIND, GAP, *[NOTHING] * 6]
    assert r.marks == "▾        ▾" and r.lines == [" " * 10] * 2


def test_bars_show_whatever_is_not_zero() -> None:
    top, bottom = bars(np.array([0, 1, 1000, 500]), 2)
    assert bottom == " ▁██" and top == "  █ "
    assert bars(np.zeros(3, int), 2) == ["   ", "   "]


# ---- what is kept


def note(topic: str, header: dict[str, Any] | None = None, at_s: float = 1.0, **arrays: np.ndarray) -> Batch:
    return Batch(Message(topic, {"seq": 1, "run": "r", **(header or {})}, arrays), int(at_s * 1e9))


def test_what_is_kept_is_bounded_in_time_and_number() -> None:
    s = StreamModel("A")
    s.told({"fs_hz": FS, "channels": 4})
    for k in range(600):
        at = k * 2000  # a minute
        s.add(
            note(
                "spikes.A",
                {"first": at, "stop": at + 2000},
                k / 10,
                spikes=spikes(*range(at, at + 50), unit=3),
                blind=blind((at, at + 10)),
            )
        )
        s.forget(int(k / 10 * 1e9))
    assert len(s.spikes.all()) <= 50 * (KEPT_S * 10 + 2) and len(s.blind) <= KEPT_S * 10 + 2
    big = spikes(*range(100_000), unit=1)
    for k in range(8):
        s.add(
            note(
                "spikes.A",
                {"first": 1_200_000, "stop": 1_200_100 + k},
                60,
                spikes=big,
                blind=blind(),
            )
        )
        s.forget(int(60e9))
    assert len(s.spikes.all()) <= 400_000
    s.add(note("spikes.A", {"first": 0, "stop": 100}, 61, spikes=spikes(5), blind=blind()))  # another session
    assert s.stop == 100 and len(s.spikes.all()) == 1


def test_what_was_not_heard_is_neither_silence_nor_spikes() -> None:
    s = StreamModel("A")
    s.told({"fs_hz": FS, "channels": 4})
    for first, stop in ((50_000, 52_000), (52_000, 54_000), (60_000, 62_000)):
        s.add(note("spikes.A", {"first": first, "stop": stop}, 1, spikes=spikes(), blind=blind()))
    assert list(s.unheard) == [(0, 50_000), (54_000, 60_000)]


def test_streams_are_in_the_order_of_the_configuration_whichever_was_heard_first() -> None:
    m = Model()
    for name in "BA":
        m.add(note(f"spikes.{name}", {"first": 0, "stop": 2000}, 1, spikes=spikes(7), blind=blind()))
    assert m.names() == []  # not known yet
    heard = m.streams["B"]
    m.add(note("health", status()))
    assert m.names() == ["A", "B"] and m.streams["B"] is heard


def test_streams_of_an_earlier_session_go_and_odd_fields_break_nothing() -> None:
    m = Model()
    m.add(note("health", status()))
    assert m.names() == ["A", "B"]
    m.add(note("health", status(streams={"C": stream()})))
    assert m.names() == ["C"]
    for header in (
        {},
        {"streams": 5},
        {"streams": {"A": 7}},
        {"streams": {"A": {"fs_hz": "x", "processes": []}}, "jobs": 5, "alarms": [3]},
    ):
        m.add(note("health", header))
        m.add(note("session", header))


# ---- the app


class Daemon:
    """Ports that tell of two streams with three units each, ten messages a second, from a task of the test's loop."""

    def __init__(self, ports: Ports, told: dict[str, Any]) -> None:
        self.ports, self.told, self.n = ports, told, 0
        self.task = asyncio.create_task(self._talk())

    async def _talk(self) -> None:
        rng = np.random.default_rng(1)
        for name, p in self.ports.streams.items():
            units = np.zeros(3, UNIT)
            units["unit"], units["y_um"] = (0, 1, 2), (0, 50, 100)
            p.send(f"units.{name}", {"from_sample": 0}, units=units)
        while True:
            at, now = self.n * FS // 10, time.monotonic_ns()
            for name, p in self.ports.streams.items():
                found = spikes(*np.sort(rng.integers(at, at + FS // 10, 12)).tolist())
                found["unit"] = rng.integers(0, 3, 12)
                header = {
                    "first": at,
                    "stop": at + FS // 10,
                    "stamps": {"arrival": now - 2_500_000, "published": now},
                    "deadline_missed": False,
                }
                p.send(
                    f"spikes.{name}",
                    header,
                    spikes=found,
                    blind=blind((at, at + 100)) if self.n % 10 == 0 else blind(),
                )
            if self.n % 5 == 0:
                self.ports.health.health(**self.told)
            self.n += 1
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def screen(app: MonitorApp) -> list[str]:
    """The text on the screen, line by line."""
    width, height = app.size
    lines = app.screen._compositor.render_strips()
    text = ["".join(segment.text for segment in line).ljust(width) for line in lines]
    assert len(text) == height
    return text


async def until(pilot: Any, true: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await pilot.pause(0.1)


async def on_screen(pilot: Any, app: MonitorApp, *expected: str, lines: int | None = None) -> None:
    """Until all of it is there, on the first `lines`: what is told comes in no order, and panels are drawn one by one."""
    missing = list(expected)

    def there() -> bool:
        whole = "\n".join(screen(app)[:lines])
        missing[:] = [e for e in expected if e not in whole]
        return not missing

    try:
        await until(pilot, there)
    except TimeoutError:
        raise AssertionError("\n".join([f"{missing} not on", *screen(app)])) from None


def shown(app: MonitorApp, panel: type) -> str:
    content = app.query_one(panel).content
    return content.plain if isinstance(content, Text) else str(content)


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
async def test_everything_is_on_one_screen_and_keys_work(size: tuple[int, int]) -> None:
    asked: list[dict[str, Any]] = []

    async def stop_stimulation(request: dict[str, Any]) -> None:
        asked.append(request)

    told = status(disk_free_gb=5000.0, streams={name: stream(doubtful=[]) for name in "AB"})
    with Ports("A", "B", handlers={"stop_stimulation": stop_stimulation}) as ports:
        daemon = Daemon(ports, told)
        app = MonitorApp(HOST, ports.port)
        async with app.run_test(size=size, notifications=True) as pilot:
            await until(
                pilot,
                lambda: (
                    app.state == "live"
                    and "units" in shown(app, RatesPanel)
                    and "p50 2.5" in shown(app, LatencyPanel)
                ),
            )
            await until(pilot, lambda: sum(c >= chr(BRAILLE) for c in shown(app, RasterPanel)) > 40)
            await on_screen(
                pilot, app, "rigA", "recording", "0:00:30", "A 1/2", "● live", "no alarms", lines=2
            )
            await on_screen(
                pilot,
                app,
                "3 units by depth",
                "p50 2.5",
                "gaps 0",
                "messages lost 0",
                "disk",
                "jobs: 1 queued, 1 running",
                "s0: sort 40 %",
                "STOP stimulation",
            )

            def deepest_last() -> bool:  # where they lie is told beside the spikes
                whole = "\n".join(screen(app))
                return -1 < whole.find("   2 ") < whole.find("   0 ")

            await until(pilot, deepest_last)
            await _ledger_and_gaps(app, pilot, ports)
            await pilot.press("right")
            await until(pilot, lambda: "B 2/2" in screen(app)[0])
            await pilot.press("right", "o", "minus")
            await until(pilot, lambda: "Raster A: 3 units by rate, 2 s" in "\n".join(screen(app)))
            await pilot.press("4")
            await until(
                pilot,
                lambda: "Health" in "\n".join(screen(app)) and "Raster" not in "\n".join(screen(app)),
            )
            await pilot.press("0", "f")
            await until(pilot, lambda: "FROZEN" in "\n".join(screen(app)))
            await pilot.press("f", "x")
            await until(pilot, lambda: isinstance(app.screen, Question))
            await until(pilot, lambda: "Stop ALL stimulation" in "\n".join(screen(app)))
            await pilot.press("n")
            await until(pilot, lambda: not isinstance(app.screen, Question))
            await pilot.pause(0.2)
            assert asked == []
            await pilot.press("x")
            await until(pilot, lambda: isinstance(app.screen, Question))
            await pilot.press("y")
            await until(pilot, lambda: len(asked) == 1 and "stimulation is stopped" in "\n".join(screen(app)))
            assert asked[0]["why"] == "spiked monitor"
            await daemon.stop()
            await pilot.press("q")


def test_the_ledger_of_the_next_session_is_another_one() -> None:
    """Its numbers begin at 1 again; a restarted live process goes on with them."""
    stream, entry = StreamModel("A"), np.zeros(1, LEDGER)

    def say(number: int, run: str, outcome: str) -> None:
        entry["number"], entry["outcome"] = number, OUTCOMES.index(outcome)
        header = {"v": VERSION, "seq": 1, "run": run}
        stream.add(Batch(Message("ledger.A", header, {"ledger": entry.copy()}), 1))

    for number in (1, 2, 3):
        say(number, "2026-11-21T10-00-00_rig-a-0", "sent")
    say(4, "2026-11-21T10-00-00_rig-a-1", "dry")
    say(3, "2026-11-21T10-00-00_rig-a-1", "failed")
    assert [(e["number"], e["outcome"]) for e in stream.ledger] == [
        (1, "sent"),
        (2, "sent"),
        (3, "failed"),
        (4, "dry"),
    ]
    say(2, "2026-11-21T12-00-00_rig-a-0", "refused")
    assert [(e["number"], e["outcome"]) for e in stream.ledger] == [(2, "refused")]


async def _ledger_and_gaps(app: MonitorApp, pilot: Any, ports: Ports) -> None:
    entry = np.zeros(1, LEDGER)
    entry["number"], entry["rule"], entry["outcome"], entry["artifact_sample"] = (
        7,
        b"burst",
        OUTCOMES.index("sent"),
        100,
    )
    entry["trigger_ns"], entry["sent_ns"] = 1_000_000, 4_500_000
    p = ports.streams["A"]
    p.send("ledger.A", ledger=entry)
    p.send("gaps.A", {"first": 10, "stop": 30}, gaps=np.array([(10, 30, 4, 0)], GAP_DTYPE))
    p.send("stim.A", {"first": 10, "stop": 30}, stims=np.array([(20, 2, 0, 1, 0.0)], STIM))
    ports.health.session("calibrated", units=3, stream="A")
    await until(
        pilot,
        lambda: (
            "#7 burst: sent 3.5 ms seen" in shown(app, LogPanel)
            and "gaps 1 (20 samples)" in shown(app, LatencyPanel)
        ),
    )
    await until(pilot, lambda: "calibrated" in shown(app, LogPanel))


async def test_a_daemon_that_goes_is_told_and_one_that_comes_back_is_found() -> None:
    from spiked.rehearsal import free_ports

    (port,) = free_ports(1)
    app = MonitorApp(HOST, port)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "no spiked daemon answered" in screen(app)[1])
        assert "● no daemon" in screen(app)[0] and app.screen.has_class("stale")
        for life in range(2):
            told = status(disk_free_gb=1.0) if life else status()
            with Ports("A", "B", port=port) as ports:
                daemon = Daemon(ports, told)
                await until(
                    pilot,
                    lambda: (
                        app.state == "live"
                        and "p50" in shown(app, LatencyPanel)
                        and not app.screen.has_class("stale")
                    ),
                )
                if life:
                    await until(
                        pilot,
                        lambda: "disk_free_gb: 1, bad from 2; Delete or move old sessions" in shown_top(app),
                    )
                    assert "disk free 1 GB" in "".join(shown(app, HealthPanel).splitlines()[:3])
                await daemon.stop()
            await until(
                pilot,
                lambda: (
                    app.state == "stale" and "● STALE" in screen(app)[0] and app.screen.has_class("stale")
                ),
            )
            await until(
                pilot,
                lambda: (
                    "what is shown is old" in screen(app)[1] or "no spiked daemon answered" in screen(app)[1]
                ),
            )


def shown_top(app: MonitorApp) -> str:
    return app.query_one("#top").content.plain  # type: ignore[attr-defined]


class Terminal:
    """A program in a pseudo-terminal of 80 x 24, as SSH gives one."""

    def __init__(self, *command: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
            os.execv(command[0], command)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.said = b""

    def until(self, text: str, seconds: float = 90) -> None:
        """Read until it was written, cursor movements apart."""
        end = time.monotonic() + seconds
        while text not in ESCAPES.sub("", self.said.decode("utf-8", "replace")):
            assert time.monotonic() < end, ESCAPES.sub("", self.said.decode("utf-8", "replace"))[-2000:]
            if select.select([self.fd], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.said += os.read(self.fd, 65536)

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def end(self, seconds: float = 90) -> int:
        """Its exit code."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.said += os.read(self.fd, 65536)
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(code)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it did not end")


ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[PX^_].*?\x1b\\\\|.)", re.S)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_command_in_a_terminal_and_without_one() -> None:
    with Ports("A", port=0) as ports, Talker(ports.streams["A"], "spikes.A", 0.01):
        command = [sys.executable, "-m", "spiked.cli", "monitor", "--port", str(ports.port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert (
            done.returncode == 1
            and done.stderr
            == "spiked: spiked monitor needs a terminal; `spiked watch` writes into files and pipes\n"
        )
        terminal, over = Terminal(*command), threading.Event()

        def tell() -> None:
            while not over.wait(0.2):
                ports.health.health(**status(streams={"A": stream(doubtful=[])}))

        health = threading.Thread(target=tell)
        health.start()
        try:
            terminal.until("STOP stimulation")
            terminal.until("● live")
            terminal.until("rigA")
            terminal.type("q")
            assert terminal.end() == 0
        finally:
            over.set()
            health.join()
