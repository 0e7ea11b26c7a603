"""The queue of offline jobs: one job per session whoever dies when, owners, cancelling, locks and leases."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from spiked import config as configuration
from spiked import lease
from spiked.afterwards import collect, enqueue
from spiked.cli import main
from spiked.errors import ConfigError, OfflineError
from spiked.offline.command import _outcome
from spiked.offline.lock import alone
from spiked.offline.owner import Owner
from spiked.offline.presets import JobSettings
from spiked.offline.queue import MAX_STARTS, NAME, Queue
from spiked.offline.task import Task, tasks


@contextmanager
def python(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code`; it is killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def session(root: Path, name: str, state: str = "queued", **offline: object) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    config = configuration.parse(
        {"stream": [{"name": "m", "source": "replay", "path": "x"}], "offline": offline}
    )
    (folder / "session.toml").write_text(configuration.dump(config))
    (folder / "m.nwb").touch()
    (folder / "state.json").write_text(json.dumps({"state": state, "pid": 1, "started": "", "error": ""}))
    return folder


def task(folder: Path) -> Task:
    return Task.of_session(folder, {"device": "cpu"})


# ---- one job per session ------------------------------------------------------------------------------------


def test_a_session_has_one_job_however_many_processes_queue_it_at_once(tmp_path: Path) -> None:
    code = """
        import sys
        from spiked.offline.queue import Queue
        from spiked.offline.task import Task
        sys.stdin.readline()
        with Queue(sys.argv[1]) as q:
            print(*q.enqueue(Task.of_session(sys.argv[2], {})))
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(tmp_path / "s")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    told = [p.communicate("\n", timeout=240)[0].split() for p in started]
    assert [p.returncode for p in started] == [0] * 6
    assert sorted(t[1] for t in told) == ["False"] * 5 + ["True"] and {t[0] for t in told} == {"1"}
    with Queue(tmp_path) as q:
        assert len(q.jobs()) == 1 and q.counts()["queued"] == 1


def test_a_process_killed_within_a_change_leaves_the_queue_as_it_was(tmp_path: Path) -> None:
    with Queue(tmp_path) as q:
        q.enqueue(task(tmp_path / "a"))
    code = """
        import os, signal, sys
        from spiked.offline.queue import Queue
        q = Queue(sys.argv[1])
        with q._change() as db:
            db.execute("UPDATE jobs SET state = 'done'")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    with python(code, tmp_path) as killed:
        assert killed.wait(240) == -signal.SIGKILL
    with Queue(tmp_path) as q:
        assert [r.state for r in q.jobs()] == ["queued"]
        assert q.enqueue(task(tmp_path / "b")) == (2, True)


def test_finished_sessions_without_a_job_are_queued_once(tmp_path: Path) -> None:
    wanted = [session(tmp_path, "1"), session(tmp_path, "2", "offline")]
    session(tmp_path, "3", "done")
    session(tmp_path, "4", "recording")
    session(tmp_path, "5", enabled=False)
    (session(tmp_path, "6") / "state.json").write_text("{")
    assert collect(tmp_path) == wanted and collect(tmp_path) == []
    config = configuration.load(wanted[0] / "session.toml").offline
    assert enqueue(tmp_path, wanted[0], config) == 1
    with Queue(tmp_path) as q:
        assert [r.name for r in q.jobs()] == ["1", "2"]
        assert q.job(1).task.params["timeout_s"] == 24 * 3600.0


# ---- owners -------------------------------------------------------------------------------------------------


def test_the_owner_is_alive_while_it_runs_and_not_after(tmp_path: Path) -> None:
    code = """
        import sys
        from spiked.offline.queue import Queue
        print(Queue(sys.argv[1]).claim().id, flush=True)
        sys.stdin.read()
    """
    with Queue(tmp_path) as q:
        q.enqueue(task(tmp_path / "a"))
        with python(code, tmp_path) as other:
            assert said(other) == "1"
            row = q.job(1)
            assert row.owner is not None and row.owner.pid == other.pid and not row.stale
            assert q.claim() is None
            with pytest.raises(OfflineError, match=rf"being run by process {other.pid}"):
                q.again(task(tmp_path / "a"))
        assert q.job(1).stale
        taken = q.claim()
        assert taken is not None and taken.owner == Owner.me() and taken.starts == 2
        assert "is gone" in q.log(1)[-1][2]


def test_a_killed_owner_that_nobody_waited_for_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Owner.me()
    start = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    owner = replace(me, pid=child.pid, start=start)
    assert owner.alive()
    child.kill()
    until = time.monotonic() + 60
    while owner.alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert Path(f"/proc/{child.pid}").exists() and not owner.alive()  # a zombie
    child.communicate()


@pytest.mark.parametrize("change", [{"start": 1}, {"boot": "another boot"}])
def test_a_process_with_the_same_number_is_not_the_owner(tmp_path: Path, change: dict[str, object]) -> None:
    with Queue(tmp_path) as q:
        q.enqueue(task(tmp_path / "a"))
        q.claim()
        assert q.claim() is None
        q._db.execute("UPDATE jobs SET owner = ?", (replace(Owner.me(), **change).dump(),))
        assert q.job(1).stale
        row = q.claim()
        assert row is not None and row.starts == 2


# ---- what can be done with a job ----------------------------------------------------------------------------


def test_jobs_run_by_priority_then_in_order(tmp_path: Path) -> None:
    with Queue(tmp_path) as q:
        for name, priority in (("a", 0), ("b", 5), ("c", 0)):
            q.enqueue(task(tmp_path / name), priority)
        assert [r.name for r in q.jobs()] == ["b", "a", "c"]
        assert q.claim(lambda row: row.name != "b").name == "a"  # type: ignore[union-attr]
        assert q.claim(only=3).name == "c"  # type: ignore[union-attr]
        assert q.claim(only=3) is None and q.counts() == {"queued": 1, "running": 2, "done": 0, "failed": 0, "cancelled": 0}  # fmt: skip


def test_cancel_and_retry(tmp_path: Path) -> None:
    with Queue(tmp_path) as q:
        q.enqueue(task(tmp_path / "a"))
        assert q.cancel(1) == "cancelled" and q.claim() is None
        with pytest.raises(OfflineError, match="nothing to cancel"):
            q.cancel(1)
        q.retry(1)
        q.claim()
        assert q.cancel(1) == "cancelling" and q.progress(1, "sort", 0.5, "half")
        q.put_back(1, "cancelled")
        assert q.job(1).state == "cancelled"
        q.retry(1)
        assert not q.job(1).cancel
        with pytest.raises(OfflineError, match="no job 7"):
            q.retry(7)
        q.claim()
        q.fail(1, "biology", "nothing to sort")
        assert (q.job(1).state, q.job(1).kind) == ("failed", "biology") and q.claim() is None
        assert q.again(task(tmp_path / "a")) == 1 and q.job(1).state == "queued"
        assert [s for _, s, _ in q.log(1)] == [
            "queued", "cancelled", "queued", "running", "running", "cancelled", "queued", "running", "failed", "queued",
        ]  # fmt: skip


@pytest.mark.parametrize("what", ["retry", "again", "cancel"])
def test_a_computer_that_has_another_name_now(tmp_path: Path, what: str) -> None:
    """Nothing is known of processes elsewhere, but a job that said nothing for long can be had back by hand."""
    folder = session(tmp_path, "s")
    with Queue(tmp_path) as q:
        job, _ = q.enqueue(task(folder))
        assert q.claim() is not None
        gone = replace(Owner.me(), host="rig-of-old", boot="x", start=1)
        q._db.execute("UPDATE jobs SET owner = ?", (gone.dump(),))
        for silent in (False, True):
            if silent:
                q._db.execute("UPDATE jobs SET changed = changed - 700")
            assert q.claim() is None and not q.job(job).stale and q.job(job).silent == silent
            if not silent and what != "cancel":
                with pytest.raises(OfflineError, match=r"process \d+ on rig-of-old"):
                    q.retry(job) if what == "retry" else q.again(task(folder))
        if what == "cancel":
            assert q.cancel(job) == "cancelled"
        else:
            q.retry(job) if what == "retry" else q.again(task(folder))
            assert q.claim() is not None


def test_a_job_whose_process_keeps_dying_in_one_stage_is_given_up(tmp_path: Path) -> None:
    with Queue(tmp_path) as q:
        q.enqueue(task(tmp_path / "a"))
        for stage in ("export", "sort"):  # dying in one stage after another is not the same
            for _ in range(MAX_STARTS - 1):
                assert q.claim() is not None
                q.progress(1, stage, 0.5, stage)
                q.lost(1, "it died")
        assert q.claim() is not None
        q.lost(1, "it died")
        row = q.job(1)
        assert row.state == "failed" and row.kind == "resource" and "spiked jobs retry 1" in row.text
        q.retry(1)
        assert q.claim() is not None


def test_an_unusable_queue_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no database " * 1000)
    with pytest.raises(OfflineError, match=r"cannot be used \(file is not a database\); move the file away"):
        Queue(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(other / NAME) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(OfflineError, match="version 99"):
        Queue(other)
    with pytest.raises(OfflineError, match="cannot be used"):
        Queue(tmp_path / NAME)
    with Queue(tmp_path / "held") as held, Queue(tmp_path / "held") as second:
        second._db.execute("PRAGMA busy_timeout=1")
        held._db.execute("BEGIN IMMEDIATE")
        with pytest.raises(OfflineError, match=r"database is locked.*; another program holds it"):
            second.claim()
        held._db.execute("ROLLBACK")


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root, and no setpriv to give that up"
)
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    folder = session(tmp_path / "sessions", "s")
    (tmp_path / "sessions/r.dat").touch()
    with Queue(tmp_path / "sessions"):
        pass
    plain = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
    for path in (*(tmp_path / "sessions").iterdir(), tmp_path / "sessions"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for arguments, line in (
        (["sort", str(tmp_path / "sessions/r.dat")], "give --out in a folder that can"),
        (["sort", str(folder)], "check its owner and how the drive is mounted"),
        (["jobs", "--folder", str(tmp_path / "sessions")], "check its owner and how the drive is mounted"),
    ):
        command = [*plain, sys.executable, "-m", "spiked.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and line in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "sessions").chmod(0o755)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = session(tmp_path, "2026-01-01")
    assert main(["sort", str(folder), "--later", "--set", "device=cpu", "--set", "Th_universal=10"]) == 0
    at = ["--folder", str(tmp_path)]
    assert main(["jobs", *at]) == 0 and "2026-01-01" in capsys.readouterr().out
    assert main(["jobs", "--json", "--folder", str(folder)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["state"] == "queued" and row["paths"] == [str(folder)] and row["id"] == 1
    assert main(["jobs", "cancel", "1", *at]) == 0 and main(["jobs", "retry", "1", *at]) == 0
    assert main(["jobs", "show", "1", *at]) == 0 and "cancelled" in capsys.readouterr().out
    with Queue(tmp_path) as q:
        assert q.job(1).task.params["sorter_params"] == {"Th_universal": 10}
    for arguments, line in (
        (["jobs", "--folder", str(tmp_path / "x")], "there is no queue"),
        (["jobs", "cancel", *at], "say which"),
        (["sort", str(tmp_path / "nowhere")], "there is no recording"),
        (["sort", str(folder), "--set", "device"], "KEY=VALUE"),
        (["sort", str(folder), "--set", "device=quantum"], "auto, cpu, cuda"),
        (["sort", str(folder), "--out", str(tmp_path)], "leave out --out"),
        (["sort", str(folder), "--recompute", "lunch"], "there is no stage lunch"),
        (["sort", str(folder), "--scheduler", "here"], "must look like tcp://HOST:8786"),
    ):
        assert main(arguments) != 0
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1


def test_the_report_of_one_stream_among_several(tmp_path: Path) -> None:
    """One stream of a session with several has a report of its own name, and there is none of the whole."""
    folder = session(tmp_path, "s")
    one = Task.of_session(folder, {}, "probeB")
    (folder / "report.probeB.json").write_text('{"merged_units": 3}')
    with Queue(tmp_path) as q:
        job, _ = q.enqueue(one)
        q.finish(job, str(folder / "report.probeB.md"), "3 units")
    told: list[str] = []
    status, results = _outcome([(tmp_path, job, one)], told.append)
    assert status == 0 and list(results.values()) == [{"merged_units": 3}]
    assert told == [f"report: {folder / 'report.probeB.md'}"]


@pytest.mark.parametrize(
    "settings",
    [
        ["threads=two"],
        ["threads=-1"],
        ["timeout_s=abc"],
        ["memory_gb=4GB"],
        ["retries=-3"],
        ["curate=maybe"],
        ["device=5"],
        ["sorter_params=[1]"],
        ["guards=5", "guards.disk_gb=1"],
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str]
) -> None:
    folder = session(tmp_path, "s")
    asked = [word for text in settings for word in ("--set", text)]
    assert main(["sort", str(folder), "--later", *asked]) == 2
    err = capsys.readouterr().err
    assert settings[0].partition("=")[0] in err and err.count("\n") == 1
    assert not (tmp_path / NAME).exists()


def test_python_says_false_with_a_capital(tmp_path: Path) -> None:
    assert main(["sort", str(session(tmp_path, "s")), "--later", "--set", "curate=False"]) == 0
    with Queue(tmp_path) as q:
        assert JobSettings.of(q.job(1).task.params).curate is False


def test_paths_hold_wherever_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("r.dat", "p.json", "u.templates.h5"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    asked = ["--sorter", "templates", "--set", "templates=u.templates.h5", "--set", "network=auto"]
    assert main(["sort", "r.dat", "--later", "--probe", "p.json", *asked]) == 0
    with Queue(tmp_path) as q:
        queued = q.job(1).task
    assert queued.choice == {"probe": str(tmp_path / "p.json")}
    assert queued.params["sorter_params"] == {
        "templates": str(tmp_path / "u.templates.h5"),
        "network": "auto",
    }
    rig = tmp_path / "rig.toml"
    rig.write_text(
        '[[stream]]\nname = "a"\nsource = "maxwell"\n[offline]\nparams = { probe = "p.json", nblocks = 0 }'
    )
    assert configuration.load(rig).offline.params == {"probe": str(tmp_path / "p.json"), "nblocks": 0}


def test_what_a_path_means(tmp_path: Path) -> None:
    a, b = session(tmp_path / "sessions", "a"), session(tmp_path / "sessions", "b")
    files = tmp_path / "files"
    files.mkdir()
    for name in ("r10.raw.h5", "r9.raw.h5", "r9.sequences.h5"):
        (files / name).touch()
    assert [t.folder for t in tasks([a])] == [a]
    assert [t.folder for t in tasks([tmp_path / "sessions"])] == [a, b]
    (joined,) = tasks([files])
    assert [Path(p).name for p in joined.paths] == ["r9.raw.h5", "r10.raw.h5"]
    assert joined.folder == tmp_path / "files.spiked" and joined.name == "files (2 joined)"
    each = tasks([files / "r9.raw.h5", files / "r10.raw.h5"], out=tmp_path / "out")
    assert [t.folder for t in each] == [tmp_path / "out/r9", tmp_path / "out/r10"]
    (one,) = tasks([a, b], joined=True)
    assert (
        one.paths == (str(a), str(b)) and not one.is_session and one.folder == a.with_name("a-joined.spiked")
    )
    (files / "note.nwb").touch()
    with pytest.raises(ConfigError, match="several kinds"):
        tasks([files])
    with pytest.raises(ConfigError, match="nothing to join"):
        tasks([files / "r9.raw.h5"], joined=True)
    assert Task.load(joined.dump()) == joined
    assert replace(joined, params={"device": "cpu"}).key == joined.key != one.key


# ---- locks and leases ---------------------------------------------------------------------------------------

HOLD = """
    import sys
    from pathlib import Path
    from spiked.offline.lock import alone
    with alone(Path(sys.argv[1]), Path(sys.argv[2])):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("same_folder", [True, False])
def test_two_jobs_on_one_recording(tmp_path: Path, same_folder: bool) -> None:
    recording = tmp_path / "r.nwb"
    recording.touch()
    second = tmp_path / ("one" if same_folder else "two")
    with python(HOLD, tmp_path / "one", recording) as holder:
        assert said(holder) == "held"
        match = rf"another job is working .*process {holder.pid} "
        with pytest.raises(OfflineError, match=match), alone(second, recording):
            pass
    # a number is still in the file, that of a process that lives: the system knows better
    (tmp_path / "one/job.lock").write_text(Owner.me().dump())
    with alone(second, recording):
        assert Owner.read((second / "job.lock").read_text()) == Owner.me()


def test_a_job_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    recording = tmp_path / "r.nwb"
    recording.touch()
    with python(
        HOLD.replace("sys.stdin.read()", "import time; time.sleep(1)"), tmp_path, recording
    ) as holder:
        assert said(holder) == "held"
        with alone(tmp_path, recording, patience_s=120.0):
            pass


def test_live_sorting_goes_before_jobs_on_the_gpu(tmp_path: Path) -> None:
    live = [lease.hold_for_live(tmp_path) for _ in range(2)]
    assert all(live) and lease.live_has_it(tmp_path) and lease.hold_for_job(tmp_path) is None
    live[0].close()  # type: ignore[union-attr]
    assert lease.hold_for_job(tmp_path) is None
    live[1].close()  # type: ignore[union-attr]
    job = lease.hold_for_job(tmp_path)
    assert job is not None and lease.hold_for_job(tmp_path) is None
    again = lease.hold_for_live(tmp_path)  # never waits for a job
    assert again is not None and lease.live_has_it(tmp_path)
    again.close()
    job.close()


def test_live_sorting_waits_for_a_job_that_is_held_up_while_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 120.0)
    looks = lease._take(tmp_path, lease.LIVE, fcntl.LOCK_EX)
    assert looks is not None
    threading.Timer(0.5, looks.close).start()
    live = lease.hold_for_live(tmp_path)
    assert live is not None and lease.live_has_it(tmp_path)
    live.close()


def test_a_killed_live_process_lets_go_of_the_gpu(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from spiked.lease import hold_for_live
        lease = hold_for_live(Path(sys.argv[1]))
        print("held", flush=True)
        sys.stdin.read()
    """
    with python(code, tmp_path) as holder:
        assert said(holder) == "held"
        assert lease.hold_for_job(tmp_path) is None
    job = lease.hold_for_job(tmp_path)
    assert job is not None
    job.close()
