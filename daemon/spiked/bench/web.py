"""How many frames a second the web page draws of a large array, in a real Chromium, and what its server takes for that."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from spiked.bench.browser import Page, installed
from spiked.bench.machine import conditions
from spiked.bench.web_rig import WebRig
from spiked.errors import ConfigError

Result = dict[str, Any]
WARM_S = 4.0
MEASURE = """(() => { const d = spiked.drawn; d.frames = 0; d.spikes = 0; d.dropped = 0; d.ms.length = 0; spiked.raster.painted = 0; d.since = performance.now(); return 1; })()"""
FIGURES = """(() => { const d = spiked.drawn, s = (performance.now() - d.since) / 1000, ms = d.ms.slice().sort((a, b) => a - b);
  const q = (p) => ms[Math.min(Math.floor(p * ms.length), ms.length - 1)];
  return { seconds: s, frames_per_s: d.frames / s, p50_ms: q(0.5), p99_ms: q(0.99), came_per_s: d.spikes / s, painted_per_s: spiked.raster.painted / s, dropped: d.dropped }; })()"""


def bench(
    units: int, channels: int, rate_hz: float, seconds: float, pages: int, say: Callable[[str], None]
) -> Result:
    """`pages` of them at the width of a desk look at one server; the first one's figures for each kind of rows.

    Raises ConfigError where there is no Chromium.
    """
    if installed() is None:
        raise ConfigError("the page is measured in Chromium, which is not installed; apt install chromium")
    machine = conditions()
    rows: dict[str, Any] = {}
    with WebRig(units, channels, rate_hz) as rig, tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, "-m", "spiked_client.web", "--control-port", str(rig.port), "--port", "0"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.stdout is not None
        try:
            url = server.stdout.readline().split()[-1]
            tabs = [Page(Path(folder) / f"{k}", 1440, 900) for k in range(pages)]
            try:
                for tab in tabs:
                    tab.open(url)
                tabs[0].wait(f"spiked.raster.units.id.length === {units}", 60)
                for mode in ("units", "electrodes"):
                    tabs[0].eval(f"document.querySelector('#mode [data-v={mode}]').click()")
                    time.sleep(WARM_S)
                    rows[mode] = _measured(tabs[0], server.pid, rig, seconds)
                    say(
                        f"{mode}: {rows[mode]['frames_per_s']} frames/s, {rows[mode]['p50_ms']} ms of the page's work each"
                    )
            finally:
                for tab in tabs:
                    tab.__exit__(None, None, None)
        finally:
            server.terminate()
            server.wait(10)
            server.stdout.close()
    return {
        "bench": "web", "units": units, "channels": channels, "rate_hz": rate_hz, "pages": pages, "rows": rows,
        "renderer": "headless Chromium, software rendering", "machine": machine,
    }  # fmt: skip


def _measured(tab: Page, pid: int, rig: WebRig, seconds: float) -> Result:
    process = psutil.Process(pid)
    tab.eval(MEASURE)
    before, sent, began = sum(process.cpu_times()[:2]), rig.sent, time.monotonic()
    time.sleep(seconds)
    got = tab.eval(FIGURES)
    took = time.monotonic() - began
    cpu = (sum(process.cpu_times()[:2]) - before) / took
    return {
        **{k: round(float(v), 2) for k, v in got.items()}, "sorted_per_s": round((rig.sent - sent) / took),
        "server_core": round(cpu, 3), "server_mb": round(process.memory_info().rss / 1e6, 1),
    }  # fmt: skip
