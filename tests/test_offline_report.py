"""The report's numbers, computed again from the session's files without any of the report's code."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from offline_rig import FIRST, FS, GAIN_UV, ZERO
from report_rig import GAP, MARKS_S, NOISE, SECONDS, SPLIT, UNITS, UNKNOWN_LIVE, recorded, sort_offline
from scipy.signal import butter, sosfiltfilt
from scipy.stats import poisson

from spiked.cli import main
from spiked.offline import report as written
from spiked.offline.compare import compare
from spiked.offline.facts import drift
from spiked.offline.page.sections import SECTIONS
from spiked.offline.report import markdown
from spiked.offline.sorters.kilosort4 import _keep_drift
from spiked_client.protocol import BLIND, BLIND_REASONS, LEDGER, OUTCOMES, SPIKE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
N = int(SECONDS * FS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("spikeinterface")
    pytest.importorskip("kilosort")
    folder = recorded(tmp_path_factory.mktemp("rig") / "2026-01-02T00-00-00_rig")
    sort_offline(folder)
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads(
        (folder / "report.json").read_text(), parse_constant=lambda s: pytest.fail(f"{s} in JSON")
    )


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawn(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def trains(folder: Path) -> dict[int, np.ndarray]:
    with np.load(folder / "offline/kilosort4/units.npz") as z:
        samples, units = z["samples"] - FIRST, z["units"]
    return {int(u): np.sort(samples[units == u]) for u in np.unique(units)}


def test_units_and_their_quality(folder: Path, report: dict[str, Any], trains: dict[int, np.ndarray]) -> None:
    rows = {u["unit"]: u for u in report["merge"]["units"]}
    assert set(rows) == set(trains) and report["merged_units"] == len(trains) == UNITS
    with h5py.File(folder / "mea.nwb") as f:
        uv = (f["acquisition/ElectricalSeries/data"][:].astype(np.float64) - ZERO) * GAIN_UV
    uv[slice(*GAP)] = 0
    x = sosfiltfilt(butter(5, (300, 6000), "bandpass", fs=FS, output="sos"), uv, axis=0)
    x -= np.median(x, axis=1, keepdims=True)
    noise = np.median(np.abs(x - np.median(x, axis=0)), axis=0) / 0.6745
    for unit, train in trains.items():
        row, q = rows[unit], report["quality"][str(unit)]
        assert row["n_spikes"] == q["num_spikes"] == len(train)
        assert row["rate_hz"] == pytest.approx(len(train) / SECONDS) == q["firing_rate"]
        short = int((np.diff(train) < 1.5 * FS / 1000).sum())
        assert q["isi_violations_count"] == short
        tenths = np.array([((train >= a) & (train < a + N // 10)).any() for a in range(0, N, N // 10)])
        assert q["presence_ratio"] == pytest.approx(tenths.mean(), abs=1e-6) == row["presence"]
        inside = train[(train > 40) & (train < N - 40)]
        mean = np.mean([x[t - 20 : t + 40] for t in inside], axis=0)
        channel = int(np.abs(mean).max(0).argmax())
        assert row["channel"] == channel
        assert row["peak_uv"] == pytest.approx(mean[:, channel][np.abs(mean[:, channel]).argmax()], rel=0.06)
        assert row["snr"] == pytest.approx(abs(row["peak_uv"]) / noise[channel], rel=0.08)
        a, b = (
            np.searchsorted(train, train + ms * FS / 1000, side)
            for ms, side in ((0.5, "right"), (1.5, "left"))
        )
        share = min(np.maximum(b - a, 0).sum() / (len(train) ** 2 * 1e-3 / SECONDS), 0.5)
        assert row["contamination"] == pytest.approx((1 - np.sqrt(1 - 2 * share)) / 2)
        most = row["contamination_most"]
        if most is None:  # even half would be no surprise
            assert poisson.cdf(np.maximum(b - a, 0).sum(), 0.5 * len(train) ** 2 * 1e-3 / SECONDS) >= 0.05
        else:
            at_most = 2 * most * (1 - most) * len(train) ** 2 * 1e-3 / SECONDS
            assert poisson.cdf(np.maximum(b - a, 0).sum(), at_most) == pytest.approx(0.05)
        assert (short > 0) == (row["contamination"] > 0.1) == (unit == 1)


def test_every_step_adds_up(folder: Path, report: dict[str, Any], trains: dict[int, np.ndarray]) -> None:
    with np.load(folder / "offline/kilosort4/sorted.npz") as z:
        assert report["offline_units"] == len(np.unique(z["units"])) == UNITS + 2
    counts = Counter(u["label"] for u in report["labels"]["units"])
    assert {k: v for k, v in report["labels"]["counts"].items() if v} == counts
    assert counts["noise"] == 1 and [
        u["unit"] for u in report["labels"]["units"] if u["label"] == "noise"
    ] == [NOISE]
    ((new, old),) = report["merge"]["mapping"].items()
    assert old == [0, SPLIT] and int(new) in trains and not {0, SPLIT} & set(trains)
    assert report["drawn_pairs"] == [[0, SPLIT]]
    stages = json.loads((folder / "offline/kilosort4/stages.json").read_text())["stages"]
    assert report["seconds"] == {k: v["seconds"] for k, v in stages.items()}


def followed(a: np.ndarray, b: np.ndarray, lag: int, window: int) -> int:
    """Coincidences, the plain way: every spike of `a` takes the first free one of `b`."""
    free, n = [int(t) - lag for t in b], 0
    for t in a.tolist():
        hit = next((k for k, u in enumerate(free[:60]) if abs(u - t) <= window), None)
        while free and free[0] < t - window:
            free.pop(0)
            hit = None if hit is None else hit - 1
        if hit is not None:
            free.pop(hit)
            n += 1
    return n


def test_live_against_offline(folder: Path, report: dict[str, Any], trains: dict[int, np.ndarray]) -> None:
    spikes = np.fromfile(folder / "mea.spikes.bin", SPIKE)
    told = spikes[spikes["unit"] >= 0]
    heard = {int(u): np.sort(told["sample"][told["unit"] == u] - FIRST) for u in np.unique(told["unit"])}
    assert (report["compare"]["live_spikes"], report["live_units"]) == (len(told), len(heard))
    start = min(t[0] for t in heard.values()) - round(0.001 * FS)
    assert report["compare"]["span_s"] == pytest.approx([start / FS, SECONDS])
    late = {u: t[t >= start] for u, t in trains.items()}
    a = report["agreement"]
    assert len(a["pairs"]) == a["same"] == UNITS - 1
    for p in a["pairs"]:
        lag = round(p["lag_ms"] * FS / 1000)
        assert lag == 4
        n = followed(late[p["offline"]], heard[p["live"]], lag, round(a["window_ms"] * FS / 1000))
        assert (p["n_match"], p["n_offline"], p["n_live"]) == (
            n,
            len(late[p["offline"]]),
            len(heard[p["live"]]),
        )
        assert p["agreement"] == pytest.approx(n / (p["n_offline"] + p["n_live"] - n))
    assert a["missed"] == [UNITS - 1] and a["invented"] == [UNKNOWN_LIVE] and a["partly"] == []
    assert report["compare"]["set_aside"] == {}


def test_gaps_blind_time_and_stimuli(folder: Path, report: dict[str, Any], drawn: dict[str, Any]) -> None:
    with h5py.File(folder / "mea.nwb") as f:
        table = f["intervals/invalid_times"]
        gaps = np.column_stack([table["start_sample"][:], table["stop_sample"][:]]) - FIRST
    assert report["gap_spans"] == drawn["gaps"] == (gaps / FS).tolist()
    assert report["recording"]["blind_s"] == pytest.approx(np.diff(gaps).sum() / FS)
    dead = np.zeros((16, N), bool)
    by_reason = {r: np.zeros((16, N), bool) for r in BLIND_REASONS}
    for row in np.fromfile(folder / "mea.blind.bin", BLIND):
        where = slice(None) if row["channel"] < 0 else int(row["channel"])
        for mask in (dead, by_reason[BLIND_REASONS[row["reason"]]]):
            mask[where, row["start"] - FIRST : row["stop"] - FIRST] = True
    blind = report["blind"]
    assert blind["seconds"] == pytest.approx(dead.any(0).sum() / FS) and blind["share"] == pytest.approx(
        dead.mean()
    )
    for reason, told in blind["reasons"].items():
        assert told["seconds"] == pytest.approx(by_reason[reason].any(0).sum() / FS)
        assert told["share"] == pytest.approx(by_reason[reason].mean())
    assert set(blind["reasons"]) == {"uncalibrated", "gap", "clipped"}
    ledger = np.fromfile(folder / "mea.ledger.bin", LEDGER)
    outcomes = Counter(OUTCOMES[o] for o in ledger["outcome"].tolist())
    rule = report["stimuli"]["rules"]["burst"]
    assert report["stimuli"]["decisions"] == len(ledger) and rule["outcomes"] == outcomes
    assert rule["intervals_ms"]["trigger spike to artifact"] == {"n": 4, **dict.fromkeys(("mean", "least", "p5", "median", "p95", "p99", "most"), 3.0)}  # fmt: skip
    assert report["events"] == {"stim": 2, "ttl": 1} and report["stim_marks_s"] == list(MARKS_S[1:])
    sent = ledger["sent_sample"][ledger["sent_sample"] >= 0]
    assert drawn["stim_s"] == sorted([*((sent - FIRST) / FS).tolist(), *MARKS_S[1:]])


def test_what_the_page_draws(drawn: dict[str, Any], trains: dict[int, np.ndarray]) -> None:
    raster = drawn["rasters"]["offline"]
    cells = np.frombuffer(base64.b64decode(raster["counts"]), np.uint8).reshape(len(trains), raster["bins"])
    assert sorted(raster["ids"]) == sorted(trains)
    for unit, row in zip(raster["ids"], cells, strict=True):
        assert np.array_equal(row, np.histogram(trains[unit], raster["bins"], (0, N))[0])
    assert drawn["rasters"]["live"]["ids"][-1] == UNKNOWN_LIVE
    for unit, train in trains.items():
        counts = np.array(drawn["acg"][str(unit)])
        bin_samples = round(drawn["bin_ms"] * FS / 1000)
        lags = (train[None] - train[:, None])[~np.eye(len(train), dtype=bool)]
        half = len(counts) // 2
        expected = np.histogram(lags, (np.arange(len(counts) + 1) - half) * bin_samples)[0]
        assert np.abs(counts.sum() - expected.sum()) <= 2 + 0.01 * expected.sum()
        assert counts[half - 1 : half + 1].sum() == 0  # nothing within half a millisecond
        foot = drawn["footprints"][str(unit)]
        assert max(abs(v) for v in foot["uv"][0]) == max(abs(v) for row in foot["uv"] for v in row)
    (pair,) = drawn["ccg"]
    assert (pair["a"], pair["b"]) == (0, SPLIT) and sum(pair["counts"]) > 0


def test_the_page_says_what_the_report_says(
    folder: Path, page: str, report: dict[str, Any], trains: dict[int, np.ndarray]
) -> None:
    assert (
        len(page) < 400_000
        and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
        and "https://" not in page
    )
    for unit in trains:
        assert f'id="unit-{unit}"' in page
    for title in (
        "Steps",
        "Merges",
        "Live against offline",
        "Stimuli",
        "Gaps and blind time",
        "Drift",
        "How it was made",
    ):
        assert f"<h2>{title}</h2>" in page
    for version in report["versions"].values():
        assert version in page
    assert f"Missed live: {UNITS - 1}." in page and f"Invented live: {UNKNOWN_LIVE}." in page
    for told in (page, (folder / "report.md").read_text()):
        assert f"{UNITS - 1} of {UNITS} offline units" in told


def test_spiked_report_tells_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)) or len(opened) < 2)
    assert main(["report", str(folder), "--open"]) == 0
    text = capsys.readouterr().out
    labels = Counter(u["label"] for u in json.loads((folder / "report.json").read_text())["merge"]["units"])
    assert f"mea: {UNITS} units (" in text and f"; kilosort4 found {UNITS + 2}: 1 set aside, 1 merge)" in text
    assert all(f"{n} {label}" in text for label, n in labels.items()) and "7 decisions to stimulate" in text
    assert (
        f"{UNITS - 1} of {UNITS} units agree with an offline one, 1 offline units missed, 1 invented" in text
    )
    assert opened == [(folder / "report.html").as_uri()]
    assert main(["report", str(folder), "--open"]) == 2 and "no browser" in capsys.readouterr().err


def test_not_sorted_yet_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "session.toml").touch()
    assert main(["report", str(tmp_path)]) == 0
    assert f"not sorted yet; `spiked sort {tmp_path}` does it" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--open"]) == 2


def test_drift_is_what_the_sorter_saw(tmp_path: Path) -> None:
    assert "no drift.npz" in drift(tmp_path, FS)["why"]
    _keep_drift(tmp_path, {"dshift": None, "batch_size": 40_000})
    assert "was off" in drift(tmp_path, FS)["why"]
    moved = np.column_stack([np.linspace(0, 12.0, 1000), np.zeros(1000)])
    _keep_drift(tmp_path, {"dshift": moved, "batch_size": 40_000})
    told = drift(tmp_path, FS)
    assert told["why"] == "" and told["range_um"] == 12.0 and len(told["um"]) == 2
    assert told["times_s"][-1] == 999 * 2.0 and len(told["times_s"]) == len(told["um"][0]) <= 300
    assert told["um"][0][-1] == 12.0


def test_what_curation_did_not_keep_was_not_invented_live_and_halves_are_told() -> None:
    """A live unit may follow what the sorter found and labels set aside; an offline unit may be followed by a live one in part."""
    rng = np.random.default_rng(0)
    a, b, c, d = (np.sort(rng.choice(np.arange(0, N, 200), 400, replace=False)) + 40 * k for k in range(4))
    offline = np.concatenate([a, b]), np.repeat([1, 2], 400)
    raw = np.concatenate([a, b, c]), np.repeat([1, 2, 3], 400)
    live = np.concatenate([a, b[:120], c, d]), np.repeat([51, 52, 53, 54], [400, 120, 400, 400])
    order = np.argsort(live[0], kind="stable")
    told = compare(offline, (live[0][order], live[1][order]), None, raw, N, FS)
    found = told["agreement"]
    assert (found["same"], found["partly"], found["missed"], found["invented"]) == (1, [2], [], [53, 54])
    assert told["set_aside"] == {"53": 3}
    lines = " ".join(written.followed(told))
    assert "1 of 2 offline units" in lines and "In part, or together with another unit: 2." in lines
    assert "53 is the sorter's 3" in lines


def test_a_recording_without_live_units_is_not_told_to_have_missed_them(
    folder: Path, report: dict[str, Any]
) -> None:
    """No row of zeros for a sorting that was not there, no step that seems to lose all units, no empty columns."""
    d = json.loads(json.dumps(report))
    samples = np.zeros(0, np.int64)
    with np.load(folder / "offline/kilosort4/sorted.npz") as z:
        raw = z["samples"], z["units"]
    d["compare"] = compare(raw, (samples, samples), raw, raw, N, FS)
    d["live_units"] = 0
    d["nwb"] = {"units": 0, "table": "", "why": "the recording is not a session's; it is left as it is"}
    d["library"] = {"file": "", "why": "switched off", "told": [], "units": {}, "known": []}
    md = markdown(d)
    html = {key: make(d) for key, _, make in SECTIONS}
    assert "Live against offline" not in md and html["live"] == ""
    for told in (md, html["truth"]):
        assert "while live units existed" not in told
    assert "| session file |  | the recording" in md and "| library |  | switched off |" in md
    assert ">live<" not in html["units"] and ">library<" not in html["units"] and ">SNR<" in html["units"]
