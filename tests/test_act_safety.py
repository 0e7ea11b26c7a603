"""Stimulation that must not happen does not, and the ledger says why."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from allocations import counted

from spiked.act.arming import STOP, Arming
from spiked.act.engine import Engine
from spiked.act.ledger import Ledger, read
from spiked.act.outputs.base import Ack, Command
from spiked.act.rules import UnitFacts
from spiked.act.safety import Safety
from spiked.config import Act, Trigger
from spiked.errors import SpikedError
from spiked_client.protocol import BLIND, LEDGER, OUTCOMES, REASONS, SPIKE

FS, MS = 20_000.0, 1_000_000
NO_BLIND = np.zeros(0, BLIND)


class Probe:
    """An output that keeps what it is sent and acknowledges 0.2 ms later."""

    name = "out"

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.acks: list[Ack] = []
        self.now, self.ok, self.leaves_ns = 0, True, 10_000

    def send(self, command: Command) -> None:
        self.commands.append(command)
        sent, text = (self.now + self.leaves_ns, "") if self.ok else (0, "nobody there")
        self.acks.append(Ack(command.number, sent, self.now + 200_000, self.ok, text))

    def poll(self) -> list[Ack]:
        out, self.acks = self.acks, []
        return out

    def waiting(self) -> tuple[int, ...]:
        return ()

    def withdraw(self, _number: int) -> bool:
        return False

    def halt(self) -> None: ...

    def take_over(self) -> None:
        self.taken_over = True

    def close(self) -> None:
        self.commands = []


class World:
    """An engine with one rule on unit 1, and a clock that the test moves. Sample 0 was taken at 1 s."""

    def __init__(self, folder: Path, limits: dict[str, Any] | None = None, **trigger: Any) -> None:
        self.told: list[str] = []
        self.marks: list[tuple[int, str]] = []
        self.out = Probe()
        rule = Trigger(
            **{"name": "rule", "when": "unit", "units": [1], "output": "out", "early": True, **trigger}
        )
        defaults = {"lockout_ms": 0, "max_per_s": 1000}
        self.engine = Engine(
            (rule,), Act(**{**defaults, **(limits or {})}), FS, 4, {"out": self.out}, Ledger(folder, "s"), Arming(folder),
            lambda _level, text: self.told.append(text), lambda sample, pattern: self.marks.append((sample, pattern)),
            now=lambda: self.ns,
        )  # fmt: skip
        self.engine.use(UnitFacts(np.array([1])))
        self.folder, self.ms = folder, 0.0

    @property
    def ns(self) -> int:
        return round((1000 + self.ms) * MS)

    def arm(self, token: str = "a", rules: list[str] | None = None, seconds: float = 60.0) -> None:
        self.engine.arming.arm(token, rules, seconds, self.ns)

    def spike(self, ms: float, later_ms: float = 2.0) -> None:
        """Unit 1 fires at `ms`, which is known `later_ms` later."""
        self.ms = ms + later_ms
        self.out.now = self.ns
        record = np.zeros(1, SPIKE)
        record["sample"], record["unit"] = round(ms * FS / 1000), 1
        self.engine.clock.chunk(round(self.ms * FS / 1000), self.ns)
        self.engine.process(record, NO_BLIND, 1 << 60, self.ns)
        self.engine.poll(self.ns)

    def wait(self, ms: float) -> None:
        self.ms = self.out.now = ms  # type: ignore[assignment]
        self.out.now = self.ns
        self.engine.poll(self.ns)

    def ledger(self) -> list[tuple[str, str]]:
        records = read(self.folder / "s.ledger.bin")
        return [(OUTCOMES[r["outcome"]], REASONS[r["reason"]]) for r in records]


def test_nothing_is_sent_until_armed(tmp_path: Path) -> None:
    w = World(tmp_path)
    w.spike(10)
    w.arm()
    w.spike(20)
    w.engine.arming.disarm()
    w.spike(30)
    assert w.ledger() == [("dry", ""), ("sent", ""), ("dry", "")]
    assert [c.number for c in w.out.commands] == [2]


def test_a_lease_covers_the_rules_it_names(tmp_path: Path) -> None:
    w = World(tmp_path)
    w.arm(rules=["another"])
    w.spike(10)
    w.arm("b", ["rule"])
    w.spike(20)
    assert w.ledger() == [("dry", ""), ("sent", "")]


def test_a_silent_client_is_disarmed_and_that_is_told(tmp_path: Path) -> None:
    w = World(tmp_path)
    w.arm("a", ["rule"], 1.0)
    w.spike(500)
    w.engine.arming.renew("a", w.ns)
    w.spike(1400)
    assert w.ledger() == [("sent", ""), ("sent", "")]
    w.spike(1600)  # the lease ended at 1502 ms; nobody polled meanwhile
    assert w.ledger()[-1] == ("dry", "")
    assert w.told == ["disarmed: the client that armed rule did not renew within 1 s"]
    with pytest.raises(SpikedError, match=r"^this lease is over[^\n]*$"):
        w.engine.arming.renew("a", w.ns)


def test_another_client_s_lease_goes_on(tmp_path: Path) -> None:
    w = World(tmp_path)
    w.arm("a", None, 1.0)
    w.arm("b", None, 5.0)
    w.spike(2000)
    assert w.ledger() == [("sent", "")] and not w.engine.arming.holds("a")


@pytest.mark.parametrize(
    ("limits", "trigger", "at_ms", "expected"),
    [
        ({"max_per_s": 2}, {}, [10, 20, 30, 1020], ["", "", "rate", ""]),
        ({"max_count": 2}, {}, [10, 20, 30, 5000], ["", "", "count", "count"]),
        ({"lockout_ms": 15}, {}, [10, 20, 26], ["", "lockout", ""]),
        ({"max_nc_per_pulse": 2.0}, {"amplitude_ua": 11, "width_us": 200}, [10], ["pulse charge"]),
        ({"max_nc_per_pulse": 2.0}, {"amplitude_ua": 10, "width_us": 200}, [10], [""]),
        ({"max_nc_per_pulse": 2.0}, {"amplitude_ua": 11}, [10], [""]),  # the width is not known
        (
            {"max_nc_per_s": 5.0}, {"amplitude_ua": 10, "width_us": 100, "pulses": 2},
            [10, 20, 30, 1015, 1019, 1030], ["", "", "charge rate", "", "charge rate", ""],
        ),
        ({"late_ms": 1.5}, {}, [10], ["late"]),
    ],
)  # fmt: skip
def test_each_limit_refuses_and_says_so(
    tmp_path: Path, limits: dict[str, Any], trigger: dict[str, Any], at_ms: list[float], expected: list[str]
) -> None:
    w = World(tmp_path, limits, **trigger)
    w.arm()
    for ms in at_ms:
        w.spike(ms)
    assert w.ledger() == [("refused", why) if why else ("sent", "") for why in expected]
    assert len(w.out.commands) == expected.count("")


def test_a_stimulus_from_elsewhere_locks_out_too(tmp_path: Path) -> None:
    w = World(tmp_path, {"lockout_ms": 5})
    w.arm()
    w.spike(1)
    w.engine.seen(7 * 20, w.ns + 10 * MS)  # at 7 ms, noticed later
    w.spike(9)
    w.spike(11)
    assert w.ledger() == [("sent", ""), ("refused", "lockout"), ("sent", "")]


def test_a_client_s_stimulus_obeys_the_same_limits(tmp_path: Path) -> None:
    w = World(tmp_path, {"lockout_ms": 50})
    t = Trigger(name="client", when="unit", units=[0], output="out", pattern="p")
    assert w.engine.stimulate(t, "a", w.ns) == {"number": 1, "outcome": "dry", "reason": ""}
    w.arm("a")
    assert w.engine.stimulate(t, "another", w.ns)["outcome"] == "dry"
    assert w.engine.stimulate(t, "a", w.ns)["outcome"] == "sent"
    w.ms = 10
    assert w.engine.stimulate(t, "a", w.ns) == {"number": 4, "outcome": "refused", "reason": "lockout"}
    w.spike(15)
    elsewhere = t.model_copy(update={"output": "none"})
    w.ms = 100
    assert w.engine.stimulate(elsewhere, "a", w.ns) == {
        "number": 6,
        "outcome": "refused",
        "reason": "no output",
    }
    assert w.ledger()[4] == ("refused", "lockout")
    assert [(c.rule, c.pattern) for c in w.out.commands] == [("", "p")]


@pytest.mark.parametrize(
    ("changes", "ok_while_armed"),
    [
        ({"max_per_s": 10}, True),
        ({"max_per_s": 51}, False),
        ({"max_count": 10_001}, False),
        ({"lockout_ms": 4.9}, False),
        ({"lockout_ms": 5.1}, True),
        ({"max_nc_per_pulse": None}, False),
        ({"max_nc_per_s": 150.0}, True),
        ({"max_per_s": 10, "max_nc_per_s": 151.0}, False),
    ],
)
def test_limits_can_only_be_lowered_while_armed(changes: dict[str, Any], ok_while_armed: bool) -> None:
    safety = Safety(Act())
    if ok_while_armed:
        safety.set_limits(changes, armed=True)
    else:
        with pytest.raises(SpikedError, match=r"^[a-z_, ]+ cannot be raised while armed; disarm first$"):
            safety.set_limits(changes, armed=True)
        assert safety.limits == Act()
        safety.set_limits(changes, armed=False)
    assert all(getattr(safety.limits, k) == v for k, v in changes.items())


@pytest.mark.parametrize(
    "changes", [{"max_per_s": -1}, {"speed": 3}, {"lockout_ms": float("nan")}, {"max_count": "x"}]
)
def test_limits_that_make_no_sense_are_refused_in_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(SpikedError, match=r"^[^\n]+$"):
        Safety(Act()).set_limits(changes, armed=False)


@pytest.mark.parametrize("how", ["file", "call", "signal"])
def test_the_emergency_stop_latches(tmp_path: Path, how: str) -> None:
    w = World(tmp_path, delay_ms=10.0)
    w.arm()
    w.spike(10)
    if how == "file":
        (tmp_path / STOP).touch()
    elif how == "call":
        w.engine.stop("by hand")
    else:
        w.engine.stop_asked = "signal SIGUSR2"
    w.wait(25)  # the command that was waiting
    w.spike(30)
    w.wait(50)
    assert w.ledger() == [("refused", "stopped")] * 2
    assert not w.out.commands and (tmp_path / STOP).exists()
    with pytest.raises(SpikedError, match=r"^stimulation was stopped[^\n]*$"):
        w.arm()
    again = World(tmp_path)  # a restarted process
    with pytest.raises(SpikedError, match="clear_stop first"):
        again.arm()
    again.engine.arming.clear()
    again.spike(100)
    again.arm()
    again.spike(200)
    assert again.ledger()[2:] == [("dry", ""), ("sent", "")]
    assert sum("is stopped" in text for text in w.told) == 1


def test_an_orphan_is_disarmed(tmp_path: Path) -> None:
    w = World(tmp_path)
    w.arm()
    w.engine.orphaned()
    w.spike(10)
    assert w.ledger() == [("dry", "")] and w.told == ["disarmed: the supervisor is gone"]


def test_a_delay_counts_from_the_trough_and_does_not_block(tmp_path: Path) -> None:
    w = World(tmp_path, delay_ms=10.0)
    w.arm()
    w.spike(10)
    w.spike(12)
    assert w.ledger() == [("held", "")] * 2
    w.wait(19.9)
    assert not w.out.commands
    w.wait(20.0)
    assert w.ledger() == [("sent", ""), ("held", "")]
    w.engine.arming.disarm()
    w.wait(23)
    assert w.ledger() == [("sent", ""), ("dry", "")]


def test_a_sham_is_decided_and_not_sent(tmp_path: Path) -> None:
    w = World(tmp_path, sham_fraction=1.0)
    w.spike(10)
    w.arm()
    w.spike(20)
    assert w.ledger() == [("dry", ""), ("sham", "")] and not w.out.commands


def test_what_is_counted_goes_on_after_a_restart(tmp_path: Path) -> None:
    w = World(tmp_path, {"max_count": 2})
    w.arm()
    w.spike(10)
    w.spike(20)
    w.engine.ledger.close()
    again = World(tmp_path, {"max_count": 2})
    again.arm()
    again.spike(30)
    assert again.ledger() == [("sent", ""), ("sent", ""), ("refused", "count")]


def test_a_ledger_that_cannot_be_written_stops_all_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = World(tmp_path)
    w.arm()

    def full(_record: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(w.engine.ledger, "append", full)
    w.spike(10)
    assert not w.out.commands and not w.engine.arming.armed
    assert len([t for t in w.told if "cannot be written" in t]) == 1
    assert REASONS[int(w.engine.take_news()["reason"][-1])] == "ledger"


def test_a_disk_that_takes_a_part_of_a_record_garbles_none_after_it(tmp_path: Path) -> None:
    """A write at the end of the room is cut short, and says so only in its count."""
    w = World(tmp_path)
    w.arm()
    w.spike(10)
    path = tmp_path / "s.ledger.bin"
    size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
    try:
        w.spike(20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(w.out.commands) == 1 and not w.engine.arming.armed and path.stat().st_size == size
    w.arm()
    w.spike(30)
    assert w.ledger() == [("sent", "")] * 2 and len(w.out.commands) == 2
    assert read(path)["number"].tolist() == [1, 3] and read(path)["sample"].tolist() == [200, 600]


def test_a_disk_that_refuses_only_when_synced_stops_commands_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network disks and quotas do."""
    w = World(tmp_path)
    w.arm()
    sync, broken = os.fsync, threading.Event()

    def fsync(fd: int) -> None:
        if broken.is_set():
            raise OSError(122, "Disk quota exceeded")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    broken.set()
    w.spike(10)
    until = time.monotonic() + 60
    while w.engine.ledger._trouble is None and w.engine.arming.armed and time.monotonic() < until:
        time.sleep(0.01)
    w.spike(20)
    assert len(w.out.commands) == 1 and not w.engine.arming.armed
    assert any("cannot be written (Disk quota exceeded): nothing is sent any more" in text for text in w.told)
    w.engine.ledger.close()
    broken.clear()
    again = World(tmp_path)
    again.arm()
    again.spike(30)
    assert len(again.out.commands) == 1


def test_every_interval_is_in_the_ledger(tmp_path: Path) -> None:
    w = World(tmp_path, pattern="p")
    w.arm()
    w.spike(10)
    w.ms = 15.0
    w.engine.seen(round(13.5 * 20), w.ns)
    w.engine.seen(round(13.6 * 20), w.ns)  # the same one, seen in the data as well
    w.spike(20)
    w.out.ok = False
    w.spike(30)
    first, second, third = read(tmp_path / "s.ledger.bin")
    assert (first["trigger_ns"], first["decided_ns"]) == (1010 * MS, 1012 * MS)
    assert (first["sent_ns"], first["ack_ns"]) == (1012 * MS + 10_000, 1012 * MS + 200_000)
    assert (first["sample"], first["sent_sample"], first["artifact_sample"]) == (200, 240, 270)
    assert first["artifact_ns"] == 1015 * MS
    assert (first["n_triggers"], first["trigger_unit"][0], first["trigger_sample"][0]) == (1, 1, 200)
    assert (first["rule"], first["pattern"]) == (b"rule", b"p")
    assert (second["artifact_sample"], second["artifact_ns"]) == (-1, 0)
    assert (OUTCOMES[third["outcome"]], REASONS[third["reason"]]) == ("failed", "output")
    assert (third["sent_ns"], third["sent_sample"]) == (0, -1)
    assert w.marks == [
        (240 + 20, "p"),
        (440 + 30, "p"),
        (640 + 30, "p"),
    ]  # where experience says, once there is some
    news = w.engine.take_news()
    assert news.dtype == LEDGER and set(news["number"]) == {1, 2, 3} and not len(w.engine.take_news())


def test_a_place_that_was_only_foretold_does_not_move_the_next_one(tmp_path: Path) -> None:
    """Commands that leave late, and artifacts that are taken to be where they were marked: no drift."""
    w = World(tmp_path)
    w.out.leaves_ns = MS // 2
    w.arm()
    for k in range(1, 9):
        w.spike(10 * k)
        w.ms += 3
        w.engine.seen(w.marks[-1][0], w.ns)
    assert [sample for sample, _ in w.marks] == [200 * k + 40 + 20 for k in range(1, 9)]
    assert (read(tmp_path / "s.ledger.bin")["artifact_sample"] >= 0).all()


def test_what_waited_for_the_peer_is_in_the_ledger_where_it_left(tmp_path: Path) -> None:
    """And the lock-out counts from there; what is told of it afterwards is at another time."""
    w = World(tmp_path, {"lockout_ms": 5})
    w.out.send = w.out.commands.append  # type: ignore[method-assign]
    w.arm()
    w.spike(10)
    w.ms = 52.0
    w.out.acks = [Ack(1, w.ns - 2 * MS, w.ns - MS, True, "")]
    w.spike(51)
    assert w.ledger() == [("sent", ""), ("sent", "")]
    w.engine.poll(w.ns)
    (first, _) = read(tmp_path / "s.ledger.bin")
    assert (first["sent_ns"], first["sent_sample"], first["ack_ns"]) == (1050 * MS, 1000, 1051 * MS)
    w.out.acks = [
        Ack(1, 1090 * MS, 1091 * MS, False, "the line could not be lowered"),
        Ack(2, 1090 * MS, 1091 * MS, True, ""),
    ]
    w.wait(92)
    first, second = read(tmp_path / "s.ledger.bin")
    assert (first["sent_ns"], first["sent_sample"], first["ack_ns"]) == (1050 * MS, 1000, 1051 * MS)
    assert OUTCOMES[first["outcome"]] == "failed" and second["sent_sample"] == 1800
    w.spike(92)
    w.spike(94)
    assert w.ledger()[2:] == [("refused", "lockout"), ("sent", "")]


def test_a_torn_record_is_left_out_and_cut_off(tmp_path: Path) -> None:
    w = World(tmp_path)
    w.spike(10)
    w.engine.ledger.close()
    path = tmp_path / "s.ledger.bin"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    assert len(read(path)) == 1
    again = World(tmp_path)
    again.spike(20)
    assert read(path)["number"].tolist() == [1, 2]
    assert len(read(tmp_path / "absent.bin")) == 0


def test_while_nothing_fires_no_arrays_are_made(tmp_path: Path) -> None:
    w = World(tmp_path, when="count", count=4000, window_ms=1000.0, early=False)
    some = np.zeros((120, 3), SPIKE)
    some["unit"], some["sample"] = [1, 1, 5], 20 * np.arange(120)[:, None]
    told = [some[i, :0] if i % 3 else some[i] for i in range(120)]

    def chunk(i: int) -> None:
        w.engine.clock.chunk(20 * i + 20, w.ns)
        w.engine.process(told[i], NO_BLIND, 20 * i - 10, w.ns)
        w.engine.poll(w.ns)

    for i in range(20):
        chunk(i)
    with counted() as found:
        for i in range(20, 120):
            chunk(i)
    assert found.calls == 0
