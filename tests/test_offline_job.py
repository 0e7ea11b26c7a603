"""A whole offline job through the real Kilosort4 and SLAy, and its continuation after an interruption."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from offline_jobs import all_gone
from offline_rig import FIRST, codes, live, neurons, session, stream
from test_offline_sorters_run import READ_BACK, in_process

from spiked.offline.job import run_offline
from spiked.offline.progress import STAGES, Step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
UNITS, SECONDS = 5, 18.0
GAP = (200_000, 206_000)  # 0.3 s


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict], list[float]]:
    """(session folder, events of the job, seconds between them)."""
    pytest.importorskip("kilosort")
    info = stream()
    data, samples, units = neurons(info, SECONDS, UNITS)
    folder = session(tmp_path_factory.mktemp("offline") / "s", info, codes(info, data), ((*GAP, ()),))
    alive = (samples < GAP[0]) | (samples >= GAP[1])
    samples, units = samples[alive], units[alive]
    np.savez(folder / "mea.truth.npz", samples=samples, units=units, snr=np.full(UNITS, 20.0))
    heard = samples > 60_000
    live(folder, info, samples + 4, np.where(heard & (units < UNITS - 1), units + 50, -1))
    errors = folder.parent / "stderr"  # no pipe: nobody would empty it before the end
    with errors.open("wb") as f:
        job = subprocess.Popen(
            [sys.executable, "-m", "spiked.offline.job", str(folder), "--json-progress"],
            stdout=subprocess.PIPE,
            stderr=f,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    events, times = [], [time.monotonic()]
    assert job.stdout is not None
    for line in job.stdout:
        events.append(json.loads(line))
        times.append(time.monotonic())
    job.communicate()
    assert job.returncode == 0, f"{events[-1:]}\n{errors.read_text(errors='replace')[-3000:]}"
    return folder, events, np.diff(times).tolist()


@pytest.fixture(scope="module")
def report(finished: tuple[Path, list[dict], list[float]]) -> dict:
    return json.loads((finished[0] / "report.json").read_text())


def test_progress_is_told_all_the_time(finished: tuple[Path, list[dict], list[float]]) -> None:
    _, events, pauses = finished
    progress = [e for e in events if e["event"] == "progress"]
    assert [
        e["stage"] for k, e in enumerate(progress) if not k or e["stage"] != progress[k - 1]["stage"]
    ] == list(STAGES)
    assert np.median(pauses[1:]) < 6.0 and max(pauses[1:]) < 60.0  # a busy computer may hold one of them up
    assert any("detection" in e["text"] and "batches" in e["text"] for e in progress)
    assert events[-1]["event"] == "finished" and Path(events[-1]["report"]).is_file()


def test_the_neurons_are_found(report: dict) -> None:
    assert report["sorter"] == "kilosort4" and report["offline_units"] >= UNITS - 1
    accuracy = np.array(list(report["accuracy_offline"].values()))
    assert len(accuracy) == UNITS and (accuracy > 0.8).sum() >= UNITS - 1
    assert (
        sum(report["labels"]["counts"].values()) == report["offline_units"] == len(report["labels"]["units"])
    )
    assert all(u["reason"] for u in report["labels"]["units"])
    assert set(report["seconds"]) == set(STAGES)


def test_live_is_compared(report: dict) -> None:
    assert report["live_units"] == UNITS - 1
    accuracy = np.array(list(report["accuracy_live"].values()))
    assert sorted(accuracy.round(6))[1:] == [1.0] * (UNITS - 1) and accuracy.min() == 0.0
    good = [p for p in report["agreement"]["pairs"] if p["agreement"] > 0.8]
    assert len(good) >= UNITS - 2 and all(abs(p["lag_ms"]) < 1.0 for p in good)


def test_the_gap_is_told_and_empty(finished: tuple[Path, list[dict], list[float]], report: dict) -> None:
    assert report["recording"]["gaps"] == 1 and report["recording"]["blind_s"] == pytest.approx(0.3)
    with np.load(finished[0] / "offline/kilosort4/units.npz") as z:
        at = z["samples"] - FIRST
        assert int(z["first_sample"]) == FIRST and len(np.unique(z["units"])) == report["merged_units"]
    assert not ((at > GAP[0] + 60) & (at < GAP[1] - 60)).any()
    assert ((at > 0) & (at < SECONDS * 20_000)).all()


def test_files_are_where_the_report_says(
    finished: tuple[Path, list[dict], list[float]], report: dict
) -> None:
    folder = finished[0] / "offline/kilosort4"
    assert (folder / "sorter/sorter_output/params.py").is_file() and Path(report["files"]["phy"]).is_dir()
    assert not (folder / "recording.dat").exists()
    text = (finished[0] / "report.md").read_text()
    for heading in (
        "## Units",
        "## Against the simulated truth",
        "## Live against offline",
        "## How it was made",
    ):
        assert heading in text
    assert "cpu_small" in text or "cuda" in text


def test_the_curated_folder_for_phy_is_read_by_kilosort_spikeinterface_and_phylib(
    finished: tuple[Path, list[dict], list[float]], report: dict
) -> None:
    place = Path(report["files"]["phy_curated"])
    assert place == finished[0] / "offline/kilosort4/phy"
    told = json.loads(in_process(READ_BACK, str(place)))
    with np.load(report["files"]["units"]) as z:
        samples, units = z["samples"] - FIRST, z["units"]
    counts = {
        str(u): n for u, n in zip(*(x.tolist() for x in np.unique(units, return_counts=True)), strict=True)
    }
    assert counts and counts.items() <= told["read_phy"].items()
    times, clusters = (np.array(x) for x in told["load_sorting"])
    for unit in np.unique(units).tolist():
        assert np.array_equal(times[clusters == unit], samples[units == unit])
    assert told["phylib"][0] == len(times) == sum(told["read_phy"].values())  # no spike is dropped
    before = json.loads(in_process(READ_BACK, report["files"]["phy"]))
    assert before["load_sorting"][0] == told["load_sorting"][0]
    assert len(before["read_phy"]) >= report["offline_units"]


def test_a_stopped_job_leaves_no_process_and_no_binary(tmp_path: Path) -> None:
    info = stream()
    data, _, _ = neurons(info, 6.0, 3)
    folder = session(tmp_path / "s", info, codes(info, data))
    job = subprocess.Popen(
        [sys.executable, "-m", "spiked.offline.job", str(folder), "--json-progress"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert job.stdout is not None
    for line in job.stdout:
        if "starting the sorter" in line:
            break
    until = time.monotonic() + 120
    while not (sorters := psutil.Process(job.pid).children(recursive=True)) and time.monotonic() < until:
        time.sleep(0.05)
    job.terminate()
    job.stdout.read()
    assert job.wait(120) == 130
    job.stdout.close()
    assert sorters and all_gone(sorters)
    assert not (folder / "offline/kilosort4/recording.dat").exists()
    stages = json.loads((folder / "offline/kilosort4/stages.json").read_text())["stages"]
    assert set(stages) == {"preflight", "canary", "export"}


def test_a_rerun_goes_on_after_the_last_finished_stage(
    finished: tuple[Path, list[dict], list[float]], report: dict
) -> None:
    folder = finished[0]
    (folder / "report.md").unlink()
    (folder / "mea.truth.npz").rename(folder / "truth.moved")
    steps: list[Step] = []
    again = run_offline(folder, {"slay": {}, "timeout_s": 50.0}, steps.append)
    assert {s.stage for s in steps if s.text == f"{s.stage} was finished before"} == set(
        STAGES[: STAGES.index("compare")]
    )
    assert again["seconds"]["sort"] == report["seconds"]["sort"]
    assert again["accuracy_offline"] is None and again["merged_units"] == report["merged_units"]
    assert "## Against the simulated truth" not in (folder / "report.md").read_text()
