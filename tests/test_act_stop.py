"""After a stop, or when nobody is armed any more, nothing that was decided before goes out: wherever it waits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from output_rig import PATIENT_MS, closing, eventually, maxlab, opened, ready, spikeglx
from test_act_safety import MS, World

from spiked.act.arming import STOP
from spiked.act.outputs.base import Output
from spiked.act.rules import Firing
from spiked.config import Trigger

CLIENT = Trigger(name="client", when="unit", units=[0], output="out", pattern="p")


class Waiting(World):
    """A world whose output is a real one."""

    def __init__(self, folder: Path, output: Output, pattern: str, **limits: Any) -> None:
        super().__init__(folder, limits, pattern=pattern)
        self.engine.outputs = {"out": output}

    def pass_time(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.engine.poll(self.ns)
            time.sleep(0.001)


@pytest.mark.parametrize("how", ["call", "file", "disarmed", "silent"])
def test_what_waits_behind_an_unanswered_command_does_not_go_out(tmp_path: Path, how: str) -> None:
    with maxlab() as peer, closing(opened("maxlab", peer.address, timeout_ms=PATIENT_MS)) as output:
        ready(output)
        w = Waiting(tmp_path, output, "tetanus")
        w.arm(seconds=1.0)
        peer.mood = "slow"
        w.spike(10)
        w.spike(20)
        w.spike(30)
        eventually(lambda: w.pass_time(0.05) or peer.got)
        assert len(peer.got) == 1
        if how == "call":
            w.engine.stop("by hand")
        elif how == "file":
            (tmp_path / STOP).touch()
        elif how == "disarmed":
            w.engine.arming.disarm()
        else:
            w.ms += 1100  # the lease ends
        w.pass_time(0.1)
        peer.mood = "well"
        eventually(lambda: w.pass_time(0.05) or not output._open)  # type: ignore[attr-defined]
        w.pass_time(0.3)
    assert len(peer.got) == 1
    left = ("refused", "stopped") if how in ("call", "file") else ("dry", "")
    assert w.ledger() == [("sent", ""), left, left]


def test_a_line_that_is_up_comes_down_with_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spiked.act.outputs.spikeglx.ALIVE_S", 600.0)  # nothing but the line is asked for
    with spikeglx() as peer:
        address, patterns = f"tcp://127.0.0.1:{peer.port}", {"tetanus": "Dev4/port0/line5"}
        with closing(opened("spikeglx", address, patterns=patterns, pulse_ms=60_000)) as output:
            ready(output)
            w = Waiting(tmp_path, output, "tetanus")
            w.arm()
            w.spike(10)
            eventually(lambda: w.pass_time(0.05) or peer.got)
            assert [text.split()[-1] for text, _ in peer.got] == ["255"]
            w.engine.stop("by hand")
            eventually(lambda: w.pass_time(0.1) or len(peer.got) > 1)
            w.pass_time(0.1)
            assert [text.split()[-1] for text, _ in peer.got] == ["255", "0"]


def test_where_nobody_can_tell_whether_there_is_a_stop_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that goes away ends the stimulation, and not the live path."""
    w = World(tmp_path)
    w.arm()
    w.spike(10)
    exists = Path.exists

    def gone(path: Path) -> bool:
        if path.name == STOP:
            raise OSError(5, "Input/output error")
        return exists(path)

    monkeypatch.setattr(Path, "exists", gone)
    w.spike(20)
    w.wait(50)
    assert w.ledger() == [("sent", ""), ("refused", "stopped")] and not w.engine.arming.armed
    assert w.told == [f"stimulation is stopped: {tmp_path / STOP} cannot be looked for (Input/output error)"]


@pytest.mark.parametrize("between", ["stop", "disarm", "not armed yet"])
def test_a_delayed_command_does_not_outlive_what_armed_it(tmp_path: Path, between: str) -> None:
    """Stopped, cleared and armed again within its delay: it was decided before all that."""
    w = World(tmp_path, delay_ms=1000.0)
    if between != "not armed yet":
        w.arm("a")
    w.spike(10)
    w.wait(100)
    if between == "stop":
        w.engine.stop("by hand")
        w.engine.arming.clear()
    else:
        w.engine.arming.disarm()
    w.arm("b")
    w.spike(500)
    w.wait(1010)
    assert not w.out.commands
    w.wait(1500)
    first = ("refused", "stopped") if between == "stop" else ("dry", "")
    assert w.ledger() == [first, ("sent", "")]


def test_a_delayed_command_whose_time_is_over_is_late(tmp_path: Path) -> None:
    w = World(tmp_path, {"late_ms": 20.0}, delay_ms=10.0)
    w.arm()
    w.spike(10)
    w.wait(20)
    w.spike(100)
    w.wait(115)
    w.spike(200)
    w.wait(231)  # something held the process up
    assert w.ledger() == [("sent", ""), ("sent", ""), ("refused", "late")]


def test_a_client_s_command_that_lay_about_is_late(tmp_path: Path) -> None:
    """Who asked was told that it failed, and may have asked again."""
    w = World(tmp_path)
    w.arm("a")
    w.ms = 700
    assert w.engine.stimulate(CLIENT, "a", w.ns, w.ns - 600 * MS)["reason"] == "late"
    assert w.engine.stimulate(CLIENT, "a", w.ns, w.ns - 400 * MS)["outcome"] == "sent"


def test_a_rule_in_python_that_takes_long_does_not_stop_the_clock(tmp_path: Path) -> None:
    w = World(tmp_path, {"late_ms": 20.0, "lockout_ms": 10.0}, blind="ignore")
    w.arm()
    took: list[float] = [5.0, 0.0, 0.0, 30.0]

    class Slow:
        trigger = w.engine.triggers[0]

        def process(self, records: np.ndarray) -> list[Firing]:
            w.ms += took.pop(0)
            return [Firing(self.trigger, int(records["sample"][0]), (1,), (int(records["sample"][0]),))]

    w.engine.set_triggers(())
    w.engine.python = [Slow()]  # type: ignore[list-item]
    w.spike(10)  # at 12, decided at 17
    w.spike(21)  # at 23: within the lock-out
    w.spike(26)
    w.spike(100)
    assert w.ledger() == [("sent", ""), ("refused", "lockout"), ("sent", ""), ("refused", "late")]


@pytest.mark.parametrize("meanwhile", ["stop", "silent", "late", "nothing"])
def test_a_disk_that_holds_the_ledger_up_does_not_hold_a_command_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    w = World(tmp_path, {"late_ms": 20.0 if meanwhile == "late" else 500.0, "lockout_ms": 20.0})
    w.arm(seconds=0.2)
    append = w.engine.ledger.append

    def slow(record: np.ndarray) -> None:
        append(record)
        monkeypatch.setattr(w.engine.ledger, "append", append)
        w.ms += 30
        if meanwhile == "stop":
            (tmp_path / STOP).touch()

    monkeypatch.setattr(w.engine.ledger, "append", slow)
    w.spike(190 if meanwhile == "silent" else 10)
    refused = {"stop": ("refused", "stopped"), "silent": ("dry", ""), "late": ("refused", "late")}
    assert w.ledger() == [refused.get(meanwhile, ("sent", ""))]
    assert len(w.out.commands) == (meanwhile == "nothing")
    if meanwhile == "nothing":  # it went out 30 ms later than it was to
        w.spike(45)
        w.spike(65)
        assert w.ledger()[1:] == [("refused", "lockout"), ("sent", "")]
