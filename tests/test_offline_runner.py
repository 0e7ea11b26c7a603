"""Real jobs through the queue's runner, killed, cancelled, short of memory, and short of a GPU."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from offline_jobs import all_gone, begun, drained, offspring, queued, runner, state

from spiked import lease
from spiked.cli import main
from spiked.errors import OfflineError
from spiked.offline import queue
from spiked.offline.nwb_units import read_units
from spiked.offline.progress import STAGES
from spiked.offline.queue import Queue
from spiked.offline.runner import Runner
from spiked.offline.standby import Standby
from spiked.offline.task import Task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MEMORY_GB = (
    1.75  # Kilosort allocates 1.98 GB for 359,000 samples of 16 channels at once, 1.60 for half of them
)


@pytest.mark.long
def test_killed_at_every_stage_it_goes_on_with_the_next(tmp_path: Path) -> None:
    folder = queued(tmp_path)
    first: dict[str, str] = {}
    kills = 0
    for stage in STAGES:
        if stage in begun(folder):  # was done before the last kill came
            continue
        kills += 1
        with runner(tmp_path) as (process, events):
            for event in events:
                if (
                    event["event"] == "progress"
                    and event["stage"] == stage
                    and "finished before" not in event["text"]
                ):
                    break
            else:
                raise AssertionError(f"the job ended before {stage}")
            children = offspring(process)
            process.kill()
            assert all_gone(children), stage
        with Queue(tmp_path) as q:
            assert q.job(1).stale and state(folder) == "offline"
        for name, when in begun(folder).items():
            again = name in ("export", "compare", "report")  # follow the export, whose copy goes with the job
            assert first.setdefault(name, when) == when or again, f"{name} ran twice"
    drained(tmp_path)
    with Queue(tmp_path) as q:
        row = q.job(1)
        assert row.state == "done" and Path(row.report).is_file()
        assert sum("is gone" in text for _, _, text in q.log(1)) == kills >= 8
    last = begun(folder)
    assert set(last) == set(STAGES) and state(folder) == "done"
    for name in set(STAGES) - {"export", "compare", "report"}:
        assert last[name] == first.get(name, last[name])
    assert not (folder / "offline/kilosort4/recording.dat").exists()
    assert json.loads((folder / "report.json").read_text())["merged_units"] >= 1
    # once more from a stage on, with the command
    assert main(["sort", str(folder), "--recompute", "labels"]) == 0
    again = begun(folder)
    assert {k for k in STAGES if again[k] == last[k]} == {"preflight", "canary", "export", "sort", "analyze"}
    assert read_units(folder / "mea.nwb")
    with Queue(tmp_path) as q:
        assert [r.state for r in q.jobs()] == ["done"]


def test_a_killed_job_goes_on_and_a_cancelled_one_ends(tmp_path: Path) -> None:
    folder = queued(tmp_path)
    kills = 0
    with runner(tmp_path) as (process, events):
        for event in events:
            if event["event"] == "progress" and event["stage"] == "sort" and "starting" in event["text"]:
                family = offspring(process)
                if kills == 0:
                    psutil.Process(process.pid).children()[0].kill()
                    kills += 1
                    assert all_gone(family)
                else:
                    with Queue(tmp_path) as q:
                        assert q.cancel(1) == "cancelling"
            if event["event"] == "job" and event["state"] == "queued":
                assert "exit -9" in event["text"]
            if event["event"] == "job" and event["state"] == "cancelled":
                break
        assert all_gone(family) and process.wait(120) == 0
    with Queue(tmp_path) as q:
        assert q.job(1).state == "cancelled"
        assert [s for _, s, _ in q.log(1)] == [
            "queued",
            "running",
            "queued",
            "running",
            "running",
            "cancelled",
        ]
    assert state(folder) == "done" and set(begun(folder)) == {"preflight", "canary", "export"}


def test_a_runner_that_is_told_to_stop_puts_its_job_back(tmp_path: Path) -> None:
    folder = queued(tmp_path)
    with runner(tmp_path) as (process, events):
        for event in events:
            if event["event"] == "progress" and event["stage"] == "sort":
                break
        family = offspring(process)
        process.send_signal(signal.SIGINT)  # the terminal's Ctrl-C is for the daemon
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        rest = list(events)
        assert process.wait(120) == 130 and all_gone(family)
    assert rest[-1]["state"] == "queued" and state(folder) == "queued"
    with Queue(tmp_path) as q:
        assert (q.job(1).state, q.job(1).starts, q.job(1).owner) == ("queued", 0, None)


def test_out_of_memory_is_tried_again_with_halved_batches(tmp_path: Path) -> None:
    """A batch of all the recording does not fit into what the sorter may have; a half or a quarter of it does."""
    seconds = 18.0
    folder = queued(
        tmp_path,
        seconds=seconds,
        sorter_params={"batch_size": int(seconds * 20_000) - 1000},
        memory_gb=MEMORY_GB,
    )
    events = drained(tmp_path)
    said = [e.get("text", "") for e in events]
    assert events[-1]["state"] == "done", said
    result = json.loads((folder / "offline/kilosort4/stages.json").read_text())["stages"]["sort"]["result"]
    tried = result["out_of_memory"]
    assert 1 <= len(tried) <= 2 and all("memory is full" in t for t in tried)
    assert result["batch_size"] == 359_000 // 2 ** len(tried)
    assert any("again with batches of 179500" in text for text in said)


@pytest.mark.long
def test_when_nothing_fits_the_job_fails_as_short_of_memory(tmp_path: Path) -> None:
    folder = queued(tmp_path, memory_gb=0.8)
    events = drained(tmp_path)
    with Queue(tmp_path) as q:
        row = q.job(1)
    assert (row.state, row.kind) == ("failed", "resource") and "smaller batch_size" in row.text
    assert sum("out of memory; again" in e.get("text", "") for e in events) == 2
    assert state(folder) == "failed"


def test_a_job_for_the_gpu_waits_for_live_sorting_and_gives_way_to_it(tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    queued(tmp_path, device="cuda")
    live = lease.hold_for_live(runtime)
    assert live is not None
    heard: list[dict[str, Any]] = []
    held: list[lease.Lease | None] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "job" and event["state"] == "running" and not held:
            held.append(lease.hold_for_live(runtime))  # before the job finds out that there is no GPU
        heard.append(event)

    doing = Runner(tmp_path, hear, runtime=runtime)
    drain = threading.Thread(target=doing.drain)

    def wait_for(event: str, state: str | None = None) -> None:
        until = time.monotonic() + 300
        while not any(e["event"] == event and state in (None, e.get("state")) for e in list(heard)):
            assert time.monotonic() < until, f"no {event} {state} in {heard}"
            time.sleep(0.02)

    drain.start()
    wait_for("waits")
    live.close()
    wait_for("job", "running")
    wait_for("job", "queued")
    (again,) = held
    assert again is not None and drain.is_alive()
    gave = next(e for e in heard if e["event"] == "job" and e["state"] == "queued")
    assert gave["text"] == "gave the GPU to live sorting"
    doing.stop()
    drain.join(200)
    again.close()
    with Queue(tmp_path) as q:
        assert (q.job(1).state, q.job(1).starts) == ("queued", 0)


def test_two_runners_of_one_queue_take_turns(tmp_path: Path) -> None:
    queued(tmp_path, "a", seconds=0.5)  # too short: fails in preflight
    queued(tmp_path, "b", seconds=0.5)
    heard: list[list[dict[str, Any]]] = [[], []]
    both = [threading.Thread(target=Runner(tmp_path, h.append).drain) for h in heard]
    for t in both:
        t.start()
    for t in both:
        t.join(600)
    running = [e["session"] for h in heard for e in h if e["event"] == "job" and e["state"] == "running"]
    assert sorted(running) == ["a", "b"]
    with Queue(tmp_path) as q:
        assert [(r.state, r.kind, r.starts) for r in q.jobs()] == [("failed", "biology", 1)] * 2


def test_an_end_that_could_not_be_noted_is_noted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue cannot be written just when a job ends: its owner lives on, so nobody else would ever take the job."""
    monkeypatch.setattr(queue, "WAIT_S", 0.2)
    damaged = tmp_path / "s"
    damaged.mkdir()
    (damaged / "a.nwb").write_bytes(b"")
    with Queue(tmp_path) as q:
        job, _ = q.enqueue(Task.of_session(damaged, {"device": "cpu"}))
    other = sqlite3.connect(tmp_path / queue.NAME, isolation_level=None)
    runs = []

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "failed":
            runs.append(event)
            if len(runs) == 1:
                other.execute("BEGIN IMMEDIATE")  # as a full disk or a stuck reader would

    standby = Standby(tmp_path, 0, tmp_path)
    standby._runner.tell = tell
    with pytest.raises(OfflineError, match="locked"):
        standby._runner.drain()
    other.execute("ROLLBACK")
    other.close()
    with Queue(tmp_path) as q:
        assert q.job(job).state == "running" and not q.job(job).stale
    assert standby._anything()
    standby._runner.drain()
    with Queue(tmp_path) as q:
        assert q.job(job).state == "failed" and [s for _, s, _ in q.log(job)] == [
            "queued",
            "running",
            "running",
            "failed",
        ]
    assert not standby._anything()


def test_a_session_that_is_still_recorded_keeps_its_state(tmp_path: Path) -> None:
    """Sorting it fails, and must not make the daemon's next start take it for one that was closed."""
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "a.nwb").write_bytes(b"")
    with Queue(tmp_path) as q:
        job, _ = q.enqueue(Task.of_session(folder, {"device": "cpu"}))
    told = {"state": "recording", "pid": 1, "started": "", "error": ""}
    (folder / "state.json").write_text(json.dumps(told))
    assert main(["jobs", "run", "--folder", str(tmp_path)]) == OfflineError.exit_code
    assert json.loads((folder / "state.json").read_text()) == told
    with Queue(tmp_path) as q:
        assert q.job(job).state == "failed"
    assert main(["jobs", "run", "1", "--folder", str(tmp_path)]) == OfflineError.exit_code
    assert main(["jobs", "run", "7", "--folder", str(tmp_path)]) == OfflineError.exit_code
