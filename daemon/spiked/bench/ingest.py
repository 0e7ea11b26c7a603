"""`spiked bench ingest`: simulate -> acquire + record at rate, over the real wire. What is missing, what it costs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from spiked.bench.machine import conditions
from spiked.errors import SpikedError
from spiked.rehearsal import Rehearsal, free_ports

# wire: (electrodes, sampling rate, arguments of the simulator)
SIZES = {
    "openephys": (384, 30_000.0, ["--electrodes", "384"]),
    "spikeglx": (384, 30_000.0, ["--electrodes", "384"]),
    "maxwell": (1024, 20_000.0, ["--electrodes", "32x32", "--columns", "1024"]),
}


def _cpu(pids: dict[str, int]) -> dict[str, float]:
    out = {}
    for name, pid in pids.items():
        with contextlib.suppress(psutil.Error):
            t = psutil.Process(pid).cpu_times()
            out[name] = t.user + t.system
    return out


def bench(
    wire: str, seconds: float, folder: Path, live: bool = False, say: Callable[[str], None] = lambda _s: None
) -> dict[str, Any]:
    """Serve `seconds` of the full array, record it, compare the counts. CPU as shares of one core."""
    channels, fs, electrodes = SIZES[wire]
    ports = free_ports(5)
    address = f"tcp://127.0.0.1:{ports[0]}"
    simulate = [
        "--wire",
        wire,
        "--address",
        address,
        "--cycle",
        "--duration-s",
        str(seconds),
        "--units",
        "30",
        "--wait-s",
        "120",
        *electrodes,
    ]
    config = {
        "rig": {"name": "bench", "sessions": str(folder.absolute() / "sessions")},
        "stream": [{"name": "sim", "source": wire, "address": address, "wait_s": 120.0, "silence_s": 60.0}],
        "live": {"enabled": live},
        "publish": dict(
            zip(("live_port", "replay_port", "control_port", "health_port"), ports[1:], strict=True)
        ),
        "offline": {"enabled": False},
    }
    machine = conditions()
    with Rehearsal(folder, simulate, config) as r:
        r.wait_state(("recording",), 150)
        pids: dict[str, int] = {}
        started, before = 0.0, {}
        after: dict[str, float] = {}
        while r.simulator_running():
            status = r.status()
            s = status["streams"]["sim"]
            if s["samples"] > 2 * fs and not started:
                pids = {
                    **s["pids"],
                    "simulate": r.simulator.pid if r.simulator else 0,
                    "supervisor": status["pid"],
                }
                started, before = time.monotonic(), _cpu(pids)
                say(f"recording; pids {pids}")
            elif started:
                now = _cpu(pids)
                if len(now) == len(pids):
                    after, ended = now, time.monotonic()
                say(f"{s['samples'] / fs:6.1f} s recorded, {s['gap_samples']} samples missing")
            time.sleep(2.0)
        sent = r.wait_simulator()
        r.wait_received(sent["samples"], 180.0)
        summary = r.stop()
    if summary["exit_code"] != 0 or not after:
        raise SpikedError(
            f"the session failed: {summary['error'] or 'it was too short to measure; give --seconds 10 or more'}"
        )
    s = summary["streams"]["sim"]
    span = ended - started
    recorded = s["processes"]["record"].get("samples", 0)
    return {
        "bench": "ingest", "machine": machine, "wire": wire, "channels": channels, "fs_hz": fs, "seconds": seconds, "live": live,
        "samples_sent": sent["samples"], "samples_received": s["samples"], "samples_recorded": recorded, "gap_samples": s["gap_samples"],
        "missing": sent["samples"] - recorded + s["gap_samples"], "messages_sent": sent["messages"], "sender_most_behind_s": sent["most_behind_s"],
        "cpu_share_of_a_core": {k: round((after[k] - before[k]) / span, 3) for k in after}, "session": summary["folder"],
    }  # fmt: skip
