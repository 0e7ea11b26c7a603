"""The closed loop in the client: age, missed ticks, and a lease that lives while ticks are taken."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from client_rig import Ports, Talker, blind, say, spikes

from spiked.errors import SpikedError
from spiked.publish.zmq_pub import Publisher
from spiked_client import Client, DaemonAbsent, DeadlineMissed, Loop, Refused, Silence
from spiked_client import loop as renewing
from spiked_client.loop import RENEWALS
from spiked_client.protocol import EARLY, FATES, RESOLVED, TOLD_EARLY

LEASE_S = 10.0  # a busy computer may hold everybody up for some seconds


class Rig:
    """The control port's side of arming: leases that end, and what was asked for."""

    def __init__(self) -> None:
        self.until: dict[str, float] = {}
        self.asked: list[dict[str, Any]] = []
        self.lease_s = 0.0

    def handlers(self) -> dict[str, Any]:
        return {"arm": self.arm, "renew": self.renew, "disarm": self.disarm, "stimulate": self.stimulate}

    async def arm(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        self.lease_s = request["lease_s"]
        self.until["L"] = time.monotonic() + self.lease_s
        return {"lease": "L", "armed": request.get("triggers", ["a", "b"])}

    async def renew(self, request: dict[str, Any]) -> None:
        self.asked.append(request)
        if self.until.get(request["lease"], 0) < time.monotonic():
            raise SpikedError("this lease is over: its rules were disarmed; arm again")
        self.until["L"] = time.monotonic() + self.lease_s

    async def disarm(self, request: dict[str, Any]) -> None:
        self.asked.append(request)
        self.until.pop(request["lease"], None)

    async def stimulate(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        return {"number": 1, "outcome": "sent" if request["lease"] else "dry", "reason": ""}

    def ops(self) -> list[str]:
        return [r["op"] for r in self.asked]

    @property
    def armed(self) -> bool:
        return self.until.get("L", 0) > time.monotonic()


@asynccontextmanager
async def looping(ports: Ports, **options: Any) -> AsyncIterator[Loop]:
    async with (
        Client(control_port=ports.port, wait_s=60) as client,
        client.loop("A", timeout=60, **options) as loop,
    ):
        loop.control.timeout = 60.0
        yield loop


async def first(loop: Loop, n: int = 1) -> list[Any]:
    out: list[Any] = []
    async for tick in loop:
        out.append(tick)
        if len(out) == n:
            break
    return out


async def said(loop: Loop, publisher: Publisher, n: int) -> None:
    """n messages that the loop is connected to hear, and has not taken yet."""

    async def one() -> None:
        with contextlib.suppress(DeadlineMissed):
            await first(loop)

    started = asyncio.create_task(one())
    while not started.done():
        say(publisher, "spikes.A", 0)
        await asyncio.sleep(0.01)
    started.result()
    for k in range(n):
        say(publisher, "spikes.A", 1 + k)


async def test_ticks_in_order_with_their_age() -> None:
    with Ports("A") as ports, Talker(ports.streams["A"], "spikes.A"):
        async with looping(ports, deadline_ms=60_000) as loop:
            ticks = await first(loop, 20)
        now = time.monotonic_ns()
        assert [t.first for t in ticks] == list(range(ticks[0].first, ticks[0].first + 600, 30))
        assert all(t.stop == t.first + 30 and t.spikes["sample"].tolist() == [t.first] for t in ticks)
        assert all(0 < t.age_ms <= (now - t.batch.stamps["arrival"]) / 1e6 for t in ticks)
        assert all(t.missed == "" and t.stream == "A" for t in ticks)
        assert loop.counters == {"ticks": 20, "late": 0, "lost": 0, "restarted": 0}


async def test_a_slow_body_makes_the_next_ticks_late() -> None:
    with Ports("A") as ports:
        p = ports.streams["A"]
        async with looping(ports, deadline_ms=60) as loop:
            await said(loop, p, 5)
            time.sleep(0.2)  # noqa: ASYNC251 - what a body must not do
            ticks = await first(loop, 3)
            assert [t.missed for t in ticks] == ["late"] * 3 and ticks[0].age_ms > 100
            with Talker(p, "spikes.A"):
                while (await first(loop))[0].missed:  # it catches up
                    pass
        async with looping(ports, deadline_ms=60, on_missed="raise") as loop:
            await said(loop, p, 5)
            time.sleep(0.2)  # noqa: ASYNC251
            with pytest.raises(
                DeadlineMissed, match=r"A: samples until \d+ are .* ms old, over .* of 60 ms"
            ) as e:
                await first(loop, 2)
            assert len(e.value.tick.spikes) == 1
            with Talker(p, "spikes.A"):
                while True:  # and the loop can be gone on with
                    try:
                        assert (await first(loop))[0].missed == ""
                        break
                    except DeadlineMissed:
                        continue


async def test_losses_and_restarts_are_missed_ticks() -> None:
    with Ports("A") as ports:
        p = ports.streams["A"]
        async with looping(ports, deadline_ms=1000) as loop:
            started = asyncio.create_task(first(loop))
            while not started.done():
                say(p, "spikes.A", 0)
                await asyncio.sleep(0.01)
            say(p, "spikes.A", 1000)
            while (await first(loop))[0].first != 30_000:
                pass
            p._seq["spikes.A"] += 3
            say(p, "spikes.A", 1001)
            (tick,) = await first(loop)
            assert tick.missed == "lost" and tick.batch.missed.count == 3
            p.run = "run-2"
            p._seq["spikes.A"] = 0
            say(p, "spikes.A", 1002)
            (tick,) = await first(loop)
            assert tick.missed in ("restarted", "lost")


async def test_what_a_tick_sees() -> None:
    with Ports("A") as ports:
        async with looping(ports) as loop:
            started = asyncio.create_task(first(loop))
            while not started.done():
                ports.streams["A"].send(
                    "spikes.A", {"first": 0, "stop": 9}, spikes=spikes(4), blind=blind((0, 9), channel=3)
                )
                await asyncio.sleep(0.01)
            (tick,) = started.result()
    assert not tick.sees(3) and not tick.sees(1, 3) and not tick.sees() and tick.sees(1, 2)
    assert tick.age_ms < 60_000 and isinstance(tick.spikes, np.ndarray)


async def test_the_lease_lives_while_ticks_are_taken_and_ends_when_they_are_not() -> None:
    rig = Rig()
    with (
        Ports("A", handlers=rig.handlers()) as ports,
        Talker(ports.streams["A"], "spikes.A"),
    ):
        async with looping(ports, deadline_ms=1000, lease_s=LEASE_S) as loop:
            assert await loop.arm(["a"]) == ["a"]
            assert rig.asked[0]["triggers"] == ["a"] and rig.asked[0]["stream"] == "A"
            begun = time.monotonic()
            while (took := time.monotonic() - begun) < 1.5 * LEASE_S:
                await first(loop)
                assert rig.armed
            assert 2 <= rig.ops().count("renew") <= 1 + took / (LEASE_S / RENEWALS)
            assert (await loop.stimulate("pulser", "p", electrodes=[3], amplitude_ua=2.0))[
                "outcome"
            ] == "sent"
            assert rig.asked[-1] | {"lease": "L", "output": "pulser", "electrodes": [3]} == rig.asked[-1]
            time.sleep(LEASE_S + 0.2)  # noqa: ASYNC251 - hung
            assert not rig.armed
            with pytest.raises(Refused, match="this lease is over"):
                await first(loop, 100_000)
            assert (await loop.stimulate("pulser"))["outcome"] == "dry"
            await loop.arm()
            await first(loop, 3)
        assert rig.ops()[-1] == "disarm" and not rig.armed


async def test_renewals_may_fail_as_long_as_the_lease_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is held up for a moment does not end the loop."""
    monkeypatch.setattr(renewing, "RENEWALS", 32)
    rig, held_up = Rig(), asyncio.Event()
    handlers = rig.handlers()

    async def renew(request: dict[str, Any]) -> None:
        asked.append(time.monotonic())
        if held_up.is_set():
            await asyncio.Event().wait()
        await rig.renew(request)

    asked: list[float] = []
    with Ports("A", handlers={**handlers, "renew": renew}) as ports, Talker(ports.streams["A"], "spikes.A"):
        async with looping(ports, deadline_ms=10_000, lease_s=16.0) as loop:
            await loop.arm(["a"])
            loop.control.timeout = 0.3
            held_up.set()
            until = time.monotonic() + 60
            while len(asked) < 2 and time.monotonic() < until:
                await first(loop)
            held_up.clear()
            loop.control.timeout = 60.0
            while len(asked) < 3 and time.monotonic() < until:
                await first(loop)
            await first(loop, 10)
            assert (await loop.stimulate("pulser"))["outcome"] == "sent"
            loop.control.timeout = 0.3
            held_up.set()
            with pytest.raises(DaemonAbsent):
                await first(loop, 10_000)
            held_up.clear()
            loop.control.timeout = 60.0
            assert (await loop.stimulate("pulser"))["outcome"] == "dry"


async def test_a_daemon_that_waits_for_its_live_processes_is_waited_for() -> None:
    """It says itself after five seconds that they did not answer; who gave up before would not know what is armed."""
    rig = Rig()

    async def arm(request: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(3.0)
        return await rig.arm(request)

    with Ports("A", handlers={**rig.handlers(), "arm": arm}) as ports:
        async with (
            Client(control_port=ports.port, wait_s=60) as client,
            client.loop("A", lease_s=60.0) as loop,
        ):
            assert await loop.arm(["a"]) == ["a"]
            loop.control.timeout = 60.0


async def test_no_ticks_no_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewing, "RENEWALS", 2)  # none is due yet when the first tick is asked for
    rig = Rig()
    with Ports("A", handlers=rig.handlers()) as ports:
        async with (
            Client(control_port=ports.port, wait_s=60) as client,
            client.loop("A", timeout=1.2 * LEASE_S, lease_s=LEASE_S) as loop,
        ):
            loop.control.timeout = 60.0
            await loop.arm()
            with pytest.raises(Silence):
                await first(loop)
            assert not rig.armed and "renew" not in rig.ops()


async def test_marks_go_to_the_stream_of_the_loop() -> None:
    with Ports("A") as ports:
        async with looping(ports) as loop:
            await loop.mark_stim(77, "tetanus")
        asked = {k: ports.asked[0][k] for k in ("op", "sample", "stream", "text")}
        assert asked == {"op": "mark_stim", "sample": 77, "stream": "A", "text": "tetanus"}


def early(number: int, sample: int, unit: int = 0) -> np.ndarray:
    out = np.zeros(1, EARLY)
    out["number"], out["sample"], out["unit"], out["flags"] = number, sample, unit, TOLD_EARLY
    return out


def became(number: int, sample: int, fate: str, unit: int = 0) -> np.ndarray:
    return np.array(
        [(number, sample, sample if fate == "confirmed" else -1, unit, FATES.index(fate))], RESOLVED
    )


async def test_an_early_loop_says_what_became_of_what_it_told() -> None:
    nothing, no_early = np.zeros(0, RESOLVED), np.zeros(0, EARLY)
    with Ports("A") as ports:
        p = ports.streams["A"]
        stamps = {"stamps": {}}
        async with looping(ports, deadline_ms=1000, early=True, units=[0, 1]) as loop:
            started = asyncio.create_task(first(loop))
            while not started.done():
                say(p, "spikes.A", 0)
                await asyncio.sleep(0.01)
            p.send(
                "early.A",
                stamps,
                early=np.concatenate([early(1, 100), early(2, 120, 1), early(3, 130, 9)]),
                resolved=nothing,
            )
            told = spikes(100, 140)
            told["flags"] = [TOLD_EARLY, 0]
            p.send("spikes.A", {"first": 90, "stop": 150, **stamps}, spikes=told, blind=blind())
            p.send(
                "early.A",
                stamps,
                early=no_early,
                resolved=np.concatenate([became(1, 100, "confirmed"), became(3, 130, "confirmed", 9)]),
            )
            p.send("early.A", stamps, early=early(4, 200), resolved=became(2, 120, "withdrawn", 1))
            while not len((tick := (await first(loop))[0]).early):
                pass
            ticks = [tick, *await first(loop, 3)]
            assert [t.news["sample"].tolist() for t in ticks] == [
                [100, 120],
                [140],
                [],
                [200],
            ]  # every spike once
            assert [t.spikes["sample"].tolist() for t in ticks] == [[], [100, 140], [], []]  # final ones only
            assert [t.resolved["number"].tolist() for t in ticks] == [[], [], [1], [2]]
            assert ticks[3].withdrawn.tolist() == became(2, 120, "withdrawn", 1).tolist()
            assert (
                loop.counters["early"] == 3 and loop.counters["confirmed"] == loop.counters["withdrawn"] == 1
            )
            # a message that cannot be had any more, and its word: what is open is lost, and is told once
            p._seq["early.A"] += 2
            p.send("early.A", stamps, early=early(6, 300), resolved=became(4, 200, "confirmed"))
            (lost,) = await first(loop)
            assert lost.missed == "lost" and lost.resolved[["number", "fate"]].tolist() == [
                (4, FATES.index("lost"))
            ]
            # a new live process knows nothing of what the former one told
            p.run, p._seq["early.A"] = "run-2", 0
            p.send("early.A", stamps, early=early(1, 900), resolved=nothing)
            (new,) = await first(loop)
            assert new.missed == "restarted" and new.resolved[["number", "fate"]].tolist() == [
                (6, FATES.index("lost"))
            ]
            assert new.early["number"].tolist() == [1] and loop.counters["unresolved"] == 2


async def test_a_loop_that_is_not_early_hears_nothing_of_it() -> None:
    with Ports("A") as ports, Talker(ports.streams["A"], "spikes.A"):
        async with looping(ports, deadline_ms=1000) as loop:
            await first(loop)
            for n in range(20):
                ports.streams["A"].send("early.A", early=early(n + 1, n), resolved=np.zeros(0, RESOLVED))
            ticks = await first(loop, 10)
        assert all(not len(t.early) and not len(t.resolved) and len(t.news) == len(t.spikes) for t in ticks)
        assert "early" not in loop.counters
