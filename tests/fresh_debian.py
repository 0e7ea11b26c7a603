"""What tests/fresh_debian.sh does in the fresh system: `fresh_debian.py ROOT`. Prints each step and its seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from systemd_box import Box

RIG = "/etc/spiked/rig.toml"
SIMULATE = ("spiked", "simulate", "--wire", "maxwell", "--electrodes", "4x4", "--cycle", "--duration-s", "1800", "--map", "/etc/network.cfg", "--wait-s", "900")  # fmt: skip


def step(box: Box, *words: str) -> str:
    began = time.monotonic()
    done = box.run(*words, timeout_s=900)
    print(f"$ {' '.join(words)}  ({time.monotonic() - began:.1f} s)\n{done.stdout.rstrip()}", flush=True)
    return done.stdout


def units(box: Box) -> int:
    """Live units, 0 while there are none."""
    done = box.run("spiked", "status", check=False)
    status = json.loads(done.stdout) if done.returncode == 0 else {}
    live = status.get("streams", {}).get("chip0", {}).get("processes", {}).get("live") or {}
    return int(live.get("units") or 0)


def job(box: Box) -> str:
    """The state of the only job."""
    (row,) = json.loads(box.run("spiked", "jobs", "--folder", RIG, "--json").stdout)
    return str(row["state"])


def wait(what: str, seconds: float, done: object) -> None:
    until = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < until, f"no {what} within {seconds} s"
        time.sleep(3)


def main(root: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch, Box(Path(scratch), root) as box:
        step(
            box,
            "sh",
            "-c",
            ". /etc/os-release; echo $PRETTY_NAME; systemctl --version | head -1; python3 --version",
        )
        with subprocess.Popen(box.enter(*SIMULATE), cwd="/", stdout=subprocess.DEVNULL) as simulator:
            try:
                wait(
                    "map", 60, lambda: box.run("test", "-s", "/etc/network.cfg", check=False).returncode == 0
                )
                step(box, "spiked", "init", RIG, "--source", "maxwell", "--name", "rigA", "--sessions", "/data/sessions", "--electrode-map", "/etc/network.cfg", "--yes")  # fmt: skip
                box.run("sh", "-c", f"chmod 644 /etc/network.cfg; sed -i 's/^# calibrate_s = [0-9.]*/calibrate_s = 15.0/' {RIG}")  # fmt: skip
                step(box, "spiked", "doctor", RIG)
                step(box, "spiked", "install-service", "--start")
                wait("live units", 300, lambda: units(box))
                step(box, "systemctl", "status", "spiked", "--no-pager")
                print(f"{units(box)} live units", flush=True)
                step(box, "systemctl", "stop", "spiked")
                assert (
                    box.show("spiked", "Result") == "success" and box.show("spiked", "ExecMainStatus") == "0"
                )
                wait("sorted session", 900, lambda: job(box) in ("done", "failed"))
                step(box, "spiked", "jobs", "--folder", RIG)
                assert job(box) == "done"
                step(box, "sh", "-c", "ls -l /data/sessions/*_rigA")
                step(box, "spiked", "doctor", RIG, "--quick", "--only", "service", "--only", "kernels")
                step(box, "spiked", "install-service", "--check")
                step(box, "spiked", "install-service", "--uninstall")
            finally:
                simulator.terminate()
    print("PASSED")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
