"""Run the sorter in a child process, watch it, and read what it found."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from spiked.errors import OfflineError
from spiked.offline.failures import error_of, sorting_error
from spiked.offline.guards import sensors
from spiked.offline.guards.watch import Watch
from spiked.offline.manifest import write_json
from spiked.offline.progress import PHASES, bar, phase, sort_fraction
from spiked.offline.session import StreamFiles

POLL_S = 0.5
GRACE_S = 10.0  # what a sorter has to end in when it is told to
LARGE_BLOCK = str(4 << 30)


def sorter_job(
    stream: StreamFiles,
    binary: Path,
    gain_uv: list[float],
    sorter: str,
    params: dict[str, Any],
    folder: Path,
    threads: int,
    memory_gb: float = 0.0,
) -> dict[str, Any]:
    """The description of a sort that sort_child reads; JSON types only."""
    return {
        "binary": str(binary),
        "fs_hz": stream.fs_hz,
        "gain_uv": gain_uv,
        "positions_um": stream.positions_um.tolist(),
        "sorter": sorter,
        "params": params,
        "folder": str(folder),
        "threads": threads,
        "memory_gb": memory_gb,
        "parent": os.getpid(),
    }


def environment(threads: int, device: str) -> dict[str, str]:
    """The child's environment: thread limits and, on a CPU, a malloc that keeps what it has.

    Torch's OpenMP threads slow each other down many times over when the processor is shared, and glibc gives
    large blocks back to the system after every batch (a third of Kilosort's CPU time).
    """
    env = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        env[name] = str(threads)
    env["MPLBACKEND"] = "Agg"
    if device == "cpu":
        env["MALLOC_MMAP_THRESHOLD_"] = env["MALLOC_TRIM_THRESHOLD_"] = LARGE_BLOCK
    return env


class _Stderr(threading.Thread):
    """Drains a child's stderr so that it never blocks; keeps the last tqdm bar and the last lines."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(name="sorter-stderr", daemon=True)
        self._pipe = pipe
        self.bar: tuple[int, int] | None = None
        self.bars = 0  # how many updates were seen
        self.tail: collections.deque[str] = collections.deque(maxlen=40)

    def run(self) -> None:
        rest = ""
        while data := os.read(self._pipe.fileno(), 65536):
            *lines, rest = (rest + data.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
            for line in [*lines, rest]:
                if (found := bar(line)) is not None:
                    self.bar, self.bars = found, self.bars + 1
                elif line.strip() and line is not rest:
                    self.tail.append(line)


def run(
    job: dict[str, Any],
    device: str,
    timeout_s: float,
    say: Callable[[float, str], None],
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Sort: {"folder", "seconds"}, or a classified OfflineError. The child never outlives the call.

    `watch` looks at the child twice a second and may end it.
    """
    folder = Path(job["folder"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    job_file = folder.with_name(folder.name + ".job.json")
    write_json(job_file, job)
    started, kills = time.monotonic(), sensors.oom_kills()
    if watch is not None:
        watch.begin()
    child = subprocess.Popen(
        [sys.executable, "-m", "spiked.offline.sort_child", str(job_file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(job["threads"], device),
    )
    assert child.stderr is not None
    reader = _Stderr(child.stderr)
    reader.start()
    try:
        _watch(child, reader, folder, started, timeout_s, say, watch)
    finally:
        end(child)
        reader.join(5)
        child.stderr.close()
    if (
        child.returncode != 0
        or error_of(folder) != ""
        or not (folder / "sorter_output" / "ops.npy").is_file()
    ):
        now = sensors.oom_kills()
        more = None if kills is None or now is None else now - kills
        seen = watch.seen["peaks"] if watch is not None else None
        tail = "\n".join(reader.tail)
        raise sorting_error(job["sorter"], child.returncode, folder, tail, more, seen)
    job_file.unlink(missing_ok=True)
    return {"folder": folder.name, "seconds": time.monotonic() - started}


def end(child: subprocess.Popen[bytes]) -> None:
    """Tell a process to end if it runs, and insist after GRACE_S."""
    for ask in (child.terminate, child.kill):
        if child.poll() is None:
            ask()
        try:
            child.wait(GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _watch(
    child: subprocess.Popen[bytes],
    reader: _Stderr,
    folder: Path,
    started: float,
    timeout_s: float,
    say: Callable[[float, str], None],
    watch: Watch | None,
) -> None:
    """Say how far the child is until it ends; OfflineError('resource') after `timeout_s`."""
    log, at, bars = folder / "sorter_output" / "kilosort4.log", -1, 0
    say(0.0, "starting Kilosort")
    while True:
        try:
            child.wait(POLL_S)
            return
        except subprocess.TimeoutExpired:
            pass
        now_at = phase(log.read_text(errors="replace")) if log.is_file() else -1
        if now_at != at:
            at, bars, reader.bar = now_at, reader.bars, None
        if at >= 0:
            done, total = reader.bar if reader.bar is not None and reader.bars > bars else (0, 0)
            within = done / total if total else 0.0
            text = f"Kilosort {PHASES[at][1]}" + (f", {done} of {total} batches" if total > 1 else "")
            say(sort_fraction(at, within), text)
        if watch is not None:
            watch.look(child.pid, (at, reader.bars))
        if time.monotonic() - started > timeout_s:
            raise OfflineError(
                f"{folder.name}: no result after {timeout_s:.0f} s; allow more with timeout_s",
                "resource",
                "sort",
                "timeout",
            )


def read(folder: Path) -> dict[str, Any]:
    """What Kilosort found, in time order: {"samples" (spikes,) int64 indices, "units" (spikes,) int64,
    "ks_label" {unit: str}, "contamination" {unit: fraction}}."""
    out = folder / "sorter_output"
    samples = np.load(out / "spike_times.npy").ravel().astype(np.int64)
    units = np.load(out / "spike_clusters.npy").ravel().astype(np.int64)
    order = np.argsort(samples, kind="stable")
    return {
        "samples": samples[order],
        "units": units[order],
        "ks_label": _column(out / "cluster_KSLabel.tsv", str),
        "contamination": {
            u: float(v) / 100 for u, v in _column(out / "cluster_ContamPct.tsv", float).items()
        },
    }


def _column(path: Path, kind: Callable[[str], Any]) -> dict[int, Any]:
    """A Phy .tsv with a cluster_id column and one value column."""
    if not path.is_file():
        return {}
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    return {int(row[0]): kind(row[1]) for row in rows}
