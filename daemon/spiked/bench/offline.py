"""`spiked bench offline`: Kilosort4 called directly, and through the stages of `spiked sort`, in turns on the same recording.

Directly: a process that imports Kilosort and calls `run_kilosort` on a plain int16 binary, which lies there before the clock starts. Through
us: the stages export and sort of a job, from the recording as it is to the spikes that the next stage reads. The same parameters,
threads and environment for both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.bench.machine import conditions
from spiked.errors import ConfigError, SpikedError
from spiked.offline import export, presets, sort, sorters
from spiked.offline.foreign import open_foreign
from spiked.offline.manifest import Manifest
from spiked.offline.pipeline import Job
from spiked.offline.progress import Progress
from spiked.offline.session import Session, StreamFiles
from spiked.offline.sorters import kilosort4
from spiked.offline.task import is_session
from spiked.sources.formats.recording import Choice

DIRECT = """
import json, sys, time
started = time.time()
import numpy as np, torch
from kilosort import run_kilosort
job = json.load(open(sys.argv[1]))
torch.set_num_threads(job["threads"])
probe = {k: np.array(v, np.float32 if k != "chanMap" else int) for k, v in job["probe"].items()}
probe["n_chan"] = len(probe["chanMap"])
run_kilosort(job["settings"], probe=probe, filename=job["binary"], results_dir=job["out"], device=torch.device(job["device"]), **job["options"])
print(json.dumps({"inside_s": time.time() - started}))
"""
STAGES = ("preflight", "canary", "export", "sort")
TIMED = ("export", "sort")


def bench(
    recording: Path,
    folder: Path,
    seconds: float = 60.0,
    turns: int = 3,
    threads: int = 1,
    device: str = "cpu",
    preset: str = "auto",
    say: Callable[[str], None] = lambda _s: None,
) -> dict[str, Any]:
    """Wall time, the largest use of disk and the units of each way, `turns` times, and whether the spikes are the same."""
    machine = conditions()
    folder.mkdir(parents=True, exist_ok=True)
    stream = _stream(recording, seconds)
    device = presets.resolve_device(device)
    chosen = kilosort4.choose(preset, device, stream)
    rounds: list[dict[str, Any]] = []
    for k in range(turns):
        ways = {"direct": _direct, "spiked": _ours}
        one: dict[str, Any] = {"load_before": round(os.getloadavg()[0], 2)}
        for name in sorted(ways, reverse=bool(k % 2)):
            one[name] = ways[name](stream, chosen.params, folder / name, threads, device)
            say(
                f"turn {k + 1} of {turns}, {name}: {one[name]['wall_s']:.1f} s ({one[name]['cpu_s']:.1f} s CPU), {one[name]['units']} units"
            )
        rounds.append({**one, "same_spikes": _same(folder / "direct", folder / "spiked")})
    raw = stream.n_samples * stream.n_channels * 2
    walls = {name: [r[name]["wall_s"] for r in rounds] for name in ("direct", "spiked")}
    cpu = {name: [r[name]["cpu_s"] for r in rounds] for name in ("direct", "spiked")}
    ratios = [b / a for a, b in zip(walls["direct"], walls["spiked"], strict=True)]
    return {
        "bench": "offline", "machine": machine, "recording": str(recording), "channels": stream.n_channels, "fs_hz": stream.fs_hz,
        "seconds": stream.duration_s, "device": device, "threads": threads, "preset": chosen.name, "params": chosen.params,
        "turns": rounds, "raw_bytes": raw, "same_spikes": all(r["same_spikes"] for r in rounds),
        "wall_s": {name: round(float(np.median(w)), 2) for name, w in walls.items()},
        "cpu_s": {name: round(float(np.median(c)), 2) for name, c in cpu.items()},
        "overhead_cpu": round(float(np.median([b / a for a, b in zip(cpu["direct"], cpu["spiked"], strict=True)])) - 1, 4),
        "overhead": round(float(np.median(ratios)) - 1, 4), "overhead_each": [round(r - 1, 4) for r in ratios],
        "disk_bytes": {name: max(r[name]["disk_bytes"] for r in rounds) for name in ("direct", "spiked")},
        "missing": not all(r["same_spikes"] for r in rounds),
    }  # fmt: skip


def _stream(recording: Path, seconds: float) -> StreamFiles:
    """The first seconds of a recording of any format, or of a session."""
    if is_session(recording):
        from spiked.offline.session import open_session

        stream = open_session(recording).stream(None)
    else:
        stream = next(iter(open_foreign([recording], recording, Choice()).streams.values()))
    n = round(seconds * stream.fs_hz)
    if n > stream.n_samples:
        raise ConfigError(f"{recording} is {stream.duration_s:.0f} s long; give --seconds at most that")
    return dataclasses.replace(stream, n_samples=n)


class Disk:
    """The most bytes that a folder held while the block ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Disk:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        total = 0
        for path in self.folder.rglob("*"):
            try:
                total += path.stat().st_blocks * 512 if path.is_file() else 0
            except OSError:  # gone meanwhile
                continue
        self.most = max(self.most, total)

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self._look()


def _cpu_s() -> float:
    """Processor time of this process and of those that it waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def _direct(
    stream: StreamFiles, params: dict[str, Any], folder: Path, threads: int, device: str
) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    told = export.write_binary(stream, folder / "recording.dat", lambda _f, _t: None)
    recording = {
        "gain_uv": told["gain_uv"],
        "fs_hz": stream.fs_hz,
        "positions_um": stream.positions_um.tolist(),
    }
    work = sorters.Work(recording, stream, params, [], folder, device, threads)
    options, settings, probe, _ = kilosort4.arguments(work)
    out = folder / "work" / sorters.OUTPUT
    job = {
        "options": options, "settings": settings, "binary": str(folder / "recording.dat"), "out": str(out), "device": device,
        "probe": {k: np.asarray(v).tolist() for k, v in probe.items() if k != "n_chan"}, "threads": threads,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    with Disk(folder / "work") as disk:
        started, cpu = time.perf_counter(), _cpu_s()
        done = subprocess.run(
            [sys.executable, "-c", DIRECT, str(folder / "job.json")],
            env=sort.environment(threads, device), capture_output=True, text=True,
        )  # fmt: skip
        wall, cpu = time.perf_counter() - started, _cpu_s() - cpu
    (folder / "recording.dat").unlink()
    if done.returncode != 0:
        raise SpikedError(f"Kilosort4 called directly failed: {done.stderr.strip().splitlines()[-1]}")
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "disk_bytes": disk.most, **_found(folder)}


def _ours(
    stream: StreamFiles, params: dict[str, Any], folder: Path, threads: int, device: str
) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "work").mkdir(parents=True)
    settings = presets.JobSettings(
        preset="default", sorter_params=params, device=device, threads=threads, guards={"canary_s": 0.0}
    )
    seconds: dict[str, float] = {}
    cpu = 0.0
    with Disk(folder / "work") as disk, Progress() as progress:
        job = Job(Session(folder, {stream.name: stream}, None), stream, settings, progress)
        job.folder = folder / "work"
        job.manifest = Manifest(job.folder)
        for stage in STAGES:
            started, before = time.perf_counter(), _cpu_s()
            files, result = getattr(job, stage)()
            seconds[stage] = round(time.perf_counter() - started, 2)
            cpu += (_cpu_s() - before) if stage in TIMED else 0.0
            job.manifest.finish(stage, time.time(), files, json.loads(json.dumps(result, default=float)), "")
    (folder / "work" / "sorter" / sorters.OUTPUT).rename(folder / "work" / sorters.OUTPUT)
    wall = sum(seconds[stage] for stage in TIMED)
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "stages_s": seconds,
        "disk_bytes": disk.most,
        **_found(folder),
    }


def _found(folder: Path) -> dict[str, int]:
    units = np.load(folder / "work" / sorters.OUTPUT / "spike_clusters.npy").ravel()
    return {"units": len(np.unique(units)), "spikes": len(units)}


def _same(a: Path, b: Path) -> bool:
    """Every spike at the same sample, in the same unit."""
    both = [
        [
            np.load(f / "work" / sorters.OUTPUT / f"{name}.npy").ravel()
            for name in ("spike_times", "spike_clusters")
        ]
        for f in (a, b)
    ]
    return all(np.array_equal(x, y) for x, y in zip(*both, strict=True))
