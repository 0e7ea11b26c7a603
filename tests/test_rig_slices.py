"""Live before offline, as the kernel does it: the slices under a real systemd, with somebody who wants all of the processor, or too much memory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import systemd_box
from systemd_box import Box
from systemd_rig import entered, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(systemd_box.missing()), reason=f"no systemd of our own: {systemd_box.missing()}"),
]
UNITS = Path(__file__).parents[1] / "systemd"
ENOUGH_S = 1.0  # of the processor, to compare


def controller(box: Box, name: str) -> str:
    """Where the box's systemd can use this controller of control groups; skips where it cannot."""
    at = box.run("sh", "-c", f"ls -d /sys/fs/cgroup/{name} /sys/fs/cgroup/{name},* 2>/dev/null || grep -qw {name} /sys/fs/cgroup/cgroup.subtree_control && echo /sys/fs/cgroup", check=False)  # fmt: skip
    if not at.stdout:
        pytest.skip(
            f"the {name} controller is not delegated to us: {box.run('cat', '/proc/self/cgroup').stdout}"
        )
    return at.stdout.split()[0]


def used_s(box: Box, units: Iterable[str]) -> dict[str, float]:
    """Seconds of the processor that each unit's only process has had, all at one time: looked at again when that took long."""
    pids = [box.show(f"{u}.service", "MainPID") for u in units]
    while True:
        told = box.run("cat", *(f"/proc/{pid}/stat" for pid in (*pids, pids[0]))).stdout.splitlines()
        rows = [row.rpartition(")")[2].split() for row in told]
        *used, again = ((int(row[11]) + int(row[12])) / os.sysconf("SC_CLK_TCK") for row in rows)
        if again - used[0] < 0.05:
            return dict(zip(units, used, strict=True))


def test_who_records_has_the_processor_and_who_sorts_ends_first(tmp_path: Path) -> None:
    with entered(tmp_path / "box") as box:
        for name in ("spiked.slice", "spikedjobs.slice"):
            box.run("sh", "-c", f"cat > /etc/systemd/system/{name}", input=(UNITS / name).read_text())
        box.run("systemctl", "daemon-reload")
        on_one_core(box)
        within_its_memory(box)


def on_one_core(box: Box) -> None:
    """The rig, an ordinary service and a job want the same core: 1000 to 100 to 1."""
    controller(box, "cpu")
    slices = {"rig": "spiked.slice", "other": "system.slice", "job": "spikedjobs.slice"}
    for unit, where in slices.items():
        box.run("systemd-run", f"--unit={unit}", f"--slice={where}", "taskset", "-c", "0", "sh", "-c", "while :; do :; done")  # fmt: skip
    before, begun = used_s(box, slices), time.monotonic()
    used = dict.fromkeys(slices, 0.0)
    while (
        used["rig"] < ENOUGH_S and time.monotonic() < begun + 240
    ):  # others want this core too, outside the box
        time.sleep(0.5)
        used = {u: s - before[u] for u, s in used_s(box, slices).items()}
    box.run("systemctl", "stop", *(f"{u}.service" for u in slices))
    print(f"seconds of one core: {used}")
    assert used["rig"] >= ENOUGH_S
    assert 0.04 < used["other"] / used["rig"] < 0.25
    assert used["job"] / used["rig"] < 0.02


def within_its_memory(box: Box) -> None:
    """At most 75 % for jobs; who wants more is ended, and nobody else is."""
    controller(box, "memory")
    total = int(re.search(r"MemTotal:\s+(\d+)", box.run("cat", "/proc/meminfo").stdout)[1]) * 1024  # type: ignore[index]
    box.run("systemctl", "start", "spikedjobs.slice", "spiked.slice")
    assert int(box.show("spikedjobs.slice", "MemoryMax")) == pytest.approx(0.75 * total, rel=0.01)
    box.run(
        "systemctl", "set-property", "--runtime", "spikedjobs.slice", "MemoryMax=100M", "MemoryHigh=infinity"
    )
    greedy = "x=b'1' * 300_000_000; import time; time.sleep(600)"
    for unit, where in (("rig", "spiked.slice"), ("job", "spikedjobs.slice")):
        box.run("systemd-run", f"--unit={unit}", f"--slice={where}", "/usr/bin/python3", "-c", greedy)
    until(lambda: box.show("job.service", "ActiveState") == "failed", 200, box, every_s=0.3)
    assert box.show("job.service", "Result") in ("oom-kill", "signal")
    assert box.show("rig.service", "ActiveState") == "active"
    box.run("systemctl", "stop", "rig.service")
