"""Control, with and without asyncio, against a real control port."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import msgpack
import pytest
import zmq
from client_rig import HOST, Ports

from spiked.errors import SpikedError
from spiked.rehearsal import free_ports
from spiked_client import Control, DaemonAbsent, Incompatible, Refused, SyncControl, protocol


async def status(_request: dict[str, Any]) -> dict[str, Any]:
    return {"rig": "rigA", "state": "idle"}


async def refuse(_request: dict[str, Any]) -> dict[str, Any]:
    raise SpikedError("no session is running; start one first")


wait = threading.Event()


async def slow(_request: dict[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(0.5)
    while wait.is_set():  # noqa: ASYNC110 - set by another thread
        await asyncio.sleep(0.01)
    return {"slow": True}


HANDLERS = {"status": status, "stop_session": refuse, "slow": slow}


def test_every_operation_reaches_the_daemon_with_its_arguments() -> None:
    with Ports("A", handlers=HANDLERS) as ports, SyncControl(HOST, ports.port) as rig:
        assert rig.status() == {"rig": "rigA", "state": "idle"}
        assert rig.endpoints()["streams"]["A"] == {**ports.streams["A"].endpoints, "run": "run-1"}
        rig.start_session()
        rig.calibrate()
        rig.cancel_calibration(stream="A")
        rig.mark_stim(1234, stream="A", line=2, value=1.5, text="pulse")
        rig.mark_stim()
        rig.shutdown()
        with pytest.raises(Refused, match=r"^no session is running; start one first$") as e:
            rig.stop_session()
        assert e.value.op == "stop_session"
        with pytest.raises(Refused, match="no operation 'dance'; there are "):
            rig.request("dance")
    asked = [{k: v for k, v in r.items() if k not in ("v", "id")} for r in ports.asked]
    ops = ["start_session", "calibrate", "cancel_calibration", "mark_stim", "mark_stim", "shutdown"]
    assert [r["op"] for r in asked] == ops
    assert asked[1] == {"op": "calibrate"} and asked[2] == {"op": "cancel_calibration", "stream": "A"}
    assert asked[3] == {
        "op": "mark_stim",
        "sample": 1234,
        "stream": "A",
        "line": 2,
        "value": 1.5,
        "text": "pulse",
    }
    assert "sample" not in asked[4]


def test_operations_on_triggers_carry_what_they_need() -> None:
    asked: list[dict[str, Any]] = []

    async def note(request: dict[str, Any]) -> dict[str, Any]:
        asked.append({k: v for k, v in request.items() if k not in ("v", "id")})
        return {"lease": "L"}

    ops = (
        "arm", "renew", "disarm", "triggers", "set_trigger", "remove_trigger", "set_limits", "stimulate", "stop_stimulation", "clear_stop", "mark_stim",
    )  # fmt: skip
    with Ports("A", handlers=dict.fromkeys(ops, note)) as ports, SyncControl(HOST, ports.port) as rig:
        assert rig.arm() == {"lease": "L"}
        rig.arm(["x"], lease_s=2, stream="A")
        rig.renew("L")
        rig.disarm("L")
        rig.disarm()
        rig.triggers()
        rig.set_trigger({"name": "x"})
        rig.remove_trigger("x")
        rig.set_limits(max_per_s=3, max_nc_per_s=None)
        rig.stimulate("L", "pulser", "p", electrodes=[1], amplitude_ua=2.0, width_us=100.0)
        rig.stop_stimulation("smoke")
        rig.clear_stop()
        rig.mark_stim(7, "tetanus")
    assert asked == [
        {"op": "arm", "lease_s": 5.0},
        {"op": "arm", "lease_s": 2, "triggers": ["x"], "stream": "A"},
        {"op": "renew", "lease": "L"},
        {"op": "disarm", "lease": "L"},
        {"op": "disarm"},
        {"op": "triggers"},
        {"op": "set_trigger", "trigger": {"name": "x"}},
        {"op": "remove_trigger", "name": "x"},
        {"op": "set_limits", "limits": {"max_per_s": 3, "max_nc_per_s": None}},
        {
            "op": "stimulate", "lease": "L", "output": "pulser", "pattern": "p", "electrodes": [1], "amplitude_ua": 2.0, "width_us": 100.0,
            "pulses": 1,
        },
        {"op": "stop_stimulation", "why": "smoke"},
        {"op": "clear_stop"},
        {"op": "mark_stim", "sample": 7, "line": 0, "value": 0.0, "text": "tetanus"},
    ]  # fmt: skip


async def test_the_asyncio_control_does_the_same() -> None:
    with Ports("A", handlers=HANDLERS) as ports:
        async with Control(HOST, ports.port) as rig:
            assert (await rig.status())["rig"] == "rigA"
            assert await rig.mark_stim(5) == {"noted": 1}
            with pytest.raises(Refused, match="no session is running"):
                await rig.stop_session()
            both = await asyncio.gather(rig.request("slow"), rig.status())
    assert both == [{"slow": True}, {"rig": "rigA", "state": "idle"}]


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one() -> None:
    with Ports(handlers=HANDLERS) as ports, SyncControl(HOST, ports.port) as rig:
        wait.set()
        with pytest.raises(DaemonAbsent):
            rig.request("slow", timeout=0.1)
        assert rig.status()["rig"] == "rigA"
        wait.clear()
        time.sleep(0.6)
        assert rig.status()["rig"] == "rigA"


def test_quick_requests_that_piled_up_at_a_busy_daemon_are_all_answered() -> None:
    """None of them takes long: they are not too many at once, however late they are read."""

    async def nap(_request: dict[str, Any]) -> None:
        time.sleep(0.3)  # noqa: ASYNC251

    ops = ("nap", *["status"] * 100)
    with (
        Ports(handlers={**HANDLERS, "nap": nap}) as ports,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as client,
    ):
        client.linger, client.rcvtimeo = 0, 60_000
        client.connect(ports.control.endpoint)
        for n, op in enumerate(ops):
            client.send(protocol.encode_request(n, op=op))
        told = [protocol.unpack(client.recv()) for _ in ops]
    assert [(reply["id"], reply["ok"]) for reply in told] == [(n, True) for n in range(len(ops))]


async def test_a_request_to_an_absent_daemon_is_not_delivered_when_it_comes() -> None:
    (port,) = free_ports(1)
    with (
        SyncControl(HOST, port) as rig,
        pytest.raises(DaemonAbsent, match=rf":{port} within 0\.2 s; start it"),
    ):
        rig.request("shutdown", timeout=0.2)
    async with Control(HOST, port) as rig:
        with pytest.raises(DaemonAbsent):
            await rig.request("shutdown", timeout=0.2)
        with Ports(port=port) as back:
            assert (await rig.calibrate())["noted"] == 1
    assert [r["op"] for r in back.asked] == ["calibrate"]


async def test_the_emergency_stop_does_not_wait_for_another_request() -> None:
    """A live process that hangs does not answer, and then somebody wants to stop."""
    stopped: list[Any] = []

    async def hangs(_request: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    async def stop(request: dict[str, Any]) -> None:
        stopped.append(request["why"])

    with Ports("A", handlers={"renew": hangs, "stop_stimulation": stop}) as ports:
        async with Control(HOST, ports.port, timeout=200) as rig:
            renewing = asyncio.create_task(rig.renew("lease"))
            await asyncio.sleep(0.1)
            async with asyncio.timeout(60):
                await rig.stop_stimulation("smoke")
            assert stopped == ["smoke"] and not renewing.done()
            renewing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await renewing
            with pytest.raises(Refused):
                await rig.request("none")
    async with Control(HOST, free_ports(1)[0], timeout=0.2) as nobody:
        waiting = asyncio.create_task(nobody.status())
        await asyncio.sleep(0)
        for ask in (nobody.stop_stimulation(), waiting):
            with pytest.raises(DaemonAbsent):
                await ask


def test_a_daemon_that_goes_just_before_a_request_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, as any that is not there: the terminal monitor's emergency stop has to say that it was not heard."""
    wait = SyncControl._wait
    monkeypatch.setattr(
        SyncControl, "_wait", lambda c, events, end: events == zmq.POLLOUT or wait(c, events, end)
    )
    with SyncControl(HOST, free_ports(1)[0], timeout=0.2) as rig, pytest.raises(DaemonAbsent):
        rig.stop_stimulation()


def test_a_daemon_of_another_major_version_is_refused_by_name() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as other:
        other.linger = 0
        port = other.bind_to_random_port(f"tcp://{HOST}")
        with SyncControl(HOST, port, timeout=60) as rig:
            rig._socket.send(b"hello")  # so that the daemon below knows whom to answer
            name = other.recv_multipart()[0]
            other.send_multipart([name, msgpack.packb({"v": [3, 1], "id": 1, "ok": True})])
            with pytest.raises(
                Incompatible,
                match=rf"peer speaks spiked protocol 3\.1, this side {protocol.VERSION[0]}\.{protocol.VERSION[1]}; update one",
            ):
                rig.status()


async def test_a_request_that_is_cancelled_while_its_answer_comes_is_cancelled() -> None:
    """Else a task that asks again and again outlives its own end."""
    with Ports("A", handlers=HANDLERS) as ports:
        async with Control(HOST, ports.port) as rig:
            begun = time.perf_counter()
            for _ in range(20):
                await rig.status()
            usual_s = (time.perf_counter() - begun) / 20
            cut_short = 0
            for i in range(400):
                task = asyncio.create_task(rig.status())
                await asyncio.sleep(usual_s * 1.5 * (i % 40) / 40)
                if task.cancel():
                    cut_short += 1
                    with pytest.raises(asyncio.CancelledError):
                        await task
            assert cut_short
            assert (await rig.status())["state"] == "idle"


async def test_an_answer_that_came_while_the_client_was_held_up_is_taken() -> None:
    """The time is over then, but nobody looked for the answer since it came."""
    now = threading.Event()

    async def told(_request: dict[str, Any]) -> dict[str, Any]:
        while not now.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.005)
        return {"told": True}

    with Ports("A", handlers={"status": status, "told": told}) as ports:
        async with Control(HOST, ports.port, timeout=60) as rig:
            await rig.status()
            asked = asyncio.create_task(rig.request("told", timeout=1.0))
            await asyncio.sleep(0)  # it is sent
            now.set()
            time.sleep(6.0)  # noqa: ASYNC251 - this is what holds the client up
            assert (await asked) == {"told": True}


async def test_who_asks_again_anyway_is_told_at_once_that_there_was_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To find out why takes seconds, in which whoever renews a lease could have asked again."""
    for kind in (Control, SyncControl):
        monkeypatch.setattr(kind, "_absent", lambda *_: pytest.fail("somebody looked why"))
    nowhere = free_ports(1)[0]
    async with Control(HOST, nowhere) as rig:
        with pytest.raises(TimeoutError):
            await rig.attempt("status", 0.2)
    with SyncControl(HOST, nowhere) as plain, pytest.raises(TimeoutError):
        plain.attempt("status", 0.2)
