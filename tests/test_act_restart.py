"""What holds for a session outlives the live process: limits, lock-out, refractory times, and what clients changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from record_rig import stream
from test_act_rules import FS as RULES_FS
from test_act_rules import python, spikes
from test_act_safety import NO_BLIND, Probe, World

from spiked import config as configuration
from spiked.act.engine import Engine
from spiked.act.python_rule import STRIKES
from spiked.act.rules import UnitFacts
from spiked.config import Trigger
from spiked.errors import SpikedError
from spiked.live.acting import Acting
from spiked_client.protocol import SPIKE

RULE = {"name": "rule", "when": "unit", "units": [1], "output": "out", "early": True, "stream": "probe"}


@pytest.fixture(autouse=True)
def former_handler() -> Iterator[None]:
    was = signal.getsignal(signal.SIGUSR2)
    yield
    signal.signal(signal.SIGUSR2, was)


class Life:
    """One life of a live process, as far as it acts."""

    def __init__(self, folder: Path, life: int = 0, streams: int = 1, **limits: Any) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        names = ["probe", "other"][:streams]
        config = configuration.parse(
            {
                "rig": {"runtime": str(folder)}, "act": {"lockout_ms": 0, "late_ms": 60_000, **limits}, "trigger": [{**RULE, "amplitude_ua": 10, "width_us": 200}],
                "stream": [{"name": n, "source": "replay", "path": "x"} for n in names],
                "output": [{"name": n, "kind": "serial", "address": "/dev/null", "patterns": {"p": 1}} for n in ("out", "b")],
            }
        )  # fmt: skip
        link = SimpleNamespace(tell=lambda event, **f: self.told.append((event, f)), orphaned=False)
        pipeline = SimpleNamespace(units=None, mark_stim=lambda *_: None, stims_found=lambda: ())
        publisher = SimpleNamespace(send=lambda *_, **__: 0)
        Acting._open_outputs = lambda _self: {"out": self.out}  # type: ignore[method-assign]
        self.out = Probe()
        self.acting = Acting(config, stream(), folder, link, publisher, pipeline, life)  # type: ignore[arg-type]
        self.engine: Engine = self.acting.engine
        self.engine.use(UnitFacts(np.array([1])))

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        held = {"lease_s": 60.0} if op == "arm" else {}  # a busy computer may take its time
        assert self.acting.answer({"op": op, "id": 1, **held, **fields})
        return self.told[-1][1]

    def spike(self, sample: int) -> None:
        now = time.monotonic_ns()
        self.engine.clock.chunk(sample, now)
        record = np.zeros(1, SPIKE)
        record["sample"], record["unit"] = sample, 1
        self.engine.process(record, NO_BLIND, 1 << 60, now)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acting, "_open_outputs", Acting._open_outputs)  # put back afterwards


def test_a_lock_out_goes_on_in_the_next_life(tmp_path: Path, opened: None) -> None:
    first = Life(tmp_path, lockout_ms=60_000)
    assert first.ask("arm", lease="a")["ok"]
    first.spike(1000)
    assert len(first.out.commands) == 1 and not hasattr(first.out, "taken_over")
    second = Life(tmp_path, 1, lockout_ms=60_000)
    assert second.ask("arm", lease="b")["ok"]
    second.spike(100_000)
    assert (
        second.out.taken_over
        and not second.out.commands
        and second.acting.summary()["refusals"] == {"lockout": 1}
    )


def test_what_clients_changed_holds_in_the_next_life(tmp_path: Path, opened: None) -> None:
    first = Life(tmp_path)
    assert first.ask("set_limits", limits={"max_count": 3, "max_nc_per_pulse": 0.5})["ok"]
    assert first.ask("set_trigger", trigger={**RULE, "amplitude_ua": 2, "width_us": 200})["ok"]
    second = Life(tmp_path, 1)
    told = second.ask("triggers")
    assert (told["limits"]["max_count"], told["limits"]["max_nc_per_pulse"]) == (3, 0.5)
    assert [t["amplitude_ua"] for t in told["triggers"]] == [2]
    second.ask("arm", lease="a")
    for k in range(5):
        second.spike(1000 * (k + 1))
    assert [c.amplitude_ua for c in second.out.commands] == [2.0] * 3
    assert (
        second.ask("remove_trigger", name="rule")["error"]
        == "triggers cannot be changed while armed; disarm first"
    )
    second.ask("disarm")
    assert second.ask("remove_trigger", name="rule")["ok"]
    assert Life(tmp_path, 2).engine.triggers == ()
    (tmp_path / "probe.act.json").write_text("{}")
    with pytest.raises(SpikedError, match=r"probe\.act\.json cannot be read \(KeyError\); remove it"):
        Life(tmp_path, 3)


def test_a_rule_cannot_name_another_stream_s_output(tmp_path: Path, opened: None) -> None:
    life = Life(tmp_path, streams=2)
    told = life.ask("set_trigger", trigger={**RULE, "output": "b"})
    assert told["error"] == "output b belongs to another stream than probe; name one of its own"
    life.acting._absent["b"] = "nobody listens"
    assert life.ask("set_trigger", trigger={**RULE, "output": "b"})["ok"]
    assert life.ask("set_trigger", trigger={**RULE, "output": ""})["ok"]


def test_limits_can_be_asked_for_without_changing_them(tmp_path: Path, opened: None) -> None:
    life = Life(tmp_path)
    assert life.ask("set_limits", limits={"max_count": 20_000}, check=True)["ok"]
    life.ask("arm", lease="a")
    assert "cannot be raised" in life.ask("set_limits", limits={"max_count": 20_000}, check=True)["error"]
    assert life.ask("set_limits", limits={"max_count": 2}, check=True)["ok"]
    assert life.engine.safety.limits.max_count == 10_000 and not (tmp_path / "probe.act.json").exists()


def test_what_was_told_to_have_failed_is_not_done_later(tmp_path: Path, opened: None) -> None:
    """A process that starts, or was held up, finds requests that nobody waits for any more. Stops and disarming count nevertheless."""
    life, past = Life(tmp_path), time.monotonic_ns() - 1
    asked = {
        "arm": {"lease": "a"}, "set_limits": {"limits": {"max_count": 1}}, "set_trigger": {"trigger": {**RULE, "amplitude_ua": 1}},
        "remove_trigger": {"name": "rule"},
    }  # fmt: skip
    for op, fields in asked.items():
        told = life.ask(op, until_ns=past, **fields)
        assert (
            not told["ok"] and told["error"] == f"{op} came too late; whoever asked was told that it failed"
        )
    assert not life.engine.arming.armed and life.engine.safety.limits.max_count == 10_000
    assert [t.amplitude_ua for t in life.engine.triggers] == [10] and not life.engine.ledger.sent
    life.ask("arm", lease="a", until_ns=past + 10**11)
    told = life.ask("stimulate", lease="a", output="out", until_ns=past, asked_ns=past - 5 * 10**9)
    assert (told["outcome"], told["reason"]) == ("refused", "late") and not life.out.commands
    assert life.ask("disarm", lease="a", until_ns=past)["ok"] and not life.engine.arming.armed
    assert (
        life.ask("stop_stimulation", why="smoke", until_ns=past)["ok"]
        and life.engine.arming.stopped == "smoke"
    )
    assert not life.ask("clear_stop", until_ns=past)["ok"] and life.engine.arming.stopped == "smoke"


def test_a_change_that_cannot_be_kept_holds_and_is_told(tmp_path: Path, opened: None) -> None:
    life = Life(tmp_path)
    (tmp_path / "probe.act.json.new").mkdir()
    assert life.ask("set_limits", limits={"max_count": 3})["ok"]
    assert life.engine.safety.limits.max_count == 3
    assert any("is lost when the live process is restarted" in str(f.get("text")) for _, f in life.told)
    assert json.dumps(life.ask("triggers")["limits"])


def test_a_stop_by_signal_holds_while_the_process_still_starts(tmp_path: Path) -> None:
    """It would end the process, and its successor would know nothing of a stop."""
    os.mkfifo(tmp_path / "session.toml")  # who reads it waits: the process starts as long as the test wants
    about = ("--session", str(tmp_path), "--stream", "probe", "--ring", str(tmp_path / "none"))
    process = subprocess.Popen(
        [sys.executable, "-m", "spiked.processes.run", "live", *about],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 200
        while not (handled := _handles(process.pid, signal.SIGUSR2)) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR2)
        stop = tmp_path / "STOP"
        while (
            not (stop.exists() and stop.read_text()) and process.poll() is None and time.monotonic() < until
        ):
            time.sleep(0.01)
        assert handled and process.poll() is None
        assert stop.read_text() == "signal SIGUSR2\n"
    finally:
        process.kill()
        process.communicate()


def test_a_stop_by_signal_holds_when_the_process_is_killed_before_it_acts_on_it(
    tmp_path: Path, opened: None
) -> None:
    """As when it hangs, and somebody tries to stop it."""
    Life(tmp_path)
    signal.raise_signal(signal.SIGUSR2)
    assert "stopped (signal SIGUSR2)" in Life(tmp_path, 1).ask("arm", lease="a")["error"]


def _handles(pid: int, which: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = int(next(line.split()[1] for line in lines if line.startswith("SigCgt")), 16)
    return bool(caught >> (which - 1) & 1)


def test_refractory_times_go_on_in_the_next_life_and_over_a_change_of_rules(tmp_path: Path) -> None:
    w = World(tmp_path, refractory_ms=1000.0)
    w.spike(10)
    w.engine.ledger.close()
    again = World(tmp_path, refractory_ms=1000.0)
    again.spike(500)
    assert len(again.ledger()) == 1
    again.spike(1020)
    another = Trigger(name="another", when="unit", units=[7])
    again.engine.set_triggers((*again.engine.triggers, another))
    again.spike(1500)
    assert len(again.ledger()) == 2
    again.spike(2030)
    assert len(again.ledger()) == 3


def test_a_suspended_python_rule_stays_so_when_another_rule_changes(tmp_path: Path) -> None:
    assert RULES_FS == 20_000
    rule, _ = python(tmp_path, "n = 0\ndef decide(s):\n    raise ValueError\n", refractory_ms=1000.0)
    w = World(tmp_path)
    w.engine.set_triggers((rule.trigger,))
    for k in range(STRIKES):
        w.engine.python[0].process(spikes((5 + k, 3)))
    w.engine.set_triggers((rule.trigger, Trigger(name="another", when="unit", units=[7])))
    assert w.engine.python[0].counters["suspended"] == 1
    changed = rule.trigger.model_copy(update={"refractory_ms": 5.0})
    w.engine.set_triggers((changed,))
    assert w.engine.python[0].counters["suspended"] == 0 and w.engine.python[0].trigger == changed
