"""Jobs on a real Dask cluster: a scheduler, two workers, one of which is killed in the middle of a job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from test_offline_runner import begun, queued

from spiked.cli import main
from spiked.offline.queue import Queue

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


@contextmanager
def cluster(folder: Path, workers: int = 2) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """(address of the scheduler, processes of the workers), each worker with one thread and no nanny."""
    pytest.importorskip("distributed")
    told = folder / "scheduler.json"
    run = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
    ]
    with (folder / "dask.log").open("wb") as log:
        started = [subprocess.Popen([*run, "--scheduler-file", str(told)], stdout=log, stderr=log, env=ENV)]
        try:
            address = address_of(told)
            run = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]  # fmt: skip
            for k in range(workers):
                place = ["--local-directory", str(folder / f"worker{k}")]
                started.append(subprocess.Popen([*run, *place], stdout=log, stderr=log, env=ENV))
            yield address, started[1:]
        finally:
            for process in started:
                process.kill()
                process.wait()


def address_of(told: Path, within_s: float = 200.0) -> str:
    """What the scheduler has written of itself, once all of it is there."""
    until = time.monotonic() + within_s
    while True:
        try:
            return str(json.loads(told.read_text())["address"])
        except (OSError, ValueError):
            assert time.monotonic() < until, "the scheduler did not say where it is"
            time.sleep(0.1)


def submit(address: str, folder: Path) -> subprocess.Popen[str]:
    """`spiked sort FOLDER --scheduler ADDRESS` as its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", "spiked.cli", "sort", str(folder), "--set", "device=cpu", "--scheduler", address],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENV,
    )  # fmt: skip


def wait_line(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout is not None
    heard = []
    for line in process.stdout:
        heard.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"no {pattern} in {''.join(heard)[-2000:]}")


def busy(workers: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    (one,) = [w for w in workers if psutil.Process(w.pid).children()]
    return one


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_job_of_a_killed_worker_goes_on_with_the_other(tmp_path: Path) -> None:
    folder = queued(tmp_path)
    with cluster(tmp_path) as (address, workers):
        with submit(address, folder) as job:
            wait_line(job, "analyze:")
            before = begun(folder)
            one = busy(workers)
            family = psutil.Process(one.pid).children(recursive=True)
            one.kill()
            assert not psutil.wait_procs(family, 200)[1]
            assert job.stdout is not None
            rest = job.stdout.read()
            assert job.wait(600) == 0, rest[-2000:]
        assert "sort was finished before" in rest and "report:" in rest
        assert one.wait(60) == -signal.SIGKILL
        others = [w for w in workers if w is not one]
        assert all(w.poll() is None for w in others)
    after = begun(folder)
    assert {k: v for k, v in after.items() if k in ("preflight", "sort")} == {
        k: before[k] for k in ("preflight", "sort")
    }
    with Queue(tmp_path) as q:
        assert (q.job(1).state, len(q.jobs())) == ("done", 1)
    assert json.loads((folder / "state.json").read_text())["state"] == "done"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_on_the_cluster_is_cancelled_and_a_failed_one_is_told(tmp_path: Path) -> None:
    folder, short = queued(tmp_path / "a"), queued(tmp_path / "b", seconds=0.5)
    with cluster(tmp_path, 1) as (address, workers):
        with submit(address, folder) as job:
            wait_line(job, "sort: starting")
            with Queue(tmp_path / "a") as q:
                assert q.cancel(1) == "cancelling"
            assert job.communicate(timeout=400)[0] and job.returncode == 6
        with Queue(tmp_path / "a") as q:
            assert q.job(1).state == "cancelled"
        until = time.monotonic() + 90
        while psutil.Process(workers[0].pid).children() and time.monotonic() < until:
            time.sleep(0.05)
        assert not psutil.Process(workers[0].pid).children()
        with submit(address, short) as job:
            said = job.communicate(timeout=400)[0]
            assert job.returncode == 6 and "too short" in said.splitlines()[-1]
    with Queue(tmp_path / "b") as q:
        assert (q.job(1).state, q.job(1).kind) == ("failed", "biology")


def test_no_scheduler_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("spiked.offline.cluster.CONNECT_S", 2.0)
    folder = queued(tmp_path, seconds=0.5)
    assert main(["sort", str(folder), "--scheduler", "tcp://127.0.0.1:9"]) == 6
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("spiked: no Dask scheduler answers at tcp://127.0.0.1:9")
    with Queue(tmp_path) as q:
        assert q.job(1).state == "queued"


def test_without_dask_it_says_what_to_install(tmp_path: Path) -> None:
    queued(tmp_path, seconds=0.5)
    code = "import sys; sys.modules['distributed'] = None; from spiked.cli import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", code, "sort", str(tmp_path / "s"), "--scheduler", "tcp://127.0.0.1:9"]
    out = subprocess.run(run, capture_output=True, text=True, check=False)
    assert out.returncode == 2 and "pip install 'spiked[dask]'" in out.stderr
