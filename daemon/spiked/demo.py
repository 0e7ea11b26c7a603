"""`spiked demo`: the whole path once, with known spikes. A simulated Maxwell array, the daemon, a watching client,
calibration, live units, the session's end, Kilosort4, curation, the report, and how it all agrees with the truth.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, SpikedError
from spiked.offline.truth import score
from spiked.rehearsal import Rehearsal, free_ports
from spiked_client.errors import ClientError
from spiked_client.protocol import SPIKE
from spiked_client.subscribe import SyncClient

STREAM = "array"
SORTED_S = 30.0  # of live units are wanted, also where calibrating takes its time
PATIENCE_S = 900.0  # what a slow or busy computer may take beyond the asked duration
Say = Callable[[str], None]


class Watcher(threading.Thread):
    """A client like any other: it subscribes to sorted spikes and counts what reaches it."""

    def __init__(self, port: int) -> None:
        super().__init__(name="watcher", daemon=True)
        self.port, self.done = port, threading.Event()
        self.spikes = self.lost = 0
        self.error = ""

    def run(self) -> None:
        try:
            with SyncClient(control_port=self.port, wait_s=60.0) as client:
                sorted_spikes = client.spikes()
                while not self.done.is_set():
                    batch = sorted_spikes.get(0.5)
                    if batch is not None:
                        self.spikes += len(batch.spikes)
                self.lost = sorted_spikes.counters["missed"]
        except ClientError as e:
            self.error = str(e)


class Lines:
    """New lines of the session's log, for the terminal."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._at = 0

    def new(self) -> Iterator[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as f:
            f.seek(self._at)
            for line in iter(f.readline, ""):
                if not line.endswith("\n"):
                    return
                self._at = f.tell()
                yield json.loads(line)


def _config(
    folder: Path, ports: list[int], calibrate_s: float, offline: bool, network: str
) -> dict[str, Any]:
    return {
        "rig": {"name": "demo", "sessions": str(folder / "sessions"), "lab": "demo", "institution": "demo", "experimenter": "Demo, Run"},
        "subject": {"id": "simulated", "age": "P30D", "sex": "U", "description": "synthetic cells, no animal"},
        "stream": [
            {"name": STREAM, "source": "maxwell", "address": f"tcp://127.0.0.1:{ports[0]}", "electrode_map": str(folder / "array.cfg"),
             "wait_s": 120.0, "silence_s": 60.0}
        ],
        "live": {"sorter": "rt_sort", "calibrate_s": calibrate_s, "network": network, "chunk_ms": 2.0},  # calibrated soonest
        "publish": dict(zip(("live_port", "replay_port", "control_port", "health_port"), ports[1:], strict=True)),
        "offline": {"enabled": offline},
    }  # fmt: skip


def _line(status: dict[str, Any], watcher: Watcher, duration_s: float) -> str:
    s = status["streams"][STREAM]
    live = s["processes"].get("live", {})
    counters = live.get("counters", {})
    calibration = s.get("calibration") or {}
    what = f"{live.get('units', 0)} units" if live.get("units") else "unsorted spikes"
    if calibration and not live.get("units"):
        what += f", calibration: {calibration.get('stage')} {100 * calibration.get('fraction', 0):.0f} %"
    latency = live.get("latency_ms") or {}
    if latency.get("n"):
        what += f", latency p50 {latency['p50']:.1f} ms p99 {latency['p99']:.1f} ms"
    if counters.get("skipped_samples"):
        what += f", FELL BEHIND: {counters['skipped_samples']} samples not sorted"
    seconds = s["samples"] / (s["fs_hz"] or 1)
    return (
        f"{seconds:5.1f} of {duration_s:g} s recorded, {s['gaps']} gaps | {what} | {counters.get('mua', 0)} detections, "
        f"{watcher.spikes} sorted spikes received by the client"
    )  # fmt: skip


def _follow(r: Rehearsal, watcher: Watcher, lines: Lines, duration_s: float, say: Say) -> dict[str, Any]:
    """While the simulator serves: a line every two seconds, and the log's own; what was sent.

    It is ended after `duration_s`, or when live units have sorted for SORTED_S, whichever is later.
    """
    told, until, waiting = 0.0, duration_s, False
    calibrated = False
    while r.simulator_running():
        time.sleep(0.3)
        status = _try_status(r)
        if status is None or status.get("state") == "idle":
            continue
        lines.path = Path(status["folder"]) / "log.jsonl"
        seconds = status["streams"][STREAM]["samples"] / (status["streams"][STREAM]["fs_hz"] or 1)
        for row in lines.new():
            say(f"  {row['text']}")
            if row["event"] == "calibrated" and not calibrated:
                calibrated, until = True, max(duration_s, seconds + SORTED_S)
        if status["state"] == "failed" or status.get("error"):
            raise SpikedError(f"the session failed: {status['error']}")
        if seconds >= until and not calibrated and not waiting:
            waiting = True
            say(
                f"  this computer is still calibrating; the stream goes on until it has, {PATIENCE_S:g} s at most"
            )
        if seconds >= until and calibrated:
            return r.stop_simulator(120.0)
        if status["streams"][STREAM]["samples"] and time.monotonic() - told > 2.0:
            told = time.monotonic()
            say(_line(status, watcher, duration_s))
    return r.wait_simulator()


def _try_status(r: Rehearsal) -> dict[str, Any] | None:
    try:
        return r.status()
    except SpikedError:
        if r.daemon is None or r.daemon.poll() is not None:
            raise
        return None


def _until_the_end(r: Rehearsal, lines: Lines, say: Say) -> dict[str, Any]:
    """After the stop: the log's lines until the daemon has ended by itself."""
    assert r.daemon is not None
    told = time.monotonic()
    while r.daemon.poll() is None:
        for row in lines.new():
            told = time.monotonic()
            say(f"  {row['text']}")
        if time.monotonic() - told > 15:
            told = time.monotonic()
            say("  still working")
        time.sleep(0.3)
    for row in lines.new():
        say(f"  {row['text']}")
    return r.wait_daemon(5.0)


def demo(
    folder: Path, electrodes: int, duration_s: float, calibrate_s: float, seed: int, say: Say, offline: bool = True, network: str = "auto"
) -> dict[str, Any]:  # fmt: skip
    """Run it; the figures. Raises SpikedError when a part failed."""
    side = math.isqrt(max(electrodes, 0))
    if side * side != electrodes or electrodes < 16:
        raise ConfigError(
            f"--electrodes {electrodes} must be a square number of at least 16, such as 36, 49 or 64"
        )
    if not calibrate_s + 15 <= duration_s < math.inf:
        raise ConfigError(
            f"--duration-s {duration_s:g} leaves no time to sort after {calibrate_s:g} s of calibration; give more"
        )
    began = time.monotonic()
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("array.cfg", "truth.npz", "run.json", "simulator.json", "run.log", "simulate.log"):
        (folder / old).unlink(missing_ok=True)
    ports = free_ports(5)
    simulate = [
        "--wire", "maxwell", "--address", f"tcp://127.0.0.1:{ports[0]}", "--electrodes", f"{side}x{side}", "--seed", str(seed),
        "--duration-s", str(duration_s + PATIENCE_S), "--map", str(folder / "array.cfg"), "--truth", str(folder / "truth.npz"), "--sent", str(folder / "sent.raw"),
        "--wait-s", "180",
    ]  # fmt: skip
    say(
        f"a simulated array of {electrodes} electrodes at 20 kHz for {duration_s:g} s, calibration on {calibrate_s:g} s; files in {folder}"
    )
    say("compiling kernels (seconds when they are cached, a minute the first time)")
    warmed = subprocess.run(
        [sys.executable, "-m", "spiked.cli", "warmup"], capture_output=True, text=True, check=False
    )
    if warmed.returncode != 0:
        raise SpikedError(f"the kernels cannot be compiled: {warmed.stderr.strip().splitlines()[-1]}")
    lines = Lines()
    with Rehearsal(
        folder, simulate, _config(folder, ports, calibrate_s, offline, network), needs=folder / "array.cfg"
    ) as r:
        r.wait_state(("starting", "recording"), 180.0)
        watcher = Watcher(ports[3])
        watcher.start()
        sent = _follow(r, watcher, lines, duration_s, say)
        say(f"the simulator has sent {sent['samples']} samples; ending the session")
        r.wait_received(sent["samples"], 180.0)
        session = Path(r.status()["folder"])
        shutil.copy2(folder / "truth.npz", session / f"{STREAM}.truth.npz")
        watcher.done.set()
        r.control("stop_session")
        summary = _until_the_end(r, lines, say)
        watcher.join(5)
        if watcher.error:
            say(f"  the client got no spikes any more: {watcher.error}")
    if summary["exit_code"] != 0:
        raise SpikedError(f"the session ended with an error: {summary['error']}")
    result = _result(session, folder, sent, summary, watcher)
    result["seconds"] = round(time.monotonic() - began, 1)
    _tell(result, say)
    return result


def _recorded_equals_sent(session: Path, sent: Path, channels: int) -> tuple[int, bool]:
    """How many samples the file holds, and whether they are those that were sent, bit for bit."""
    import h5py

    with h5py.File(session / f"{STREAM}.nwb", "r") as f:
        data = f["acquisition/ElectricalSeries/data"]
        codes = np.memmap(sent, data.dtype, "r").reshape(-1, channels)
        same = len(codes) == len(data)
        for a in range(0, min(len(codes), len(data)), 200_000):
            same = same and bool(np.array_equal(data[a : a + 200_000], codes[a : a + 200_000]))
        return len(data), same


def live_accuracy(
    session: Path, stream: str, first_sample: int, from_sample: int, fs_hz: float
) -> dict[int, dict[str, Any]]:
    """Per true unit, over the time in which units were sorted live; window 0.4 ms."""
    truth = np.load(session / f"{stream}.truth.npz")
    spikes = np.fromfile(session / f"{stream}.spikes.bin", SPIKE)
    spikes = spikes[(spikes["unit"] >= 0) & (spikes["sample"] >= from_sample)]
    since = truth["samples"] >= from_sample - first_sample
    return score(
        truth["samples"][since],
        truth["units"][since],
        spikes["sample"] - first_sample,
        spikes["unit"],
        fs_hz,
        0.4,
    )


def _result(
    session: Path, folder: Path, sent: dict[str, Any], summary: dict[str, Any], watcher: Watcher
) -> dict[str, Any]:
    stream = summary["streams"][STREAM]
    rows, same = _recorded_equals_sent(session, folder / "sent.raw", stream["channels"])
    live = json.loads((session / f"{STREAM}.latency.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (session / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    calibrated = [row for row in log if row["event"] == "calibrated"]
    if not calibrated:
        raise SpikedError(
            f"calibration did not finish before the stream ended; see {session / 'log.jsonl'}, or use a longer --duration-s"
        )
    per_unit = live_accuracy(
        session, STREAM, sent["first_sample"], calibrated[0]["from_sample"], stream["fs_hz"]
    )
    accuracy = {str(k): round(v["accuracy"], 3) for k, v in per_unit.items()}
    offline = summary.get("offline") or {}
    return {
        "session_dir": str(session), "channels": stream["channels"], "samples_sent": sent["samples"], "samples_recorded": rows,
        "recorded_equals_sent": same, "gaps": stream["gaps"], "true_units": len(accuracy), "live_units": calibrated[-1]["units"],
        "live_spikes": live["counters"]["spikes"], "client_spikes": watcher.spikes, "client_lost": watcher.lost,
        "skipped_samples": live["counters"]["skipped_samples"], "deadline_missed": live["counters"]["deadline_missed"],
        "offline_units": offline.get("offline_units"), "merged_units": offline.get("merged_units"),
        "latency_ms": {k: live["latency_ms"][k] for k in ("mean", "p50", "p99", "max", "n")}, "chunk_compute_ms": live["chunk_compute_ms"],
        "accuracy_live": accuracy, "mean_accuracy_live": round(float(np.mean(list(accuracy.values()))), 3) if accuracy else None,
        "accuracy_offline": offline.get("accuracy_offline"), "mean_accuracy_offline": _mean(offline.get("accuracy_offline")),
        "live_vs_offline": offline.get("agreement"), "report": offline.get("report"), "report_html": offline.get("report_html"),
        "curation": _curation(offline),
    }  # fmt: skip


def _curation(offline: dict[str, Any]) -> str:
    """What became of the sorter's units, in words."""
    if not offline:
        return "switched off"
    n, merge = offline["labels"]["counts"], offline["merge"]
    return (
        f"{n['good']} good, {n['undetermined']} undetermined, {n['mua']} multi-unit, {n['noise']} noise; {len(merge['groups'])} merges "
        f"({merge['method']}); {len(offline['library']['units'])} units in the rig's library for the next session"
    )


def _mean(per_unit: Any) -> float | None:
    if not per_unit:
        return None
    values = [v["accuracy"] if isinstance(v, dict) else v for v in per_unit.values()]
    return round(float(np.mean(values)), 3)


def _tell(d: dict[str, Any], say: Say) -> None:
    lat = d["latency_ms"]
    say("")
    say(f"session   {d['session_dir']}")
    say(f"report    {d['report']}")
    say(
        f"recorded  {d['samples_recorded']} of {d['samples_sent']} samples, {'identical to' if d['recorded_equals_sent'] else 'NOT EQUAL TO'} what was sent, {d['gaps']} gaps"
    )
    say(
        f"live      {d['live_units']} units, {d['live_spikes']} spikes, {d['client_spikes']} of them received by the client, {d['skipped_samples']} samples not sorted"
    )
    say(
        f"latency   mean {lat['mean']} ms, p50 {lat['p50']} ms, p99 {lat['p99']} ms from arrival of the trough's chunk to publication"
    )
    say(
        f"offline   {d['offline_units']} units from Kilosort4, {d['merged_units']} after curation and merging"
    )
    say(f"curation  {d['curation']}")
    say(f"page      {d['report_html']}; job: spiked jobs show 1 --folder {Path(d['session_dir']).parent}")
    say(
        f"accuracy  live {d['mean_accuracy_live']}, offline {d['mean_accuracy_offline']} (mean over {d['true_units']} true units)"
    )
    say(f"took      {d['seconds']:.0f} s")
