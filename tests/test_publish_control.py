"""The control port: operations, refusals, and everything that is not a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio
from client_rig import HOST, Ports, port_of

from spiked.errors import ConfigError, SpikedError
from spiked.publish.control import CUT_BYTES, OF_ONE, RUNNING, ControlServer
from spiked.publish.health import HealthPublisher
from spiked_client import protocol


class Served:
    """A control server in this loop, and a raw DEALER that talks to it."""

    def __init__(self, limits: dict[str, float] | None = None, **handlers: Any) -> None:
        self.server = ControlServer(HOST, 0, handlers, **(limits or {}))

    async def __aenter__(self) -> Served:
        await self.server.start()
        self.context = zmq.asyncio.Context()
        self.dealers = [self.context.socket(zmq.DEALER) for _ in range(3)]
        for dealer in self.dealers:
            dealer.linger = 0
            dealer.connect(self.server.endpoint)
        self.dealer = self.dealers[0]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for dealer in self.dealers:
            dealer.close(0)
        self.context.term()
        await self.server.close()

    async def reply(self, dealer: Any = None) -> dict[str, Any]:
        frames = await asyncio.wait_for((dealer or self.dealer).recv_multipart(), 60)
        return dict(msgpack.unpackb(frames[-1]))

    async def under_way(self, n: int) -> None:
        """Until so many requests are."""
        async with asyncio.timeout(60):
            while len(self.server._running) < n:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)

    async def ask(self, **fields: Any) -> dict[str, Any]:
        await self.dealer.send(protocol.encode_request(9, **fields))
        return await self.reply()


async def echo(request: dict[str, Any]) -> dict[str, Any]:
    return {"got": request.get("x")}


async def test_a_reply_carries_the_fields_the_id_and_the_version() -> None:
    async def figures(_request: dict[str, Any]) -> dict[str, Any]:
        return {"rate": np.float32(1.5), "n": np.int64(3), "where": Path("/data"), "a": np.arange(2)}

    async def nothing(_request: dict[str, Any]) -> None:
        return None

    async with Served(echo=echo, figures=figures, nothing=nothing) as s:
        assert await s.ask(op="echo", x=[1, "two"]) == {
            "v": list(protocol.VERSION),
            "id": 9,
            "ok": True,
            "got": [1, "two"],
        }
        assert await s.ask(op="nothing") == {"v": list(protocol.VERSION), "id": 9, "ok": True}
        got = await s.ask(op="figures")
        assert (got["rate"], got["n"], got["where"], got["a"]) == (1.5, 3, "/data", [0, 1])
        assert s.server.counters["requests"] == 3


async def test_refusals_are_the_daemons_own_line_and_bugs_stay_inside(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def refuse(_request: dict[str, Any]) -> dict[str, Any]:
        raise SpikedError("no session is running; start one first")

    async def broken(_request: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("secret")

    async def untold(_request: dict[str, Any]) -> dict[str, Any]:
        return {"x": object()}

    async with Served(refuse=refuse, broken=broken, untold=untold) as s:
        assert (await s.ask(op="refuse"))["error"] == "no session is running; start one first"
        assert (await s.ask(op="format_disk"))[
            "error"
        ] == "no operation 'format_disk'; there are broken, refuse, untold"
        with caplog.at_level(logging.CRITICAL):
            assert (await s.ask(op="broken"))[
                "error"
            ] == "broken failed inside the daemon (KeyError); its log says more"
            assert "TypeError" in (await s.ask(op="untold"))["error"]
        assert s.server.counters == {"requests": 4, "refused": 2, "failed": 2}


async def test_a_long_operation_holds_up_nobody_and_too_many_are_told() -> None:
    release = asyncio.Event()

    async def long(_request: dict[str, Any]) -> dict[str, Any]:
        await release.wait()
        return {"long": True}

    async with Served(long=long, echo=echo) as s:
        greedy, other, third = s.dealers
        for _ in range(OF_ONE + 1):
            await greedy.send(protocol.encode_request(1, op="long"))
        assert (await s.reply(greedy))["error"].startswith("too many requests")  # for one client
        await third.send(protocol.encode_request(3, op="echo"))
        assert (await s.reply(third))["ok"]
        for _ in range(RUNNING - OF_ONE):
            await other.send(protocol.encode_request(1, op="long"))
        await s.under_way(RUNNING)
        for _ in range(3):
            await third.send(protocol.encode_request(2, op="echo"))
        busy = [await s.reply(third) for _ in range(3)]
        assert all(r["id"] == 2 and r["error"].startswith("too many requests") for r in busy)
        release.set()
        assert all([(await s.reply(d))["long"] for d in (greedy, other) for _ in range(RUNNING // 2)])
        assert (await s.ask(op="echo"))["ok"]
        assert s.server.counters["busy"] == 4


async def test_the_emergency_stop_is_taken_when_too_many_others_are_under_way() -> None:
    """A live process that hangs lets every request about it wait: just then somebody wants to stop."""
    stopped: list[Any] = []

    async def hangs(_request: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    async def stop(request: dict[str, Any]) -> None:
        stopped.append(request.get("why"))

    limits = {"per_s": 0.01, "at_once": float(OF_ONE + 2)}
    async with Served(limits, renew=hangs, stop_stimulation=stop) as s:
        first, second, third = s.dealers
        for dealer in (first, second):
            for _ in range(OF_ONE):
                await dealer.send(protocol.encode_request(1, op="renew"))
        await s.under_way(RUNNING)
        await third.send(protocol.encode_request(2, op="renew"))
        assert (await s.reply(third))["error"].startswith("too many requests")
        for dealer in (third, first):  # the second one has as many under way as it may
            await dealer.send(protocol.encode_request(3, op="stop_stimulation", why="smoke"))
            assert (await s.reply(dealer))["ok"]
        for _ in range(5):  # over its requests a second
            await first.send(protocol.encode_request(4, op="renew"))
            await s.reply(first)
        await first.send(protocol.encode_request(5, op="stop_stimulation", why="again"))
        assert (await s.reply(first))["ok"]
        for _ in range(100):
            await first.send(protocol.encode_request(6, op="stop_stimulation", why="flood"))
        assert not all([(await s.reply(first))["ok"] for _ in range(100)])
    assert stopped[:3] == ["smoke", "smoke", "again"] and 3 < len(stopped) < 80


async def test_requests_are_not_held_up_by_one_that_waits() -> None:
    async def long(_request: dict[str, Any]) -> None:
        await asyncio.sleep(60)

    async with Served(long=long, echo=echo) as s:
        await s.dealer.send(protocol.encode_request(1, op="long"))
        assert (await s.ask(op="echo"))["ok"]  # and closing does not wait for it either


async def test_garbage_is_counted_and_survived() -> None:
    rng = np.random.default_rng(3)
    good = protocol.encode_request(1, op="echo", x=1)
    bad = [rng.bytes(rng.integers(0, 300)) for _ in range(300)] + [good[:n] for n in range(len(good))]
    bad += [
        msgpack.packb(d)
        for d in (
            {"id": 1, "op": "echo"}, {"v": [1], "id": 1, "op": "echo"}, {"v": [1, 0], "op": "echo"},
            {"v": [1, 0], "id": -1, "op": "echo"}, {"v": [1, 0], "id": 1}, {"v": [1, 0], "id": 1, "op": 5},
            {"v": [1, 0], "id": "x", "op": "echo"}, [1, 2], None, "status",
        )
    ]  # fmt: skip
    async with Served(echo=echo) as s:
        for data in bad:
            await s.dealer.send(data)
            reply = await s.reply()
            assert reply["ok"] is False and "\n" not in reply["error"]
        for frames in ([good, good], [b"a", b"b", b"c", b"d"], [b""]):
            await s.dealer.send_multipart(frames)
            assert (await s.reply())["ok"] is False
        assert s.server.counters["malformed"] == len(bad) + 3
        assert (await s.ask(op="echo", x=3))["got"] == 3


async def test_another_major_version_is_refused_by_name_and_a_newer_minor_is_not() -> None:
    async with Served(echo=echo) as s:
        await s.dealer.send(msgpack.packb({"v": [2, 1], "id": 4, "op": "echo"}))
        refused = await s.reply()
        assert (
            refused["error"]
            == f"peer speaks spiked protocol 2.1, this side {protocol.VERSION[0]}.{protocol.VERSION[1]}; update one"
        )
        assert (refused["id"], refused["v"]) == (4, list(protocol.VERSION))
        await s.dealer.send(msgpack.packb({"v": [1, 9], "id": 5, "op": "echo", "x": 1, "new": True}))
        assert (await s.reply())["got"] == 1


async def test_oversized_requests_and_foreign_protocols_are_cut_off() -> None:
    async with Served(echo=echo) as s:
        await s.dealer.send(bytes(protocol.MAX_REQUEST_BYTES + 1))
        assert "bytes; at most 1048576 are read" in (await s.reply())["error"]
        assert s.server.counters["refused_size"] == s.server.counters["malformed"] == 1
        await s.dealer.send(bytes(CUT_BYTES + 1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(s.dealer.recv(), 0.3)
        with socket.create_connection((HOST, port_of(s.server.endpoint)), 5) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 50)
        asked, answer = 0, None
        async with asyncio.timeout(60):
            while answer is None:  # what was sent before the connection was cut is lost with it
                asked += 1
                await s.dealer.send(protocol.encode_request(9, op="echo", x=1))
                with contextlib.suppress(TimeoutError):
                    answer = msgpack.unpackb(await asyncio.wait_for(s.dealer.recv(), 3))
            assert answer["got"] == 1
            while not s.server.counters["refused_handshakes"]:  # noqa: ASYNC110 - a counter tells nobody
                await asyncio.sleep(0.01)
        assert 1 <= s.server.counters["requests"] <= asked


async def test_a_client_that_leaves_before_the_answer_is_nobodys_problem() -> None:
    async with Served(echo=echo) as s:
        for _ in range(20):
            gone = s.context.socket(zmq.DEALER)
            gone.connect(s.server.endpoint)
            await gone.send(protocol.encode_request(1, op="echo"))
            gone.close(100)
        assert (await s.ask(op="echo", x=2))["got"] == 2


async def test_taken_ports_are_one_line() -> None:
    async with Served(echo=echo) as s:
        with pytest.raises(
            ConfigError, match=r"the control port cannot listen on 127\.0\.0\.1:\d+: .* in use"
        ):
            ControlServer(HOST, port_of(s.server.endpoint), {})
        with pytest.raises(ConfigError, match="the publisher cannot listen on"):
            HealthPublisher(HOST, port_of(s.server.endpoint), "service-1")


async def test_health_and_session_share_a_port_and_number_themselves() -> None:
    health = HealthPublisher(HOST, 0, "service-1")
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.linger = 0
        sub.connect(health.endpoint)
        sub.subscribe(b"")
        first = health.health(state="idle")
        while not sub.poll(50):
            first = health.health(state="idle")
        health.session("started", session="s1", seq=99, run="forged")
        got = [protocol.decode(sub.recv_multipart()) for _ in range(2)]
        while got[-1].topic != "session":
            got.append(protocol.decode(sub.recv_multipart()))
    health.close()
    assert got[0].header["state"] == "idle" and 1 <= got[0].seq <= first
    assert (got[-1].seq, got[-1].header["run"], got[-1].header["event"]) == (1, "service-1", "started")


def test_a_request_that_comes_while_another_is_answered_is_not_left_lying() -> None:
    """One that waits for the next to be seen could be the emergency stop."""

    async def busy(_request: dict[str, Any]) -> None:
        time.sleep(0.004)  # noqa: ASYNC251  nothing else of the loop runs meanwhile, as when the computer is loaded

    with (
        Ports(handlers={"status": busy}) as ports,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as first,
        context.socket(zmq.DEALER) as second,
    ):
        for dealer in (first, second):
            dealer.linger, dealer.rcvtimeo = 0, 30_000
            dealer.connect(ports.control.endpoint)
            dealer.send(protocol.encode_request(0, op="status"))
            dealer.recv()
        for i in range(20):
            first.send(protocol.encode_request(i, op="status"))
            time.sleep(0.002)
            second.send(protocol.encode_request(i, op="status"))
            for dealer in (first, second):
                assert msgpack.unpackb(dealer.recv())["id"] == i
