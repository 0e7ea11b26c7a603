"""Template matching in a whole session: found while it runs, told with what to expect of each unit, live again in the next one."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from session_rig import rehearsal

from spiked.offline.truth import score
from spiked.rehearsal import Rehearsal
from spiked.templates.library import Templates, library_path
from spiked_client.protocol import BLIND, SPIKE

pytest.importorskip("spikeinterface", reason="templates are found with SpikeInterface's sorters")


def calibrated(r: Rehearsal, timeout_s: float) -> None:
    """Wait until units were found; what went wrong otherwise."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        told = r.status()["streams"]["sim"].get("calibration") or {}
        if told.get("state") == "done":
            return
        assert told.get("state") not in ("failed", "cancelled"), told
        time.sleep(0.3)
    raise AssertionError(f"not calibrated after {timeout_s:g} s: {r.status()['streams']['sim']}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_templates_are_found_used_and_carried_on(tmp_path: Path) -> None:
    truth = tmp_path / "truth.npz"
    live = {"enabled": True, "sorter": "templates", "calibrate_s": 25}
    with rehearsal(tmp_path / "one", seconds=1800.0, live=live, simulate=("--truth", str(truth))) as r:
        r.wait_state(("recording",), 150)
        calibrated(r, 900)
        at = r.status()["streams"]["sim"]["samples"]
        while r.status()["streams"]["sim"]["samples"] < at + 400_000:
            time.sleep(0.3)
        summary = r.stop()
        sent = r.stop_simulator(150)
    assert summary["exit_code"] == 0
    session = Path(summary["folder"])
    templates = Templates.load(session / "sim.templates.h5")
    assert len(templates) >= 3
    assert templates.source["sorter"] == "lupin"
    log = [json.loads(line) for line in (session / "log.jsonl").read_text().splitlines()]
    (event,) = (e for e in log if e["event"] == "calibrated")
    for sorter in ("templates", "rt_sort"):
        assert len(event["expected"][sorter]["accuracy"]) == event["units"] == len(templates)
    assert max(event["expected"]["templates"]["accuracy"]) > 0.8

    spikes = np.fromfile(session / "sim.spikes.bin", SPIKE)
    found = spikes[spikes["unit"] >= 0]
    start, stop = event["from_sample"] + 1000, found["sample"].max()
    with np.load(truth) as z:
        known, cells = z["samples"] + sent["first_sample"], z["units"]
    k = (known >= start) & (known < stop)
    blind = np.fromfile(session / "sim.blind.bin", BLIND)
    for hole in blind[blind["channel"] == -1]:  # what a busy computer skipped is told, and not sorted
        k &= (known < hole["start"]) | (known >= hole["stop"])
    per_unit = score(known[k], cells[k], found["sample"], found["unit"], 20_000, 0.4)
    accuracy = sorted(v["accuracy"] for v in per_unit.values())
    assert sum(a >= 0.8 for a in accuracy) >= 3, accuracy
    assert set(found["unit"].tolist()) <= set(templates.unit_ids.tolist())

    library = library_path(tmp_path / "three" / "sessions" / "any", "sim")
    library.parent.mkdir(parents=True)
    shutil.copy(session / "sim.templates.h5", library)
    for name, brought in (("two", str(session / "sim.templates.h5")), ("three", "library")):
        again = {"enabled": True, "sorter": "templates", "templates": brought}
        with rehearsal(tmp_path / name, seconds=8.0, live=again) as r:
            sent = r.wait_simulator(200)
            assert r.wait_received(sent["samples"])
            summary = r.stop()
        folder = Path(summary["folder"])
        spikes = np.fromfile(folder / "sim.spikes.bin", SPIKE)
        early = spikes[(spikes["unit"] >= 0) & (spikes["sample"] < sent["first_sample"] + 40_000)]
        assert len(early) > 5 and set(early["unit"].tolist()) <= set(templates.unit_ids.tolist())
    assert f"{len(templates)} units of the rig's library" in (folder / "log.jsonl").read_text()
