"""Run the sorter in a child process, watch it, and read what it found."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from spiked.errors import OfflineError
from spiked.offline import phy, reading
from spiked.offline.failures import sorting_error
from spiked.offline.guards import sensors
from spiked.offline.guards.watch import Watch
from spiked.offline.manifest import write_json
from spiked.offline.progress import PHASES, bar, phases, sort_fraction
from spiked.offline.session import StreamFiles
from spiked.offline.sort_child import ERROR, OUTCOME
from spiked.offline.sorters import OUTPUT

POLL_S = 0.5
GRACE_S = 10.0  # what a sorter has to end in when it is told to
LARGE_BLOCK = str(4 << 30)
_TOLD = re.compile(r"^progress (\d+(?:\.\d*)?) (.*)$")
_BATCHES = re.compile(r"N batches: +(\d+)")  # in Kilosort4's log


def sorter_job(
    stream: StreamFiles,
    binary: Path | None,
    gain_uv: list[float],
    sorter: str,
    params: dict[str, Any],
    folder: Path,
    threads: int,
    memory_gb: float = 0.0,
    left_out: list[int] | None = None,
) -> dict[str, Any]:
    """The description of a sort that sort_child reads; JSON types only. Without `binary` it reads the recording itself."""
    return {
        "binary": "" if binary is None else str(binary),
        "source": reading.source_of(stream),
        "fs_hz": stream.fs_hz,
        "gain_uv": gain_uv,
        "positions_um": stream.positions_um.tolist(),
        "sorter": sorter,
        "params": params,
        "left_out": left_out or [],
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
    """Drains a child's stderr so that it never blocks; keeps the last tqdm bar, what it told and the last lines.

    `told` holds the last that it said of each thing it did, and is emptied up to the newest by who reads it.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(name="sorter-stderr", daemon=True)
        self._pipe = pipe
        self.bar: tuple[int, int] | None = None
        self.bars = 0  # how many updates were seen
        self.told: collections.deque[tuple[float, str]] = collections.deque()
        self.tail: collections.deque[str] = collections.deque(maxlen=40)

    def run(self) -> None:
        rest = ""
        while data := os.read(self._pipe.fileno(), 65536):
            *lines, rest = (rest + data.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
            for line in [*lines, rest]:
                if (found := bar(line)) is not None:
                    self.bar, self.bars = found, self.bars + 1
                elif line is rest or not line.strip():
                    continue
                elif told := _TOLD.match(line):
                    self._hear(float(told[1]), told[2])
                else:
                    self.tail.append(line)

    def _hear(self, fraction: float, text: str) -> None:
        if self.told and self.told[-1][1].split()[:1] == text.split()[:1]:
            self.told[-1] = fraction, text
        else:
            self.told.append((fraction, text))


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
    if (kept := phy.set_aside(folder, folder / OUTPUT)) is not None:
        say(0.0, f"{folder.name} was saved by hand in Phy; it stays as {kept.name}")
    shutil.rmtree(folder, ignore_errors=True)  # of a sort that did not end
    job_file = folder.with_name(folder.name + ".job.json")
    write_json(job_file, {**job, "device": device})
    started, kills = time.monotonic(), sensors.oom_kills()
    if watch is not None:
        watch.begin()
    child = subprocess.Popen(
        [sys.executable, "-m", "spiked.offline.sort_child", str(job_file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(job["threads"], device),
        process_group=0,  # what it starts ends with it
    )
    assert child.stderr is not None
    reader, doing = _Stderr(child.stderr), _progress_of(job)
    reader.start()
    try:
        _watch(child, reader, folder, started, timeout_s, say, watch, doing)
    finally:
        end(child)
        reader.join(5)
        child.stderr.close()
    for told in doing(reader):
        say(*told)
    if child.returncode != 0 or not (folder / OUTCOME).is_file():
        trace = folder / ERROR
        text = trace.read_text(encoding="utf-8") if trace.is_file() else "\n".join(reader.tail)
        now = sensors.oom_kills()
        more = None if kills is None or now is None else now - kills
        seen = watch.seen["peaks"] if watch is not None else None
        limited = bool(job["memory_gb"])
        raise sorting_error(job["sorter"], child.returncode, folder, text, more, seen, limited)
    job_file.unlink(missing_ok=True)
    return {"folder": folder.name, "seconds": time.monotonic() - started}


def end(child: subprocess.Popen[bytes]) -> None:
    """Tell a process to end if it runs, and insist after GRACE_S; what it left behind in a group of its own ends too."""
    for ask in (child.terminate, child.kill):
        if child.poll() is None:
            ask()
        try:
            child.wait(GRACE_S)
            break
        except subprocess.TimeoutExpired:
            continue
    child.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(
            child.pid, signal.SIGKILL
        )  # a group without its leader keeps the number from being given again


Doing = Callable[[_Stderr], list[tuple[float, str]]]


def _progress_of(job: dict[str, Any]) -> Doing:
    """What the child did since the last look, however late this one is, and how far it is now.

    From what it leaves: Kilosort4's log and bars, or what the sorter says itself.
    """
    if job["sorter"] != "kilosort4":
        return _said
    shanks = job["params"].get("shank_idx") or []
    return _Kilosort(Path(job["folder"]) / OUTPUT, shanks)


def _said(reader: _Stderr) -> list[tuple[float, str]]:
    passed = [reader.told.popleft() for _ in range(len(reader.told) - 1)]
    return [*passed, reader.told[0]] if reader.told else []


class _Kilosort:
    """Progress of Kilosort4: its log says the stage, its bars how far that is. One log for each shank."""

    def __init__(self, out: Path, shanks: list[int]) -> None:
        self._logs = [out / f"shank_{s}" / "kilosort4.log" for s in shanks] or [out / "kilosort4.log"]
        self._at, self._bars = (-1, -1), 0

    def __call__(self, reader: _Stderr) -> list[tuple[float, str]]:
        logs = {k: log.read_text(errors="replace") for k, log in enumerate(self._logs) if log.is_file()}
        begun = [at for k, log in logs.items() for p in phases(log) if (at := (k, p)) >= self._at]
        if not begun:
            return []
        *passed, now = begun
        if now != self._at:
            self._at, self._bars, reader.bar = now, reader.bars, None
        bar = reader.bar if reader.bar is not None and reader.bars > self._bars else (0, 0)
        return [*(self._step(at, self._all(logs[at[0]], at[1])) for at in passed), self._step(now, bar)]

    def _all(self, log: str, at: int) -> tuple[int, int]:
        """The bar of a stage that is over."""
        found = _BATCHES.search(log) if PHASES[at][1] in ("detection", "extraction") else None
        return (int(found[1]), int(found[1])) if found else (1, 1)

    def _step(self, where: tuple[int, int], bar: tuple[int, int]) -> tuple[float, str]:
        (k, at), (done, total) = where, bar
        text = f"Kilosort {PHASES[at][1]}" + (f", {done} of {total} batches" if total > 1 else "")
        if len(self._logs) > 1:
            text += f", shank {k + 1} of {len(self._logs)}"
        return (k + sort_fraction(at, done / total if total else 0.0)) / len(self._logs), text


def _watch(
    child: subprocess.Popen[bytes],
    reader: _Stderr,
    folder: Path,
    started: float,
    timeout_s: float,
    say: Callable[[float, str], None],
    watch: Watch | None,
    doing: Doing,
) -> None:
    """Say how far the child is until it ends; OfflineError('resource') after `timeout_s`."""
    say(0.0, "starting the sorter")
    while True:
        try:
            child.wait(POLL_S)
            return
        except subprocess.TimeoutExpired:
            pass
        told = doing(reader)
        for step in told:
            say(*step)
        if watch is not None:
            watch.look(child.pid, (told[-1:], reader.bars))
        if time.monotonic() - started > timeout_s:
            raise OfflineError(
                f"{folder.name}: no result after {timeout_s:.0f} s; allow more with timeout_s",
                "resource",
                "sort",
                "timeout",
            )


def read(folder: Path) -> dict[str, Any]:
    """What the sorter found, in time order: {"samples" (spikes,) int64 indices, "units" (spikes,) int64,
    "ks_label" {unit: str}, "contamination" {unit: fraction}}; the last two only from Kilosort."""
    out = folder / OUTPUT
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
