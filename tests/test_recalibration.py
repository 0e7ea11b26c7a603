"""Calibrating again while a session runs: the samples go on, the units keep their ids, and it can be given up."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from session_rig import rehearsal

from spiked.cli import main
from spiked.rehearsal import Rehearsal
from spiked.sort.sequences import Sequences
from spiked_client.protocol import BLIND, BLIND_REASONS, SPIKE, UNIT
from spiked_client.subscribe import SyncClient

WAIT_S = 240.0
# a busy machine may delay the live path by seconds; that is not what is tested here
LIVE = {"enabled": True, "calibrate_s": 15.0, "skip_behind_ms": 15_000.0}


def stream(r: Rehearsal) -> dict[str, Any]:
    return dict(r.status()["streams"]["sim"])


def states(r: Rehearsal) -> Iterator[dict[str, Any]]:
    """What is told of the calibration, again and again, for as long as a test may wait."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        yield stream(r)["calibration"] or {"state": None}
        time.sleep(0.1)
    raise AssertionError(f"waited {WAIT_S} s; the last was {stream(r)['calibration']}")


def wait_state(r: Rehearsal, *wanted: str) -> dict[str, Any]:
    return next(s for s in states(r) if s["state"] in wanted)


def calibrator(r: Rehearsal) -> psutil.Process:
    """The calibrating process once it runs, held: else it may be done before anything is done to it."""
    live, until = psutil.Process(stream(r)["pids"]["live"]), time.monotonic() + WAIT_S
    while time.monotonic() < until:
        for p in live.children():
            with contextlib.suppress(psutil.Error):  # it has just gone
                if "spiked.live.calibration" in p.cmdline():
                    p.suspend()
                    return p
        time.sleep(0.05)
    raise AssertionError("no calibrating process came")


def leftovers(r: Rehearsal, session: Path) -> list[Path]:
    return [*r.config.rig.runtime.glob(f"*{session.name}*.calibration"), *session.glob("*.found*")]


def spikes_after(session: Path, sample: int) -> np.ndarray:
    spikes = np.fromfile(session / "sim.spikes.bin", SPIKE)
    return spikes[(spikes["unit"] >= 0) & (spikes["sample"] >= sample)]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One session: calibrated, calibrated again, then three times in vain and once while the live process dies."""
    told = SimpleNamespace()
    with rehearsal(tmp_path_factory.mktemp("rig"), seconds=1800.0, live=LIVE, ring={"seconds": 40.0}) as r:
        r.wait_state(("recording",), 120)
        told.session = session = Path(r.status()["folder"])
        process = calibrator(r)
        told.seen = {wait_state(r, "calculating")["state"]}
        process.resume()
        told.seen |= {s["state"] for s in states_until_done(r)}
        told.first = Sequences.load(session / "sim.sequences.h5")
        with SyncClient(control_port=r.config.publish.control_port) as client:
            units = client.messages("units")
            assert units.get(0.5) is None  # connected, and nothing new
            r.control("calibrate")
            wait_state(r, "collecting", "calculating")
            r.control("calibrate")  # told that one is under way
            again = list(states_until_done(r))
            told.seen |= {s["state"] for s in again}
            told.fractions = [s["fraction"] for s in again]
            told.units = units.get(60.0)
        assert told.units is not None
        until = stream(r)["samples"] + 100_000
        while stream(r)["samples"] < until:
            time.sleep(0.2)
        told.second = Sequences.load(session / "sim.sequences.h5")

        told.kept = (session / "sim.sequences.h5").read_bytes()
        told.in_use = np.fromfile(session / "sim.units.bin", UNIT)
        told.begin = stream(r)["samples"]
        r.control("cancel_calibration")  # none is under way: said, and nothing else
        r.control("calibrate")
        next(s for s in states(r) if s["state"] == "collecting" and s["fraction"] > 0.1)
        r.control("cancel_calibration", stream="sim")
        assert wait_state(r, "cancelled")["fraction"] > 0.1

        r.control("calibrate")
        process = calibrator(r)
        wait_state(r, "calculating")
        process.kill()
        assert "exit -9" in wait_state(r, "failed")["stage"]

        r.control("calibrate")
        process = calibrator(r)
        wait_state(r, "calculating")
        assert main(["calibrate", "--cancel", "--port", str(r.config.publish.control_port)]) == 0
        wait_state(r, "cancelled")
        process.wait(60)
        until_gone(r, session)
        told.lives = stream(r)["lives"]
        told.end = stream(r)["samples"]

        r.control("calibrate")
        process = calibrator(r)
        wait_state(r, "calculating")
        psutil.Process(stream(r)["pids"]["live"]).kill()  # the next life clears what this one leaves
        process.resume()
        process.wait(120)
        until_gone(r, session)
        told.summary = r.stop()
    told.log = [json.loads(line) for line in (session / "log.jsonl").read_text().splitlines()]
    told.blind = np.fromfile(session / "sim.blind.bin", BLIND)
    return told


def states_until_done(r: Rehearsal) -> Iterator[dict[str, Any]]:
    for s in states(r):
        yield s
        if s["state"] in ("done", "failed", "cancelled"):
            return


def until_gone(r: Rehearsal, session: Path) -> None:
    until = time.monotonic() + 120
    while leftovers(r, session) and time.monotonic() < until:
        time.sleep(0.1)
    assert leftovers(r, session) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_recalibrating_leaves_no_blind_moment_and_keeps_the_ids(story: SimpleNamespace) -> None:
    first, second, told = story.first, story.second, story.units
    assert {"collecting", "calculating", "done"} <= story.seen
    assert story.fractions[-1] == 1.0 and len(set(story.fractions)) > 5
    swapped = int(told.header["from_sample"])
    same = set(first.unit_ids.tolist()) & set(second.unit_ids.tolist())
    assert max(second.unit_ids) < second.next_unit_id and first.next_unit_id <= second.next_unit_id
    root = [[s.positions_um[s.roots[s.unit_ids == u][0]] for u in same] for s in (first, second)]
    near = np.hypot(*(np.array(root[0]) - np.array(root[1])).T) <= 25  # the root or its neighbour
    # seconds are short: a weak cell may be found on one stretch only, or be taken for another
    assert near.sum() >= 3 and near.sum() >= len(same) - 1
    fresh = set(second.unit_ids.tolist()) - same
    assert all(unit >= first.next_unit_id for unit in fresh)
    assert told.message.arrays["units"]["unit"].tolist() == second.unit_ids.tolist()

    starts = [e["from_sample"] for e in story.log if e["event"] == "calibrated"]
    assert len(starts) == 2 and starts[1] == swapped
    assert any("a calibration is under way" in e["text"] for e in story.log)
    late = story.blind[story.blind["stop"] > starts[0]]
    assert {BLIND_REASONS[row["reason"]] for row in late} <= {"clipped"}
    # the busiest unit that stayed fires on across the swap as it did before
    spikes = spikes_after(story.session, swapped - 60_000)
    spikes = spikes[spikes["sample"] < swapped + 60_000]
    stayed = spikes[np.isin(spikes["unit"], list(same))]
    busiest = stayed["sample"][stayed["unit"] == np.bincount(stayed["unit"]).argmax()]
    before, after = (busiest < swapped).sum(), (busiest >= swapped).sum()
    assert before > 5 and 0.4 < before / after < 2.5
    assert len(np.unique(spikes[["sample", "unit"]])) == len(spikes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_calibration_that_is_cancelled_or_dies_leaves_everything_as_it_was(story: SimpleNamespace) -> None:
    session, units = story.session, story.in_use
    assert (session / "sim.sequences.h5").read_bytes() == story.kept
    assert np.array_equal(np.fromfile(session / "sim.units.bin", UNIT), units)
    assert story.lives == {"acquire": 0, "record": 0, "live": 0}
    assert (story.summary["exit_code"], story.summary["error"]) == (0, "")
    said = [line["text"] for line in story.log]
    n = len(story.second)
    for text in (
        "no calibration is under way", f"calibration cancelled while collecting; the {n} units in use stay",
        f"calibration failed (exit -9): no output; the {n} units in use stay",
        f"calibration cancelled while calculating; the {n} units in use stay",
    ):  # fmt: skip
        assert any(line.endswith(text) for line in said), text
    first = story.summary["streams"]["sim"]["first_sample"]
    spikes = spikes_after(session, first + story.begin)["sample"]
    spikes = spikes[spikes < first + story.end]
    assert np.diff(np.sort(spikes)).max() < 20_000  # never a second of silence
