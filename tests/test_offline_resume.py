"""Jobs that are killed, starved and refused in the middle: nothing is lost, and what comes out is what would have."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from offline_jobs import ENV, begun, offspring, queued, runner, state
from offline_rig import codes, neurons, session, stream

from spiked.cli import main
from spiked.errors import OfflineError
from spiked.offline import failures
from spiked.offline.job import run_offline
from spiked.offline.progress import STAGES, Step
from spiked.offline.queue import Queue
from spiked.offline.task import Task
from spiked.record import nwbfile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def units(folder: Path) -> list[np.ndarray]:
    with np.load(folder / "offline/kilosort4/units.npz") as z:
        return [z["samples"], z["units"]]


def runs(process: psutil.Process, module: str) -> bool:
    """Whether it runs this module; False for one that has ended meanwhile."""
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def sorter_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    found = [p for p in offspring(process) if runs(p, "spiked.offline.sort_child")]
    return found[0] if found else None


KILLED = """
import json, os, signal, sys
import spikeinterface.core, spikeinterface.metrics, spikeinterface.postprocessing
from spiked.offline.job import run_offline
from spiked.offline.manifest import Manifest
from spiked.offline.progress import STAGES
from pathlib import Path

def run(folder, stage):
    child = os.fork()
    if child == 0:
        def at(step):
            begins = "starting" in step.text if stage in ("canary", "sort") else True
            if step.stage == stage and "finished before" not in step.text and begins:
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            run_offline(folder, json.loads(sys.argv[3]), at)
            os._exit(0)
        except BaseException as e:
            print("ERROR", e, file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    stages = Manifest(Path(folder) / "offline/kilosort4").stages
    print(json.dumps([stage, os.waitstatus_to_exitcode(status), {k: v["started"] for k, v in stages.items()}]), flush=True)

run(sys.argv[2], "")
for stage in [*STAGES, ""]:
    run(sys.argv[1], stage)
"""


def test_kill_9_at_every_stage_changes_nothing_of_the_result(tmp_path: Path) -> None:
    """A process for each stage, which kills itself there; what is sorted in the end is what an undisturbed job finds."""
    params = {
        "device": "cpu", "threads": 1, "guards": {"canary_s": 1.5, "canary_from_s": 1.0}, "sorter_params": {"batch_size": 20_000},
    }  # fmt: skip
    folder, same = (queued(tmp_path / name) for name in ("killed", "left"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder), str(same), json.dumps(params)],
        capture_output=True, text=True, env=ENV, timeout=1500,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [(stage, code) for stage, code, _ in rows] == [("", 0), *((s, -9) for s in STAGES), ("", 0)], done.stderr[-3000:]  # fmt: skip
    first: dict[str, str] = {}
    for stage, _, began in rows[1:]:
        for name, when in began.items():
            again = name in (
                "export",
                "compare",
                "report",
            )  # what is read again, and what is always told anew
            assert first.setdefault(name, when) == when or again, (
                f"{name} ran twice, the second time at {stage}"
            )
    with h5py.File(folder / "mea.nwb") as one, h5py.File(same / "mea.nwb") as other_file:
        np.testing.assert_array_equal(one[nwbfile.DATA][:], other_file[nwbfile.DATA][:])
    for mine, undisturbed in zip(units(folder), units(same), strict=True):
        np.testing.assert_array_equal(mine, undisturbed)
    report, other = (json.loads((f / "report.json").read_text()) for f in (folder, same))
    for key in ("offline_units", "merged_units", "accuracy_offline", "labels", "merge", "nwb", "quality"):
        assert report[key] == other[key], key
    assert report["canary"]["ran"] and report["guards"]["guards"]["peaks"]["sorter_gb"] > 0.1
    assert "tried beforehand" in (folder / "report.md").read_text()
    assert not [
        p for p in (folder / "offline/kilosort4").iterdir() if p.suffix == ".dat" or "canary" in p.name
    ]


def test_a_sorter_that_dies_fails_the_job_and_not_what_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Killed, crashed, stopped: each is told for what it is, and the job can be tried again every time."""
    folder = queued(tmp_path, guards={"stall_s": 10.0})
    for number, name, kind in (
        (signal.SIGKILL, "killed", "environment"),
        (signal.SIGSEGV, "crash", "environment"),
        (signal.SIGSTOP, "stall", "environment"),
    ):
        with runner(tmp_path) as (process, events):
            for event in events:
                if event["event"] == "progress" and event["stage"] == "sort" and "starting" in event["text"]:
                    break
            until = time.monotonic() + 200
            while (sorter := sorter_of(process)) is None and time.monotonic() < until:
                time.sleep(0.02)
            assert sorter is not None
            sorter.send_signal(number)
            end = [e for e in events if e["event"] == "job"][-1]
            assert process.wait(200) == 0 and not sorter.is_running()
        assert end["state"] == "failed" and end["failure"]["name"] == name, end
        with Queue(tmp_path) as q:
            row = q.job(1)
            assert (row.state, row.kind, row.failure["class"]) == ("failed", kind, kind)
            q.retry(1)
            assert q.job(1).failure == {}
        assert set(begun(folder)) == {"preflight", "canary", "export"} and state(folder) == "failed"
    # told everywhere
    with Queue(tmp_path) as q:
        q.claim()
        q.fail(1, row.kind, row.text, row.failure)
    assert main(["jobs", "show", "1", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "class: environment (stop and fix): stall, in stage sort" in shown
    assert "to do: look whether the disk" in shown and "evidence: guard stall" in shown
    told = json.loads((folder / "report.json").read_text())["failed"]
    assert (
        told == row.failure == json.loads((folder / "offline/kilosort4/failure.json").read_text())["failed"]
    )
    assert "**what to do**: look whether" in (folder / "report.md").read_text()
    assert "neither computed nor read" in (folder / "report.html").read_text()
    assert main(["report", str(folder)]) == 0
    assert "stall, in stage sort" in capsys.readouterr().out


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    """A real file system of its own; skips where this user may not mount one."""
    at.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "spiked-test", str(at)], capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_disk_that_fills_up_is_told_cleared_and_gone_on_with(tmp_path: Path) -> None:
    info = stream()
    data, _, _ = neurons(info, 5.0, 3)
    with small_disk(tmp_path / "disk", "90m") as disk:
        folder = session(disk / "s", info, codes(info, data))
        recording = hashlib.sha256((folder / "mea.nwb").read_bytes()).digest()
        filler = disk / "somebody-elses.file"

        def fill(leave_mb: float) -> Any:
            def at(step: Step) -> None:
                if step.stage == "sort" and not filler.exists():
                    free = os.statvfs(disk)
                    with filler.open("wb") as f:
                        f.truncate(0)
                        os.posix_fallocate(f.fileno(), 0, int(free.f_bavail * free.f_frsize - leave_mb * 1e6))

            return at

        def fails(leave_mb: float, guards: dict[str, float]) -> dict[str, Any]:
            with pytest.raises(OfflineError) as e:
                run_offline(folder, {"device": "cpu", "sorter_params": {"batch_size": 20_000}, "guards": guards}, fill(leave_mb))  # fmt: skip
            assert hashlib.sha256((folder / "mea.nwb").read_bytes()).digest() == recording
            assert not list((folder / "offline").rglob("*.dat"))
            filler.unlink()
            return failures.told(e.value)

        told = fails(15.0, {"disk_gb": 0.02})
        assert (told["class"], told["name"], told["stage"]) == ("resource", "disk", "sort")
        assert "GB are free for the results (limit 0.02 GB)" in told["what"]
        assert json.loads((folder / "report.json").read_text())["failed"]["name"] == "disk"
        told = fails(0.0, {"disk_gb": 0.0})
        assert (told["class"], told["name"]) == ("resource", "disk_full") and "free space" in told["remedy"]
        params = {"device": "cpu", "sorter_params": {"batch_size": 20_000}, "guards": {"disk_gb": 0.001}}
        command = [sys.executable, "-m", "spiked.offline.job", str(folder), "--json-progress", "--params", json.dumps(params)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=700, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert '"text": "preflight was finished before"' in done.stdout
        report = json.loads((folder / "report.json").read_text())
        assert report["merged_units"] >= 1 and "failed" not in report
        assert not (folder / "offline/kilosort4/failure.json").exists()


def test_two_commands_on_one_recording_are_not_at_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    info = stream()
    data, _, _ = neurons(info, 4.0, 3)
    file = session(tmp_path / "s", info, codes(info, data)) / "mea.nwb"
    command = [sys.executable, "-m", "spiked.cli", "sort", str(file), "--set", "device=cpu", "--out"]
    first = subprocess.Popen([*command, str(tmp_path / "one")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert first.stdout is not None
    try:
        for line in first.stdout:
            if "starting" in line:
                break
        jobs = [p for p in psutil.Process(first.pid).children(recursive=True) if runs(p, "spiked.offline.job")]  # fmt: skip
        jobs[0].suspend()  # it stays at work however slow this computer is
        for process in jobs[0].children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        second = subprocess.run(  # it does not wait for the first, which does not go on
            [*command, str(tmp_path / "two")], capture_output=True, text=True, timeout=400
        )
        assert second.returncode == 6
        (said,) = second.stderr.strip().splitlines()
        assert f"another job is working on {file}" in said and f"process {jobs[0].pid} " in said and "wait for it" in said  # fmt: skip
        assert not (tmp_path / "two/mea/report.json").exists()
    finally:
        for process in psutil.Process(first.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends with the one before it
                process.kill()
        first.kill()
        first.communicate()


def test_what_fails_for_the_computers_sake_fails_in_the_canary_and_biology_does_not(tmp_path: Path) -> None:
    info = stream()
    data, _, _ = neurons(info, 8.0, 3)
    data[:60_000] = np.random.default_rng(1).normal(0, 5.0, (60_000, 16))
    folder = session(tmp_path / "s", info, codes(info, data))
    guards = {"canary_s": 2.0, "canary_from_s": 5.0}
    params = {"device": "cpu", "guards": guards, "sorter_params": {"batch_size": 20_000}}
    steps: list[Step] = []
    with pytest.raises(OfflineError, match="on the first 2 s already") as e:
        run_offline(folder, {**params, "memory_gb": 0.5, "retries": 0}, steps.append)
    assert (e.value.kind, e.value.name, e.value.stage) == ("resource", "host_memory", "canary")
    assert "export" not in {s.stage for s in steps}

    class Enough(Exception):
        pass

    def until_sorting(step: Step) -> None:
        if step.stage == "sort":
            raise Enough

    with pytest.raises(OfflineError):  # an unknown exception of ours is told as one
        run_offline(folder, params, until_sorting)
    told = json.loads((folder / "offline/kilosort4/stages.json").read_text())["stages"]["canary"]["result"]
    assert (told["ran"], told["outcome"]) == (True, "biology") and "too few spikes" in told["text"]
    assert not [p for p in (folder / "offline/kilosort4").iterdir() if p.name.startswith("canary")]


REUSED = """
import subprocess, sys, time
from pathlib import Path
from spiked.offline.lock import alone
from spiked.offline.owner import Owner
from spiked.offline.queue import Queue

root = Path(sys.argv[1])
hold = '''
import sys
from pathlib import Path
from spiked.offline.lock import alone
from spiked.offline.queue import Queue
with alone(Path(sys.argv[1]) / "results", Path(sys.argv[1]) / "r.nwb"):
    Queue(sys.argv[1]).claim()
    print("held", flush=True)
    sys.stdin.read()
'''
first = subprocess.Popen([sys.executable, "-c", hold, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
first.stdout.readline()
with Queue(root) as q:
    assert not q.job(1).stale
    first.kill()
    first.wait()
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(first.pid - 1))
    second = subprocess.Popen(["sleep", "600"])
    time.sleep(0.2)
    named = Owner.read((root / "results/job.lock").read_text())
    print("same" if second.pid == first.pid == named.pid == q.job(1).owner.pid else "other", flush=True)
    assert q.job(1).stale and q.claim().starts == 2
with alone(root / "results", root / "r.nwb"):
    print("taken", flush=True)
second.kill()
"""


def test_a_number_that_was_given_to_another_process_is_not_the_owner(tmp_path: Path) -> None:
    """In a world of process numbers of its own, where the next one can be chosen."""
    (tmp_path / "r.nwb").touch()
    with Queue(tmp_path) as q:
        q.enqueue(Task.of_session(tmp_path / "s", {}))
    command = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, "-c", REUSED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    if "unshare" in done.stderr or "ns_last_pid" in done.stderr or done.stdout.split()[:1] == ["other"]:
        pytest.skip(f"process numbers cannot be chosen here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0 and done.stdout.split() == ["same", "taken"], done.stderr
