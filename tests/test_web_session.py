"""The web page of a real rig in a real Chromium: simulator, daemon, the page's server as its child, a stimulator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import aiohttp
import numpy as np
import psutil
import pytest
from browser import Page, installed
from output_rig import PATIENT_MS, OwnStimulator
from session_rig import rehearsal
from test_act_session import Asking

from spiked import config as configuration
from spiked.act.ledger import read
from spiked.rehearsal import Rehearsal, free_ports
from spiked_client.errors import Refused
from spiked_client.protocol import OUTCOMES, newest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(installed() is None, reason="no Chromium on this computer; apt install chromium"),
]
DROPS = [(100_000, 101_000), (160_000, 160_020)]


class Renewing(threading.Thread):
    """Keeps a lease, until it is refused because stimulation was stopped."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port, self._leave = port, threading.Event()
        self.refused = ""

    def run(self) -> None:
        with Asking(control_port=self._port, timeout=30.0) as c:
            lease = c.arm(["any"], lease_s=60.0)["lease"]
            while not self._leave.wait(0.5):
                try:
                    c.renew(lease)
                except Refused as e:  # the lease is over: that is what is waited for
                    self.refused = str(e)
                    return

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave.set()
        self.join(10)


def until(what: Callable[[], Any], timeout_s: float = 240.0) -> Any:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if got := what():
            return got
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s:g} s")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rehearsal, str]]:
    """A session that calibrates when it is asked to, loses samples twice, and has one rule on any unit; and the stimulator's address."""
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    drops = tuple(x for a, b in DROPS for x in ("--drop", f"{a}:{b}"))
    live = {"enabled": True, "sorter": "rt_sort", "calibrate_s": 15.0, "calibrate_after_s": 3600.0}
    r = rehearsal(
        tmp_path_factory.mktemp("web"),
        seconds=3600.0,
        simulate=drops,
        live=live,
        ring={"seconds": 60.0},  # a live path that starts late sorts all of it
        web={"enabled": True, "port": 0},
    )
    data = json.loads(r.config.model_dump_json())
    data["output"] = [{"name": "pulser", "kind": "zmq", "address": address, "timeout_ms": PATIENT_MS}]
    data["trigger"] = [
        {"name": "any", "when": "burst", "count": 1, "window_ms": 1.0, "refractory_ms": 60, "output": "pulser",
         "pattern": "p", "electrodes": [5], "amplitude_ua": 5, "width_us": 200}
    ]  # fmt: skip
    data["act"] = {"late_ms": 5000.0}  # this machine has other things to do as well
    r.config = configuration.parse(data)
    with r:
        r.wait_state(("recording",), 150)
        yield r, address


def page_of(r: Rehearsal, former: str = "") -> str:
    """Where the daemon's page is now."""
    return str(until(lambda: (u := r.status().get("web", {}).get("url")) and u != former and u))


def ink(which: str) -> str:
    """How many different colours a canvas shows."""
    return f"""(() => {{ const c = document.getElementById('{which}'), g = c.getContext('2d');
        return new Set(new Uint32Array(g.getImageData(0, 0, c.width, c.height).data.buffer)).size; }})()"""


def carried_out(ledger: Path) -> np.ndarray:
    """The decisions that the stimulator has confirmed."""
    rows = newest(read(ledger))
    return rows[rows["outcome"] == OUTCOMES.index("sent")]


def stopped(r: Rehearsal) -> str:
    return str(r.status()["streams"]["sim"]["processes"].get("live", {}).get("act", {}).get("stopped", ""))


def test_a_desk_sees_spikes_units_gaps_and_stops_stimulation(
    rig: tuple[Rehearsal, str], tmp_path: Path
) -> None:
    r, address = rig
    url = page_of(r)
    with OwnStimulator(address) as stimulator, Page(tmp_path, 1440, 900) as tab:
        tab.open(url)
        tab.wait("document.getElementById('state').textContent === 'recording'")
        # before units are known: unsorted detections per electrode, and a word about the calibration
        tab.wait("spiked.raster.mode === 'electrodes' && spiked.drawn.spikes > 20", 120)
        r.control("calibrate")
        tab.wait("spiked.raster.units.id.length > 3 && spiked.raster.mode === 'units'", 300)
        shown = tab.eval("spiked.raster.units.id.length")
        until(lambda: r.status()["streams"]["sim"]["processes"]["live"]["units"] == shown)
        tab.wait("spiked.raster.painted > 100 && " + ink("raster") + " > 5", 120)
        tab.wait(ink("map") + " > 5")
        # the gaps, as the daemon counts them
        tab.wait("document.getElementById('losses').textContent.includes('1020 in 2 gaps')", 120)
        rows = (
            "Array.from(document.querySelectorAll('#losses tbody tr'), (r) => Number(r.cells[1].textContent))"
        )
        until(lambda: sorted(tab.eval(rows)) == [20, 1000])
        # one unit: as the sorter has it, and its last spikes from the ring
        tab.wait("document.querySelector('#rates .row') !== null")
        tab.eval("document.querySelector('#rates .row').click()")
        tab.wait("document.getElementById('unit').textContent.includes('spikes as received')", 120)
        told = tab.eval(
            f"fetch('/unit?stream=sim&unit=' + {tab.eval('spiked.raster.selected')}).then((r) => r.json())"
        )
        trough = min(told["spikes"]["typical_uv"][0])
        assert trough < -15 and told["template"]["kind"] == "sequences"
        assert told["spikes"]["typical_uv"][0].index(trough) == pytest.approx(told["spikes"]["before"], abs=4)
        tab.wait("document.getElementById('latency').textContent.includes('in the middle')")
        # armed by somebody else; one tap here ends it, and the page says so when the live process has said so
        with Renewing(r.config.publish.control_port) as holder:
            until(lambda: len(stimulator.wanted) > 3)
            tab.wait("document.getElementById('stopsays').textContent === 'armed: any'", 120)
            tab.picture(tmp_path / "armed.png", whole=True)
            tab.eval("document.getElementById('stop').click()")
            tab.wait("document.getElementById('stop').className === 'stopped'", 120)
            until(lambda: stopped(r) == "web page, this computer")  # the status is told twice a second
            over_ns = time.monotonic_ns()
            until(lambda: holder.refused)
            last = tab.eval("spiked.state().session")
            file = r.config.rig.sessions / last / "sim.ledger.bin"
            until(lambda: len(carried_out(file)) == len(stimulator.wanted))  # the last ones were on their way
            n = len(stimulator.wanted)
        tab.wait("document.querySelectorAll('#ledger tbody tr').length > 3 && spiked.raster.marks.length > 3")
        assert tab.eval("document.documentElement.scrollWidth") <= 1440
        assert [u for u in tab.requests if not u.startswith((url, "data:"))] == []
        assert tab.complaints == []
    sent = carried_out(file)
    assert len(sent) == n and (sent["sent_ns"] < over_ns).all()  # nothing after the stop


def test_a_phone_has_the_stop_in_reach_and_no_sideways_scroll(
    rig: tuple[Rehearsal, str], tmp_path: Path
) -> None:
    r, _ = rig
    if not until(lambda: r.status()["streams"]["sim"]["processes"].get("live"))["units"]:
        r.control("calibrate")
    with Page(tmp_path, 375, 812, dark=True) as tab:
        tab.open(page_of(r))
        tab.wait(
            "spiked.drawn.frames > 20 && spiked.raster.units.id.length > 0 && !document.body.classList.contains('stale')"
        )
        tab.wait("document.querySelector('#rates .row') !== null")
        tab.eval("document.querySelector('#rates .row').click()")
        for at in (0, 900, 99_999):
            tab.eval(f"scrollTo(0, {at})")
            tab.settle()
            box = tab.eval(
                "(() => { const b = document.getElementById('stop').getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom, b.height]; })()"
            )
            assert box[0] >= 0 and box[2] <= 375 and box[1] >= 0 and box[3] <= 812 and box[4] >= 48
            # nothing lies over it
            hit = f"document.elementFromPoint({(box[0] + box[2]) / 2}, {(box[1] + box[3]) / 2}).closest('#stop') !== null"
            assert tab.eval(hit)
        assert tab.eval("document.documentElement.scrollWidth") <= 375
        beyond = """Array.from(document.querySelectorAll('main *')).filter((e) =>
            !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).length"""
        assert tab.eval(beyond) == 0
        tab.eval("scrollTo(0, 0)")
        tab.picture(tmp_path / "phone.png", whole=True)
        assert tab.complaints == []


async def flood(url: str, seconds: float) -> dict[str, int]:
    """Two hundred at a time connect, say nonsense or nothing, and go; what the server answered."""
    port = int(url.rsplit(":", 1)[1].strip("/"))
    rng = random.Random(1)
    answers: Counter[str] = Counter()

    async def one(http: aiohttp.ClientSession) -> None:
        try:
            kind = rng.randrange(4)
            if kind == 0:  # not HTTP at all, or half of it
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    writer.write(rng.choice((rng.randbytes(3000), b"GET /live HTTP/1.1\r\nHost: 127", b"")))
                    await asyncio.wait_for(reader.read(1000), 2)
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
                answers["raw"] += 1
                return
            if kind == 1:
                async with http.post(url + "do", data=rng.randbytes(9000)) as r:
                    answers[str(r.status)] += 1
                return
            async with http.ws_connect(url + "live", max_msg_size=1 << 24) as ws:
                answers["open"] += 1
                for _ in range(30):
                    await ws.send_str('{"stream": "sim"}' if kind == 2 else rng.randbytes(500).hex())
                await asyncio.sleep(0.5)
        except aiohttp.WSServerHandshakeError as e:
            answers[str(e.status)] += 1
        except (aiohttp.ClientError, OSError, TimeoutError):
            answers["gone"] += 1

    end = time.monotonic() + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        while time.monotonic() < end:
            await asyncio.gather(*(one(http) for _ in range(200)))
    return dict(answers)


def test_a_flood_of_pages_and_nonsense_leaves_acquisition_alone(
    rig: tuple[Rehearsal, str], tmp_path: Path
) -> None:
    r, _ = rig
    url = page_of(r)

    def figures() -> tuple[int, int, int, int]:
        s = r.status()["streams"]["sim"]
        return (
            s["processes"]["live"]["counters"]["skipped_samples"], s["gaps"], s["gap_samples"], sum(s["lives"].values()),
        )  # fmt: skip

    with Page(tmp_path, 1200, 800) as tab:
        tab.open(url)
        tab.wait("document.getElementById('link').textContent === 'live'")
        web = psutil.Process(r.status()["web"]["pid"])
        before, memory, samples = figures(), web.memory_info().rss, r.status()["streams"]["sim"]["samples"]
        frames = tab.eval("spiked.drawn.spikes")
        answers = asyncio.run(flood(url, 6.0))
        assert (
            answers.get("503", 0) > 20 and answers.get("open", 0) > 20
        )  # some had a place, the others were told no
        assert web.is_running() and r.status()["web"]["pid"] == web.pid and r.status()["web"]["lives"] == 0
        assert web.memory_info().rss - memory < 80e6
        assert figures() == before
        assert r.wait_received(samples + 5 * 20_000)
        tab.wait(f"spiked.drawn.spikes > {frames}")  # who was there before has kept its place
        tab.wait("!document.body.classList.contains('stale')")
    with Page(tmp_path / "after", 1200, 800) as tab:
        tab.open(url)
        tab.wait("document.getElementById('link').textContent === 'live'")


def test_the_daemon_brings_the_page_back_and_the_page_comes_back_by_itself(
    rig: tuple[Rehearsal, str], tmp_path: Path
) -> None:
    r, _ = rig
    web = until(lambda: (w := r.status()["web"]) and w["pid"] and w["url"] and w)
    skipped = r.status()["streams"]["sim"]["processes"]["live"]["counters"]["skipped_samples"]
    with Page(tmp_path, 1200, 800) as tab:
        tab.open(web["url"])
        tab.wait("document.getElementById('link').textContent === 'live'")
        os.kill(web["pid"], signal.SIGKILL)
        tab.wait(
            "document.body.classList.contains('stale') && !document.getElementById('banner').hidden", 120
        )
        again = until(
            lambda: (w := r.status()["web"]) and w["pid"] not in (None, web["pid"]) and w["url"] and w
        )
        assert again["lives"] == web["lives"] + 1
    assert r.status()["state"] == "recording"
    assert r.status()["streams"]["sim"]["processes"]["live"]["counters"]["skipped_samples"] == skipped
    with pytest.raises(ProcessLookupError):
        os.kill(web["pid"], 0)


def test_the_session_is_ended_from_the_page(rig: tuple[Rehearsal, str], tmp_path: Path) -> None:
    r, _ = rig
    with Page(tmp_path, 1200, 800) as tab:
        tab.open(page_of(r))
        tab.wait("document.querySelector('[data-op=stop_session]').disabled === false")
        tab.eval("document.querySelector('[data-op=stop_session]').click()")
        tab.wait("document.getElementById('sure').open")
        assert r.status()["state"] == "recording"  # not before it was confirmed
        tab.eval("document.getElementById('sureyes').click()")
        summary = r.wait_daemon(300)
    assert (summary["exit_code"], summary["state"], summary["error"]) == (0, "done", "")
    assert summary["streams"]["sim"]["gaps"] == len(DROPS)
    page = json.loads((r.folder / "run.json").read_text())["streams"]["sim"]
    assert page["gap_samples"] == sum(b - a for a, b in DROPS)
