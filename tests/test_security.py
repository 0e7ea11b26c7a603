"""Who gets in, who does not, and what the others notice of it: real sockets, real keys."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import zmq
from client_rig import HOST, Ports, Talker, port_of, say
from output_rig import PATIENT_MS

from spiked.act.outputs.base import Command
from spiked.act.outputs.exchange import Exchange, Words
from spiked.act.outputs.trigger import TriggerSocket
from spiked.config import Output
from spiked.errors import ConfigError, SpikedError
from spiked.gate import Allowance
from spiked.keys import add, init, remove
from spiked.publish import replay as replaying
from spiked.publish.zmq_pub import Publisher
from spiked.rehearsal import free_ports
from spiked_client import access, protocol
from spiked_client.access import ClientKey
from spiked_client.control import SyncControl
from spiked_client.errors import AccessError, DaemonAbsent, Refused
from spiked_client.stimulator import Stimulator
from spiked_client.subscribe import SyncClient


def until(true: Callable[[], Any], patience_s: float = 60.0) -> None:
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def silence(c: SyncControl) -> str:
    """What the client makes of it that nobody answers."""
    with pytest.raises((AccessError, DaemonAbsent)) as told:
        c.status()
    return str(told.value)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy computer may hold the replay port up for seconds."""
    monkeypatch.setattr("spiked_client.subscribe.REPLAY_TIMEOUT_S", 30.0)


class Keys:
    """A keys folder and the key files of three clients, one of each role."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder / "keys", folder
        init(self.folder, lambda _text: None)
        self.watch, self.control, self.stimulate = (self.of(role, role) for role in access.ROLES)

    def of(self, name: str, role: str) -> ClientKey:
        file = self.out / f"{name}.key"
        add(self.folder, name, role, lambda _text: None, out=file)
        key = access.load_key(file)
        assert key is not None
        return key

    def remove(self, name: str) -> None:
        remove(self.folder, name, lambda _text: None)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def stranger(keys: Keys) -> ClientKey:
    """A key that nobody added."""
    public, secret = (k.decode() for k in zmq.curve_keypair())
    return replace(keys.watch, name="stranger", public=public, secret=secret)


async def fine(_request: dict[str, Any]) -> dict[str, Any]:
    return {"fine": True}


OPS = {"status": fine, "arm": fine, "stop_stimulation": fine}


# ---- roles -----------------------------------------------------------------------------------------------------


def test_each_role_may_what_it_may_and_the_rest_is_refused_by_name_and_counted(keys: Keys) -> None:
    with Ports(handlers=OPS, keys=keys.folder) as rig:
        for key, allowed in (
            (keys.watch, {"status", "stop_stimulation"}),
            (keys.control, {"status", "stop_stimulation", "calibrate"}),
            (keys.stimulate, {"status", "stop_stimulation", "calibrate", "arm"}),
        ):
            with SyncControl(control_port=rig.port, keys=key) as c:
                for op in ("status", "stop_stimulation", "calibrate", "arm"):
                    if op in allowed:
                        c.request(op)
                        continue
                    with pytest.raises(
                        Refused, match=f"{op} needs the role .*, {key.name} has {key.role}; `spiked keys add"
                    ):
                        c.request(op)
        assert rig.control.counters["refused_roles"] == 3
        assert rig.control.counters["requests"] == 12
        assert len(rig.asked) == 2  # calibrate, twice


def test_without_the_right_key_nothing_is_answered_and_the_reason_is_told(keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path / "other rig")
    with Ports("A", handlers=OPS, keys=keys.folder) as rig:
        for key, says in (
            (None, "asks for a key: give keys"),
            (stranger(keys), "does not take this key"),
            (
                other.stimulate,
                "stimulate's key file is for another daemon",
            ),  # another rig's server key
        ):
            with SyncControl(control_port=rig.port, timeout=0.3, keys=key) as c:
                until(lambda c=c, says=says: says in silence(c))  # on a busy computer it looks more than once
        until(
            lambda: rig.control.counters["refused_keys"] and rig.control.counters["refused_handshakes"] >= 2
        )
        assert rig.control.counters["requests"] == 0
        with (
            SyncClient(HOST, rig.port, keys=keys.watch) as client,
            client.spikes(timeout=60) as spikes,
            Talker(rig.streams["A"], "spikes.A"),
        ):
            first = next(spikes)
            assert next(spikes).seq == first.seq + 1


def test_a_subscriber_without_the_key_hears_nothing_even_where_it_knows_the_address(keys: Keys) -> None:
    with Publisher(HOST, 0, 0, "run-1", keys=keys.folder) as p, zmq.Context() as context:
        subs = []
        for key in (None, stranger(keys), keys.watch):
            sub = context.socket(zmq.SUB)
            sub.linger = 0
            if key is not None:
                key.secure(sub)
            sub.subscribe(b"")
            sub.connect(p.endpoints["pub"])
            subs.append(sub)
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.connect(p.endpoints["replay"])
        dealer.send(protocol.encode_request(1, topic="spikes.A", **{"from": 1, "to": 9}))
        end = time.monotonic() + 60
        n = 0
        while not subs[2].poll(10):
            say(p, "spikes.A", n)
            n += 1
            assert time.monotonic() < end
        for _ in range(20):
            say(p, "spikes.A", n)
        until(lambda: p.counters["refused_keys"] >= 1 and p.counters["refused_handshakes"] >= 1)
        assert [bool(s.poll(200)) for s in subs] == [False, False, True] and not dealer.poll(50)
        for s in (*subs, dealer):
            s.close(0)


def test_a_client_with_a_key_tells_a_daemon_without_from_its_own(keys: Keys) -> None:
    with Ports(handlers=OPS) as rig:
        with SyncControl(control_port=rig.port, timeout=0.3, keys=keys.watch) as c:
            until(lambda: "uses no keys" in silence(c))
        with SyncControl(control_port=rig.port) as c:
            assert c.status()["fine"]


async def test_the_asyncio_client_says_it_too(keys: Keys) -> None:
    from spiked_client.control import Control
    from spiked_client.subscribe import Client

    with Ports("A", handlers=OPS, keys=keys.folder) as rig:
        async with Control(control_port=rig.port, timeout=0.3) as c:
            says, end = "", time.monotonic() + 60
            while "asks for a key" not in says and time.monotonic() < end:
                with pytest.raises((AccessError, DaemonAbsent)) as told:
                    await c.status()
                says = str(told.value)
            assert "asks for a key" in says
        async with Client(HOST, rig.port, keys=keys.watch) as client, client.spikes(timeout=60) as spikes:
            with Talker(rig.streams["A"], "spikes.A"):
                assert (await anext(spikes)).stream == "A"


# ---- revocation ------------------------------------------------------------------------------------------------


def test_a_removed_key_is_out_at_once_and_the_others_lose_nothing(keys: Keys) -> None:
    leaver = keys.of("leaver", "stimulate")
    got: dict[str, list[int]] = {"leaver": [], "watch": []}
    missed: list[Any] = []
    stop = threading.Event()

    def listen(key: ClientKey, port: int) -> None:
        with SyncClient(HOST, port, keys=key) as client, client.spikes() as spikes:
            while not stop.is_set():
                if (batch := spikes.get(0.1)) is not None:
                    got[key.name].append(batch.seq)
                    missed.extend([batch.missed] if batch.missed else [])

    with (
        Ports("A", handlers=OPS, keys=keys.folder) as rig,
        SyncControl(control_port=rig.port, timeout=30, keys=leaver) as c,
    ):
        threads = [threading.Thread(target=listen, args=(k, rig.port)) for k in (leaver, keys.watch)]
        with Talker(rig.streams["A"], "spikes.A", 0.002):
            for t in threads:
                t.start()
            until(lambda: len(got["leaver"]) > 50 and len(got["watch"]) > 50)
            assert c.request("arm")["fine"]
            keys.remove("leaver")
            with pytest.raises(Refused, match="this key was removed"):  # on a connection that it already had
                c.request("arm")
            until(lambda: rig.streams["A"].counters["revoked"] == 1)
            until(lambda: rig.streams["A"].counters["refused_keys"])  # it came again, and was not let in
            sent = rig.streams["A"].counters["sent"]
            n = len(got["watch"])
            until(lambda: len(got["watch"]) > n + 500 and got["watch"][-1] > sent)
            assert got["leaver"][-1] <= sent + 1
        stop.set()
        for t in threads:
            t.join(60)
    seen = got["watch"]
    assert seen == list(range(seen[0], seen[-1] + 1)) and not missed
    assert rig.control.counters["refused_roles"] >= 1


def test_a_role_that_was_lowered_holds_from_the_next_request(keys: Keys) -> None:
    with (
        Ports(handlers=OPS, keys=keys.folder) as rig,
        SyncControl(control_port=rig.port, keys=keys.stimulate) as c,
    ):
        assert c.request("arm")["fine"]
        file = keys.folder / "access.toml"
        file.write_text(file.read_text().replace('role = "stimulate"', 'role = "watch"'))
        with pytest.raises(Refused, match="stimulate has watch"):
            c.request("arm")
        assert c.status()["fine"]


def test_what_one_thread_read_is_not_put_in_force_after_what_another_read_later(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was removed would be let in again, until the file changes once more."""
    listed, read, has_read = access.AccessList(keys.folder), access.read_access, threading.Event()
    keys.of("leaver", "watch")

    def dawdles(folder: Path) -> tuple[access.Entry, ...]:
        found = read(folder)
        if not has_read.is_set():
            has_read.set()
            time.sleep(0.3)
        return found

    monkeypatch.setattr(access, "read_access", dawdles)
    first = threading.Thread(target=listed.refresh)
    first.start()
    assert has_read.wait(60)
    keys.remove("leaver")
    listed.refresh()
    first.join(60)
    assert "leaver" not in {e.name for e in listed.entries}


# ---- the stimulator --------------------------------------------------------------------------------------------


def test_only_a_key_that_may_stimulate_gets_commands_and_only_as_long_as_it_may(keys: Keys) -> None:
    port = socket_port()
    config = Output(name="o", kind="zmq", address=f"tcp://127.0.0.1:{port}", timeout_ms=PATIENT_MS)
    out = TriggerSocket(config, keys.folder)
    command = Command(1, "r", 5, "p", (1,), None, None, time.monotonic_ns())

    def polled(for_s: float) -> None:
        end = time.monotonic() + for_s
        while time.monotonic() < end:
            out.poll()
            time.sleep(0.005)

    try:
        for key in (None, keys.control, stranger(keys)):
            refused = out.counters["refused_keys"]
            with Stimulator(out.endpoint, keys=key) as s:
                s.receive(0.3)
                polled(0.2)
                if key is not None:
                    until(lambda s=s, n=refused: (s.receive(0.02), out.poll()) and out.counters["refused_keys"] > n)  # fmt: skip
                assert out.there is None and s.output is None
        assert out.counters["refused_keys"] >= 2
        with Stimulator(out.endpoint, keys=keys.stimulate) as s:
            until(lambda: (s.receive(0.02), out.poll()) and out.there)
            out.send(command)
            wanted = s.receive(60.0)
            assert wanted is not None and wanted.number == 1
            s.answer(wanted)
            acks: list[Any] = []
            until(lambda: acks.extend(out.poll()) or acks)
            assert acks[0].ok
            keys.remove("stimulate")
            until(lambda: (s.receive(0.02), out.poll()) and out.there is None)
            out.send(replace(command, number=2))
            assert not out.poll()[0].ok
            assert s.receive(0.2) is None
    finally:
        out.close()


def socket_port() -> int:
    return free_ports(1)[0]


# ---- beyond loopback -------------------------------------------------------------------------------------------


def addresses() -> list[str]:
    """This computer's own addresses that are not loopback."""
    found = (a for those in psutil.net_if_addrs().values() for a in those if a.family == socket.AF_INET)
    return [a.address for a in found if not a.address.startswith("127.")]


def test_from_another_address_the_key_opens_everything_and_nothing_else_does(keys: Keys) -> None:
    here = (addresses() or ["127.0.0.2"])[0]
    with Ports("A", handlers=OPS, keys=keys.folder, host="0.0.0.0") as rig:
        assert rig.control.endpoint.startswith("tcp://0.0.0.0:")
        with SyncControl(here, rig.port, timeout=0.3) as c:
            until(lambda: "asks for a key" in silence(c))
        with (
            SyncClient(here, rig.port, keys=keys.watch) as client,
            client.messages(("spikes", "health"), timeout=60) as messages,
        ):
            with Talker(rig.streams["A"], "spikes.A"):
                topics = set()
                while topics != {"spikes.A", "health"}:
                    rig.health.health(state="idle")
                    topics.add(next(messages).topic)
            rig.streams["A"].send("spikes.A")
            first = next(m for m in messages if m.topic == "spikes.A")
            say(rig.streams["A"], "spikes.A", 1)
            assert first.missed is None


@pytest.mark.parametrize("there", ["", "access.toml", "server.key"])
def test_ports_without_usable_keys_do_not_open(keys: Keys, there: str) -> None:
    for file in ("access.toml", "server.key"):
        if file != there:
            (keys.folder / file).unlink()
    port = socket_port()
    for attempt in (
        lambda: Publisher(HOST, port, 0, "run-1", keys=keys.folder),
        lambda: TriggerSocket(Output(name="o", kind="zmq", address=f"tcp://127.0.0.1:{port}"), keys.folder),
    ):
        with pytest.raises(ConfigError, match=r"cannot read .*; see `spiked keys`"):
            attempt()
    with pytest.raises(OSError):  # nobody listens
        socket.create_connection((HOST, port), 0.5)


# ---- limits ----------------------------------------------------------------------------------------------------


def test_an_allowance_is_per_peer_saved_up_and_forgets_old_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("spiked.gate.time", SimpleNamespace(monotonic=lambda: clock[0]))
    a = Allowance(per_s=1000.0, burst=3, peers=2)
    assert [bool(a.take(b"a")) for _ in range(3)] == [False] * 3
    wait = a.take(b"a", 2)
    assert 0 < wait <= 0.002
    assert a.take(b"b") == 0.0
    clock[0] += wait + 1e-6
    assert a.take(b"a", 2) == 0.0
    assert (
        a.take(b"c", 1e9) == 0.0
    )  # more than can ever be saved up goes when all is there, and leaves a debt
    assert a.take(b"c") > 1000
    assert len(a._left) == 2


def test_too_many_requests_are_told_when_to_come_back_and_others_do_not_notice() -> None:
    with Ports(handlers=OPS) as rig, zmq.Context() as context, context.socket(zmq.DEALER) as d:
        rig.control._requests = Allowance(20.0, 50)
        d.linger = 0
        d.connect(rig.control.endpoint)
        began = time.monotonic()
        for i in range(200):
            d.send(protocol.encode_request(i, op="status"))
        replies = [protocol.decode_map(d.recv()) for _ in range(200) if d.poll(60_000)]
        seconds = time.monotonic() - began
        assert len(replies) == 200
        refused = [r for r in replies if "retry_ms" in r]  # others: too many at the same time
        assert 149 - 20 * seconds <= len(refused) <= 150 and rig.control.counters["refused_requests"] == len(
            refused
        )
        assert all("over 20 requests a second" in r["error"] and 0 < r["retry_ms"] <= 1001 for r in refused)
        with SyncControl(control_port=rig.port) as c:
            assert c.status()["fine"]


def test_a_client_that_takes_replay_faster_than_it_may_waits_and_still_misses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replaying, "BYTES_AT_ONCE", 50_000.0)
    monkeypatch.setattr(replaying, "BYTES_PER_S", 200_000.0)
    with Ports("A", replay_messages=1 << 14) as rig:
        p = rig.streams["A"]
        for n in range(1000):
            say(p, "spikes.A", n)
        with (
            SyncClient(HOST, rig.port) as client,
            client.spikes(timeout=60, from_start=True) as spikes,
            Talker(p, "spikes.A"),
        ):
            seen = [next(spikes) for _ in range(1005)]
        assert [b.seq for b in seen] == list(range(1, 1006)) and not any(b.missed for b in seen)
        assert p.counters["refused_replay"] > 0


def test_a_port_takes_so_many_clients_and_tells_the_next_one(keys: Keys) -> None:
    with Ports(handlers=OPS, keys=keys.folder, peers=4) as rig:
        inside = [SyncControl(control_port=rig.port, keys=keys.watch).__enter__() for _ in range(4)]
        try:
            assert all(c.status()["fine"] for c in inside)
            with SyncControl(control_port=rig.port, timeout=0.3, keys=keys.watch) as c:
                until(lambda: "as many clients as it takes" in silence(c))
            assert rig.control.counters["refused_peers"] >= 1
            assert all(c.status()["fine"] for c in inside)  # who is in stays
        finally:
            for c in inside:
                c.__exit__()
        with SyncControl(control_port=rig.port, timeout=60, keys=keys.watch) as c:
            assert c.status()["fine"]  # and their places are free again


def test_a_flood_of_connections_is_ended_and_the_daemon_keeps_its_descriptors(keys: Keys) -> None:
    with Ports(handlers=OPS, keys=keys.folder, peers=8) as rig:
        me = psutil.Process()
        before = me.num_fds()
        flood = []
        for _ in range(300):
            flood.append(s := socket.create_connection((HOST, rig.port), 30))
            s.settimeout(30)
        until(lambda: rig.control.counters["refused_peers"] > 100)
        until(lambda: me.num_fds() - before - len(flood) < 60)  # ours of the flood are in this process too
        for s in flood:
            s.close()
        with SyncControl(control_port=rig.port, timeout=60, keys=keys.watch) as c:
            until(lambda: answered(c))


def answered(c: SyncControl) -> bool:
    try:
        return bool(c.status()["fine"])
    except (AccessError, DaemonAbsent):
        return False


def test_everything_that_is_not_ours_is_refused_counted_and_survived(keys: Keys) -> None:
    import numpy as np

    rng = np.random.default_rng(5)
    with Ports("A", handlers=OPS, keys=keys.folder) as rig:
        p = rig.streams["A"]
        ports = [rig.port, *(port_of(e) for e in p.endpoints.values()), port_of(rig.health.endpoint)]
        greeting = bytes.fromhex("ff00000000000000017f0301") + b"CURVE".ljust(20, b"\0") + bytes(32)
        for port in ports:
            for data in (
                b"GET / HTTP/1.1\r\n\r\n" * 9,
                rng.bytes(5000),
                greeting[:20],
                greeting + rng.bytes(3000),
                b"",
            ):
                with socket.create_connection((HOST, port), 30) as s:
                    s.sendall(data)
                    time.sleep(0.02)
        for server in (rig.control, p, rig.health):
            until(lambda server=server: server.counters["refused_handshakes"] >= 2)  # type: ignore[misc]
        with (
            SyncClient(HOST, rig.port, keys=keys.watch) as client,
            client.spikes(timeout=60) as spikes,
            Talker(p, "spikes.A"),
        ):
            next(spikes)


def test_a_client_that_is_in_and_sends_nonsense_is_counted_and_cut_and_nobody_else_notices(
    keys: Keys,
) -> None:
    import numpy as np

    rng = np.random.default_rng(6)
    with Ports("A", handlers=OPS, keys=keys.folder) as rig, zmq.Context() as context:
        p = rig.streams["A"]
        with (
            SyncClient(HOST, rig.port, keys=keys.watch) as client,
            client.spikes(timeout=60) as spikes,
            Talker(p, "spikes.A", 0.002),
        ):
            first = next(spikes).seq
            for endpoint in (rig.control.endpoint, p.endpoints["replay"]):
                with context.socket(zmq.DEALER) as d:
                    d.linger = 0
                    keys.watch.secure(d)
                    d.connect(endpoint)
                    for size in (0, 1, 100, 3000, 5000, 60_000):
                        d.send(rng.bytes(size))
                        d.send_multipart([rng.bytes(size), rng.bytes(size)])
                    server = rig.control if endpoint == rig.control.endpoint else p
                    until(lambda server=server: server.counters["malformed"] >= 4)  # type: ignore[misc]
                    until(lambda server=server: server is rig.control or server.counters["refused_size"])  # type: ignore[misc]
                    d.send(bytes(2_000_000))  # this one costs the connection
                    time.sleep(0.1)
            # Subscriptions so long that whoever keeps them (libzmq, one step of the stack for each byte) is in danger:
            # at 1 MB it is the client that dies of it.
            for kind in (zmq.SUB, zmq.XSUB):
                with context.socket(kind) as s:
                    s.linger = 0
                    keys.watch.secure(s)
                    s.connect(p.endpoints["pub"])
                    if kind == zmq.SUB:
                        s.subscribe(b"x" * 20_000)
                    else:
                        s.send(b"\x01" + b"y" * 20_000)
                        s.send(rng.bytes(100))
                    time.sleep(0.5)
            until(lambda: rig.control.counters["malformed"] >= 4 and p.counters["malformed"] >= 4)
            assert p.counters["refused_size"] >= 1
            seen = [next(spikes).seq for _ in range(500)]
        assert seen == list(range(first + 1, first + 501))


def test_subscriptions_without_end_cost_the_connection_before_they_cost_memory(keys: Keys) -> None:
    with Ports("A", keys=keys.folder) as rig, zmq.Context() as context:
        p = rig.streams["A"]
        with (
            SyncClient(HOST, rig.port, keys=keys.control) as client,
            client.spikes(timeout=60) as spikes,
            Talker(p, "spikes.A", 0.002),
        ):
            first = next(spikes).seq
            for key in (keys.watch, keys.watch):
                with context.socket(zmq.XSUB) as s:
                    s.linger, s.sndtimeo = 0, 100
                    key.secure(s)
                    s.connect(p.endpoints["pub"])
                    end = time.monotonic() + 120
                    n, before = 0, p.counters["refused_bytes"]
                    while p.counters["refused_bytes"] == before and time.monotonic() < end:
                        try:
                            s.send(b"\x01" + b"%d" % n + bytes(400))
                            n += 1
                        except zmq.Again:
                            pass
                    assert p.counters["refused_bytes"] > before
            seen = [next(spikes).seq for _ in range(300)]
        assert seen == list(range(first + 1, first + 301))


def test_a_peer_that_answers_without_end_is_given_up() -> None:
    class Endless:
        renewed = 0

        def send(self, _data: bytes) -> bool:
            return True

        def receive(self) -> bytes:
            return b"x" * 60_000

        def renew(self) -> None:
            self.renewed += 1

        def close(self) -> None: ...

    peer = Endless()
    exchange = Exchange("o", "a peer", peer, Words(lambda _p: b"go", lambda _r: None), 10_000.0)
    exchange.send(Command(1, "r", 5, "p", (), None, None, 7))
    acks = [a for _ in range(3) for a in exchange.poll()]
    assert [a.ok for a in acks] == [False] and "a reply without end" in acks[0].text and peer.renewed == 1


def test_the_port_says_nothing_of_it_to_the_operator_but_one_line(keys: Keys) -> None:
    with pytest.raises(SpikedError) as e:
        Publisher(HOST, 0, 0, "run-1", keys=keys.folder / "none")
    assert "\n" not in str(e.value)
