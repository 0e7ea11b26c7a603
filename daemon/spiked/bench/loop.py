"""`spiked bench loop`: from the trough of a true spike to a stimulator that has the command in its hands.

A simulated device serves a recording with known spikes, paced by the clock, and is the stimulator too: it takes the
commands of the daemon's trigger socket and puts artifacts and evoked spikes into the samples that follow. One rule fires
on every unit. The clock starts when the trough's sample existed by the device's own schedule, and stops when the command
was received in the simulator's process. Commands that no true spike explains are counted, not timed.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from spiked.act import ledger
from spiked.bench import early as two_steps
from spiked.bench import scene
from spiked.bench.figures import spread
from spiked.bench.latency import Played, unrolled
from spiked.bench.live import (
    SPARE_S,
    STREAM,
    Say,
    Sitting,
    device_and_stream,
    known_spikes,
    network_used,
    rig_settings,
)
from spiked.bench.machine import conditions
from spiked.errors import ConfigError, SpikedError
from spiked.rehearsal import Rehearsal, free_ports
from spiked.sources.simulate_stim import rails
from spiked_client.control import SyncControl
from spiked_client.errors import ClientError
from spiked_client.protocol import OUTCOMES, REASONS

RULE, OUTPUT, PATTERN = "bench", "pulser", "single"
LEASE_S, RENEW_S = 5.0, 1.0
NEAR_MS = 0.5  # a command's spike and a true trough closer than this are one
NO_ARTIFACT_UA = 1e-6
AMPLITUDE_UA, WIDTH_US = 5.0, 200.0
SETTLED_S = 2.0  # after disarming, for the last acknowledgements


class Armed(threading.Thread):
    """Sets the rule, arms it, and renews the lease until told to stop."""

    def __init__(self, port: int, trigger: dict[str, Any]) -> None:
        super().__init__(name="lease", daemon=True)
        self.done, self.error = threading.Event(), ""
        self._port, self._trigger = port, trigger

    def arm(self) -> None:
        with SyncControl(control_port=self._port) as control:
            control.set_trigger(self._trigger)
            self._lease = str(control.arm([RULE], lease_s=LEASE_S)["lease"])
        self.start()

    def run(self) -> None:
        try:
            with SyncControl(control_port=self._port) as control:
                while not self.done.wait(RENEW_S):
                    control.renew(self._lease)
                control.disarm(self._lease)
        except ClientError as e:
            self.error = str(e)


class LoopSitting(Sitting):
    """Arms one rule on all units as soon as they are known."""

    trigger: dict[str, Any]
    armed: Armed | None = None

    def units_known(self, stream: dict[str, Any]) -> None:
        units = sorted(int(u) for u in stream["processes"]["live"]["rates_hz"])
        try:
            self.armed = Armed(self.r.config.publish.control_port, {**self.trigger, "units": units})
            self.armed.arm()
        except ClientError as e:
            raise SpikedError(f"the rule could not be armed: {e}") from e

    def disarm(self) -> None:
        if self.armed is None:
            return
        self.armed.done.set()
        self.armed.join(10)
        if self.armed.error:
            raise SpikedError(f"the lease was lost: {self.armed.error}")


def bench(
    folder: Path, electrodes: str = "8x8", recording: Path | None = None, network: str = "auto", sorter: str = "rt_sort", chunk_ms: float = 1.0,
    seconds: float = 60.0, calibrate_s: float = 60.0, sequences: Path | None = None, templates: Path | None = None, threads: int = 1,
    every_ms: float = 100.0, early: bool = False, artifact: bool = True, evoked_p: float = 0.5, burst_ms: float | None = None,
    columns: int = 1027, seed: int = 1, priority: str = "auto", wire: str | None = None, say: Say = lambda _s: None,
) -> dict[str, Any]:  # fmt: skip
    """Latency from trough to received command in ms, what it is made of, and whether the ledger knows every pulse.

    `wire`: how the device speaks, "maxwell" or "openephys"; by default as the one that the recording came from.
    `early`: the rule acts before spikes are final; with templates on the early decisions of the sorter, which a client gets too.
    `every_ms`: least time between two commands. `artifact` False: the stimulator takes commands and leaves the
    samples as they are, which times the loop on undisturbed spikes.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (
        "probe.json",
        "schedule.npy",
        "stims.npz",
        "run.json",
        "simulator.json",
        "run.log",
        "simulate.log",
        "array.cfg",
    ):
        (folder / old).unlink(missing_ok=True)
    if recording is None:
        positions, made_s = scene.grid(electrodes), calibrate_s + seconds + SPARE_S
        say(f"making {made_s:g} s of {len(positions)} synthetic electrodes")
        recording = scene.write(folder / "recording", positions, made_s, max(1, len(positions) // 4), seed)
    info, length, truth = known_spikes(recording)
    ports, columns = free_ports(6), max(columns, info.n_channels)
    patience_s = 4 * calibrate_s + 120
    simulate, stream = device_and_stream(
        recording.absolute(), info, folder, ports[0], burst_ms, columns, wire
    )
    if stream["source"] == "openephys":
        stream["stim_lines"] = [0]  # the simulator's edge at every pulse
        lowest, highest = rails(info)
        if math.isfinite(highest - lowest):
            stream["rail_uv"] = max(info.zero_code - lowest, highest - info.zero_code) * max(info.gain_uv)
    simulate += ["--priority", priority, "--duration-s", str(patience_s + 2 * seconds + 120)]
    simulate += ["--stim", f"tcp://127.0.0.1:{ports[5]}", "--stim-log", str(folder / "stims.npz"), "--evoked-prob", str(evoked_p if artifact else 0)]  # fmt: skip
    live: dict[str, Any] = {
        "network": network,
        "chunk_ms": chunk_ms,
        "calibrate_s": calibrate_s,
        "threads": threads,
        "sorter": sorter,
    }
    for name, known in (("sequences", sequences), ("templates", templates)):
        if known is not None:
            live[name] = str(known.absolute())
    live["early"] = early and sorter == "templates"
    settings = rig_settings(folder, stream, ports[1:5], live)
    settings["rig"]["priority"] = priority
    settings["output"] = [{"name": OUTPUT, "kind": "zmq", "address": f"tcp://127.0.0.1:{ports[5]}"}]
    sys.setswitchinterval(1e-4)
    machine, receiver = conditions(), two_steps.BothSteps(ports[3], priority)
    with Rehearsal(folder, simulate, settings, needs=folder / "probe.json") as r:
        r.wait_state(("recording",), 150)
        receiver.start()
        sitting = LoopSitting(r, receiver, seconds, patience_s, say)
        sitting.trigger = {
            "name": RULE, "when": "unit", "refractory_ms": every_ms, "early": early, "output": OUTPUT, "pattern": PATTERN,
            "electrodes": [info.n_channels // 2], "amplitude_ua": AMPLITUDE_UA if artifact else NO_ARTIFACT_UA, "width_us": WIDTH_US,
        }  # fmt: skip
        sitting.measure()
        sitting.disarm()
        threading.Event().wait(SETTLED_S)
        sent = r.stop_simulator()
        receiver.done.set()
        receiver.join(10)
        summary = r.stop()
    if summary["exit_code"] != 0:
        raise SpikedError(f"the session failed: {summary['error']}")
    played = Played(info.fs_hz, sent["first_sample"], sent["started_ns"], np.load(folder / "schedule.npy"))
    session = Path(sitting.after["folder"])
    with np.load(folder / "stims.npz") as z:
        stims, evoked = z["stims"], (z["evoked_samples"], z["evoked_units"])
    spikes = unrolled(truth, length, played.first_sample, sitting.start, sitting.stop)
    troughs = np.sort(np.concatenate([spikes[0], evoked[0]]))
    steps = two_steps.figures(
        played, receiver, sitting.start, sitting.stop, lambda at: nearest(troughs, at, info.fs_hz)
    )
    return {
        "bench": "loop", "machine": machine, "load_1min_after": round(os.getloadavg()[0], 2), "recording": str(recording), "channels": info.n_channels,
        "fs_hz": info.fs_hz, "chunk_ms": chunk_ms, "threads": threads, "measured_s": seconds, "sorter": sorter, "early": early, "artifact": artifact,
        "wire": stream["source"], "burst_ms": round(1000 * sent["block_samples"] / info.fs_hz, 3), "every_ms": every_ms, "evoked_spikes": len(evoked[0]), "units": sitting.after["units"],
        "priority": {"asked": priority, "device": sent["priority"]}, **network_used(session, info, live),
        **figures(played, sitting, stims, troughs, ledger.read(ledger.path_of(session, STREAM))),
        "steps": steps, "skipped_samples": sitting.after["counters"]["skipped_samples"] - sitting.before["counters"]["skipped_samples"],
        "burst_late_ms": spread(played.late_ms(sitting.start, sitting.stop)), "cpu_share_of_a_core": sitting.shares(), "session": str(session),
    }  # fmt: skip


def figures(
    played: Played, sitting: Sitting, stims: np.ndarray, troughs: np.ndarray, records: np.ndarray
) -> dict[str, Any]:
    """Latencies of the commands of the measured part, and what ledger and stimulator say of each other.

    `stims` are STIM_ROW of the simulator, `troughs` true ones in device samples and order, `records` the ledger's.
    """
    if not len(records):
        raise ConfigError("nothing was decided: no unit of the rule fired")
    inside = stims[(stims["trigger"] >= sitting.start) & (stims["trigger"] < sitting.stop)]
    near = nearest(troughs, inside["trigger"], played.fs_hz)
    timed, trough = inside[near >= 0], near[near >= 0]
    of = {int(r["number"]): r for r in records}
    rows = np.array([of[int(n)] for n in timed["number"] if int(n) in of], records.dtype)
    existed = played.existed_ns(trough) if len(trough) else np.zeros(0)
    ms: dict[str, np.ndarray] = {"trough_to_received": timed["received_ns"] - existed}
    if len(rows) == len(timed):
        ms |= {
            "trough_to_decided": timed["decided_ns"] - existed,
            "decided_to_sent": rows["sent_ns"] - rows["decided_ns"],
            "sent_to_received": timed["received_ns"] - rows["sent_ns"],
            "sent_to_acknowledged": rows["ack_ns"] - rows["sent_ns"],
        }
    said = records[records["sent_ns"] > 0]
    return {
        "latency_ms": {name: spread(v / 1e6) for name, v in ms.items()},
        "commands": len(inside), "without_a_true_spike": int((near < 0).sum()),
        "ledger": {
            "decisions": len(records), "received": len(stims), "sent": len(said),
            "received_but_not_in_it": int((~np.isin(stims["number"], said["number"])).sum()),
            "sent_but_not_received": int((~np.isin(said["number"], stims["number"])).sum()),
            "not_acknowledged": int((said["ack_ns"] == 0).sum()), "artifact_seen": int((said["artifact_sample"] >= 0).sum()),
            "outcomes": _counted(records["outcome"], OUTCOMES), "reasons": _counted(records["reason"], REASONS),
        },
    }  # fmt: skip


def nearest(troughs: np.ndarray, samples: np.ndarray, fs_hz: float) -> np.ndarray:
    """For each sample the true trough nearest to it, -1 where none is within NEAR_MS. `troughs` ascending."""
    if not len(troughs):
        return np.full(len(samples), -1)
    at = np.clip(np.searchsorted(troughs, samples), 1, max(len(troughs) - 1, 1))
    before, after = troughs[at - 1], troughs[np.minimum(at, len(troughs) - 1)]
    best = np.where(np.abs(samples - before) <= np.abs(after - samples), before, after)
    return np.where(np.abs(best - samples) <= NEAR_MS * fs_hz / 1000, best, -1)


def _counted(values: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    found, n = np.unique(values, return_counts=True)
    return {names[int(v)]: int(k) for v, k in zip(found, n, strict=True) if names[int(v)]}
