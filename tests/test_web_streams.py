"""One session of two streams, one page, in a real Chromium: which stream is looked at, what each does, how their clocks lie."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, installed
from streams_rig import GRID, Devices
from test_web_session import until

from spiked import config as configuration
from spiked.sources import simulate_command
from spiked.templates.learn import learn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(installed() is None, reason="no Chromium on this computer; apt install chromium"),
]
SIMULATED = {
    "probe": ["--cycle", "--seed", "3", "--units", "4", "--ppm", "20"],
    "array": ["--cycle", "--seed", "5", "--units", "6"],
}
WIRES = {"probe": "openephys", "array": "maxwell"}


def known(name: str, folder: Path) -> None:
    """The rig knows the cells of this simulation from an earlier day: templates in its library, learned from the true spikes."""
    words = argparse.ArgumentParser()
    simulate_command.options(words)
    electrodes = "4x4" if name == "array" else str(GRID)
    rec = simulate_command.synthetic(
        words.parse_args(["--wire", WIRES[name], "--electrodes", electrodes, *SIMULATED[name]])
    )
    spikes = np.concatenate([s for _, s in rec.blocks(len(rec.codes))])
    x, times = (rec.codes.astype(np.float32) - rec.zero_code) * np.float32(rec.lsb_uv), 12
    sample = np.concatenate([spikes["sample"] + k * len(x) for k in range(times)])
    ids = tuple(str(i) for i in range(GRID))
    x = np.tile(x - np.median(x, 0), (times, 1))
    found = learn(np.ascontiguousarray(x.T), sample, np.tile(spikes["unit"], times), rec.fs_hz, rec.positions_um, ids)  # fmt: skip
    (folder / "library").mkdir(parents=True, exist_ok=True)
    found.save(folder / "library" / f"{name}.templates.h5")


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Devices]:
    folder = tmp_path_factory.mktemp("streams")
    wires = {n: (w, [*SIMULATED[n], *(["--probe", str(folder / "probe.json")] if n == "probe" else [])]) for n, w in WIRES.items()}  # fmt: skip
    live = {"enabled": True, "sorter": "templates", "templates": "library"}
    d = Devices(folder, wires, 3600.0, {"probe": 8.0}, live=live, web={"enabled": True, "port": 0})
    for name in WIRES:
        known(name, folder / "sessions")
    data = json.loads(d.rig.config.model_dump_json())
    data["stream"][0]["probe"] = str(folder / "probe.json")
    d.rig.config = configuration.parse(data)
    with d:
        d.rig.wait_state(("recording",), 150)
        d.wait(lambda s: all(x["processes"].get("live", {}).get("units") for x in s["streams"].values()), 240)
        yield d


def url(d: Devices) -> str:
    return str(until(lambda: d.rig.status()["web"]["url"]))


def card(tab: Page, name: str) -> str:
    """What the page says of a stream."""
    return str(tab.eval(f"Array.from(document.querySelectorAll('.stream')).find((c) => c.querySelector('b').textContent === '{name}').innerText"))  # fmt: skip


def choose(tab: Page, name: str) -> None:
    tab.eval(f"Array.from(document.querySelectorAll('.stream')).find((c) => c.querySelector('b').textContent === '{name}').click()")  # fmt: skip


def live(d: Devices, name: str) -> dict[str, Any]:
    return dict(d.rig.status()["streams"][name]["processes"].get("live") or {})


def test_a_desk_sees_both_streams_and_acts_on_the_one_it_looks_at(devices: Devices, tmp_path: Path) -> None:
    d = devices
    units = {n: live(d, n)["units"] for n in WIRES}
    with Page(tmp_path, 1440, 900) as tab:
        tab.open(url(d))
        tab.wait("spiked.raster.painted > 10", 120)
        names = "Array.from(document.querySelectorAll('.stream b'), (b) => b.textContent).join()"
        tab.wait(f"{names} === 'probe,array'")  # as in the rig's file
        assert tab.eval("document.getElementById('stream').value") == "probe"
        tab.wait(f"spiked.raster.units.id.length === {units['probe']}", 120)
        tab.wait("document.getElementById('streams').innerText.includes('Hz')")
        for name in WIRES:
            until(
                lambda name=name: (
                    f"{GRID} electrodes" in (c := card(tab, name)) and f"{units[name]} units" in c
                )
            )
        # how far the second clock is from the first: what the message it was drawn from says
        tab.wait("/clock against probe: [+\\u2212][0-9.]+ ms/.test(document.getElementById('streams').innerText)", 120)  # fmt: skip
        drawn = tab.eval("(() => ({ text: document.getElementById('streams').innerText, of: spiked.state().streams }))()")  # fmt: skip
        said = re.search(r"clock against probe: ([+\u2212])([\d.]+) ms, ± ([\d.]+) \((\w+)\), [+\u2212][\d.]+ ppm", drawn["text"])  # fmt: skip
        assert said, drawn["text"]
        probe, array, clock = drawn["of"]["probe"], drawn["of"]["array"], drawn["of"]["array"]["clock"]
        here, there = clock["sample"] - array["first_sample"], clock["reference_sample"] - probe["first_sample"]  # fmt: skip
        apart = float(said[2]) * (1 if said[1] == "+" else -1)
        assert apart == pytest.approx(1000 * (there / 30_000 - here / 20_000), abs=0.6)
        assert (float(said[3]), said[4]) == (pytest.approx(clock["error_ms"], rel=0.05, abs=0.1), "arrival")
        # the other one: its raster, units and waveforms; a page that was paused goes on
        tab.eval("document.getElementById('pause').click()")
        choose(tab, "array")
        tab.wait(
            "spiked.raster.about.name === 'array' && spiked.raster.painted > 10 && !spiked.raster.paused"
        )
        tab.wait(f"spiked.raster.units.id.length === {units['array']}", 120)
        titles = tab.eval("Array.from(document.querySelectorAll('h2'), (h) => h.textContent).join()")
        assert "Spikes array" in titles and "probe" not in titles
        tab.wait("Object.keys(spiked.raster.rates).length > 0 && document.querySelectorAll('#rates .row').length > 0")  # fmt: skip
        tab.eval("document.querySelector('#rates .row').click()")
        tab.wait("document.getElementById('unit').textContent.includes('spikes as received')", 120)
        # what is done, is done to it
        tab.eval("document.getElementById('mark').requestSubmit()")
        tab.wait("spiked.raster.marks.length === 1")
        tab.wait("!document.querySelector('[data-op=calibrate]').disabled")
        tab.eval("document.querySelector('[data-op=calibrate]').click()")
        tab.wait("!document.querySelector('[data-op=cancel_calibration]').disabled", 120)
        assert not d.rig.status()["streams"]["probe"]["calibration"]
        tab.eval("document.querySelector('[data-op=cancel_calibration]').click()")
        tab.wait("document.querySelector('[data-op=cancel_calibration]').disabled", 120)
        choose(tab, "probe")
        tab.wait("spiked.raster.about.name === 'probe' && spiked.raster.painted > 10")
        assert tab.eval("spiked.raster.marks.length") == 0 and tab.eval("location.hash") == "#stream=probe"
        assert tab.eval("document.documentElement.scrollWidth") <= 1440
        assert tab.complaints == []


def test_a_phone_stops_all_streams_and_sees_one_fall_silent(devices: Devices, tmp_path: Path) -> None:
    d = devices
    with Page(tmp_path, 390, 844) as tab:
        tab.open(url(d) + "#stream=array")  # a link to this stream
        tab.wait("spiked.raster.painted > 10 && spiked.raster.about.name === 'array'", 120)
        tab.eval("document.getElementById('stop').click()")
        says = "document.getElementById('stopsays').textContent.includes('confirmed by 2 of 2')"
        tab.wait(f"document.getElementById('stop').className === 'stopped' && {says}", 120)
        until(lambda: all((live(d, n).get("act") or {}).get("stopped") for n in WIRES), 120)
        assert tab.eval("document.documentElement.scrollWidth") <= 390
        beyond = """Array.from(document.querySelectorAll('main *')).filter((e) =>
            !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).length"""
        assert tab.eval(beyond) == 0
        d.kill("probe")
        tab.wait("document.querySelectorAll('.stream.bad').length === 1", 120)
        assert "lost" in card(tab, "probe") and "no samples" in card(tab, "probe")
        choose(tab, "probe")
        tab.wait("document.getElementById('rastersays').textContent.startsWith('probe is lost')")
        choose(tab, "array")
        drawn = tab.eval("spiked.drawn.spikes")
        tab.wait(f"spiked.drawn.spikes > {drawn} && document.getElementById('rastersays').hidden")
        assert tab.complaints == []
