"""The monitor as a program for the terminal."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from spiked_client.access import ClientKey
from spiked_client.control import CONTROL_PORT, SyncControl
from spiked_client.errors import ClientError
from spiked_client.monitor.model import Feed
from spiked_client.monitor.panels import (
    HealthPanel,
    LatencyPanel,
    LogPanel,
    Panel,
    RasterPanel,
    RatesPanel,
    summary,
)

PANELS: tuple[type[Panel], ...] = (RasterPanel, RatesPanel, LatencyPanel, HealthPanel, LogPanel)
FAST_S, SLOW_S = 0.2, 0.5
WINDOWS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
STOP_S = 5.0


class Question(ModalScreen[bool]):
    """Asks once before the emergency stop."""

    CSS = """
    Question { align: center middle; }
    Question > Vertical { width: 56; height: auto; border: heavy red; background: $surface; padding: 1 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "answer(True)", "stop"), Binding("n,escape", "answer(False)", "go back"),
    ]  # fmt: skip

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(
                "Stop ALL stimulation, in every stream, now?\n\n[b]y[/b] or Enter: stop    [b]n[/b] or Esc: go back"
            )

    def action_answer(self, stop: bool) -> None:
        self.dismiss(stop)


class MonitorApp(App[None]):
    """`spiked monitor`. Reads the public protocol; the only thing it can do to the rig is the emergency stop."""

    TITLE = "spiked monitor"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #top { height: 2; text-wrap: nowrap; text-overflow: ellipsis; }
    Grid { grid-size: 6 21; grid-gutter: 0; }
    Panel { border: round $primary; height: 100%; text-wrap: nowrap; text-overflow: clip; }
    Panel:focus { border: round $accent; }
    #rasterpanel { column-span: 4; row-span: 11; }
    #ratespanel { column-span: 2; row-span: 11; }
    #latencypanel, #healthpanel, #logpanel { column-span: 2; row-span: 10; }
    .stale Panel { opacity: 45%; border: round $error; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("x", "stop", "STOP stimulation", priority=True),
        Binding("right,n", "stream(1)", "next stream"),
        Binding("left,p", "stream(-1)", "previous", show=False),
        Binding("plus", "window(1)", "window", key_display="+-"),
        Binding("equals_sign", "window(1)", "longer", show=False),
        Binding("minus", "window(-1)", "shorter", show=False),
        Binding("o", "order", "order"),
        Binding("f", "freeze", "freeze"),
        Binding("1", "zoom(1)", "zoom", key_display="1-5"),
        *(Binding(str(i), f"zoom({i})", f"zoom {i}", show=False) for i in range(2, len(PANELS) + 1)),
        Binding("0,escape", "zoom(0)", "all panels", show=False),
        Binding("q", "quit", "quit"),
    ]

    def __init__(
        self, host: str = "127.0.0.1", port: int = CONTROL_PORT, keys: Path | str | ClientKey | None = None, stream: str = ""
    ) -> None:  # fmt: skip
        super().__init__()
        self.feed = Feed(host, port, keys)
        self._control = (host, port, keys)
        self.stream = stream
        self.state = "absent"

    def compose(self) -> ComposeResult:
        yield Static(id="top")
        with Grid():
            for i, panel in enumerate(PANELS, 1):
                yield panel(self.feed, i)
        yield Footer(compact=True)

    def on_mount(self) -> None:
        self.feed.start()
        self._main = self.screen  # a question may lie over it
        self.raster = self.query_one(RasterPanel)
        self.set_interval(FAST_S, self._fast)
        self.set_interval(SLOW_S, self._slow)
        self._slow()

    def on_unmount(self) -> None:
        self.feed.close()

    # ---- drawing -----------------------------------------------------------------------------------------------

    def _fast(self) -> None:
        if self.state == "live" and not self.raster.frozen_at:
            self.raster.redraw(self.stream)

    def _slow(self) -> None:
        with self.feed.use() as model:
            names = model.names()
            if self.stream not in names and names:
                self.stream = names[0]
            text, self.state = summary(model, self.feed.problem, names, self.stream, time.monotonic_ns())
        self._main.query_one("#top", Static).update(text)
        self._main.set_class(self.state != "live", "stale")
        for panel in self._main.query(Panel):
            panel.redraw(self.stream)

    # ---- keys --------------------------------------------------------------------------------------------------

    def action_stream(self, step: int) -> None:
        """Look at the next stream, or the one before."""
        with self.feed.use() as model:
            names = model.names()
        if names:
            at = names.index(self.stream) if self.stream in names else 0
            self.stream = names[(at + step) % len(names)]
            self.raster.frozen_at = 0
            self._slow()

    def action_window(self, step: int) -> None:
        """A longer or shorter raster."""
        at = WINDOWS_S.index(self.raster.seconds) + step
        self.raster.seconds = WINDOWS_S[min(max(at, 0), len(WINDOWS_S) - 1)]
        self.raster.redraw(self.stream)

    def action_order(self) -> None:
        """Order units by depth, rate or id."""
        orders = RasterPanel.ORDERS
        self.raster.by = orders[(orders.index(self.raster.by) + 1) % len(orders)]
        self.raster.redraw(self.stream)

    def action_freeze(self) -> None:
        """Hold the raster, or let it run."""
        with self.feed.use() as model:
            stream = model.streams.get(self.stream)
            now = stream.stop if stream else 0
        self.raster.frozen_at = 0 if self.raster.frozen_at else now
        self.raster.redraw(self.stream)

    def action_zoom(self, number: int) -> None:
        """One panel over the whole screen; again, or 0: all of them."""
        panel = list(self._main.query(Panel))[number - 1] if number else None
        if panel is None or self._main.maximized is panel:
            self._main.minimize()
        else:
            self._main.maximize(panel)
        self.call_after_refresh(self._slow)

    def action_stop(self) -> None:
        """The emergency stop, asked once."""
        if isinstance(self.screen, Question):
            return

        def answered(stop: bool | None) -> None:
            if stop:
                self._stop_stimulation()

        self.push_screen(Question(), answered)

    @work(thread=True)
    def _stop_stimulation(self) -> None:
        host, port, keys = self._control
        try:
            with SyncControl(host, port, timeout=STOP_S, keys=keys) as control:
                control.stop_stimulation("spiked monitor")
            text, severity = "stimulation is stopped, until clear_stop", "information"
        except ClientError as e:
            text, severity = f"NOT STOPPED: {e}", "error"
        self.call_from_thread(self.notify, text, severity=severity, timeout=20)


def monitor(
    host: str = "127.0.0.1", port: int = CONTROL_PORT, keys: Path | str | None = None, stream: str = ""
) -> None:  # fmt: skip
    """Run until the user quits. Raises AccessError when the key file cannot be used."""
    if hasattr(os, "nice"):
        os.nice(10)  # over SSH it runs on the rig's own computer
    MonitorApp(host, port, keys, stream).run()
