"""The terminal monitor, the light imports, and the public names."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from client_rig import HOST, Ports, Talker, blind, spikes

import spiked_client
from spiked_client.errors import DaemonAbsent
from spiked_client.order import Batch, Missed
from spiked_client.protocol import GAP, Message
from spiked_client.watch import Monitor, blind_samples, watch

STATUS = {"state": "recording", "streams": {"A": {"samples": 60_000, "fs_hz": 20_000.0, "channels": 4}}}


def batch(
    topic: str,
    seq: int,
    at_s: float,
    header: dict | None = None,
    missed: Missed | None = None,
    **arrays: np.ndarray,
) -> Batch:
    return Batch(Message(topic, {"seq": seq, "run": "r", **(header or {})}, arrays), int(at_s * 1e9), missed)


def fed() -> Monitor:
    """Five seconds of one stream: unit 3 at 10 Hz, unit 5 at 2 Hz, one of four channels blind."""
    m = Monitor(top=1)
    m.add(batch("health", 1, 100.0, STATUS))
    for i in range(50):
        at = 100.0 + i * 0.1
        published = int(at * 1e9) - 100_000
        stamps = {"arrival": published - 2_000_000, "published": published}
        header = {"first": 2000 * i, "stop": 2000 * i + 2000, "stamps": stamps, "deadline_missed": i == 7}
        found = np.concatenate(
            [spikes(2000 * i, unit=3), spikes(*([2000 * i] if i % 5 == 0 else []), unit=5)]
        )
        lost = Missed("spikes.A", 20, 24, "gone") if i == 30 else None
        m.add(
            batch(
                "spikes.A",
                i + 1,
                at,
                header,
                lost,
                spikes=found,
                blind=blind((2000 * i, 2000 * i + 2000), channel=2),
            )
        )
    m.add(batch("gaps.A", 1, 104.0, gaps=np.array([(10, 25, 4, 0), (50, 55, 4, 0)], GAP)))
    m.add(batch("mua.A", 1, 104.5, spikes=spikes(*range(100), unit=-1)))
    m.add(batch("session", 1, 104.6, {"event": "calibrated", "text": "57 units"}))
    return m


def test_one_line_holds_the_figures_of_a_stream() -> None:
    m = fed()
    (line,) = m.lines(int(105.0 * 1e9), bars=False)
    assert line == (
        "A: recording 3.0 s | 2 units 12.0 Hz, mua 20.0 Hz | latency 2.0/2.0 ms +0.1 | late 1/50 | "
        "blind 25.0 % | gaps 2 (20 samples) | messages lost 5 replayed 0 restarts 0"
    )
    screen = m.lines(int(105.0 * 1e9), bars=True)
    assert not any("jobs" in line for line in screen)
    assert screen[1] == "  unit     3    10.00 Hz " + "#" * 30 and len(screen) == 4  # the most active only
    assert screen[2] == "last event: calibrated text=57 units"
    later = m.lines(int(120.0 * 1e9), bars=False)
    assert "0 units 0.0 Hz" in later[0] and "latency -" in later[0] and later[1] == "nothing heard for 15 s"


def test_a_calibration_under_way_is_in_the_line_and_not_in_the_events() -> None:
    m = fed()
    for told, end in (
        ({"state": "collecting", "fraction": 0.406}, " | calibration collecting 41 %"),
        ({"state": "calculating", "fraction": 0.0}, " | calibration calculating 0 %"),
        ({"state": "failed", "fraction": 1.0}, " | calibration failed"),
        ({"state": "done", "fraction": 1.0}, " restarts 0"), ({"state": 5}, " restarts 0"), ("odd", " restarts 0"),
    ):  # fmt: skip
        stream = {**STATUS["streams"]["A"], "calibration": told}
        m.add(batch("health", 2, 104.9, {**STATUS, "streams": {"A": stream}}))
        m.add(batch("session", 2, 104.9, {"event": "calibration", "stage": "merging 20 clusters"}))
        line, *rest = m.lines(int(105.0 * 1e9), bars=True)
        assert line.endswith(end) and "last event: calibrated text=57 units" in rest


def test_jobs_and_alarms_are_on_the_screen() -> None:
    m = fed()
    now = [{"job": 4, "session": "s1", "stage": "sort", "overall": 0.41, "text": "batch 7"}]
    alarm = {"figure": "gaps", "stream": "A", "level": "bad", "value": 12.0, "todo": "Look at cables"}
    m.add(
        batch(
            "health",
            2,
            104.9,
            {**STATUS, "jobs": {"queued": 2, "running": 1, "done": 0, "now": now}, "alarms": [alarm]},
        )
    )
    m.add(
        batch(
            "session",
            2,
            104.9,
            {"event": "job", "state": "failed", "text": "the disk is full; free space", "folder": "/s"},
        )
    )
    screen = m.lines(int(105.0 * 1e9), bars=True)
    for line in (
        "jobs: 2 queued, 1 running",
        "  s1: sort 41 % batch 7",
        "bad: gaps A 12.0; Look at cables",
        "last event: job state=failed text=the disk is full; free space",
    ):
        assert line in screen, screen


def test_blind_intervals_count_once() -> None:
    whole = blind((0, 100), (50, 120), (60, 70))
    assert blind_samples(whole, 4) == 120
    assert blind_samples(np.concatenate([whole, blind((0, 40), channel=1)]), 4) == 130
    assert blind_samples(blind(), 0) == 0


def test_fields_that_are_missing_or_odd_do_not_stop_the_monitor() -> None:
    m = Monitor()
    for header in (
        {},
        {"streams": 5, "state": None},
        {"streams": {"A": {"channels": "x", "fs_hz": 0, "samples": 5}}},
    ):
        m.add(batch("health", 1, 1.0, header))
        m.add(batch("spikes.A", 1, 1.0, {"stamps": 7, "first": "a"}))
        m.add(batch("stim.A", 1, 1.0))
        m.add(batch("session", 1, 1.0))
        assert m.lines(int(1.5e9), bars=True)[0].startswith("A: ")


def test_watching_a_live_daemon_writes_a_line_a_second() -> None:
    for _ in range(10):  # again where the computer was too busy to write, or to talk, on time
        out = io.StringIO()
        with Ports("A") as ports, Talker(ports.streams["A"], "spikes.A", 0.01):
            start = time.monotonic()
            watch(ports.port, 2.0, out, host=HOST, wait_s=60.0)
            took = time.monotonic() - start
        lines = out.getvalue().splitlines()
        found = re.fullmatch(
            r"\d\d:\d\d:\d\d A: .*1 units ([\d.]+) Hz,.*latency ([\d.]+)/.*lost 0 replayed 0.*", lines[-1]
        )
        if took < 4 and len(lines) == 2 and found and 20 < float(found[1]) <= 110 and float(found[2]) < 5:
            break
    assert 1.9 < took < 4 and len(lines) == 2 and found
    assert 20 < float(found[1]) <= 110 and float(found[2]) < 5


def test_the_command_line_watches_and_tells_an_absent_daemon_in_one_line() -> None:
    command = [sys.executable, "-m", "spiked_client.watch", "--seconds", "1", "--port"]
    with Ports("A") as ports, Talker(ports.streams["A"], "spikes.A", 0.01):
        for _ in range(10):  # again where the computer was too busy to hear the stream within that second
            done = subprocess.run(
                [*command, str(ports.port)], capture_output=True, text=True, timeout=250, check=False
            )
            assert (done.returncode, done.stderr) == (0, "")
            if " A: " in done.stdout:
                break
    assert " A: " in done.stdout
    with pytest.raises(DaemonAbsent, match="start it with `spiked run`"):
        watch(ports.port, 1.0, io.StringIO(), wait_s=0.2)


def test_public_names_load_and_nothing_heavy_comes_with_them() -> None:
    for name in spiked_client.__all__:
        assert getattr(spiked_client, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Daemon'"):
        spiked_client.Daemon  # noqa: B018
    code = (
        "import sys, spiked_client, spiked_client.subscribe, spiked_client.control, spiked_client.watch\n"
        "from spiked_client import *\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=True
    ).stdout.split()
    assert not {"torch", "h5py", "scipy", "spiked", "spiked_models", "pydantic", "pynwb", "numba"} & set(
        loaded
    )
    assert {"numpy", "zmq", "msgpack", "spiked_client"} <= set(loaded)
