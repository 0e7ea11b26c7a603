"""Processes that live and do nothing: found by their silence, killed while the ring still holds what they owe."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from session_rig import recorded, rehearsal
from test_session import wait_samples

from spiked.hang import ACQUIRE_S, LIVE_S, LOOK_S, RECORD_STARTS_S, Hangs


def process(pid: int = 7) -> Any:
    return SimpleNamespace(pid=pid, running=True, last={"progress": {"t_ns": 1}})


def found(
    hangs: Hangs, role: str, child: Any, seconds: float, start: float, step: float = 0.5
) -> list[float]:
    """When it was called hanging, in seconds after `start`."""
    out = []
    for i in range(int(seconds / step)):
        now = start + i * step
        out += [now - start for _ in hangs.look([(role, child)], now)]
    return out


@pytest.mark.parametrize(("role", "after"), [("acquire", ACQUIRE_S), ("record", 12.0), ("live", LIVE_S)])
def test_silence_is_found_once_within_its_patience(role: str, after: float) -> None:
    (at,) = found(Hangs(20.0), role, process(), 200.0, 0.0)
    assert after < at <= after + 1.5


def test_who_tells_starts_or_has_ended_does_not_hang() -> None:
    hangs, child = Hangs(20.0), process()
    for i in range(400):
        child.last["progress"]["t_ns"] = i // 10  # a word every five seconds
        assert list(hangs.look([("acquire", child)], 0.5 * i)) == []
    starting, ended = process(8), process(9)
    starting.last, ended.running = {}, False
    assert (
        found(hangs, "live", starting, 500.0, 1000.0) == found(hangs, "acquire", ended, 500.0, 2000.0) == []
    )
    (at,) = found(hangs, "record", starting, 100.0, 3000.0)
    assert RECORD_STARTS_S < at < RECORD_STARTS_S + 2


def test_a_computer_that_slept_has_no_hanging_processes() -> None:
    hangs, child = Hangs(20.0), process()
    assert found(hangs, "acquire", child, 5.0, 0.0) == []
    assert list(hangs.look([("acquire", child)], 3600.0)) == []  # nobody was heard meanwhile, nor could be
    assert ACQUIRE_S - 5 - LOOK_S - 1 < found(hangs, "acquire", child, 20.0, 3600.0)[0] < ACQUIRE_S


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_recorder_that_hangs_loses_nothing(tmp_path: Path) -> None:
    with rehearsal(tmp_path, seconds=900.0, ring={"seconds": 40.0}) as r:
        r.wait_state(("recording",), 120)
        stream: dict[str, Any] = {}
        while not stream.get("processes", {}).get("record"):  # it has begun
            stream = wait_samples(r, 40_000)["streams"]["sim"]
        old = stream["pids"]["record"]
        os.kill(old, signal.SIGSTOP)
        try:
            back = wait_restarted(r, "record", old)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(old, signal.SIGCONT)
        wait_samples(r, back + 40_000)
        summary = r.stop()
        r.stop_simulator()
    assert summary["exit_code"] == 0 and summary["streams"]["sim"]["gaps"] == 0
    folder = Path(summary["folder"])
    data, gaps = recorded(folder)
    sent = np.fromfile(tmp_path / "sent.raw", "uint16").reshape(-1, 16)
    assert gaps == [] and len(data) >= back and np.array_equal(data, sent[: len(data)])
    notes = [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]
    assert [n["role"] for n in notes if n["event"] in ("hang", "restart")] == ["record", "record"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_recorder_that_hangs_while_the_session_ends_is_replaced(tmp_path: Path) -> None:
    """After two minutes; what it had not written yet is in the ring, where nothing comes any more."""
    with rehearsal(tmp_path, seconds=900.0) as r:
        r.wait_state(("recording",), 120)
        stream: dict[str, Any] = {}
        while not stream.get("processes", {}).get("record"):
            stream = wait_samples(r, 40_000)["streams"]["sim"]
        os.kill(stream["pids"]["record"], signal.SIGSTOP)
        r.control("stop_session")
        summary = r.wait_daemon(400)
        r.stop_simulator()
    assert (summary["exit_code"], summary["state"], summary["error"]) == (0, "done", "")
    folder = Path(summary["folder"])
    data, gaps = recorded(folder)
    sent = np.fromfile(tmp_path / "sent.raw", "uint16").reshape(-1, 16)
    assert gaps == [] and len(data) == summary["streams"]["sim"]["samples"] >= 40_000
    assert np.array_equal(data, sent[: len(data)])
    assert "another one writes what is left in the ring" in (folder / "log.jsonl").read_text()


def wait_restarted(r: Any, role: str, old: int, timeout_s: float = 150.0) -> int:
    """Until a successor runs; the samples there are then."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        stream = r.status()["streams"]["sim"]
        if stream["pids"].get(role, old) != old:
            return int(stream["samples"])
        time.sleep(0.1)
    raise AssertionError(f"{role} was not restarted within {timeout_s} s")
