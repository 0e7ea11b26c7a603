"""Whole sessions with the real programs: simulator, daemon, its processes, a client."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from session_rig import recorded, rehearsal

from spiked.errors import SpikedError
from spiked.rehearsal import Rehearsal
from spiked.sort.sequences import Sequences
from spiked_client.protocol import SPIKE
from spiked_client.subscribe import SyncClient


def wait_samples(r: Rehearsal, n: int, timeout_s: float = 120.0) -> dict[str, Any]:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        status = r.status()
        if status["streams"]["sim"]["samples"] >= n:
            return status
        time.sleep(0.05)
    raise AssertionError(f"{n} samples did not arrive within {timeout_s} s")


def kill(r: Rehearsal, role: str) -> None:
    """kill -9 one process and wait until its successor runs."""
    old = r.status()["streams"]["sim"]["pids"][role]
    os.kill(old, signal.SIGKILL)
    until = time.monotonic() + 90
    while time.monotonic() < until:
        if r.status()["streams"]["sim"]["pids"].get(role, old) != old:
            return
        time.sleep(0.05)
    raise AssertionError(f"{role} did not come back")


def wait_live(r: Rehearsal, samples: int = 1, timeout_s: float = 120.0) -> None:
    """Until the live path has decided so many samples."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        live = r.status()["streams"]["sim"]["processes"].get("live", {})
        if live.get("samples", 0) >= samples:
            return
        time.sleep(0.1)
    raise AssertionError(f"the live path did not reach {samples} samples within {timeout_s} s")


def sent_codes(folder: Path, channels: int, dtype: str = "uint16") -> np.ndarray:
    return np.fromfile(folder / "sent.raw", dtype).reshape(-1, channels)


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["maxwell", "openephys"])
def test_file_equals_what_was_sent(tmp_path: Path, wire: str) -> None:
    with rehearsal(tmp_path, wire, "4x4" if wire == "maxwell" else "16", 5.0) as r:
        sent = r.wait_simulator(150)
        assert r.wait_received(sent["samples"])
        summary = r.stop()
    assert (summary["exit_code"], summary["state"], summary["error"]) == (0, "done", "")
    assert summary["streams"]["sim"]["gaps"] == 0
    data, gaps = recorded(Path(summary["folder"]))
    assert gaps == []
    expected = sent_codes(tmp_path, 16, "uint16" if wire == "maxwell" else "int16")
    assert np.array_equal(data, expected)


@pytest.mark.slow
def test_losses_are_told_the_same_everywhere(tmp_path: Path) -> None:
    drops = [(40_000, 41_234), (60_000, 60_001), (300_000, 300_020)]
    simulate = tuple(x for a, b in drops for x in ("--drop", f"{a}:{b}"))
    told: list[tuple[int, int]] = []
    with rehearsal(
        tmp_path, seconds=900.0, simulate=(*simulate, "--garbage-every", "5000"), live={"enabled": True}
    ) as r:
        r.wait_state(("recording",), 120)
        until = time.monotonic() + 200
        with SyncClient(control_port=r.config.publish.control_port) as client:
            gaps = client.messages("gaps", from_start=True)
            while len(told) < len(drops) and time.monotonic() < until:
                if (batch := gaps.get(0.5)) is not None:
                    told += [(int(g["start"]), int(g["stop"])) for g in batch.message.arrays["gaps"]]
        sent = r.stop_simulator(150)
        assert r.wait_received(sent["samples"])
        summary = r.stop()
    first = sent["first_sample"]
    expected = [(first + a, first + b) for a, b in drops]
    assert [(g["start"], g["stop"]) for g in summary["gap_list"]["sim"]] == expected
    assert told == expected
    data, in_file = recorded(Path(summary["folder"]))
    assert in_file == drops
    codes = sent_codes(tmp_path, 16)
    for a, b in drops:
        codes[a:b] = 0
    assert np.array_equal(data, codes)
    counters = summary["streams"]["sim"]["processes"]["acquire"]["counters"]
    assert counters["malformed"] == sent["garbage"] > 0 and counters["gap_samples"] == 1255


@pytest.mark.slow
def test_ttl_edges_and_marks_are_in_the_file_at_their_samples(tmp_path: Path) -> None:
    r = rehearsal(tmp_path, "openephys", "16", 6.0, ("--ttl-hz", "5"))
    stream = r.config.stream[0].model_copy(update={"stim_lines": (0,)})
    r.config = r.config.model_copy(update={"stream": (stream,)})
    with r:
        r.wait_state(("recording",), 120)
        wait_samples(r, 30_000)
        r.control("mark_stim", sample=123_456, text="by hand", line=7)
        sent = r.wait_simulator(150)
        assert r.wait_received(sent["samples"])
        summary = r.stop()
    first = sent["first_sample"]
    with h5py.File(Path(summary["folder"]) / "sim.nwb", "r") as f:
        table = f["acquisition/events"]
        rows = sorted(zip(*(table[k][:].tolist() for k in ("sample", "line", "state", "kind")), strict=True))
        times = dict(zip(table["sample"][:].tolist(), table["timestamp"][:].tolist(), strict=True))
    edges = [(sample, state) for sample, line, state, kind in rows if line == 0]
    assert edges == [(first + k * 3000, k % 2) for k in range(1, sent["ttl_edges"] + 1)]
    assert {kind for _, line, _, kind in rows if line == 0} <= {"stim", b"stim", 2}
    assert [sample for sample, line, _, _ in rows if line == 7] == [123_456]
    assert times[first + 3000] == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_record_live_acquire_one_after_the_other(tmp_path: Path) -> None:
    live = {"enabled": True, "calibrate_s": 4.0}
    # a busy computer starts a live path late: its samples are still there
    with rehearsal(tmp_path, seconds=900.0, live=live, ring={"seconds": 60.0}) as r:
        r.wait_state(("recording",), 120)
        wait_samples(r, 60_000)
        wait_live(r)
        kill(r, "record")
        r.control("mark_stim", line=5)
        with SyncClient(control_port=r.config.publish.control_port) as client:
            mark = client.messages("stim", from_start=True).get(60.0)
        assert mark is not None and mark.message.arrays["stims"]["line"].tolist() == [5]
        # the live path that dies now is past the mark that it told: it is told no more
        begun = r.status()["streams"]["sim"]["first_sample"]
        wait_live(r, int(mark.message.arrays["stims"]["sample"][0]) + 1 - begun)
        n = wait_samples(r, 120_000)["streams"]["sim"]["samples"]
        kill(r, "live")
        wait_live(r, n + 40_000)
        status = r.status()["streams"]["sim"]
        assert status["gaps"] == 0
        with SyncClient(control_port=r.config.publish.control_port) as client:
            told = client.messages("stim", from_start=True)
            assert told.get(1.0) is None  # connected, and nothing new
            r.control("mark_stim", line=6)
            batch = told.get(60.0)
        assert batch is not None and batch.message.arrays["stims"]["line"].tolist() == [6]  # not 5 again
        kill(r, "acquire")
        wait_samples(r, status["samples"] + 60_000)
        assert r.simulator is not None
        r.simulator.send_signal(signal.SIGTERM)
        sent = r.wait_simulator(150)
        assert r.wait_received(sent["samples"])
        summary = r.stop()
    assert (summary["exit_code"], summary["state"], summary["error"]) == (0, "done", "")
    gaps = summary["gap_list"]["sim"]
    assert len(gaps) == 1 and gaps[0]["reason"] == "restart"
    session, first = Path(summary["folder"]), sent["first_sample"]
    data, in_file = recorded(session)
    a, b = gaps[0]["start"] - first, gaps[0]["stop"] - first
    assert in_file == [(a, b)]
    codes = sent_codes(tmp_path, 16)
    codes[a:b] = 0
    assert np.array_equal(data, codes)
    events = [json.loads(line) for line in (session / "log.jsonl").read_text().splitlines()]
    assert [e["role"] for e in events if e["event"] == "restart"] == ["record", "live", "acquire"]
    spikes = np.fromfile(session / "sim.spikes.bin", SPIKE)
    assert len(spikes) > 50
    pairs = spikes[["sample", "unit", "channel"]]
    assert len(np.unique(pairs)) == len(pairs)  # nothing was reported twice
    # the restarted live path missed nothing that it had not reported: detections on both sides of its death
    died = first + n
    near = spikes["sample"][(spikes["sample"] > died - 20_000) & (spikes["sample"] < died + 40_000)]
    assert np.diff(np.sort(near)).max() < 8_000
    assert summary["streams"]["sim"]["processes"]["live"]["counters"]["skipped_samples"] == 0


def wait_calibrations(r: Rehearsal, n: int, timeout_s: float = 240.0) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        live = r.status()["streams"]["sim"]["processes"].get("live", {})
        if live.get("counters", {}).get("calibrations", 0) >= n:
            return
        time.sleep(0.2)
    raise AssertionError(f"calibration {n} did not finish within {timeout_s} s")


def cells(spikes: np.ndarray, true: np.ndarray, cell: np.ndarray) -> dict[int, int]:
    """Which cell each unit's spikes are of: the one that at least 80 % of them lie within 0.5 ms of.

    `true` and `cell` are the known spikes in time order; a unit with fewer than 10 spikes is not judged.
    """
    out = {}
    for unit in np.unique(spikes["unit"][spikes["unit"] >= 0]):
        at = spikes["sample"][spikes["unit"] == unit]
        hit = []
        for c in range(cell.max() + 1):
            known = true[cell == c]
            k = np.clip(np.searchsorted(known, at), 1, len(known) - 1)
            hit.append((np.minimum(abs(known[k] - at), abs(known[k - 1] - at)) <= 10).mean())
        if len(at) >= 10:
            assert max(hit) >= 0.8, f"unit {unit} is of no cell"
            out[int(unit)] = int(np.argmax(hit))
    return out


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_units_keep_their_ids_over_recalibration_and_into_the_next_session(tmp_path: Path) -> None:
    live = {"enabled": True, "calibrate_s": 25}
    truth = tmp_path / "truth.npz"
    simulate = ("--truth", str(truth))
    with rehearsal(tmp_path / "one", seconds=900.0, live=live, simulate=simulate) as r:
        r.wait_state(("recording",), 120)
        wait_calibrations(r, 1)
        session = Path(r.status()["folder"])
        first = Sequences.load(session / "sim.sequences.h5")
        r.control("calibrate")
        wait_calibrations(r, 2)
        wait_samples(r, r.status()["streams"]["sim"]["samples"] + 300_000)
        summary = r.stop()
        sent = r.stop_simulator(150)
    assert summary["exit_code"] == 0
    second = Sequences.load(session / "sim.sequences.h5")
    same = set(first.unit_ids.tolist()) & set(second.unit_ids.tolist())
    assert (first.id_confidence == 0).all()
    assert set(second.unit_ids[second.id_confidence > 0].tolist()) == same

    log = [json.loads(line) for line in (session / "log.jsonl").read_text().splitlines()]
    _, swapped = (e["from_sample"] for e in log if e["event"] == "calibrated")
    spikes = np.fromfile(session / "sim.spikes.bin", SPIKE)
    with np.load(truth) as z:
        known = z["samples"] + sent["first_sample"], z["units"]
    before, after = (
        cells(part, *known)
        for part in (spikes[spikes["sample"] < swapped], spikes[spikes["sample"] >= swapped])
    )
    # an id never goes to another cell, and a cell that is found again keeps one of its ids
    assert all(before[unit] == after[unit] for unit in same & set(before) & set(after))
    again = set(before.values()) & set(after.values())
    assert len(again) >= 3
    assert all(any(c == cell and unit in same for unit, c in before.items()) for cell in again)
    with h5py.File(session / "sim.nwb", "r") as f:
        assert set(f["units/id"][:].tolist()) <= set(first.unit_ids.tolist()) | set(second.unit_ids.tolist())

    known = {"enabled": True, "sequences": str(session / "sim.sequences.h5")}
    with rehearsal(tmp_path / "two", seconds=8.0, live=known) as r:
        sent = r.wait_simulator(150)
        assert r.wait_received(sent["samples"])
        summary = r.stop()
    folder = Path(summary["folder"])
    spikes = np.fromfile(folder / "sim.spikes.bin", SPIKE)
    early = spikes[(spikes["unit"] >= 0) & (spikes["sample"] < sent["first_sample"] + 40_000)]
    assert len(early) > 5 and set(early["unit"].tolist()) <= set(second.unit_ids.tolist())


@pytest.mark.slow
def test_sigterm_closes_the_session(tmp_path: Path) -> None:
    with rehearsal(tmp_path, seconds=300.0) as r:
        r.wait_state(("recording",), 120)
        wait_samples(r, 40_000)
        assert r.daemon is not None
        r.daemon.send_signal(signal.SIGTERM)
        summary = r.wait_daemon(200)
    assert summary["exit_code"] == 0 and summary["state"] == "done"
    data, _ = recorded(Path(summary["folder"]))
    n = len(data)
    assert n >= 40_000 and np.array_equal(data, sent_codes(tmp_path, 16)[:n])


@pytest.mark.slow
def test_killed_supervisor_leaves_a_file_that_the_next_start_finalizes(tmp_path: Path) -> None:
    runtime = tmp_path / "run"  # its own: any daemon that starts in the usual one clears what nobody owns
    runtime.mkdir()
    with rehearsal(tmp_path, seconds=300.0, rig={"runtime": str(runtime)}) as r:
        status = wait_samples_after_start(r)
        assert r.daemon is not None
        r.daemon.kill()
        r.daemon.wait()
        pids = status["streams"]["sim"]["pids"].values()
        until = time.monotonic() + 120
        while time.monotonic() < until and any(Path(f"/proc/{p}").exists() for p in pids):
            time.sleep(0.1)
        assert not any(Path(f"/proc/{p}").exists() for p in pids)
    folder = Path(status["folder"])
    data, _ = recorded(folder)
    assert len(data) >= 40_000 and np.array_equal(data, sent_codes(tmp_path, 16)[: len(data)])
    # the next start of a daemon with this configuration sees to the session and removes the ring
    left = list(runtime.glob(f"spiked-*-{folder.name}-sim.ring"))
    assert len(left) == 1
    again = Rehearsal(tmp_path / "again", None, r.config.model_dump(mode="json"))
    with again:
        again.wait_state(("starting",), 150)
    assert not left[0].exists()
    assert json.loads((folder / "state.json").read_text())["state"] == "queued"


def wait_samples_after_start(r: Rehearsal) -> dict[str, Any]:
    r.wait_state(("recording",), 120)
    return wait_samples(r, 40_000)


@pytest.mark.slow
def test_stream_that_stops_ends_the_session_with_one_line(tmp_path: Path) -> None:
    r = rehearsal(tmp_path, seconds=2.0)
    r.config = r.config.model_copy(
        update={"stream": (r.config.stream[0].model_copy(update={"silence_s": 10.0}),)}
    )
    with r:
        r.wait_simulator(150)
        # nobody stops the session: the silence does
        r2 = r.wait_daemon(200)
    assert r2["exit_code"] == 3
    assert "no samples for" in r2["error"] and "start a new session" in r2["error"]
    data, _ = recorded(Path(r2["folder"]))
    assert np.array_equal(data, sent_codes(tmp_path, 16))


def test_stream_that_never_comes_is_one_line(tmp_path: Path) -> None:
    r = rehearsal(tmp_path)
    r.simulate = None
    stream = r.config.stream[0].model_copy(update={"wait_s": 0.5})
    r.config = r.config.model_copy(update={"stream": (stream,)})
    with r:
        assert r.daemon is not None
        summary = r.wait_daemon(200)
    assert summary["exit_code"] == 3 and summary["state"] == "failed"
    assert "\n" not in summary["error"] and "within 0.5 s" in summary["error"]


def test_port_taken_is_one_line(tmp_path: Path) -> None:
    r = rehearsal(tmp_path)
    r.simulate = None
    with r:
        r.wait_state(("starting",), 150)
        again = Rehearsal(tmp_path / "again", None, r.config.model_dump(mode="json"))
        with again:
            assert again.daemon is not None
            assert again.daemon.wait(200) == 2
            last = (tmp_path / "again" / "run.log").read_text().strip().splitlines()[-1]
            assert "cannot listen on" in last
            with pytest.raises(SpikedError, match="ended with exit 2"):
                again.status()
