"""Jobs in a real queue, and the runner's process: what the tests of jobs that die, fail and go on share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from offline_rig import codes, neurons, session, stream

from spiked.offline.queue import Queue
from spiked.offline.task import Task

SECONDS, UNITS = 6.0, 3
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def queued(root: Path, name: str = "s", seconds: float = SECONDS, **params: Any) -> Path:
    """A session with neurons and its job in the queue of `root`."""
    pytest.importorskip("kilosort")
    info = stream()
    data, samples, units = neurons(info, seconds, UNITS)
    folder = session(root / name, info, codes(info, data))
    np.savez(folder / "mea.truth.npz", samples=samples, units=units, snr=np.full(UNITS, 20.0))
    (folder / "state.json").write_text(json.dumps({"state": "queued", "pid": 1, "started": "", "error": ""}))
    with Queue(root) as q:
        q.enqueue(Task.of_session(folder, {"device": "cpu", **params}))
    return folder


@contextmanager
def runner(
    root: Path, runtime: Path = Path("/dev/shm")
) -> Iterator[tuple[subprocess.Popen[str], Iterator[dict[str, Any]]]]:
    """The runner's process and its events, up to its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "spiked.offline.runner", str(root), "--runtime", str(runtime)],
        stdout=subprocess.PIPE, text=True, env=ENV,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process, map(json.loads, process.stdout)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def drained(root: Path) -> list[dict[str, Any]]:
    with runner(root) as (process, events):
        heard = list(events)
        assert process.wait() == 0
    return heard


def state(folder: Path) -> str:
    return str(json.loads((folder / "state.json").read_text())["state"])


def begun(folder: Path) -> dict[str, str]:
    """When each finished stage was begun."""
    file = folder / "offline/kilosort4/stages.json"
    return (
        {k: v["started"] for k, v in json.loads(file.read_text())["stages"].items()} if file.exists() else {}
    )


def offspring(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process], within_s: float = 90.0) -> bool:
    return not psutil.wait_procs(processes, within_s)[1]
