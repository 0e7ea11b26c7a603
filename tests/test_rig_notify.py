"""What systemd and its journal are told: the rules alone, then the real daemon in front of a socket that plays systemd."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from session_rig import recorded, rehearsal
from test_session import wait_samples

from spiked import notify
from spiked.journald import Journald, encode, is_journal, priority
from spiked.offline.queue import Queue
from spiked.rehearsal import Rehearsal
from spiked_client.subscribe import SyncClient, SyncSubscription


def status(received: int, written: int | None, state: str = "recording", name: str = "a") -> dict[str, Any]:
    record = {} if written is None else {"record": {"samples": written}}
    pids = {"acquire": 1} | ({} if written is None else {"record": 2})
    return {"state": state, "streams": {name: {"samples": received, "processes": record, "pids": pids}}}


def test_the_watchdog_is_fed_by_samples_that_arrive_and_are_written() -> None:
    a = notify.Advance()
    assert a.moved(status(100, 100))
    assert not a.moved(status(100, 100))  # nothing came
    assert a.moved(status(200, 150))
    assert not a.moved(status(300, 150))  # it came, but the file does not grow
    assert a.moved(status(300, 300))
    assert a.moved(status(400, 300))  # the file was complete when last looked at
    assert not a.moved(status(500, 300))
    assert a.moved(status(900, 900))


def test_every_stream_has_to_advance() -> None:
    a = notify.Advance()
    two = {"state": "recording", "streams": {**status(1, 1)["streams"], **status(1, 1, name="b")["streams"]}}
    assert a.moved(two)
    two["streams"]["a"] = status(9, 9)["streams"]["a"]
    assert not a.moved(two)
    two["streams"]["b"] = status(9, 9)["streams"]["a"]
    assert a.moved(two)
    two["streams"] |= {"a": status(12, 12)["streams"]["a"], "b": {**two["streams"]["b"], "state": "lost"}}
    assert a.moved(two)  # its source went away; it is looked for while the other goes on
    assert not a.moved(two)


def test_without_a_recorder_what_arrives_is_enough_and_one_that_restarts_has_to_write_again() -> None:
    a = notify.Advance()
    assert a.moved(status(1, None)) and a.moved(status(2, None)) and not a.moved(status(2, None))
    a = notify.Advance()
    assert a.moved(status(100, 60))
    restarted = status(200, 60)
    restarted["streams"]["a"]["processes"] = {}  # it has not said anything yet
    assert not a.moved(restarted)
    assert a.moved(status(300, 300))


@pytest.mark.parametrize("state", ["idle", "starting", "stopping", "finalizing", "queued", "failed"])
def test_waiting_for_a_rig_or_closing_a_file_is_no_hang(state: str) -> None:
    a = notify.Advance()
    assert all(a.moved(status(0, None, state)) for _ in range(5))


def test_a_source_that_may_be_silent_for_long_gets_a_longer_watchdog() -> None:
    assert notify.watchdog_s([10.0], "30000000") == 30
    assert notify.watchdog_s([10.0, 300.0], "30000000") == 320
    assert notify.watchdog_s([10.0], None) is None


def test_journal_records_carry_their_fields(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        handler = Journald(path)
        log = logging.Logger("spiked.test")
        log.addHandler(handler)
        log.error("disk %s", "full", extra={"about": {"event": "error", "session": "s1", "exit-code": 4, "role": None}})  # fmt: skip
        fields = dict(row.split("=", 1) for row in journal.recv(65536).decode().splitlines())
        handler.close()
    assert fields == {
        "MESSAGE": "disk full", "PRIORITY": "3", "SYSLOG_IDENTIFIER": "spiked", "LOGGER": "spiked.test",
        "SPIKED_EVENT": "error", "SPIKED_SESSION": "s1", "SPIKED_EXIT_CODE": "4",
    }  # fmt: skip
    two = b"one\ntwo"
    assert encode({"MESSAGE": two.decode()}) == b"MESSAGE\n" + struct.pack("<Q", len(two)) + two + b"\n"
    assert [priority(n) for n in (10, 20, 30, 40, 50)] == [7, 6, 4, 3, 2]


def test_without_a_journal_socket_lines_have_their_priority(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = Journald(str(tmp_path / "nobody"))
    log = logging.Logger("spiked.test")
    log.addHandler(handler)
    log.warning("first\nsecond")
    handler.close()
    assert capsys.readouterr().err == "<4>first\n<4>second\n"
    at = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{at.st_dev}:{at.st_ino}")
    assert is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    assert not is_journal()


class Systemd:
    """The socket that a service is given, and when each message came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0.2)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                continue
            self.told.append((time.monotonic(), data.decode()))

    def said(self, what: str, since: float = 0.0) -> list[str]:
        return [text for at, text in list(self.told) if at > since and what in text]

    def heard(self) -> float:
        """When everything that was said until now had been heard."""
        mark = f"HEARD={time.monotonic_ns()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.connect(str(self.path))
            s.send(mark.encode())
        self.wait(mark)
        return next(at for at, text in self.told if text == mark)

    def wait(self, what: str, since: float = 0.0, timeout_s: float = 150.0) -> float:
        """Until it is said; now."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self.said(what, since):
                return time.monotonic()
            time.sleep(0.05)
        raise AssertionError(f"{what} was not said within {timeout_s} s, but {self.told[-5:]}")

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    played = Systemd(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(played.path))
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    yield played
    played.close()


def test_closing_a_file_gets_the_time_it_takes(systemd: Systemd) -> None:
    teller = notify.Teller([10.0])
    for state in ("stopping", "finalizing", "queued"):
        teller.tell(status(1, 1, state), stopping=True)
        systemd.wait(f"STATUS={state};")
    asked = [text.splitlines()[0] for text in systemd.said("EXTEND_TIMEOUT_USEC=30000000")]
    assert [text.split(";")[0] for text in asked] == ["STATUS=stopping", "STATUS=finalizing"]
    teller.tell(status(1, 1, "finalizing"), stopping=False)  # not asked to end: no time is measured
    systemd.wait("STATUS=finalizing")
    assert len(systemd.said("EXTEND_TIMEOUT_USEC")) == 2
    teller.stopping("closing", 120.0)  # nobody says anything from here on
    systemd.wait("STATUS=stopping: closing\nEXTEND_TIMEOUT_USEC=120000000")


def looks(health: SyncSubscription, n: int) -> None:
    """Until the daemon has looked n times more whether samples advance, which it does with every health message."""
    for _ in range(n):
        assert health.get(60.0) is not None


def still(r: Rehearsal, role: str) -> None:
    """Until the daemon has heard the last of a process."""

    def told() -> int:
        s = r.status()["streams"]["sim"]
        return int(s["samples"] if role == "acquire" else s["processes"]["record"]["samples"])

    before = -1
    while (now := told()) != before:
        before = now
        time.sleep(0.3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_daemon_in_front_of_systemd(systemd: Systemd, tmp_path: Path) -> None:
    # the ring is so long that a recorder which is stopped is not replaced before it goes on
    r = rehearsal(tmp_path, seconds=900.0, offline={"enabled": True, "device": "cpu"}, ring={"seconds": 60.0})
    r.run_args = ("--daemon", "--no-jobs")
    with r:
        systemd.wait("READY=1")
        assert "WATCHDOG_USEC=50000000" in systemd.said("READY=1")[0]  # silence_s = 30, and slack
        now = systemd.wait("STATUS=recording")
        now = systemd.wait("WATCHDOG=1", now)
        pids = r.status()["streams"]["sim"]["pids"]
        for role in ("acquire", "record"):  # a process that hangs feeds nothing
            os.kill(pids[role], signal.SIGSTOP)
            try:
                still(r, role)
                with SyncClient(control_port=r.config.publish.control_port) as client:
                    health = client.messages("health")
                    looks(health, 3)  # what was under way
                    stuck = systemd.heard()
                    looks(health, 2)  # for longer it would be taken to hang
                assert systemd.said("WATCHDOG=1", stuck) == [], role
            finally:
                os.kill(pids[role], signal.SIGCONT)
            systemd.wait("WATCHDOG=1", time.monotonic())
        first = Path(r.status()["folder"])
        r.control("stop_session")
        now = systemd.wait("STATUS=queued")
        systemd.wait("WATCHDOG=1", systemd.wait("WATCHDOG=1", now))  # nothing records: alive is enough
        r.control("start_session")
        now = systemd.wait("STATUS=recording", now)
        second = Path(wait_samples(r, 1)["folder"])
        assert systemd.said("STOPPING=1") == []
        assert r.daemon is not None
        r.daemon.send_signal(signal.SIGTERM)
        systemd.wait("STOPPING=1", now)
        assert r.wait_daemon(200)["exit_code"] == 0
    sent = np.fromfile(tmp_path / "sent.raw", "uint16").reshape(-1, 16)
    data, gaps = recorded(first)
    assert gaps == [] and len(data) > 100_000 and np.array_equal(data, sent[: len(data)])
    assert len(recorded(second)[0]) > 0
    with Queue(tmp_path / "sessions") as jobs:
        assert [(j.state, j.name) for j in jobs.jobs()] == [("queued", first.name), ("queued", second.name)]
    jobs_service(systemd, tmp_path / "sessions", first)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_daemon_that_is_up_before_its_rig_records_when_samples_come(
    systemd: Systemd, tmp_path: Path
) -> None:
    r = rehearsal(tmp_path, seconds=900.0)
    simulate, r.simulate = r.simulate, None
    stream = r.config.stream[0].model_copy(update={"wait_s": 2.0, "silence_s": 10.0})
    r.config = r.config.model_copy(update={"stream": (stream,)})
    r.run_args = ("--daemon",)
    folders: list[Path] = []
    with r:
        assert simulate is not None and r.daemon is not None
        for _ in range(2):  # also when it went away for a while
            now = systemd.wait("STATUS=recording begins when samples come; sim: nobody at", timeout_s=200)
            systemd.told.clear()
            systemd.wait("WATCHDOG=1", systemd.wait("WATCHDOG=1", now))
            assert (
                list((tmp_path / "sessions").glob("*_test*")) == folders
            )  # one that got nothing is no session
            r.simulator = r._start("simulate", *simulate, "--json", str(tmp_path / "simulator.json"))
            systemd.wait("STATUS=recording 2", now)
            folders.append(Path(wait_samples(r, 1)["folder"]))
            if len(folders) == 1:
                r.stop_simulator()
        r.daemon.send_signal(signal.SIGTERM)
        assert r.wait_daemon(200)["exit_code"] == 0
    assert sorted((tmp_path / "sessions").glob("*_test*")) == folders
    assert all(len(recorded(folder)[0]) > 0 for folder in folders)


def jobs_service(systemd: Systemd, root: Path, first: Path) -> None:
    """The service beside it takes the first session; told to stop, it puts it back."""
    now = time.monotonic()
    words = [sys.executable, "-m", "spiked.cli", "jobs", "run", "--wait", "--folder", str(root)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as service:
        try:
            systemd.wait("READY=1", now)
            systemd.wait(f"STATUS={first.name}:", now)
            assert json.loads((first / "state.json").read_text())["state"] == "offline"
            service.send_signal(signal.SIGTERM)
            said, _ = service.communicate(timeout=200)
        finally:
            service.kill()
    assert service.returncode == 0, said
    systemd.wait("STOPPING=1", now)
    with Queue(root) as jobs:
        states = {j.name: j.state for j in jobs.jobs()}
    assert states[first.name] == "queued", said
    assert json.loads((first / "state.json").read_text())["state"] == "queued"
