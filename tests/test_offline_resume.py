"""Jobs that are killed, starved and refused in the middle: nothing is lost, and what comes out is what would have."""

from __future__ import annotations

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

import numpy as np
import psutil
import pytest
from offline_jobs import begun, drained, offspring, queued, runner, state
from offline_rig import codes, neurons, session, stream

from spiked.cli import main
from spiked.errors import OfflineError
from spiked.offline import failures
from spiked.offline.job import run_offline
from spiked.offline.progress import STAGES, Step
from spiked.offline.queue import Queue

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def units(folder: Path) -> list[np.ndarray]:
    with np.load(folder / "offline/kilosort4/units.npz") as z:
        return [z["samples"], z["units"]]


def sorter_of(process: subprocess.Popen[str]) -> psutil.Process | None:
    found = [p for p in offspring(process) if "spiked.offline.sort_child" in p.cmdline()]
    return found[0] if found else None


def test_kill_9_at_every_stage_changes_nothing_of_the_result(tmp_path: Path) -> None:
    """The job's process, and in the sort the sorter's too; the runner goes on with what is left each time."""
    params = {"guards": {"canary_s": 1.5, "canary_from_s": 1.0}, "sorter_params": {"batch_size": 20_000}}
    folder = queued(tmp_path / "killed", **params)
    same = queued(tmp_path / "left", **params)
    drained(tmp_path / "left")
    recording = hashlib.sha256((folder / "mea.nwb").read_bytes()).digest()
    left, killed = list(STAGES), []
    first: dict[str, str] = {}
    with runner(tmp_path / "killed") as (process, events):
        for event in events:
            if event["event"] == "job" and event["state"] in ("done", "failed"):
                break
            if (
                event["event"] != "progress"
                or event["stage"] not in left
                or "finished before" in event["text"]
            ):
                continue
            stage = event["stage"]
            for name, when in begun(folder).items():
                assert first.setdefault(name, when) == when or name == "export", f"{name} ran twice"
            if stage in ("sort", "canary") and "starting" not in event["text"]:
                continue
            left.remove(stage)
            job = next(p for p in offspring(process) if "spiked.offline.job" in p.cmdline())
            job.kill()
            killed.append(stage)
            if stage == "export":
                assert hashlib.sha256((folder / "mea.nwb").read_bytes()).digest() == recording
        process.wait(60)
    assert killed == list(STAGES) and event["state"] == "done", event
    last = begun(folder)
    assert set(last) == set(STAGES)
    for mine, undisturbed in zip(units(folder), units(same), strict=True):
        np.testing.assert_array_equal(mine, undisturbed)
    report, other = (json.loads((f / "report.json").read_text()) for f in (folder, same))
    for key in ("offline_units", "merged_units", "accuracy_offline", "labels", "canary", "nwb"):
        assert {**report, "seconds": 0}[key] == {**other, "seconds": 0}[key], key
    assert report["canary"]["ran"] and report["guards"]["guards"]["peaks"]["sorter_gb"] > 0.1
    assert not list((folder / "offline/kilosort4").rglob("*.dat"))


def test_a_sorter_that_dies_fails_the_job_and_not_what_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Killed, crashed, stopped: each is told for what it is, and the job can be tried again every time."""
    folder = queued(tmp_path, guards={"stall_s": 3.0})
    for number, name, kind in (
        (signal.SIGKILL, "killed", "environment"),
        (signal.SIGSEGV, "crash", "environment"),
        (signal.SIGSTOP, "stall", "environment"),
    ):
        with runner(tmp_path) as (process, events):
            for event in events:
                if event["event"] == "progress" and event["stage"] == "sort" and "whitening" in event["text"]:
                    break
            sorter = sorter_of(process)
            assert sorter is not None
            sorter.send_signal(number)
            end = [e for e in events if e["event"] == "job"][-1]
            assert process.wait(60) == 0 and not sorter.is_running()
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
        steps: list[Step] = []
        report = run_offline(folder, {"device": "cpu", "sorter_params": {"batch_size": 20_000}, "guards": {"disk_gb": 0.001}}, steps.append)  # fmt: skip
        assert report["merged_units"] >= 1 and "failed" not in json.loads(
            (folder / "report.json").read_text()
        )
        assert not (folder / "offline/kilosort4/failure.json").exists()
        assert any(s.text == "export was finished before" or s.stage == "export" for s in steps)


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
        jobs = [p for p in psutil.Process(first.pid).children(recursive=True) if "spiked.offline.job" in p.cmdline()]  # fmt: skip
        for process in [*jobs[0].children(recursive=True), jobs[0]]:
            process.suspend()  # it stays at work however slow this computer is
        began = time.monotonic()
        second = subprocess.run(
            [*command, str(tmp_path / "two")], capture_output=True, text=True, timeout=120
        )
        assert second.returncode == 6 and time.monotonic() - began < 100
        (said,) = second.stderr.strip().splitlines()
        assert f"another job is working on {file}" in said and f"process {jobs[0].pid} " in said and "wait for it" in said  # fmt: skip
        assert not (tmp_path / "two/mea/report.json").exists()
    finally:
        for process in psutil.Process(first.pid).children(recursive=True):
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
