"""`spiked bench live`: from the trough of a true spike to a client that has the sorted spike in its hands.

A simulated device serves a recording with known spikes over the real wire, paced by the clock; the daemon runs
as it does on a rig, calibrates, and publishes; a subscriber in another process notes when each spike came. The
clock starts when the trough's sample existed by the device's own schedule (start + sample / rate), so whatever
the sender was late, and however many samples it sent at once, counts as latency and is told apart beside it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from spiked.bench import scene
from spiked.bench.figures import agreement, spread
from spiked.bench.latency import RECEIPT, Played, delays, matched, unrolled
from spiked.bench.machine import conditions
from spiked.config import Live
from spiked.errors import ConfigError, SpikedError
from spiked.priority import raise_priority
from spiked.rehearsal import Rehearsal, free_ports
from spiked.sources.recordings import GroundTruth, open_recording
from spiked.stream import StreamInfo
from spiked_client.errors import ClientError
from spiked_client.subscribe import SyncClient

Say = Callable[[str], None]
STREAM = "sim"
SETTLE_S = 3.0  # between the units' arrival and the first spike that counts
SPARE_S = 30.0  # of a synthetic recording: what it holds beyond calibration and measurement
ASK_S = 5.0  # while measuring, the daemon is asked no oftener: the client shares this process
READ = 1 << 18  # samples read at once
LEFT_BEHIND = (
    "array.cfg",
    "probe.json",
    "schedule.npy",
    "run.json",
    "simulator.json",
    "run.log",
    "simulate.log",
)
MAXWELL_LSB = 3.3e6 / 1024  # microvolt per bit at a gain of 1

CAUGHT_UP_S, STEADY_LOOKS, WITHOUT_LOOKS = 0.01, 6, 20  # a look every quarter of a second


class Receiver(threading.Thread):
    """A client like any other; notes for every sorted spike when it came, and the stamps it came with."""

    def __init__(self, control_port: int, priority: str) -> None:
        super().__init__(name="receiver", daemon=True)
        self.priority = priority
        self.done, self.covered, self.error = threading.Event(), -1, ""
        self.counters: dict[str, int] = {}
        self.late: list[int] = []  # samples at which a message had missed its deadline
        self._port, self._parts = control_port, list[np.ndarray]()

    def run(self) -> None:
        self.priority = raise_priority("client", self.priority)
        try:
            with SyncClient(control_port=self._port, wait_s=60.0) as client:
                subscription = client.spikes()
                while not self.done.is_set():
                    batch = subscription.get(0.5)
                    if batch is not None:
                        self._note(batch.received_ns, batch.header, batch.spikes)
                self.counters = dict(subscription.counters)
        except ClientError as e:
            self.error = str(e)

    def _note(self, received_ns: int, header: dict[str, Any], spikes: np.ndarray) -> None:
        self.covered = max(self.covered, int(header.get("stop", -1)))
        if header.get("deadline_missed"):
            self.late.append(int(header["stop"]))
        if len(spikes):
            stamps = header.get("stamps", {})
            part = np.empty(len(spikes), RECEIPT)
            part["sample"], part["unit"], part["received"] = spikes["sample"], spikes["unit"], received_ns
            part["arrival"], part["published"] = stamps.get("arrival", 0), stamps.get("published", 0)
            self._parts.append(part)

    def receipts(self) -> np.ndarray:
        """RECEIPT rows so far, by sample."""
        parts = np.concatenate([np.zeros(0, RECEIPT), *self._parts])
        return parts[np.argsort(parts["sample"], kind="stable")]


def _cpu(pids: dict[str, int]) -> dict[str, float]:
    out = {}
    for name, pid in pids.items():
        with contextlib.suppress(psutil.Error):
            t = psutil.Process(pid).cpu_times()
            out[name] = t.user + t.system
    return out


def _busy() -> float:
    t = psutil.cpu_times()
    return float(t.user + t.nice + t.system + t.irq + t.softirq + t.steal)


class Sitting:
    """One daemon and one device, from the start to the end of the measured part."""

    def __init__(self, r: Rehearsal, receiver: Receiver, seconds: float, patience_s: float, say: Say) -> None:
        self.r, self.receiver, self.seconds, self.patience_s, self.say = r, receiver, seconds, patience_s, say
        self.start = self.stop = 0
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def _status(self) -> dict[str, Any]:
        status = self.r.status()
        if status.get("error"):
            raise SpikedError(f"the session failed: {status['error']}")
        if not self.r.simulator_running():
            raise SpikedError("the simulator ended too early; see simulate.log in the benchmark's folder")
        if self.receiver.error:
            raise SpikedError(self.receiver.error)
        return status

    def _until_units(self) -> dict[str, Any]:
        until, told, steady, without = time.monotonic() + self.patience_s, 0.0, 0, 0
        while time.monotonic() < until:
            s = self._status()["streams"][STREAM]
            live = s["processes"].get("live", {})
            abreast = live.get("units") and live.get("behind", s["fs_hz"]) <= CAUGHT_UP_S * s["fs_hz"]
            steady = steady + 1 if abreast else 0  # what waited for the start is worked off first
            if steady >= STEADY_LOOKS:
                return dict(s)
            # found units are taken over at a later chunk than they are counted at
            found_none = live.get("counters", {}).get("calibrations") and not live.get("units")
            without = without + 1 if found_none else 0
            if without >= WITHOUT_LOOKS:
                raise SpikedError("calibration found no unit; give a longer --calibrate-s")
            if time.monotonic() - told > 10:
                told = time.monotonic()
                stage = (s.get("calibration") or {}).get("stage", "waiting")
                self.say(
                    f"{s.get('samples', 0) / (s.get('fs_hz') or 1):6.1f} s received, calibration: {stage}"
                )
            time.sleep(0.25)
        raise SpikedError(
            f"no units, or not abreast of the stream, after {self.patience_s:g} s; this machine is too slow for these electrodes"
        )

    def units_known(self, stream: dict[str, Any]) -> None:
        """For benchmarks that do more; `stream` is its status."""

    def measure(self) -> None:
        """Wait for the units, then for `seconds` of the stream to be decided; a look at every process on both ends."""
        found = self._until_units()
        fs = float(found["fs_hz"])
        self.units_known(found)
        time.sleep(SETTLE_S)
        self.before = self._look()
        self.start = max(self.receiver.covered, 0)
        self.stop = self.start + round(self.seconds * fs)
        self.say(f"{self.before['units']} units; measuring {self.seconds:g} s")
        until, asked = time.monotonic() + 2 * self.seconds + 30, time.monotonic()
        while self.receiver.covered < self.stop + fs / 10:
            now = time.monotonic()
            if now > until:
                raise SpikedError("the live path does not keep up: what it decides falls ever further behind")
            time.sleep(0.1)
            if now - asked > ASK_S:
                asked = now
                self._status()
        self.after = self._look()

    def _look(self) -> dict[str, Any]:
        status = self._status()
        s = status["streams"][STREAM]
        device = self.r.simulator.pid if self.r.simulator else 0
        pids = {**s["pids"], "supervisor": status["pid"], "simulator": device, "client": os.getpid()}
        live = s["processes"]["live"]
        return {
            "at": time.monotonic(), "cpu": _cpu(pids), "busy": _busy(), "folder": status["folder"], "counters": live["counters"],
            "units": live["units"], "gap_samples": s["gap_samples"], "lives": s["lives"],
        }  # fmt: skip

    def shares(self) -> dict[str, float]:
        """CPU of each process during the measured part, in cores, and of everything else on the machine."""
        span = self.after["at"] - self.before["at"]
        used = {k: v - self.before["cpu"][k] for k, v in self.after["cpu"].items() if k in self.before["cpu"]}
        rest = self.after["busy"] - self.before["busy"] - sum(used.values())
        return {k: round(v / span, 3) for k, v in {**used, "other programs": max(rest, 0.0)}.items()}


def _wire(info: StreamInfo) -> str:
    """The device that a recording came from: 10-bit unsigned codes are MaxLab's."""
    return "maxwell" if info.dtype == "uint16" and info.zero_code else "openephys"


def device_and_stream(
    recording: Path, info: StreamInfo, folder: Path, port: int, burst_ms: float | None, columns: int, wire: str | None = None
) -> tuple[list[str], dict[str, Any]]:  # fmt: skip
    """The simulator's arguments and the stream's section of the configuration; `wire` None: the recording's own."""
    wire, address = wire or _wire(info), f"tcp://127.0.0.1:{port}"
    simulate = [
        "--wire", wire, "--address", address, "--recording", str(recording), "--loop", "--wait-s", "180",
        "--schedule", str(folder / "schedule.npy"), "--probe", str(folder / "probe.json"),
    ]  # fmt: skip
    if burst_ms is not None:
        simulate += ["--burst-ms", str(burst_ms)]
    stream = {"name": STREAM, "source": wire, "address": address, "wait_s": 180.0, "silence_s": 60.0}
    if wire == "openephys":
        return [*simulate, "--name", STREAM], {**stream, "probe": str(folder / "probe.json")}
    simulate += ["--map", str(folder / "array.cfg"), "--columns", str(columns)]
    gain = MAXWELL_LSB / info.gain_uv[0]
    return simulate, {**stream, "electrode_map": str(folder / "array.cfg"), "fs_hz": info.fs_hz, "gain": gain}


def rig_settings(
    folder: Path, stream: dict[str, Any], ports: list[int], live: dict[str, Any]
) -> dict[str, Any]:
    names = ("live_port", "replay_port", "control_port", "health_port")
    return {
        "rig": {"name": "bench", "sessions": str(folder / "sessions")}, "stream": [stream], "live": live,
        "publish": dict(zip(names, ports, strict=True)), "offline": {"enabled": False},
    }  # fmt: skip


def known_spikes(recording: Path) -> tuple[StreamInfo, int, GroundTruth]:
    """The recording's stream, length and true spikes from 0; it lies in memory afterwards, so that no disk makes the device late."""
    with open_recording(recording) as rec:
        if rec.ground_truth is None:
            raise ConfigError(f"{recording} has no known spikes; give a folder with ground_truth.npz")
        for a in range(0, rec.n_samples, READ):
            rec.read(a, min(a + READ, rec.n_samples))
        truth = rec.ground_truth._replace(samples=rec.ground_truth.samples - rec.first_sample)
        return rec.info, rec.n_samples, truth


def bench(
    folder: Path, electrodes: str = "8x8", recording: Path | None = None, network: str = "auto", chunk_ms: float = 1.0,
    seconds: float = 60.0, calibrate_s: float = 60.0, sequences: Path | None = None, threads: int = 1, units: int | None = None,
    burst_ms: float | None = None, columns: int = 1027, seed: int = 1, priority: str = "auto", say: Say = lambda _s: None,
    sorter: str = "rt_sort", templates: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Latency from trough to receipt in ms, what it is made of, what was lost, and what each process used."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in LEFT_BEHIND:
        (folder / old).unlink(missing_ok=True)
    if recording is None:
        positions, made_s = scene.grid(electrodes), calibrate_s + seconds + SPARE_S
        say(f"making {made_s:g} s of {len(positions)} synthetic electrodes")
        n_units = units if units is not None else max(1, len(positions) // 4)
        recording = scene.write(folder / "recording", positions, made_s, n_units, seed)
    info, length, truth = known_spikes(recording)
    ports, columns = free_ports(5), max(columns, info.n_channels)
    patience_s = 4 * calibrate_s + 120
    simulate, stream = device_and_stream(recording.absolute(), info, folder, ports[0], burst_ms, columns)
    # it ends by itself should the benchmark be killed, and the daemon with it
    longest_s = patience_s + 2 * seconds + 120
    simulate += ["--priority", priority, "--duration-s", str(longest_s)]
    live: dict[str, Any] = {
        "network": network,
        "chunk_ms": chunk_ms,
        "calibrate_s": calibrate_s,
        "threads": threads,
        "sorter": "templates" if templates is not None else sorter,
    }
    for name, known in (("sequences", sequences), ("templates", templates)):
        if known is not None:
            live[name] = str(known.absolute())
    sys.setswitchinterval(1e-4)  # the client gets its turn at once
    machine, receiver = conditions(), Receiver(ports[3], priority)
    settings = rig_settings(folder, stream, ports[1:], live)
    settings["rig"]["priority"] = priority
    with Rehearsal(folder, simulate, settings, needs=folder / "probe.json") as r:
        r.wait_state(("recording",), 150)
        receiver.start()
        sitting = Sitting(r, receiver, seconds, patience_s, say)
        sitting.measure()
        sent = r.stop_simulator()
        receiver.done.set()
        receiver.join(10)
        summary = r.stop()
    if summary["exit_code"] != 0:
        raise SpikedError(f"the session failed: {summary['error']}")
    played = Played(info.fs_hz, sent["first_sample"], sent["started_ns"], np.load(folder / "schedule.npy"))
    spikes = unrolled(truth, length, played.first_sample, sitting.start, sitting.stop)
    return {
        "bench": "live", "machine": machine, "load_1min_after": round(os.getloadavg()[0], 2), "recording": str(recording), "channels": info.n_channels,
        "fs_hz": info.fs_hz, "chunk_ms": chunk_ms, "threads": threads, "calibrate_s": None if sequences or templates else calibrate_s,
        "measured_s": seconds, "sorter": live["sorter"],
        "priority": {"asked": priority, "client": receiver.priority, "device": sent["priority"]},
        **network_used(Path(sitting.after["folder"]), info, live),
        **figures(played, sitting, receiver, spikes),
        "wire": _wire(info), "sender": {
            "what": f"one message per {'frame' if _wire(info) == 'maxwell' else 'channel and burst'}; a burst goes out when its last sample exists",
            "burst_samples": sent["block_samples"], "columns": columns if _wire(info) == "maxwell" else None,
            "burst_late_ms": spread(played.late_ms(sitting.start, sitting.stop)), "recording_repeated": bool(sent["samples"] > length),
        },
    }  # fmt: skip


def figures(
    played: Played, sitting: Sitting, receiver: Receiver, truth: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """Everything about the measured part that the receipts, the schedule and the daemon's counters say."""
    got = receiver.receipts()
    got = got[(got["sample"] >= sitting.start) & (got["sample"] < sitting.stop)]
    scored = agreement(*truth, got["sample"], got["unit"], played.fs_hz)
    a, b = matched(*truth, got, scored["per_unit"], played.fs_hz)
    before, after = sitting.before, sitting.after
    return {
        "latency_ms": delays(played, truth[0][a], got[b]),
        "true_spikes": len(truth[0]), "spikes_received": len(got), "spikes_matched": len(a), "units": after["units"],
        "skipped_samples": after["counters"]["skipped_samples"] - before["counters"]["skipped_samples"],
        "gap_samples": after["gap_samples"] - before["gap_samples"],
        "deadline_missed": sum(sitting.start <= s < sitting.stop for s in receiver.late),
        "client_missed_messages": receiver.counters.get("missed", 0), "restarts": sum(after["lives"].values()),
        "cpu_share_of_a_core": sitting.shares(), "session": after["folder"],
        **{k: scored[k] for k in ("match_window_ms", "true_units", "mean_accuracy", "units_at_0.8")},
    }  # fmt: skip


def network_used(session: Path, info: StreamInfo, live: dict[str, Any]) -> dict[str, Any]:
    """The network that ran, and for how long a spike waits at most for the samples after its trough."""
    from spiked.live.pipeline import LivePipeline
    from spiked.live.process import load_network, pick_device
    from spiked.sort.sequences import Sequences
    from spiked.templates.library import Templates

    device = pick_device("auto")
    net = load_network(live["network"], info.fs_hz, device, info.n_channels, live["threads"])
    known: Sequences | Templates
    if live["sorter"] == "templates":
        known = Templates.load(session / f"{STREAM}.templates.h5")
    else:
        known = Sequences.load(session / f"{STREAM}.sequences.h5")
    pipeline = LivePipeline(info, net, Live(chunk_ms=live["chunk_ms"]), known, device)
    lookahead = round(pipeline.lookahead * 1000 / info.fs_hz, 3)
    return {"network": net.name, "network_sha256": net.sha256, "device": device, "lookahead_ms": lookahead}
