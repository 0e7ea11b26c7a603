"""The units under a real systemd: a rig from nothing to a sorted session, and what happens when the daemon dies.

Skipped, with the reason, where there can be no box (see systemd_box).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import systemd_box
from systemd_box import Box
from systemd_rig import RIG, SPIKED, entered, recording, until

from spiked.rig import warm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(systemd_box.missing()), reason=f"no systemd of our own: {systemd_box.missing()}"),
]
CACHE = "/var/cache/spiked/numba"
LIGHT = """
[live]
enabled = false
[offline]
device = "cpu"
curate = false
library = false
"""


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with entered(tmp_path / "box") as found:
        yield found


def test_from_nothing_to_a_sorted_session(box: Box, tmp_path: Path) -> None:
    log = (tmp_path / "simulate.log").open("wb")
    words = [*SPIKED, "simulate", "--wire", "maxwell", "--electrodes", "4x4", "--duration-s", "600", "--map", "/etc/network.cfg", "--wait-s", "300"]  # fmt: skip
    simulator = subprocess.Popen(box.enter(*words), stdout=log, stderr=log, cwd="/")
    try:
        box_to_the_end(box)
    finally:
        simulator.terminate()
        simulator.wait(20)
        log.close()


def box_to_the_end(box: Box) -> None:
    until(lambda: box.run("test", "-s", "/etc/network.cfg", check=False).returncode == 0, 180, box)
    box.run("chmod", "644", "/etc/network.cfg")
    init = ["init", RIG, "--source", "maxwell", "--name", "rigA", "--sessions", "/data/sessions", "--electrode-map", "/etc/network.cfg", "--yes"]  # fmt: skip
    box.run(*SPIKED, *init)
    text = box.run("cat", RIG).stdout
    text = re.sub(r"(?ms)^\[live\]\n.*?(?=^# .*\n\[stim\])", "", text)
    text = re.sub(r"(?ms)^\[offline\]\n.*", "", text)
    box.run("sh", "-c", f"cat > {RIG}", input=text + LIGHT)

    told = json.loads(box.run(*SPIKED, "doctor", RIG, "--json", "--quick").stdout)
    assert told["ok"], told
    assert {"config", "probe", "ports", "peers", "space", "shm"} <= {f["check"] for f in told["findings"] if f["level"] != "fail"}  # fmt: skip

    # as if an earlier start had compiled the kernels, which takes minutes; nothing here runs them
    box.run("sh", "-c", f"mkdir -p {CACHE} && cat > {CACHE}/{warm.STAMP}", input=warm.fingerprint())
    said = box.run(*SPIKED, "install-service", "--start").stdout
    assert "spiked.service runs" in said and "failed" not in said
    sandboxed(box)
    box.run("chmod", "600", "/etc/network.cfg")
    told = box.run(*SPIKED, "doctor", RIG, "--quick", "--only", "service", check=False)
    assert told.returncode == 1 and "the user spiked cannot read /etc/network.cfg" in told.stdout
    box.run("chmod", "644", "/etc/network.cfg")
    first = recording(box, 60_000)
    assert box.show("spiked.service", "StatusText").startswith("recording ")

    killed_and_back(box, first)
    second = recording(box, 100_000)
    assert second["session"] != first["session"]

    box.run("systemctl", "stop", "spiked.service")
    assert box.show("spiked.service", "Result") == "success"
    assert box.show("spiked.service", "ExecMainStatus") == "0"
    assert box.run("sh", "-c", "ls /dev/shm | grep ring", check=False).stdout == ""
    sorted_after(box, second["folder"])
    removed(box, second["folder"])


def sandboxed(box: Box) -> None:
    """What systemd runs is what the files say: user, slices, rights."""
    assert (
        box.show("spiked.service", "ActiveState")
        == box.show("spiked-jobs.service", "ActiveState")
        == "active"
    )
    assert box.show("spiked.service", "Slice") == "spiked.slice"
    assert box.show("spiked-jobs.service", "Slice") == "spikedjobs.slice"
    pid = box.show("spiked.service", "MainPID")
    about = box.run("cat", f"/proc/{pid}/status").stdout
    owner = box.run("id", "-u", "spiked").stdout.strip()
    assert f"Uid:\t{owner}\t" in about and "NoNewPrivs:\t1" in about and "CapBnd:\t0000000000000000" in about
    assert "Seccomp:\t2" in about
    nice = box.run("ps", "-o", "ni=,cls=", "-p", box.show("spiked-jobs.service", "MainPID")).stdout.split()
    assert nice[-1] == "B"  # batch


def killed_and_back(box: Box, first: dict[str, Any]) -> None:
    """kill -9 of the supervisor: acquire and record finish by themselves, systemd starts it again, it recovers and records."""
    nwb = f"{first['folder']}/chip0.nwb"
    written = int(box.run("stat", "-c", "%s", nwb).stdout)
    box.run("kill", "-9", box.show("spiked.service", "MainPID"))
    until(lambda: box.show("spiked.service", "NRestarts") == "1", 180, box)
    until(lambda: box.show("spiked.service", "ActiveState") == "active", 180, box)
    state = json.loads(box.run("cat", f"{first['folder']}/state.json").stdout)["state"]
    assert state in ("queued", "offline", "done")
    assert int(box.run("stat", "-c", "%s", nwb).stdout) >= written
    words = ["journalctl", "--no-pager", "-o", "cat", "-u", "spiked", "SPIKED_EVENT=recover"]
    until(
        lambda: "recovered" in box.run(*words, check=False).stdout, 60, box
    )  # with the journal's own fields
    box.run(*SPIKED, "jobs", "cancel", "1", "--folder", RIG)  # one sorted session is enough


def sorted_after(box: Box, folder: str) -> None:
    """The daemon is gone; its session is sorted by the service beside it, as the service user, readable for its group alone."""

    def over() -> bool:
        done = box.run(*SPIKED, "jobs", "--folder", RIG, "--json", check=False)
        jobs = json.loads(done.stdout) if done.returncode == 0 else []
        assert not [j for j in jobs if j["state"] == "failed"], jobs
        return sorted(j["state"] for j in jobs) == ["cancelled", "done"]

    until(over, 900, box, every_s=5.0)
    modes = box.run(
        "find", "/data/sessions", "-ignore_readdir_race", "-printf", "%M %u %p\n"
    ).stdout.splitlines()
    assert [row for row in modes if row.split()[0][7:] != "---" or row.split()[1] != "spiked"] == []
    assert box.run("test", "-s", f"{folder}/report.html").returncode == 0


def removed(box: Box, folder: str) -> None:
    box.run(*SPIKED, "install-service", "--uninstall")
    assert box.run("systemctl", "cat", "spiked.service", check=False).returncode != 0
    assert box.show("spiked-jobs.service", "LoadState") == "not-found"
    assert box.run("test", "-s", f"{folder}/chip0.nwb").returncode == 0
    assert box.run("test", "-s", RIG).returncode == 0


def test_box_leaves_nothing(tmp_path: Path) -> None:
    """The box is ours alone: nothing of it is left on this computer."""
    try:
        with Box(tmp_path / "box") as box:
            box.run("touch", "/etc/only-in-the-box")
    except (OSError, RuntimeError) as e:
        pytest.skip(f"no systemd of our own: {e}")
    assert not Path("/etc/only-in-the-box").exists()
    assert not Path(f"/proc/{box.pid}").exists()
    assert not [group for group in box._groups if group.exists()]
