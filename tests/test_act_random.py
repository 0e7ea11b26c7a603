"""Whatever happens in whatever order: no command without a lease that was there when it was decided, none after a stop, none over a limit."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from test_act_safety import MS, World

from spiked.act import ledger
from spiked.act.arming import STOP
from spiked.act.ledger import read
from spiked.act.outputs.base import Ack, Command
from spiked.act.shared import SharedSafety
from spiked.config import Trigger
from spiked.errors import SpikedError
from spiked_client.protocol import OUTCOMES

LIMITS = {"max_per_s": 5, "lockout_ms": 20.0, "max_count": 25, "max_nc_per_s": 8.0, "late_ms": 20.0}
CLIENT = Trigger(name="client", when="unit", units=[0], output="out", amplitude_ua=10, width_us=200)  # 2 nC
PULSE = {"amplitude_ua": 10, "width_us": 100, "probability": 0.9, "sham_fraction": 0.1}

WEIGHTS = {
    "spike": 40, "wait": 15, "arm": 14, "renew": 5, "disarm": 3, "stimulate": 8, "block": 4, "free": 8, "stop": 1, "file": 1, "signal": 1, "clear": 8, "restart": 2,
}  # fmt: skip
ABOUT: dict[str, tuple[list[Any], ...]] = {
    "spike": ([0.5, 2.0, 15.0, 40.0],),  # known so much later
    "wait": ([1.0, 5.0, 12.0, 90.0, 400.0],), "arm": (["a", "b"], [0.2, 0.5, 5.0]),
    **dict.fromkeys(("renew", "disarm", "stimulate"), (["a", "b"],)),
}  # fmt: skip


class Queueing:
    """An output that may hold commands back as one does whose peer does not answer."""

    name = "out"

    def __init__(self, world: World, left: list[tuple[int, Command]]) -> None:
        self.queue: list[tuple[int, Command]] = []  # since, command
        self.acks: list[Ack] = []
        self.world, self.left, self.blocked, self.waited = world, left, False, False

    def send(self, command: Command) -> None:
        self.queue.append((self.world.ns, command))
        self.pump()

    def pump(self) -> None:
        now = self.world.ns
        while self.queue:
            since, c = self.queue[0]
            if now - since > 100 * MS:
                self.acks.append(Ack(c.number, 0, now, False, "late"))
            elif self.blocked or (self.left and now - self.left[-1][0] < c.apart_ns):
                return
            else:
                self.waited |= now > since
                self.left.append((now, c))
                self.acks.append(Ack(c.number, now, now, True, ""))
            del self.queue[0]

    def poll(self) -> list[Ack]:
        self.pump()
        out, self.acks = self.acks, []
        return out

    def waiting(self) -> tuple[int, ...]:
        return tuple(c.number for _, c in self.queue)

    def withdraw(self, number: int) -> bool:
        kept = [w for w in self.queue if w[1].number != number]
        found, self.queue = len(kept) < len(self.queue), kept
        return found

    def halt(self) -> None: ...

    def take_over(self) -> None: ...

    def close(self) -> None: ...


class Rig:
    """Lives of a live process one after the other, and what a strict observer knows of them."""

    def __init__(self, folder: Path, delay_ms: float) -> None:
        self.folder, self.delay_ms, self.ms = folder, delay_ms, 0.0
        self.tokens = {"a": "", "b": ""}
        self.waited = False
        self.leases: dict[str, tuple[int, int]] = {}  # token -> since, until
        self.ended: list[tuple[str, int, int]] = []
        self.stops: list[tuple[int, int]] = []  # since, until
        self.left: list[tuple[int, Command]] = []
        self.begin()

    def begin(self) -> None:
        w = self.w = World(self.folder, LIMITS, delay_ms=self.delay_ms, **PULSE)
        w.ms = self.ms
        w.engine.safety = SharedSafety(self.folder / "account", w.engine.cfg, w.engine.ledger.sent)
        self.out = w.engine.outputs["out"] = Queueing(w, self.left)  # type: ignore[index]

    def do(self, what: str, *about: Any) -> None:
        w = self.w
        w.ms += 0.25
        if what == "spike":
            w.spike(w.ms + 1, *about)
        elif what == "wait":
            for _ in range(4):
                w.wait(w.ms + about[0] / 4)
        elif what == "arm":
            self.tokens[about[0]] = f"{about[0]}{w.ms}"
            self.lease(what, self.tokens[about[0]], about[1])
        elif what == "renew":
            self.lease(what, self.tokens[about[0]])
        elif what == "disarm":
            w.engine.arming.disarm(self.tokens[about[0]])
            self.end(self.tokens[about[0]], w.ns)
        elif what == "stimulate":
            w.engine.stimulate(CLIENT, self.tokens[about[0]], w.ns)
        elif what in ("stop", "file", "signal"):
            self.stop(what)
        elif what == "clear":
            w.engine.arming.clear()
            self.stops[-1:] = [(a, min(b, w.ns)) for a, b in self.stops[-1:]]
        elif what == "restart":  # killed: nothing is closed
            self.ms = w.ms + 1
            w.engine.ledger.close()
            self.waited |= self.out.waited
            for token in list(self.leases):
                self.end(token, w.ns)
            self.begin()
        else:
            self.out.blocked = what == "block"

    def lease(self, what: str, token: str, seconds: float = 0.0) -> None:
        w = self.w
        w.engine.poll(w.ns)
        try:
            if what == "arm":
                w.engine.arming.arm(token, None, seconds, w.ns)
                self.leases[token] = w.ns, w.ns + round(seconds * 1e9)
            else:
                w.engine.arming.renew(token, w.ns)
                since, until = self.leases.get(token, (0, 0))  # a stop by the file is seen within 10 ms
                if not until:
                    return
                seconds = w.engine.arming._leases[token].seconds
                assert until > w.ns
                self.leases[token] = since, w.ns + round(seconds * 1e9)
        except SpikedError:
            pass

    def end(self, token: str, ns: int) -> None:
        if token in self.leases:
            since, until = self.leases.pop(token)
            self.ended.append((token, since, min(until, ns)))

    def stop(self, how: str) -> None:
        w = self.w
        if how == "file":
            (self.folder / STOP).touch()
        elif how == "signal":
            w.engine.stop_asked = "signal SIGUSR2"
            w.engine.arming.put_on_file("signal SIGUSR2")
        else:
            w.engine.stop("by hand")
        for token in list(self.leases):
            self.end(token, w.ns)
        if not self.stops or self.stops[-1][1] <= w.ns:
            self.stops.append((w.ns, 1 << 62))

    def check(self) -> None:
        left = np.array([ns for ns, _ in self.left], np.int64)
        decided = read(self.folder / "s.ledger.bin")
        when = dict(zip(decided["number"].tolist(), decided["decided_ns"].tolist(), strict=True))
        held = [(a, b) for _, a, b in self.ended] + list(self.leases.values())
        for ns, c in self.left:
            assert not any(a < ns < b for a, b in self.stops), "after a stop"
            assert any(a <= when[c.number] and ns < b for a, b in held), "without a lease"
            assert ns - when[c.number] <= (self.delay_ms + LIMITS["late_ms"] + 100) * MS
        assert (
            np.diff(left).min(initial=1 << 60) >= LIMITS["lockout_ms"] * MS
            and len(left) <= LIMITS["max_count"]
        )
        numbers = [c.number for _, c in self.left]
        assert len(set(numbers)) == len(numbers)
        names = [OUTCOMES[o] for o in decided["outcome"]]
        assert {c.number for _, c in self.left} <= {
            n for n, o in zip(decided["number"], names, strict=True) if o == "sent"
        }
        if not self.waited:  # else a second may hold what was counted for the tenth of a second before
            for a in left:
                mine = [c for ns, c in self.left if a <= ns < a + 1_000_000_000]
                assert len(mine) <= LIMITS["max_per_s"]
                assert sum(c.amplitude_ua * c.width_us / 1000 for c in mine) <= LIMITS["max_nc_per_s"] + 1e-9  # type: ignore[operator]


@pytest.mark.parametrize("delay_ms", [0.0, 30.0, 300.0])
def test_no_order_of_events_lets_a_command_out_that_may_not_go(
    delay_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "SYNC_S", 0.0)
    words, weights = list(WEIGHTS), np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    left = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        with TemporaryDirectory() as folder:
            rig = Rig(Path(folder), delay_ms)
            rig.do("arm", "a", 5.0)
            events = [
                (what, *(choices[rng.integers(len(choices))] for choices in ABOUT.get(what, ())))
                for what in rng.choice(words, 100, p=weights).tolist()
            ]
            for event in events:
                rig.do(*event)
            rig.do("wait", 1200.0)
            rig.w.engine.ledger.close()
            rig.waited |= rig.out.waited
            try:
                rig.check()
            except AssertionError as e:
                raise AssertionError(f"seed {seed}: {events}") from e
            left += len(rig.left)
    assert left > 100
