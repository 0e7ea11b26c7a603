"""report.html in a real Chromium, at the width of a desk and of a phone."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from browser import Page, installed
from report_rig import recorded, sort_offline

from spiked.offline.page import page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(installed() is None, reason="no Chromium on this computer; apt install chromium"),
]
MANY = 300


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("spikeinterface")
    pytest.importorskip("kilosort")
    return sort_offline(recorded(tmp_path_factory.mktemp("rig") / "2026-01-02T00-00-00_rig"))


def scrolled(tab: Page) -> None:
    """As a reader does it, screen by screen."""
    height = tab.eval("innerHeight")
    at = 0
    while at < tab.eval("document.documentElement.scrollHeight"):
        tab.eval(f"scrollTo(0, {at})")
        tab.settle()
        at += height


@pytest.mark.parametrize(
    ("width", "height", "dark"), [(1280, 900, False), (375, 812, False), (375, 812, True)]
)
def test_it_is_whole_and_fits(
    report: dict[str, Any], tmp_path: Path, width: int, height: int, dark: bool
) -> None:
    path = Path(report["report_html"])
    with Page(tmp_path, width, height, dark) as tab:
        tab.open(path)
        scrolled(tab)
        assert tab.complaints == []
        assert [u for u in tab.requests if not u.startswith("data:")] == [path.as_uri()]
        assert tab.eval("document.documentElement.scrollWidth") <= width
        assert tab.eval("document.querySelectorAll('[data-draw]:not([data-drawn])').length") == 0
        cards = tab.eval(
            "Array.from(document.querySelectorAll('.card'), (c) => c.querySelectorAll('svg').length)"
        )
        assert cards == [3] * report["merged_units"]
        for which in ("offline", "live"):
            ink = f"""(() => {{ const c = document.querySelector('[data-raster={which}] canvas');
                return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v); }})()"""
            assert tab.eval(ink)
        beyond = """Array.from(document.querySelectorAll('main *')).filter((e) =>
            !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1).length"""
        assert tab.eval(beyond) == 0


def test_tables_sort_and_cards_are_chosen(report: dict[str, Any], tmp_path: Path) -> None:
    def column() -> list[str]:
        return tab.eval(
            "Array.from(document.querySelectorAll('#units table')[0].tBodies[0].rows, (r) => r.cells[0].textContent)"
        )

    rows = sorted(report["merge"]["units"], key=lambda u: u["snr"])
    with Page(tmp_path, 1280, 900) as tab:
        tab.open(Path(report["report_html"]))
        click = (
            "Array.from(document.querySelectorAll('#units th')).find((t) => t.textContent === 'SNR').click()"
        )
        tab.eval(click)
        assert column() == [str(u["unit"]) for u in rows]
        tab.eval(click)
        assert column() == [str(u["unit"]) for u in reversed(rows)]
        labels = {u["label"] for u in rows}
        if len(labels) > 1:
            one = min(labels)
            tab.eval(
                f"(() => {{ const s = document.getElementById('which'); s.value = '{one}'; s.dispatchEvent(new Event('change')); }})()"
            )
            shown = tab.eval(
                "Array.from(document.querySelectorAll('.card')).filter((c) => c.offsetParent).length"
            )
            assert shown == sum(u["label"] == one for u in rows)
        assert tab.complaints == []


def many(report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same report with hundreds of units on a long recording: its mapping and its arrays."""
    d = copy.deepcopy(report)
    rng = np.random.default_rng(0)
    ids = list(range(MANY))
    d["merge"]["units"] = [{**d["merge"]["units"][k % 5], "unit": k} for k in ids]
    d["quality"] = {str(k): next(iter(report["quality"].values())) for k in ids}
    d["library"]["units"] = {str(k): k for k in ids}
    d["drift"] = {
        "why": "",
        "times_s": [0.0, 3600.0, 7200.0],
        "um": [[0.0, 4.0, 9.0], [0.0, 1.0, 2.0]],
        "range_um": 9.0,
    }
    d["merged_units"], d["recording"]["duration_s"] = MANY, 7200.0
    a = d["compare"]["agreement"]
    a["offline_ids"], a["live_ids"], a["matrix"] = ids, ids, np.eye(MANY).tolist()
    a["pairs"] = [{**a["pairs"][0], "offline": k, "live": k} for k in ids]
    counts = "A" * (MANY * 600 // 3 * 4)
    raster = {"ids": ids, "bins": 600, "counts": counts}
    wave = rng.integers(-150, 80, (20, 90)).tolist()
    foot = {
        "channels": list(range(20)),
        "xy": [[16.0 * (i % 4), 20.0 * (i // 4)] for i in range(20)],
        "uv": wave,
        "before": 30,
    }
    arrays = {
        "footprints": dict.fromkeys(ids, foot), "acg": {k: rng.integers(0, 2000, 200).tolist() for k in ids}, "bin_ms": 0.5, "window_ms": 3.0,
        "amplitudes": {k: rng.integers(-150, -50, 60).tolist() for k in ids}, "ccg": [{"a": 0, "b": 900, "counts": [1] * 200}],
        "rasters": {"offline": raster, "live": raster},
    }  # fmt: skip
    return d, arrays


def computed_s(browser: psutil.Process) -> float:
    """Seconds of the processor that the browser and all its processes have had."""
    total = 0.0
    for p in (browser, *browser.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just gone
            total += sum(p.cpu_times()[:2])
    return total


def test_hundreds_of_units_open_at_once(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "many.html"
    path.write_text(page(*many(report)), encoding="utf-8")
    assert path.stat().st_size < 10_000_000
    with Page(tmp_path / "profile", 375, 812) as tab:
        browser = psutil.Process(tab._browser.pid)
        before = computed_s(browser)
        tab.open(path)
        assert computed_s(browser) - before < 10.0  # what it waits for, on a busy computer, is not the page
        drawn = "document.querySelectorAll('.card[data-drawn]').length"
        assert tab.eval(drawn) < 20 and tab.eval("document.querySelectorAll('.card').length") == MANY
        tab.eval("document.getElementById('unit-250').scrollIntoView()")
        tab.wait("document.getElementById('unit-250').querySelectorAll('svg').length === 3")
        assert tab.eval(drawn) < 60
        tab.eval("document.getElementById('raster').scrollIntoView()")
        tab.wait("document.querySelector('[data-raster=offline]').dataset.drawn === ''")
        tab.eval("document.getElementById('drift').scrollIntoView()")
        tab.wait("document.querySelectorAll('#drift polyline').length === 2")
        assert tab.eval("document.documentElement.scrollWidth") <= 375 and tab.complaints == []


def test_the_data_cannot_end_the_script(report: dict[str, Any]) -> None:
    d = copy.deepcopy(report)
    d["session"] = "</script><b>x"
    d["merge"]["units"][0]["reason"] = "<img src=x onerror=alert(1)>"
    text = page(
        d,
        {
            "rasters": {},
            "ccg": [],
            "footprints": {},
            "acg": {"</script>": 1},
            "amplitudes": {},
            "bin_ms": float("nan"),
        },
    )
    assert text.count("</script>") == 2 and "<img" not in text and "<b>x" not in text
    data = text.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["bin_ms"] is None
