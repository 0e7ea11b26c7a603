"""`spiked bench subscribers`: many clients, one of them stalled, one of them killed every second; what the live path notices.

Simulator, daemon and clients are processes on this computer, with real sockets. Turns without the crowd and with it
alternate; one client that is always there measures. In a turn with the crowd one client is stopped (SIGSTOP), and at its
end let go again: it must be told what it lost, and get back what is still stored. Another is killed every second and
replaced.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from spiked.bench import scene
from spiked.bench.figures import spread
from spiked.bench.live import STREAM, device_and_stream, known_spikes, rig_settings
from spiked.bench.machine import conditions
from spiked.errors import ConfigError, SpikedError
from spiked.keys import add, init
from spiked.rehearsal import Rehearsal, free_ports
from spiked_client.errors import ClientError
from spiked_client.subscribe import SyncClient

Say = Callable[[str], None]
SETTLE_S = 3.0
# ms: of a message's slowest spike from the arrival of its trough to publication, the live path's own figure; from the arrival of
# the newest samples to publication, which leaves out the sorter's lookahead; and from there to this client's hands.
KINDS = ("live", "published", "received")
CATCH_UP_S = 20.0
PLAYED_S = 60.0


class Crowd:
    """Subscribers as processes; `end` stops them and gives what each saw."""

    def __init__(self, port: int, folder: Path, key: Path | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.pids = folder, dict[str, int]()
        words = ["127.0.0.1", str(port), str(folder), *([str(key)] if key else [])]
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "spiked.bench.nursery", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, name: str) -> None:
        """One more subscriber, or one in the place of one that was killed."""
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        (self.folder / f"{name}.there").unlink(missing_ok=True)
        self._nursery.stdin.write(f"start {name}\n")
        self._nursery.stdin.flush()
        self.pids[name] = int(self._nursery.stdout.readline())

    def wait(self, names: list[str], patience_s: float = 60.0) -> None:
        """Until each of these has got a message."""
        until = time.monotonic() + patience_s
        while absent := [n for n in names if not (self.folder / f"{n}.there").exists()]:
            if time.monotonic() > until:
                raise SpikedError(f"subscribers that got nothing: {', '.join(absent)}")
            time.sleep(0.05)

    def signal(self, name: str, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pids[name], number)

    def end(self, names: list[str], patience_s: float = 20.0) -> dict[str, dict[str, Any]]:
        """What these saw; raises SpikedError when one does not say."""
        for name in names:
            self.signal(name, signal.SIGTERM)
        found: dict[str, dict[str, Any]] = {}
        until = time.monotonic() + patience_s
        while len(found) < len(names):
            for name in names:
                path = self.folder / f"{name}.json"
                if name not in found and path.exists():
                    found[name] = json.loads(path.read_text(encoding="utf-8"))
                    path.unlink()
            if time.monotonic() > until:
                raise SpikedError(
                    f"subscribers that did not say what they saw: {sorted(set(names) - set(found))}"
                )
            time.sleep(0.05)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self.pids:
            self.signal(name, signal.SIGCONT)
            self.signal(name, signal.SIGKILL)
        for pipe in (self._nursery.stdin, self._nursery.stdout):
            if pipe is not None:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._nursery.wait(5)


class Measuring(threading.Thread):
    """The client that measures: a row of KINDS for each message."""

    def __init__(self, port: int, key: Path | None) -> None:
        super().__init__(name="measuring", daemon=True)
        self._port, self._key = port, key
        self.rows: list[tuple[float, ...]] = []
        self.missed = self.replayed = 0
        self.done, self.error = threading.Event(), ""

    def run(self) -> None:
        try:
            with (
                SyncClient(control_port=self._port, wait_s=60.0, keys=self._key) as client,
                client.spikes() as spikes,
            ):
                while not self.done.is_set():
                    batch = spikes.get(0.5)
                    if batch is None:
                        continue
                    self.missed += batch.missed.count if batch.missed else 0
                    self.replayed += batch.replayed
                    s = batch.stamps
                    if "arrival" in s and "published" in s and not batch.replayed:
                        spikes_ms = batch.header.get("latency_ms") or {}
                        after = (t - s["arrival"] for t in (s["published"], batch.received_ns))
                        self.rows.append((spikes_ms.get("max", float("nan")), *(ns / 1e6 for ns in after)))
        except ClientError as e:
            self.error = str(e)

    def turn(self, seconds: float, every_s: Callable[[], None] | None = None) -> np.ndarray:
        """(messages, KINDS) ms, over `seconds`. `every_s` is called once a second."""
        before, end = len(self.rows), time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if every_s is not None:
                every_s()
            time.sleep(min(left, 1.0))
            if self.error:
                raise SpikedError(self.error)
        rows = np.array(self.rows[before:], float).reshape(-1, len(KINDS))
        if not len(rows):
            raise SpikedError("nothing was published in a whole turn; see run.log in the benchmark's folder")
        return rows


def rehearse(
    folder: Path, electrodes: str, seconds: float, live: dict[str, Any], publish: dict[str, Any]
) -> Rehearsal:
    """A device that is as punctual as a real one, playing a synthetic recording in turn, and a daemon that sorts it."""
    folder, positions, ports = folder.absolute(), scene.grid(electrodes), free_ports(5)
    recording = scene.write(folder / "recording", positions, PLAYED_S, max(1, len(positions) // 4))
    info, _length, _truth = known_spikes(recording)  # it lies in memory from here on
    simulate, stream = device_and_stream(recording, info, folder, ports[0], None, info.n_channels)
    simulate += ["--priority", "auto", "--duration-s", str(seconds)]
    settings = rig_settings(folder, stream, ports[1:], live)
    settings["publish"] |= publish
    return Rehearsal(folder, simulate, settings, needs=folder / "probe.json")


def _with_the_crowd(
    measuring: Measuring, crowd: Crowd, clients: int, seconds: float
) -> tuple[np.ndarray, dict[str, Any]]:
    """One turn with everybody there: the latencies, and what became of whom."""
    healthy, kills = [f"healthy-{k}" for k in range(clients - 2)], 0
    for name in (*healthy, "stalled", "victim"):
        crowd.start(name)
    crowd.wait([*healthy, "stalled"])
    time.sleep(SETTLE_S)

    def kill_one() -> None:
        nonlocal kills
        crowd.signal("victim", signal.SIGKILL)
        crowd.start("victim")
        kills += 1

    crowd.signal("stalled", signal.SIGSTOP)
    ms = measuring.turn(seconds, kill_one)
    crowd.signal("stalled", signal.SIGCONT)
    time.sleep(min(CATCH_UP_S, seconds / 2))
    stalled = crowd.end(["stalled"])["stalled"]
    seen = crowd.end(healthy)
    crowd.signal("victim", signal.SIGKILL)
    return ms, {
        "killed": kills, "stalled": stalled, "healthy": len(seen),
        "healthy_missed": sum(sum(s["missed"].values()) for s in seen.values()),
        "healthy_untold": sum(s["untold"] + s["out_of_order"] for s in seen.values()),
        "healthy_replayed": sum(s["replayed"] for s in seen.values()),
        "healthy_received": {"least": min(s["received"] for s in seen.values()), "most": max(s["received"] for s in seen.values())},
        "healthy_p99_ms": {"median": float(np.median([s["p99_ms"] for s in seen.values()])), "most": max(s["p99_ms"] for s in seen.values())},
    }  # fmt: skip


def bench(
    folder: Path, say: Say, *, clients: int = 50, seconds: float = 60.0, turns: int = 3, electrodes: str = "6x6", calibrate_s: float = 20.0,
    sorter: str = "rt_sort", curve: bool = False, hwm: int = 64, replay_messages: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """`turns` turns without and with the crowd, each of `seconds`. The figures; `missing` says that somebody lost a batch."""
    if clients < 3:
        raise ConfigError("at least 3 clients: one stalled, one killed, one that is neither")
    publish: dict[str, Any] = {"hwm": hwm, "replay_messages": replay_messages, "peers": max(2 * clients, 128)}
    key = _keys(folder, publish) if curve else None
    machine, live = conditions(), {"sorter": sorter, "calibrate_s": calibrate_s}
    span = 120 + 3 * calibrate_s + turns * (2 * seconds + CATCH_UP_S + 4 * SETTLE_S + 10)
    without, crowded, told = list[np.ndarray](), list[np.ndarray](), list[dict[str, Any]]()
    with rehearse(folder, electrodes, span, live, publish) as r:
        port = r.config.publish.control_port
        units = 0 if sorter == "none" else _until_units(r, 120 + 6 * calibrate_s)
        r.wait_state(("recording",), 150)
        measuring = Measuring(port, key)
        measuring.start()
        with Crowd(port, folder / "crowd", key) as crowd:
            for k in range(turns):
                time.sleep(SETTLE_S)
                at_first = _skipped(r)
                without.append(measuring.turn(seconds))
                between = _skipped(r)
                ms, about = _with_the_crowd(measuring, crowd, clients, seconds)
                crowded.append(ms)
                told.append({**about, "skipped_alone": between - at_first, "skipped_with": _skipped(r) - between, "load_1min": round(os.getloadavg()[0], 1)})  # fmt: skip
                say(f"turn {k + 1} of {turns}: p99 {np.nanpercentile(without[-1][:, 0], 99):.2f} ms alone, {np.nanpercentile(ms[:, 0], 99):.2f} ms with {clients} clients")  # fmt: skip
        measuring.done.set()
        measuring.join(5)
        device = r.stop_simulator()
        counters = r.status()["streams"][STREAM]["processes"]["live"]["counters"]
        r.stop()
    return _figures(without, crowded, told, measuring, counters) | {
        "bench": "subscribers", "clients": clients, "seconds": seconds, "turns": turns, "electrodes": electrodes, "units": units, "sorter": sorter,
        "device": {"priority": device["priority"], "most_behind_ms": round(1000 * device["most_behind_s"], 1)}, "curve": curve, "hwm": hwm, "replay_messages": replay_messages, "machine": machine,
    }  # fmt: skip


def _skipped(r: Rehearsal) -> int:
    """Samples that the live path gave up so far, because it was too far behind."""
    return int(r.status()["streams"][STREAM]["processes"]["live"]["counters"]["skipped_samples"])


def _keys(folder: Path, publish: dict[str, Any]) -> Path:
    """Keys for the daemon, the crowd and this process; SPIKED_KEYS names them from here on."""
    keys, file = folder / "keys", folder / "bench.key"
    for old in (keys / "server.key", keys / "access.toml", file):
        old.unlink(missing_ok=True)
    init(keys, lambda _text: None)
    add(keys, "bench", "stimulate", lambda _text: None, out=file)
    publish["keys"] = str(keys)
    os.environ["SPIKED_KEYS"] = str(file)
    return file


def _until_units(r: Rehearsal, patience_s: float) -> int:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        with suppress(SpikedError):
            live = r.status()["streams"].get(STREAM, {}).get("processes", {}).get("live", {})
            if live.get("units") and live.get("behind", 1 << 30) < 1000:
                return int(live["units"])
        if r.daemon is not None and r.daemon.poll() is not None:
            r.status()  # says why
        time.sleep(0.5)
    raise SpikedError("no units were found in time; see run.log in the benchmark's folder")


def _figures(
    without: list[np.ndarray], crowded: list[np.ndarray], told: list[dict[str, Any]], measuring: Measuring, counters: dict[str, int]
) -> dict[str, Any]:  # fmt: skip
    def column(turns: list[np.ndarray], kind: str) -> list[np.ndarray]:
        return [t[np.isfinite(t[:, KINDS.index(kind)]), KINDS.index(kind)] for t in turns]

    def p99(ms: np.ndarray) -> float:
        return float(np.percentile(ms, 99)) if len(ms) else float("nan")

    change = {
        kind: [round(p99(b) / p99(a) - 1, 4) for a, b in zip(column(without, kind), column(crowded, kind), strict=True)]
        for kind in KINDS
    }  # fmt: skip
    lost = measuring.missed + sum(t["healthy_missed"] + t["healthy_untold"] for t in told)
    return {
        "alone_ms": {kind: spread(np.concatenate(column(without, kind))) for kind in KINDS},
        "crowd_ms": {kind: spread(np.concatenate(column(crowded, kind))) for kind in KINDS},
        "p99_change_per_turn": change, "p99_change": {name: round(float(np.median(c)), 4) for name, c in change.items()},
        "turns_told": told, "killed": sum(t["killed"] for t in told), "healthy_lost": lost, "healthy_replayed": sum(t["healthy_replayed"] for t in told),
        "stalled_untold": sum(t["stalled"]["untold"] for t in told), "stalled_replayed": sum(t["stalled"]["replayed"] for t in told),
        "stalled_missed": sum(sum(t["stalled"]["missed"].values()) for t in told), "publisher": counters, "missing": lost,
    }  # fmt: skip
