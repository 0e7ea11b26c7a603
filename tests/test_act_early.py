"""Rules that act on early spikes: what the ledger says of it, and what is taken back while there is time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from test_act_safety import FS, NO_BLIND, World

from spiked.act.ledger import read
from spiked.act.report import lines, summary
from spiked.act.rules import UnitFacts
from spiked_client.protocol import EARLY, FATES, LEDGER, RESOLVED, SPIKE, TOLD_EARLY

PER_MS = FS // 1000


class TwoStepWorld(World):
    """Its spikes are told early, and resolved later."""

    n = 0

    def early(self, ms: float, unit: int = 1, later_ms: float = 0.5) -> int:
        """The number of an early spike at `ms`."""
        self.n += 1
        found = np.zeros(1, EARLY)
        found["sample"], found["unit"], found["number"] = round(ms * PER_MS), unit, self.n
        self.at(ms + later_ms)
        self.engine.early(found, np.zeros(0, RESOLVED), self.ns)
        return self.n

    def final(self, number: int, ms: float, fate: str, unit: int = 1, later_ms: float = 1.4) -> None:
        """What became of it; its final spike too, flagged, where there is one."""
        self.at(ms + later_ms)
        confirmed = fate == "confirmed"
        spike = np.zeros(int(confirmed), SPIKE)
        spike["sample"], spike["unit"], spike["flags"] = round(ms * PER_MS), unit, TOLD_EARLY
        self.engine.process(spike, NO_BLIND, 1 << 60, self.ns)
        sample = round(ms * PER_MS)
        row = (number, sample, sample if confirmed else -1, unit, FATES.index(fate))
        self.engine.early(np.zeros(0, EARLY), np.array([row], RESOLVED), self.ns)

    def at(self, ms: float) -> None:
        self.ms = ms
        self.engine.clock.chunk(round(ms * PER_MS), self.ns)
        self.wait(ms)


def armed(folder: Path, **trigger: Any) -> TwoStepWorld:
    w = TwoStepWorld(folder, **trigger)
    w.engine.use(UnitFacts(np.array([1, 2])))
    w.arm()
    return w


def test_a_command_on_an_early_spike_is_marked_and_later_confirmed_or_withdrawn(tmp_path: Path) -> None:
    w = armed(tmp_path)
    a = w.early(10)
    assert w.ledger() == [("sent", "early")] and len(w.out.commands) == 1
    w.final(a, 10, "confirmed")
    assert w.ledger() == [("sent", "confirmed")]
    b = w.early(50)
    w.final(b, 50, "withdrawn")
    w.spike(90)  # one that was never early
    assert w.ledger() == [("sent", "confirmed"), ("sent", "withdrawn"), ("sent", "")]
    assert [c.number for c in w.out.commands] == [1, 2, 3]  # nothing twice
    w.wait(300)
    assert (read(tmp_path / "s.ledger.bin")["ack_ns"] > 0).all()
    assert w.engine.conditional.counters == {"confirmed": 1, "withdrawn": 1}
    told = summary(read(tmp_path / "s.ledger.bin"), FS)["rules"]["rule"]
    assert told["on_early"] == {"decisions": 2, "confirmed": 1, "withdrawn": 1, "withdrawn_share": 0.5}
    assert any(
        "2 on early spikes: 1 confirmed, 1 withdrawn (50.0 %)" in line
        for line in lines({"s": {"decisions": 3, "rules": {"rule": told}}})
    )


def test_a_rule_that_is_not_early_waits_for_the_final_spike(tmp_path: Path) -> None:
    w = armed(tmp_path, early=False)
    a = w.early(10)
    assert w.ledger() == []
    w.final(a, 10, "confirmed")
    assert w.ledger() == [("sent", "")]


def test_what_waits_for_its_delay_is_not_sent_when_the_spike_is_withdrawn(tmp_path: Path) -> None:
    w = armed(tmp_path, delay_ms=5)
    a = w.early(10)
    w.final(a, 10, "withdrawn")
    assert w.ledger() == [("held", "")]
    w.wait(16)
    assert w.ledger() == [("refused", "withdrawn")] and not w.out.commands
    b = w.early(40)
    w.final(b, 40, "confirmed")
    w.wait(46)
    assert w.ledger()[1] == ("sent", "confirmed") and len(w.out.commands) == 1


def test_what_cannot_be_sent_keeps_its_own_reason(tmp_path: Path) -> None:
    w = TwoStepWorld(tmp_path, {"lockout_ms": 100})
    a = w.early(10)
    assert w.ledger() == [("dry", "early")]
    w.final(a, 10, "confirmed")
    w.arm()
    b, c = w.early(50), w.early(60)
    w.final(b, 50, "withdrawn")
    w.final(c, 60, "confirmed")
    assert w.ledger() == [("dry", "confirmed"), ("sent", "withdrawn"), ("refused", "lockout")]


def test_of_several_early_spikes_one_withdrawn_is_enough(tmp_path: Path) -> None:
    w = armed(tmp_path, when="count", units=(1, 2), count=3, window_ms=20, refractory_ms=30)
    w.spike(4)
    a, b = w.early(10, unit=1), w.early(12, unit=2)
    assert w.ledger() == [("sent", "early")]
    w.final(a, 10, "confirmed", unit=1, later_ms=4)
    assert w.ledger() == [("sent", "early")]
    w.final(b, 12, "withdrawn", unit=2, later_ms=4)
    assert w.ledger() == [("sent", "withdrawn")]
    record = read(tmp_path / "s.ledger.bin")
    assert record.dtype == LEDGER and record["n_triggers"].tolist() == [3]


def test_a_rule_in_python_that_is_early_sees_each_spike_once(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "seen = []\ndef f(spikes):\n    seen.extend(spikes['sample'].tolist())\n    return True\n"
    )
    w = armed(tmp_path, when="python", call=f"{tmp_path}/r.py:f", budget_ms=1000)
    a = w.early(10)
    w.final(a, 10, "confirmed")
    w.spike(60)
    assert w.ledger() == [("sent", "confirmed"), ("sent", "")]
    seen = w.engine.python[0]._decide.__globals__["seen"]
    assert seen == [10 * PER_MS, 60 * PER_MS]


def test_spikes_out_of_order_keep_their_own_samples(tmp_path: Path) -> None:
    w = armed(tmp_path, units=(1, 2), refractory_ms=0)
    a = w.early(12, unit=1)
    w.spike(10.5, later_ms=2.0)  # one that was never early, final only now
    b = w.early(11.9, unit=2, later_ms=1.0)
    w.final(a, 12, "confirmed", unit=1, later_ms=3)
    w.final(b, 11.9, "withdrawn", unit=2, later_ms=4)
    records = read(tmp_path / "s.ledger.bin")
    assert (records["sample"] / PER_MS).tolist() == [12, 10.5, 11.9]
    assert (records["trigger_sample"][:, 0] == records["sample"]).all()
    assert w.ledger() == [("sent", "confirmed"), ("sent", ""), ("sent", "withdrawn")]
