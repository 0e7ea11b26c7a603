"""The subscriber over real sockets: order, replay, losses told, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from client_rig import HOST, Ports, Talker, blind, port_of, say, spikes

from spiked.publish.replay import ReplayServer
from spiked.publish.zmq_pub import Publisher
from spiked.rehearsal import free_ports
from spiked_client import (
    Batch,
    Client,
    DaemonAbsent,
    Incompatible,
    Silence,
    SyncClient,
    UnknownStream,
    protocol,
    subscribe,
)
from spiked_client.protocol import GAP, SPIKE, UNIT
from spiked_client.subscribe import Subscription, SyncSubscription


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy computer may hold the replay port up for seconds."""
    monkeypatch.setattr(subscribe, "REPLAY_TIMEOUT_S", 30.0)


def client(ports: Ports, **options: int) -> SyncClient:
    return SyncClient(HOST, ports.port, wait_s=60, **options)


async def test_batches_arrive_in_order_with_samples_and_stamps() -> None:
    with Ports("A") as ports, Talker(ports.streams["A"], "spikes.A"):
        async with Client(HOST, ports.port) as c:
            batches = []
            async for b in c.spikes("A", timeout=60):
                batches.append(b)
                if len(batches) == 50:
                    break
    seqs = [b.seq for b in batches]
    assert seqs == list(range(seqs[0], seqs[0] + 50))
    assert all(b.first == 30 * (b.seq - 1) and b.stop == b.first + 30 for b in batches)
    assert all(b.spikes["sample"].tolist() == [b.first] and len(b.blind) == 0 for b in batches)
    assert all(b.stamps["arrival"] <= b.stamps["published"] <= b.received_ns for b in batches)
    assert not any(b.missed or b.restarted or b.replayed for b in batches)


def test_only_the_units_asked_for_but_every_covered_sample() -> None:
    with Ports("A") as ports, client(ports) as c:
        wanted = c.spikes("A", units=[1, 3], timeout=60, from_start=True)
        p = ports.streams["A"]
        for n in range(8):
            p.send(
                "spikes.A", {"first": n, "stop": n + 1}, spikes=spikes(n, unit=n % 4), blind=blind((n, n + 1))
            )
        with Talker(p, "spikes.A"):
            got = list(itertools.islice(wanted, 8))
    assert [b.first for b in got] == list(range(8)) and all(len(b.blind) == 1 for b in got)
    assert np.concatenate([b.spikes for b in got])["unit"].tolist() == [1, 3, 1, 3]


def test_streams_do_not_mix_even_when_one_name_begins_with_the_other() -> None:
    with Ports("A", "AB") as ports, Talker(ports.streams["A"], "spikes.A"), client(ports) as c:
        ports.streams["A"].send("spikes.AB", {"first": 0, "stop": 1})  # also on A's port
        with Talker(ports.streams["AB"], "spikes.AB"):
            one = c.spikes("A", timeout=60)
            assert {b.stream for b in itertools.islice(one, 20)} == {"A"}
            one.close()
            seen = Counter[str]()
            for b in c.spikes(timeout=60):
                seen[b.stream] += 1
                if seen.total() >= 200 and len(seen) > 1:  # a busy computer may hold one of them up
                    break
            assert set(seen) == {"A", "AB"}


def stall(ports: Ports, subscription: SyncSubscription, n: int) -> list[Batch]:
    """Read one message, look away while n large ones are sent, then read on past the last of them."""
    p = ports.streams["A"]
    with Talker(p, "spikes.A"):
        batches = [next(subscription)]
    large = np.zeros(20_000, SPIKE)  # so that the sockets' buffers fill up as well
    for _ in range(n):
        newest = p.send("spikes.A", {}, spikes=large)
    with Talker(p, "spikes.A", 1.0):  # seldom: the replay port keeps but a few, and may be asked late
        while batches[-1].seq <= newest:
            batches.append(next(subscription))
    return batches


def test_a_client_that_stalls_gets_what_it_missed_in_order() -> None:
    with Ports("A", hwm=16, replay_messages=4096) as ports, client(ports, hwm=4) as c:
        subscription = c.spikes("A", timeout=60)
        batches = stall(ports, subscription, 100)
        counters = subscription.counters
    seqs = [b.seq for b in batches]
    assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
    assert counters["replayed"] > 0 and counters["missed"] == 0
    assert 0 < sum(b.replayed for b in batches) <= counters["replayed"]


def test_what_the_replay_port_no_longer_has_is_told_exactly() -> None:
    with Ports("A", hwm=16, replay_messages=20) as ports, client(ports, hwm=4) as c:
        subscription = c.spikes("A", timeout=60)
        batches = stall(ports, subscription, 200)
        seqs = [b.seq for b in batches]
        missed = [b.missed for b in batches if b.missed]
        replayed, gone = subscription.counters["replayed"], ports.streams["A"].counters["gone"]
    assert missed and all(m.reason == "gone" for m in missed)
    lost = sorted(set(range(seqs[0], seqs[-1] + 1)) - set(seqs))
    assert lost == [n for m in missed for n in range(m.first, m.last + 1)]
    assert gone == len(lost) and 0 < replayed <= 20 * len(missed)
    for b in batches:
        if b.missed:
            assert b.seq == b.missed.last + 1


def test_from_start_begins_with_what_was_published_before() -> None:
    with Ports("A") as ports, client(ports) as c:
        for n in range(700):  # more than one page of the replay port
            say(ports.streams["A"], "spikes.A", n)
        with Talker(ports.streams["A"], "spikes.A"):
            got = list(itertools.islice(c.spikes("A", timeout=60, from_start=True), 710))
    assert [b.seq for b in got] == list(range(1, 711))
    assert sum(b.replayed for b in got) >= 700


@pytest.mark.parametrize("what", ["silent", "busy"])
def test_the_past_of_a_silent_topic_is_asked_for_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else would tell a client that comes late of the units in use."""
    answer, asked = ReplayServer._answer, []

    def later(self: ReplayServer, body: list[bytes], peer: bytes) -> list[bytes]:
        asked.append(protocol.unpack(body[0]))
        if len(asked) > 1:
            return answer(self, body, peer)
        if what == "silent":
            time.sleep(1.0)
        return [protocol.encode_reply(asked[0]["id"], False, error="later", retry_ms=50)]

    monkeypatch.setattr(ReplayServer, "_answer", later)
    monkeypatch.setattr("spiked_client.subscribe.REPLAY_TIMEOUT_S", 0.3)
    monkeypatch.setattr("spiked_client.subscribe.PATIENCE_S", 1.0)
    with Ports("A") as ports, client(ports) as c:
        ports.streams["A"].send("units.A", {}, units=units_of(3, 7))
        told = c.messages("units", from_start=True)
        first = told.get(30)
        assert first is not None and first.unit_table["unit"].tolist() == [3, 7] and first.replayed
        assert told.get(0.5) is None and len(asked) >= 2 and told.counters["missed"] == 0


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_daemon_that_was_busy_is_soon_asked_again_by_who_hears_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon may be slow while its processes start, and a client that waits for them must not come 10 s late."""
    monkeypatch.setattr(subscribe, "PATIENCE_S", 1e6)
    asked: list[float] = []

    async def endpoints(_request: dict[str, Any]) -> dict[str, Any]:
        asked.append(time.monotonic())
        if (
            len(asked) == 4
        ):  # the one after those of the client and of the subscription, and one that says: none yet
            await asyncio.sleep(3.0)
        streams = {n: {**p.endpoints, "run": p.run} for n, p in ports.streams.items()}
        return {"streams": streams if len(asked) > 4 else {}, "health": ports.health.endpoint}

    async def first() -> Batch:
        async with Client(HOST, ports.port, wait_s=60) as c:
            return await anext(c.spikes(timeout=120, from_start=True))

    with Ports("A", handlers={"endpoints": endpoints}) as ports:
        for n in range(3):
            say(ports.streams["A"], "spikes.A", n)
        if kind == "async":
            batch = asyncio.run(first())
        else:
            with client(ports) as c:
                batch = next(c.spikes(timeout=120, from_start=True))
    assert batch.seq == 1 and len(asked) >= 5


def test_without_replay_losses_are_reported_and_not_asked_for() -> None:
    with Ports("A", hwm=16) as ports, client(ports) as c:
        quiet = c.spikes("A", timeout=60, replay=False)
        with Talker(ports.streams["A"], "spikes.A"):
            first = next(quiet)
            with ports.streams["A"]._sending:
                ports.streams["A"]._seq["spikes.A"] += 100  # numbers that nobody ever sent
            hole = next(b for b in quiet if b.missed)
    assert hole.missed.count == 100 and hole.missed.reason == "no replay" and hole.seq > first.seq
    assert ports.streams["A"].counters["replay_requests"] == 0


@pytest.mark.parametrize("same_port", [True, False])
def test_a_restarted_publisher_is_recognised_and_followed(same_port: bool) -> None:
    with Ports() as ports, client(ports) as c:
        old = ports.streams["A"] = ports.publisher("run-1", *free_ports(2))  # nobody takes them meanwhile
        subscription = c.spikes("A", timeout=60)
        with Talker(old, "spikes.A"):
            before = list(itertools.islice(subscription, 5))
        old.close()
        fixed = [port_of(old.endpoints[k]) for k in ("pub", "replay")] if same_port else [0, 0]
        ports.streams["A"] = ports.publisher("run-2", *fixed)
        with Talker(ports.streams["A"], "spikes.A"):
            new = (b for b in subscription if b.header["run"] == "run-2")
            after = list(itertools.islice(new, 99))
    assert not any(b.restarted for b in before)
    assert [b.restarted for b in after] == [True] + [False] * (len(after) - 1)
    assert [b.seq for b in after] == list(range(1, 100))  # from its first message on, by replay
    assert subscription.counters["restarts"] == 1 and subscription.counters["missed"] == 0


def test_a_replay_port_that_is_gone_costs_a_report_not_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscribe, "REPLAY_TIMEOUT_S", 2.0)
    with Ports("A") as ports, client(ports) as c:
        subscription = c.spikes("A", timeout=60)
        p = ports.streams["A"]
        with Talker(p, "spikes.A"):
            next(subscription)
        p._replay.close()
        p._seq["spikes.A"] += 7
        with Talker(p, "spikes.A"):
            hole = next(b for b in subscription if b.missed)
            assert (hole.missed.count, hole.missed.reason) == (7, "unanswered")
            assert next(subscription).missed is None


class Deaf:
    """Instead of a publisher's socket: nothing reaches anybody."""

    closed = False

    def send_multipart(self, *_: object) -> None: ...


@contextlib.contextmanager
def deaf(publisher: Publisher) -> Iterator[None]:
    """What is sent meanwhile only the replay port has."""
    publisher._pub, real = Deaf(), publisher._pub
    yield
    publisher._pub = real


def unheard(publisher: Publisher, first: int, n: int) -> None:
    """Messages that only the replay port has."""
    with deaf(publisher):
        for i in range(first, first + n):
            say(publisher, "spikes.A", i)


async def test_who_stops_waiting_for_the_replay_port_misses_nothing_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer that comes afterwards must not be taken for that to the next question."""
    answer, slow = ReplayServer._answer, threading.Event()

    def slowly(self: ReplayServer, *asked: Any) -> list[bytes]:
        while slow.is_set():
            time.sleep(0.005)
        return answer(self, *asked)

    monkeypatch.setattr(ReplayServer, "_answer", slowly)
    with Ports("A") as ports:
        a = ports.streams["A"]
        async with Client(HOST, ports.port, wait_s=60) as c:
            subscription = c.spikes("A", timeout=60)
            seqs, n = [], 0
            while not seqs:
                n = say(a, "spikes.A", n)
                if (batch := await subscription.get(0.05)) is not None:
                    seqs.append(batch.seq)
            while seqs[-1] < n:  # what was said again before the first was heard
                seqs.append((await anext(subscription)).seq)
            for _ in range(3):
                unheard(a, a._seq["spikes.A"], 5)
                slow.set()
                say(a, "spikes.A", 0)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await anext(subscription)
                slow.clear()
                last = say(a, "spikes.A", 0)
                while seqs[-1] < last:
                    seqs.append((await anext(subscription)).seq)
            assert seqs == list(range(seqs[0], seqs[-1] + 1)) and subscription.counters["missed"] == 0


def test_who_does_not_wait_gets_what_is_there() -> None:
    with Ports("A") as ports, client(ports) as c:
        subscription = c.spikes("A")
        with Talker(ports.streams["A"], "spikes.A"):
            first = subscription.get(60)
        assert first is not None
        for n in range(5):
            last = say(ports.streams["A"], "spikes.A", n)
        until, got = time.monotonic() + 60, first.seq
        while got < last and time.monotonic() < until:
            if (batch := subscription.get(0)) is not None:
                got = batch.seq
        assert got == last and subscription.get(0) is None


class HeldUp:
    """A SUB socket whose reader is held up when its wait ends: past its time, and a message comes meanwhile."""

    def __init__(self, real: Any, meanwhile: Callable[[], None]) -> None:
        self.__dict__.update(real=real, meanwhile=meanwhile, held=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def recv_multipart(self, flags: int = 0) -> Any:
        if flags or self.held:
            return self.real.recv_multipart(flags)
        self.__dict__["held"] = True
        self.meanwhile()
        time.sleep(5.0)
        raise zmq.Again


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_message_that_came_while_its_reader_was_held_up_is_not_silence(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look comes after the time is over."""
    monkeypatch.setattr(subscribe, "QUIET_S", 1e6)  # nothing else is looked for
    with Ports("A") as ports:
        a = ports.streams["A"]
        if kind == "sync":
            with client(ports) as c:
                plain = c.spikes("A")
                with Talker(a, "spikes.A"):
                    at = plain.get(60).seq
                while at < a._seq["spikes.A"]:
                    at = plain.get(60).seq
                plain._sub = HeldUp(plain._sub, lambda: say(a, "spikes.A", at))
                assert plain.get(1.0).seq == at + 1
            return
        async with Client(HOST, ports.port, wait_s=60) as other:
            waiting = other.spikes("A")
            with Talker(a, "spikes.A"):
                at = (await waiting.get(60)).seq
            while at < a._seq["spikes.A"]:
                at = (await waiting.get(60)).seq
            task = asyncio.create_task(waiting.get(1.0))
            await asyncio.sleep(0)  # it waits
            say(a, "spikes.A", at)
            time.sleep(6.0)  # noqa: ASYNC251 - this is what holds the client up
            assert (await task).seq == at + 1


@pytest.mark.parametrize("what", ["talks", "is silent", "replays"])
async def test_closing_ends_the_iteration_of_another_task_and_does_not_cancel_it(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, asked = ReplayServer._answer, threading.Event()

    def slowly(self: ReplayServer, *request: Any) -> list[bytes]:
        asked.set()
        time.sleep(0.5)
        return answer(self, *request)

    monkeypatch.setattr(ReplayServer, "_answer", slowly)
    with Ports("A") as ports, Talker(ports.streams["A"], "spikes.A") as talker:
        async with Client(HOST, ports.port, wait_s=60) as c:
            subscription = c.spikes("A", from_start=what == "replays")

            async def consume() -> str:
                async for _ in subscription:
                    pass
                return "the end"

            if what != "replays":
                await anext(subscription)
            if what == "is silent":
                talker.__exit__()
            task = asyncio.create_task(consume())
            await asyncio.sleep(0.1)
            if what == "replays":
                assert await asyncio.to_thread(asked.wait, 60)
            subscription.close()
            async with asyncio.timeout(60):
                assert await task == "the end"
            cancelled = asyncio.create_task(anext(c.spikes("A")))
            await asyncio.sleep(0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled


def test_subscriptions_that_were_closed_are_forgotten() -> None:
    with Ports("A") as ports, client(ports) as c:
        for _ in range(50):
            with c.spikes("A"):
                pass
        assert len(c._open) == 1


def test_silence_absence_and_unknown_streams_are_one_line_each() -> None:
    with Ports("A") as ports, client(ports) as c:
        with pytest.raises(Silence, match=r"nothing came on spikes\.A for 0\.3 s"):
            next(c.spikes("A", timeout=0.3))
        with pytest.raises(UnknownStream, match="no stream 'B'; it publishes A"):
            next(c.spikes("B", timeout=0.3))
        with pytest.raises(UnknownStream, match="no topic 'spikez'"):
            next(c.messages("spikez", timeout=0.3))
        port = ports.port
    start = time.monotonic()
    with pytest.raises(DaemonAbsent, match="start it with `spiked run`"), SyncClient(HOST, port, wait_s=0.4):
        pass
    assert 0.4 <= time.monotonic() - start < 30


async def test_the_client_waits_for_a_daemon_that_comes_later() -> None:
    (port,) = free_ports(1)
    with pytest.raises(DaemonAbsent, match=rf"answered on tcp://127\.0\.0\.1:{port} within 0\.2 s"):
        async with Client(HOST, port, wait_s=0.2):
            pass

    async def first_stream() -> str:
        async with Client(HOST, port, wait_s=60) as c:
            return (await anext(c.spikes(timeout=60))).stream

    waiting = asyncio.create_task(first_stream())
    await asyncio.sleep(0.3)
    assert not waiting.done()
    with Ports("A", port=port) as late, Talker(late.streams["A"], "spikes.A"):
        assert await waiting == "A"


def test_gaps_health_mua_and_session_events() -> None:
    gap = np.array([(100, 130, 384, 0)], GAP)
    with Ports("A") as ports, client(ports) as c:
        gaps, mua, health = c.gaps(timeout=0.2), c.mua("A", timeout=60), c.health(timeout=0.2)
        with Talker(ports.streams["A"], "mua.A"):
            assert next(mua).spikes["unit"].tolist() == [0]
        got_gap = until_heard(gaps, lambda: ports.streams["A"].send("gaps.A", {}, gaps=gap))
        figures = until_heard(health, lambda: ports.health.health(state="recording"))
        event = figures
        while event.topic != "session":
            event = until_heard(health, lambda: ports.health.session("started", session="s1"))
    assert got_gap.gaps.tolist() == gap.tolist() and got_gap.first is None
    assert figures.header["state"] == "recording"
    assert (event.header["event"], event.header["session"]) == ("started", "s1")


def until_heard(subscription: SyncSubscription, tell: Callable[[], object]) -> Batch:
    """Tell again and again until the subscription is connected and hears it."""
    for _ in range(500):
        tell()
        with contextlib.suppress(Silence):
            return next(subscription)
    raise AssertionError("nothing was heard")


def test_another_major_version_is_refused_by_name() -> None:
    head = msgpack.packb({"v": [2, 3], "seq": 1, "run": "x", "arrays": []})
    with Ports("A") as ports, client(ports) as c:
        fake = ports.streams["A"]._pub
        with pytest.raises(
            Incompatible,
            match=rf"peer speaks spiked protocol 2\.3, this side {protocol.VERSION[0]}\.{protocol.VERSION[1]}",
        ):
            until_heard(c.spikes("A", timeout=0.2), lambda: fake.send_multipart([b"spikes.A", head]))


async def test_many_subscriptions_of_one_client_at_once() -> None:
    async def read(subscription: Subscription) -> list[int]:
        return [(await anext(subscription)).seq for _ in range(40)]

    with Ports("A") as ports, Talker(ports.streams["A"], "spikes.A", 0.002):
        async with Client(HOST, ports.port) as c:
            got = await asyncio.gather(*(read(c.spikes("A", timeout=60)) for _ in range(5)))
    assert all(seqs == list(range(seqs[0], seqs[0] + 40)) for seqs in got)


def units_of(*ids: int) -> np.ndarray:
    rows = np.zeros(len(ids), UNIT)
    rows["unit"] = ids
    return rows


@pytest.mark.parametrize("same_port", [True, False])
def test_a_late_client_gets_what_a_silent_topic_told_once(same_port: bool) -> None:
    """The units in use are told once, maybe hours before a client comes; and once more by a publisher that restarted."""
    with Ports() as ports:
        old = ports.streams["A"] = ports.publisher("run-1", *free_ports(2))
        old.send("units.A", {"from_sample": 5}, units=units_of(3, 7))
        with SyncClient(control_port=ports.port) as c:
            told = c.messages("units", from_start=True)
            first = told.get(60)
            assert first is not None and first.unit_table["unit"].tolist() == [3, 7] and first.replayed
            fixed = [port_of(old.endpoints[k]) for k in ("pub", "replay")] if same_port else [0, 0]
            old.close()
            new = ports.publisher("run-2", *fixed)
            with deaf(new):  # also to a client that is there again already
                new.send("units.A", {}, units=units_of(3))
                new.send("units.A", {}, units=units_of(3, 9))
            ports.streams["A"] = new
            again = [told.get(60), told.get(60)]
            assert [b.unit_table["unit"].tolist() for b in again if b] == [[3], [3, 9]]
            assert [b.restarted for b in again if b] == [True, False] and told.counters["missed"] == 0
            assert told.get(0.3) is None and told.counters["duplicates"] == 0
