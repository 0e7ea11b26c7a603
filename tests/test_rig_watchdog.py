"""Daemons that live and do nothing, under a real systemd: killed by WatchdogSec as the unit has it, started again, and what they recorded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import systemd_box
from systemd_box import Box
from systemd_rig import RIG, SPIKED, entered, recording, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(systemd_box.missing()), reason=f"no systemd of our own: {systemd_box.missing()}"),
]
FS_HZ, ELECTRODES, FIRST = 20_000, 16, 100_000
SENT = "/data/sent.raw"
DROP_IN = "/etc/systemd/system/spiked.service.d"
# The ring is so long that a recorder which hangs is not replaced before the watchdog acts: what is left is systemd.
TOML = """
[rig]
name = "rigA"
sessions = "/data/sessions"
[[stream]]
name = "chip0"
source = "maxwell"
electrode_map = "/etc/network.cfg"
silence_s = 10
[ring]
seconds = 60
[live]
enabled = false
[offline]
enabled = false
"""
LOOK = """
import json, sys
import h5py, numpy as np
session, first, sent = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with h5py.File(f"{session}/chip0.nwb") as f:
    x = f["acquisition/ElectricalSeries/data"][:]
    gaps = len(f["intervals/invalid_times/start_time"]) if "intervals/invalid_times" in f else 0
codes = np.memmap(sent, "uint16", "r").reshape(-1, x.shape[1])
state = json.load(open(f"{session}/state.json"))["state"]
print(json.dumps({"samples": len(x), "same": bool(np.array_equal(x, codes[first : first + len(x)])), "gaps": gaps, "state": state}))
"""


def look(box: Box, status: dict[str, Any]) -> dict[str, Any]:
    """What lies in a session's folder, against what the device sent."""
    first = status["streams"]["chip0"]["first_sample"] - FIRST
    return dict(json.loads(box.run(sys.executable, "-c", LOOK, status["folder"], str(first), SENT).stdout))


def killed(box: Box, restarts: int) -> float:
    """Wait until systemd has killed the daemon and another one is ready; the seconds since."""
    began = time.monotonic()
    until(lambda: box.show("spiked.service", "NRestarts") == str(restarts), 300, box)
    until(lambda: box.show("spiked.service", "ActiveState") == "active", 180, box)
    until(lambda: box.journal("spiked.service").count("with result 'watchdog'") >= restarts, 60, box)
    said = box.journal("spiked.service")
    assert said.count("Watchdog timeout (limit 30s)") == restarts, said[-4000:]
    assert said.count("Failed with result 'watchdog'") == restarts, said[-4000:]
    return time.monotonic() - began


def test_a_daemon_that_hangs_is_killed_and_what_it_recorded_is_whole(tmp_path: Path) -> None:
    with entered(tmp_path / "box") as box:
        box.run("systemctl", "log-target", "journal")  # what it says itself, too
        box.run("sh", "-c", f"mkdir -p /data /etc/spiked && cat > {RIG}", input=TOML)
        words = [*SPIKED, "simulate", "--wire", "maxwell", "--electrodes", "4x4", "--columns", "64", "--cycle", "--duration-s", "1200", "--map", "/etc/network.cfg", "--sent", SENT, "--wait-s", "300"]  # fmt: skip
        with (tmp_path / "simulate.log").open("wb") as log:
            simulator = subprocess.Popen(box.enter(*words), stdout=log, stderr=log, cwd="/")
        try:
            until(lambda: box.run("test", "-s", "/etc/network.cfg", check=False).returncode == 0, 60, box)
            box.run("chmod", "644", "/etc/network.cfg", RIG)
            # nothing here runs the kernels, which take minutes to compile
            box.run(
                "sh",
                "-c",
                f"mkdir -p {DROP_IN} && cat > {DROP_IN}/warm.conf",
                input="[Service]\nExecStartPre=\n",
            )
            box.run(*SPIKED, "install-service", "--start")
            first = a_supervisor_that_hangs(box)
            second = a_recorder_that_hangs(box, first)
            assert recording(box, FS_HZ)["session"] not in (first["session"], second["session"])
            box.run("systemctl", "stop", "spiked.service")
            assert box.show("spiked.service", "Result") == "success"
            assert box.run("sh", "-c", "ls /dev/shm | grep ring", check=False).stdout == ""
        finally:
            simulator.terminate()
            simulator.wait(20)


@contextmanager
def held(box: Box, pid: str) -> Iterator[None]:
    """Stopped, and again whenever systemd wakes it, which it does after every SIGTERM: as deaf as a deadlock."""
    hold = f"import os, time\nwhile True: os.kill({pid}, 19); time.sleep(0.005)"
    with subprocess.Popen(
        box.enter(sys.executable, "-c", hold), stderr=subprocess.DEVNULL, cwd="/"
    ) as holding:
        yield
        holding.kill()


def a_supervisor_that_hangs(box: Box) -> dict[str, Any]:
    """Acquire and record go on without it. It does not end when told to, so it is killed; its successor recovers the session."""
    status = recording(box, 2 * FS_HZ)
    with held(box, box.show("spiked.service", "MainPID")):
        seconds = killed(box, 1)
    found = look(box, status)
    print(f"a supervisor that hangs: another one runs after {seconds:.0f} s; {found}")
    assert found["same"] and found["gaps"] == 0 and found["state"] == "queued"  # recovered
    # fed for the last time a second before, at most; 30 s later everybody was told to end
    assert found["samples"] > status["streams"]["chip0"]["samples"] + 27 * FS_HZ
    return status


def a_recorder_that_hangs(box: Box, before: dict[str, Any]) -> dict[str, Any]:
    """The daemon lives, but nothing reaches the disk: no food for the watchdog. Told to end, and the recorder awake, all of it is saved."""
    until(lambda: recording(box, 2 * FS_HZ)["session"] != before["session"], 90, box)
    status = recording(box, 2 * FS_HZ)
    box.run("kill", "-STOP", str(status["streams"]["chip0"]["pids"]["record"]))
    seconds = killed(box, 2)
    found = look(box, status)
    print(f"a recorder that hangs: another daemon runs after {seconds:.0f} s; {found}")
    assert found["same"] and found["gaps"] == 0 and found["state"] == "done"
    assert found["samples"] > status["streams"]["chip0"]["samples"] + 27 * FS_HZ
    return status
