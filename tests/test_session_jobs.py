"""From the end of a session to its offline job, with the real programs, whoever dies in between."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from session_rig import rehearsal

from spiked.errors import SpikedError
from spiked.offline.queue import NAME, Queue, Row
from spiked.rehearsal import Rehearsal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
OFFLINE = {"enabled": True, "device": "cpu"}


def until(what: Callable[[], Any], timeout_s: float = 300.0) -> Any:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except (SpikedError, KeyError):  # the daemon does not answer yet, or has no session yet
            pass
        time.sleep(0.1)
    raise AssertionError(f"nothing within {timeout_s} s")


def jobs(root: Path) -> list[Row]:
    with Queue(root) as q:
        return q.jobs()


def state(folder: Path) -> str:
    return str(json.loads((folder / "state.json").read_text())["state"])


def states(folder: Path) -> list[str]:
    """The session's states so far, as its log has them."""
    *lines, _ = (folder / "log.jsonl").read_text().split("\n")  # the last one may be half there
    return [n["state"] for n in map(json.loads, lines) if n["event"] == "state"]


def held(r: Rehearsal) -> psutil.Process | None:
    """The process that sorts, once it runs: else it may be done before the next session records."""
    assert r.daemon is not None
    for p in psutil.Process(r.daemon.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "spiked.offline.job" in p.cmdline():
                p.suspend()
                return p
    return None


def test_a_daemon_killed_between_the_end_and_the_queue_sorts_at_its_next_start(tmp_path: Path) -> None:
    root = tmp_path / "sessions"
    Queue(root).close()
    with rehearsal(tmp_path, seconds=300.0, offline=OFFLINE) as r:
        folder = Path(
            until(lambda: r.status()["streams"]["sim"]["samples"] > 100_000 and r.status()["folder"])
        )
        writer = sqlite3.connect(root / NAME, timeout=60, isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")  # the daemon cannot queue its session before it is killed
        r.control("stop_session")
        until(lambda: state(folder) == "queued")
        assert r.daemon is not None
        r.daemon.kill()
        r.daemon.wait()
        writer.execute("ROLLBACK")
        writer.close()
    assert jobs(root) == []
    config = r.config.model_dump(mode="json")
    config["stream"][0]["wait_s"] = 900.0  # for samples, which do not come: the daemon stays
    for _ in range(2):  # a second start finds the job and makes no other
        with Rehearsal(tmp_path / "again", None, config) as again:
            until(lambda: [j for j in jobs(root) if j.state == "running" and not j.stale and j.stage])
            until(lambda: again.status()["jobs"]["running"] == 1)
        (job,) = jobs(root)
        assert (job.state, job.starts, job.name) == ("queued", 0, folder.name) and state(folder) == "queued"


def test_a_session_is_sorted_while_the_next_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("kilosort")
    root = tmp_path / "sessions"
    r = rehearsal(tmp_path, seconds=1800.0, offline=OFFLINE)
    r.run_args = ("--daemon",)
    with r:
        first = Path(
            until(lambda: r.status()["streams"]["sim"]["samples"] > 100_000 and r.status()["folder"])
        )
        r.control("stop_session")
        until(lambda: r.status()["jobs"].get("now"))
        sorting = until(lambda: held(r))
        r.control("start_session")
        second = until(lambda: (s := r.status())["state"] == "recording" and s["folder"] != str(first) and s)
        assert second["jobs"]["running"] == 1 and second["jobs"]["now"][0]["session"] == first.name
        sorting.resume()
        begun = second["streams"]["sim"]["samples"]
        until(lambda: jobs(root)[0].state in ("done", "failed"), 1200)
        until(lambda: states(first)[-1] in ("done", "failed"))  # the daemon has heard of it
        assert r.status()["state"] == "recording" and r.status()["streams"]["sim"]["samples"] > begun
        assert r.status()["streams"]["sim"]["gaps"] == 0
    (job, *rest) = jobs(root)
    assert job.state == "done", job.text
    assert state(first) == "done" and Path(job.report).is_file()
    assert states(first)[-3:] == ["queued", "offline", "done"]
    # SIGTERM ended the second session and left it in the queue
    assert [(j.state, j.name) for j in rest] == [("queued", Path(second["folder"]).name)]
