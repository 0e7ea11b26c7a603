"""A supervisor on a computer that has run out of something, or that is told to stop at a bad moment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq
from record_rig import FIRST, Feed, stream
from record_rig import config as record_config
from session_rig import recorded as recorded_codes
from session_rig import rehearsal
from test_record_disk import die, recorded, tmpfs
from test_session import kill, sent_codes, wait_samples

from spiked import config as configuration
from spiked import session as sessions
from spiked.errors import RecordingError
from spiked.processes.acquire import Acquire
from spiked.publish.zmq_pub import Publisher
from spiked.record.lock import WriterLock
from spiked.record.nwbfile import create
from spiked.rehearsal import free_ports
from spiked.ring import GAP_REASONS, Ring
from spiked.service import Service
from spiked.session import Session
from spiked.track import GAPS_LISTED, Track
from spiked_client import protocol


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from tmpfs(tmp_path / "small", "2m")


def rig(folder: Path, **sections: Any) -> configuration.Config:
    """A rig whose device is not there."""
    ports = free_ports(5)
    source = {"name": "sim", "source": "maxwell", "address": f"tcp://127.0.0.1:{ports[0]}", "wait_s": 60.0}
    publish = dict(zip(("live_port", "replay_port", "control_port", "health_port"), ports[1:], strict=True))
    own = {"name": "test", "priority": "normal", "sessions": str(folder / "sessions"), "runtime": str(folder)}
    return configuration.parse(
        {"rig": own, "stream": [source], "live": {"enabled": False}, "publish": publish, **sections}
    )


async def until(there: Callable[[], Any], timeout_s: float = 150.0) -> None:
    end = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


def test_a_process_that_is_only_being_started_is_not_killed_when_the_session_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy computer its start takes longer than the end of one that runs; that is no failure."""
    monkeypatch.setattr(sessions, "ACQUIRE_ENDS_S", 4 * sessions.ACQUIRE_ENDS_S)
    slow = "import sys, time\nif 'acquire' in sys.orig_argv:\n    time.sleep(12)\n"
    (tmp_path / "sitecustomize.py").write_text(slow, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def scene() -> None:
        session = Session(rig(tmp_path))
        running = asyncio.create_task(session.run())
        await until(lambda: "acquire" in session.tracks["sim"].children)
        session.stop("asked to")
        await running
        assert (session.state, session.error, session.exit_code) == ("done", "", 0)

    asyncio.run(scene())


def test_a_stream_waits_for_its_recorder_but_not_for_ever(tmp_path: Path) -> None:
    """A recorder may take longer to start than the ring lasts; samples wait in the source's queue meanwhile."""
    info = stream(4).to_json()
    began, told = [], []
    for over, up, since_s in (
        (False, False, 0.0),
        (False, True, 0.0),
        (True, False, 0.0),
        (False, False, 11.0),
    ):
        session = Session(rig(tmp_path, ring={"seconds": 20.0}))
        track = session.tracks["sim"]
        acquire: Any = SimpleNamespace(last={}, running=True, command=told.append)
        track.children = {"acquire": acquire, "record": SimpleNamespace(last={"up": {}} if up else {})}  # type: ignore[dict-item]
        track.over = {"record"} if over else set()
        session._begin_stream(track)
        assert track.ring is None  # the source is not there yet
        acquire.last["stream"] = {"info": info, "t_ns": time.monotonic_ns() - int(1e9 * since_s)}
        session._begin_stream(track)
        began.append(track.ring is not None)
        track.release()
        session.journal.close()
    assert began == [False, True, True, True] and told == ["ring"] * 3


def test_a_process_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the kernel has killed the recorder for want of memory: the fork may fail as well."""

    async def scene() -> None:
        session = Session(rig(tmp_path))
        track = session.tracks["sim"]
        (session.folder / "sim.record.stderr").mkdir()  # a log that cannot be had is done without
        monkeypatch.setattr(sessions, "START_RETRY_S", 0.1)
        with monkeypatch.context() as m:
            m.setattr(sys, "executable", "/nothing/here")
            await session._spawn(track, "record")
            assert not track.children["record"].running
        await until(lambda: track.children["record"].running)
        assert track.lives["record"] >= 1 and "record" not in track.over
        track.children["record"].command("stop")
        session.stop()
        await until(lambda: "record" in track.over)
        await asyncio.gather(*session._tasks)
        session.journal.close()

    asyncio.run(scene())


def test_acquire_that_is_started_while_the_session_stops_stops_too(tmp_path: Path) -> None:
    """It died, or lost its source, a moment before: nobody else would tell it, and it would run for ever."""

    async def scene() -> None:
        session = Session(rig(tmp_path))
        session.stop()
        await session._spawn(session.tracks["sim"], "acquire")
        assert await session.tracks["sim"].children["acquire"].wait(200.0) == 0
        await asyncio.gather(*session._tasks)
        session.journal.close()

    asyncio.run(scene())


def test_told_to_stop_while_it_starts_it_begins_no_session(tmp_path: Path) -> None:
    async def scene() -> int:
        service = Service(rig(tmp_path))
        await service.startup()
        service._stop("SIGTERM")  # as its handler does; a recovery may take minutes
        await service._one_session(None, once=True)
        await service.shutdown()
        return service.exit_code

    assert asyncio.run(scene()) == 0
    assert not list((tmp_path / "sessions").glob("*_test"))


def test_a_start_on_a_full_disk_keeps_what_it_knows_of_sessions(tmp_path: Path, small_disk: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = small_disk / "2026-01-01T00-00-00_test"
    folder.mkdir()
    (folder / "session.toml").write_text("")
    told = {"state": "recording", "pid": dead.pid, "started": "x", "error": ""}
    (folder / "state.json").write_text(json.dumps(told))
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):  # noqa: PT012
        while True:
            filler.write(bytes(4096))
    config = rig(tmp_path)
    service = Service(
        config.model_copy(update={"rig": config.rig.model_copy(update={"sessions": small_disk})})
    )
    service._recover_left_behind()
    assert json.loads((folder / "state.json").read_text()) == told
    (small_disk / "filler").unlink()
    service._recover_left_behind()
    assert json.loads((folder / "state.json").read_text())["state"] == "queued"


@pytest.mark.parametrize("text", ["", "\0" * 95])
def test_a_session_whose_state_a_power_cut_emptied_is_recovered(tmp_path: Path, text: str) -> None:
    """A file that was replaced a moment before comes back empty on some file systems."""
    config = rig(tmp_path)
    for name in ("2026-01-01T00-00-00_test", "2026-01-01T00-00-01_test"):
        folder = config.rig.sessions / name
        folder.mkdir(parents=True)
        writer, _ = recorded(folder)
        (folder / "session.toml").write_text("")
        (folder / "state.json").write_text(text)
        die(writer)
    writer.path.unlink()  # nothing was recorded here: nothing to do
    Service(config)._recover_left_behind()
    first = config.rig.sessions / "2026-01-01T00-00-00_test"
    assert json.loads((first / "state.json").read_text())["state"] == "queued"
    assert not sessions.left_open(first / "probe.nwb") and (folder / "state.json").read_text() == text


def test_a_new_file_and_its_folder_are_on_the_disk_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    folder = tmp_path / "sessions" / "one"
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "fsync", note)
    create(folder / "probe.nwb", stream(4), record_config(), datetime.now(UTC), "one", 0)
    assert synced.index(str(folder)) > synced.index(str(folder / "probe.nwb.part"))
    assert str(folder.parent) in synced


def test_a_session_that_cannot_be_queued_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(session: Session, _duration_s: float | None) -> dict[str, Any]:
        session.state = "queued"
        return {}

    monkeypatch.setattr(Session, "run", run)
    (tmp_path / "sessions" / "jobs.sqlite").mkdir(parents=True)
    service = Service(rig(tmp_path))
    for _ in range(3):
        asyncio.run(service._one_session(None, once=False))
    assert not service._to_sort
    assert service.session is not None
    file = service.session.journal._file
    assert file is not None and file.closed


def test_every_gap_is_counted_however_many_there_are(tmp_path: Path) -> None:
    """The ring remembers some thousands; a bad network makes more in a night."""
    ring = Ring.create(tmp_path / "ring", stream(4), 4.0)
    feed = Feed(ring)
    config = rig(tmp_path)
    track = Track(config.stream[0], tmp_path / "ring")
    track.ring = ring
    for k in range(10):
        for _ in range(1000):
            feed.gap(2)
        feed.writer.add_gap(feed.writer.next_sample, feed.writer.next_sample + 1, "partial")
        feed.writer.add_gap(feed.writer.next_sample, feed.writer.next_sample, "reset")
        told = track.told()
        assert (told["gaps"], told["gap_samples"]) == (1001 * (k + 1), 2000 * (k + 1))
    assert track.told()["gaps"] == 10_010
    assert len(track.gaps()) == min(10_020, GAPS_LISTED) and track.gaps()[0]["start"] == FIRST
    assert track.gaps()[-1]["reason"] == GAP_REASONS[-1]
    track.release()
    assert track.told()["gaps"] == 10_010


def test_a_file_its_writer_left_open_is_seen(tmp_path: Path) -> None:
    writer, _ = recorded(tmp_path)
    assert sessions.left_open(writer.path)
    die(writer)
    assert sessions.left_open(writer.path) and not sessions.left_open(tmp_path / "absent.nwb")


def test_a_start_right_after_the_kill_waits_for_the_orphaned_recorder(tmp_path: Path) -> None:
    """It drains the ring and closes its file. Refused then, the session would wait for yet another start."""
    config = rig(tmp_path)
    folder = config.rig.sessions / "2026-01-01T00-00-00_test"
    folder.mkdir(parents=True)
    writer, _ = recorded(folder)
    writer.finish()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folder / "session.toml").write_text("")
    (folder / "state.json").write_text(json.dumps({"state": "recording", "pid": dead.pid}))
    lock = WriterLock(folder / "probe.nwb")
    threading.Timer(1.0, lock.release).start()
    Service(config)._recover_left_behind()
    assert json.loads((folder / "state.json").read_text())["state"] == "queued"


def test_a_folder_whose_name_is_no_text_is_one_line(tmp_path: Path) -> None:
    """A home of another century, in Latin-1: nothing that names it could be sent or written."""
    config = rig(tmp_path)
    odd = config.rig.model_copy(update={"sessions": tmp_path / "m\udcfcller"})
    with pytest.raises(RecordingError, match=r"choose another rig\.sessions") as failure:
        Session(config.model_copy(update={"rig": odd}))
    assert str(failure.value).isascii() and not list(tmp_path.iterdir())


def test_who_starts_a_session_is_told_that_there_is_no_place_for_it(tmp_path: Path) -> None:
    """And the daemon, with the jobs it runs, stays."""
    config = rig(tmp_path)
    (tmp_path / "file").write_text("x")
    odd = config.rig.model_copy(update={"sessions": tmp_path / "file" / "sessions"})
    service = Service(config.model_copy(update={"rig": odd}))
    with pytest.raises(RecordingError, match=r"check rig\.sessions"):
        asyncio.run(service._handlers()["start_session"]({}))
    assert not service._start.is_set()
    service = Service(config)
    asyncio.run(service._handlers()["start_session"]({}))
    assert service._start.is_set() and not list((tmp_path / "sessions").iterdir())


def test_a_figure_that_cannot_be_told_ends_no_daemon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """systemd ends a daemon that says nothing for too long, and with it the recording."""

    async def scene() -> None:
        service = Service(rig(tmp_path))
        await service.startup()
        told: list[str] = []
        service.systemd.tell = lambda *_: told.append("")  # type: ignore[method-assign]
        good = service.status()
        service.status = lambda: {**good, "odd": "m\udcfcller"}  # type: ignore[method-assign]
        teller = asyncio.create_task(service._tell_health())
        await until(lambda: len(told) > 1)
        assert not teller.done()
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)
        await service.shutdown()

    asyncio.run(scene())
    assert sum("cannot be told" in record.message for record in caplog.records) == 1


def test_a_mark_right_before_the_stop_is_in_the_recording(tmp_path: Path) -> None:
    """Both lie there when acquire, held up meanwhile, gets its turn."""
    ring = Ring.create(tmp_path / "ring", stream(4), 4.0)
    Feed(ring).put(1000)
    commands: Iterator[dict[str, Any]] = iter([{"op": "mark", "line": 9}, {"op": "stop"}])
    link: Any = SimpleNamespace(
        stop=threading.Event(), dropped=0, tell=lambda *_, **__: None, next_command=lambda: next(commands, None)
    )  # fmt: skip
    link.stop.set()
    source: Any = SimpleNamespace(read=lambda _timeout_s: [], counters={})
    Acquire(source, ring, ring.info, 10.0, link, ()).run()
    assert ring.rows("events", 0)[0]["line"].tolist() == [9]


def test_what_a_session_says_last_is_sent_before_its_ports_close() -> None:
    p = Publisher("127.0.0.1", 0, None, "run-1")
    with zmq.Context() as context, context.socket(zmq.SUB) as s:
        s.linger = s.rcvhwm = 0
        s.subscribe(b"")
        s.connect(p.endpoints["pub"])
        while not s.poll(20):
            p.send("spikes.A")
        for _ in range(5000):
            last = p.send("spikes.A", {"text": 1000 * "x"})
        p.close(100.0)
        heard = 0
        while heard < last:
            assert s.poll(60_000), (heard, last)
            heard = protocol.decode(s.recv_multipart()).seq


@pytest.mark.slow
def test_a_terminal_that_closes_ends_no_recording(tmp_path: Path) -> None:
    """An SSH connection that breaks sends SIGHUP to all processes of its terminal, Ctrl-Z SIGTSTP."""
    with rehearsal(tmp_path, "openephys", "16", 600.0) as r:
        r.wait_state(("recording",), 120)
        status = wait_samples(r, 15_000)
        assert r.daemon is not None
        pids = status["streams"]["sim"]["pids"]
        for sig in (signal.SIGHUP, signal.SIGTSTP):
            for pid in (r.daemon.pid, *pids.values()):
                os.kill(pid, sig)
        status = wait_samples(r, status["streams"]["sim"]["samples"] + 60_000)
        assert status["streams"]["sim"]["pids"] == pids
        summary = r.stop()
        r.stop_simulator()
    assert summary["exit_code"] == 0
    data, gaps = recorded_codes(Path(summary["folder"]))
    assert gaps == [] and len(data) >= 75_000
    assert np.array_equal(data, sent_codes(tmp_path, 16, "int16")[: len(data)])


@pytest.mark.slow
def test_a_ring_whose_name_was_removed_is_found_again(tmp_path: Path) -> None:
    """As logind does at the end of a user's last login: what dies afterwards must find the ring all the same."""
    with rehearsal(tmp_path, "openephys", "16", 600.0) as r:
        r.wait_state(("recording",), 120)
        wait_samples(r, 15_000)
        for role in ("record", "acquire"):
            told = r.status()  # a session of others may have begun in the same second
            (ring,) = Path("/dev/shm").glob(f"spiked-{told['pid']}-{Path(told['folder']).name}-sim.ring")
            ring.unlink()
            kill(r, role)
            status = wait_samples(r, r.status()["streams"]["sim"]["samples"] + 60_000)
        summary = r.stop()
        r.stop_simulator()
    assert summary["exit_code"] == 0 and not ring.is_symlink()
    data, gaps = recorded_codes(Path(summary["folder"]))
    assert len(data) >= status["streams"]["sim"]["samples"] and len(gaps) <= 1
    expected = sent_codes(tmp_path, 16, "int16")[: len(data)]
    for a, b in gaps:  # acquire was away
        expected[a:b] = 0
    assert np.array_equal(data, expected)
