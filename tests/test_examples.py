"""The examples, run as their users run them, against a simulated array that closes the loop."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from output_rig import PATIENT_MS, acks, closing, command, opened
from session_rig import rehearsal

from spiked.act import ledger
from spiked.rehearsal import Rehearsal, free_ports

EXAMPLES = Path(__file__).parents[1] / "clients" / "examples"


HELD_UP = ("spiked daemon answered", "did not answer", "nothing came on", "no units that fire")
LEASE_S = 30.0
failed: list[str] = []


def example(name: str, *args: str, timeout: float = 200.0) -> dict[str, Any]:
    """Its JSON; what it complained about where it failed. Again where a busy computer let it wait in vain."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *args], capture_output=True, text=True, timeout=timeout, check=False
        )  # fmt: skip
        if done.returncode == 0 or not any(said in done.stderr for said in HELD_UP):
            break
        failed.append(done.stderr)
        time.sleep(LEASE_S)  # what it armed it may not have disarmed
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def until_units(r: Rehearsal, timeout_s: float = 300.0) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        live = r.status()["streams"]["sim"]["processes"].get("live", {})
        if live.get("units") and live.get("behind", 1e9) < 2_000:
            return
        time.sleep(0.3)
    raise AssertionError(r.status()["streams"]["sim"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_responding_and_holding_a_rate(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    address, log = f"tcp://127.0.0.1:{port}", tmp_path / "stims.npz"
    simulate = ("--stim", address, "--stim-log", str(log), "--evoked-prob", "0.8")
    live = {"enabled": True, "sorter": "rt_sort", "calibrate_s": 25}
    output = [{"name": "pulser", "kind": "zmq", "address": address, "timeout_ms": PATIENT_MS}]
    act = {"late_ms": 2000.0}  # this computer may be busy
    with rehearsal(tmp_path, seconds=1000.0, live=live, simulate=simulate, output=output, act=act) as r:
        r.wait_state(("recording",), 120)
        until_units(r)
        control = (
            "--control-port",
            str(r.config.publish.control_port),
            "--output",
            "pulser",
            "--electrodes",
            "5",
            "--deadline-ms",
            "2000",
            "--lease-s",
            str(LEASE_S),
        )
        responded = example(
            "respond_to_unit.py", *control, "--sham", "0.4", "--refractory-ms", "100", "--seconds", "12"
        )
        held = example("hold_rate.py", *control, "--low-hz", "1000", "--seconds", "15", "--window-ms", "300")
        calm = example("hold_rate.py", *control, "--low-hz", "0.001", "--seconds", "10", "--window-ms", "300")
        assert r.control("triggers")["streams"]["sim"]["armed"] == []
        r.stop_simulator(60)
        summary = r.stop()
    records = ledger.read(ledger.path_of(Path(summary["folder"]), "sim"))
    with np.load(log) as z:
        stims, evoked = z["stims"], z["evoked_samples"]
    assert summary["exit_code"] == 0 and len(evoked) > 0
    outcomes = responded["outcomes"]
    assert outcomes["sent"] >= 5 and outcomes["sham"] >= 3 and responded["ticks"] > 50
    assert held["stimuli"]["sent"] >= 10 and held["share_of_ticks_in_bounds"] == 0
    assert calm["stimuli"] == {} and calm["share_of_ticks_in_bounds"] > 0.9
    assert set(stims["number"]) == set(records["number"][records["sent_ns"] > 0])
    told = outcomes["sent"] + held["stimuli"]["sent"]
    assert len(stims) == told or (
        failed and len(stims) > told
    )  # what a failed try stimulated it did not tell


def test_the_receiving_end() -> None:
    (port,) = free_ports(1)
    address = f"tcp://127.0.0.1:{port}"
    said: list[str] = []

    def run() -> None:
        args = [sys.executable, str(EXAMPLES / "stimulator.py"), "--address", address, "--seconds", "10"]
        said.append(subprocess.run(args, capture_output=True, text=True, check=True).stdout)

    thread = threading.Thread(target=run)
    with closing(opened("zmq", address, timeout_ms=PATIENT_MS)) as output:
        thread.start()
        while output.there is None and thread.is_alive():  # type: ignore[attr-defined]
            output.poll()
            time.sleep(0.01)
        output.send(command())
        assert acks(output)[0].ok
        thread.join(60)
    assert said == ["1 stimuli\n"]
