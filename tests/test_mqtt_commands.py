"""Commands over MQTT: carried out once, answered by id; what is malformed, retained, too much or not allowed is counted."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mqtt_rig import HOST, MOSQUITTO, Broker, hear, listener, until

from spiked.errors import SpikedError
from spiked.publish.mqtt import MqttStatus
from spiked.publish.mqtt_commands import OPERATIONS, Commands, Malformed, read
from spiked_client.access import OPERATIONS as ROLES


class Asked:
    """Handlers that note what they are asked; start is refused, and stop takes a while."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.go = asyncio.Event()

    def handlers(self) -> dict[str, Any]:
        async def start(request: dict[str, Any]) -> None:
            raise SpikedError("session s1 is recording; stop it first")

        async def note(request: dict[str, Any]) -> dict[str, Any]:
            self.requests.append(request)
            return {"noted": len(self.requests)}

        async def slow(request: dict[str, Any]) -> dict[str, Any]:
            await self.go.wait()
            return await note(request)

        async def broken(request: dict[str, Any]) -> None:
            raise ZeroDivisionError

        return {
            "start_session": start,
            "stop_session": slow,
            "mark_stim": note,
            "stop_stimulation": note,
            "arm": note,
        }


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed")
    b = Broker(tmp_path)
    b.start()
    yield b
    b.stop()


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an answer of the broker may take, else what is said while it is looked for again is lost; and a command."""
    monkeypatch.setattr("spiked.publish.mqtt.GOODBYE_S", 30.0)
    monkeypatch.setattr("spiked.publish.mqtt_commands.ANSWER_S", 60.0)


def test_nothing_that_stimulates_arms_or_lifts_the_stop_is_offered() -> None:
    assert {ROLES.get(op) for op in OPERATIONS.values()} <= {"watch", "control"}


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"start", "a command is JSON"), (b"[1]", "JSON object"), (b'{"op": "start"}', "id must be text"), (b'{"id": 5, "op": "start"}', "id must be text"),
        (b'{"id": "a", "op": "arm"}', "no operation 'arm'; there are start, stop, mark"), (b'{"id": "a", "op": ["start"]}', "no operation"),
        (b'{"id": "a", "op": "start", "when": 1}', "start does not take 'when'; it takes nothing"),
        (b'{"id": "a", "op": "mark", "sample": "x"}', "sample is of the wrong type"), (b'{"id": "a", "op": "mark", "sample": true}', "wrong type"),
        (b'{"id": "' + b"a" * 65 + b'", "op": "start"}', "1 to 64"), (b"[" * 4000, "a command is JSON"), (b" " * 4097, "at most 4096 bytes"), (b"\xff\xfe", "JSON"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named(payload: bytes, why: str) -> None:
    with pytest.raises(Malformed) as e:
        read(payload)
    assert why in e.value.args[0] and "\n" not in e.value.args[0] and len(e.value.args[0]) < 200


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_random_bytes_are_malformed_and_nothing_else(payload: bytes) -> None:
    with pytest.raises(Malformed):
        read(payload)


async def test_commands_are_answered_by_id_and_carried_out_once(broker: Broker) -> None:
    asked = Asked()
    settings = broker.settings(commands=True)
    async with (
        MqttStatus(settings, "rigA", handlers=asked.handlers()) as mqtt,
        listener(broker) as heard,
        aiomqtt.Client(HOST, broker.port) as lab,
    ):
        await until(lambda: mqtt.connected)

        async def say(**command: Any) -> None:
            await lab.publish("lab/rigA/command", json.dumps(command), qos=1)

        async def ack() -> dict[str, Any]:
            return dict(json.loads(await hear(heard, "lab/rigA/ack")))

        await say(id="m1", op="mark", sample=123, text="light")
        answer = await ack()
        assert (answer["id"], answer["op"], answer["ok"], answer["noted"]) == ("m1", "mark", True, 1)
        assert asked.requests == [{"op": "mark_stim", "sample": 123, "text": "light"}]
        await say(id="s1", op="start")
        answer = await ack()
        assert (answer["id"], answer["ok"], answer["error"]) == (
            "s1",
            False,
            "session s1 is recording; stop it first",
        )
        await say(id="e1", op="stop")  # a long one holds up nobody
        await say(id="e1", op="stop")
        await say(id="m2", op="mark")
        assert (await ack())["id"] == "m2"
        asked.go.set()
        assert (await ack())["id"] == "e1"
        await say(id="e1", op="stop")
        answer = await ack()
        assert answer["repeated"] is True and answer["ok"] is True
        await lab.publish("lab/rigA/command", b"\x00nonsense", qos=1)
        answer = await ack()
        assert answer["id"] is None and answer["ok"] is False and "JSON" in answer["error"]
    assert [r["op"] for r in asked.requests] == ["mark_stim", "mark_stim", "stop_session"]
    got = {k: mqtt.counters[k] for k in ("commands", "refused", "malformed", "repeated")}
    assert got == {"commands": 4, "refused": 1, "malformed": 1, "repeated": 2}


async def test_a_retained_command_is_not_carried_out(broker: Broker) -> None:
    asked = Asked()
    async with aiomqtt.Client(HOST, broker.port) as lab, listener(broker) as heard:
        await lab.publish("lab/rigA/command", '{"id": "old", "op": "mark"}', qos=1, retain=True)
        settings = broker.settings(commands=True)
        async with MqttStatus(settings, "rigA", handlers=asked.handlers()) as mqtt:
            answer = json.loads(await hear(heard, "lab/rigA/ack"))
    assert answer["id"] == "old" and "must not be retained" in answer["error"]
    assert asked.requests == [] and mqtt.counters["retained"] == 1


async def test_without_leave_only_the_emergency_stop_is_obeyed() -> None:
    asked, answers, counters = Asked(), [], Counter()
    commands = Commands(asked.handlers(), answers.append, counters, obey=False)
    for op in ("start", "mark", "stop_stimulation"):
        commands.hear(json.dumps({"id": op, "op": op}).encode(), False)
    await until(lambda: len(answers) == 3)
    told = {a["id"]: a for a in answers}
    assert (
        told["stop_stimulation"]["ok"]
        and "set mqtt.commands = true" in told["start"]["error"] == told["mark"]["error"]
    )
    assert [r["op"] for r in asked.requests] == ["stop_stimulation"]


async def test_the_emergency_stop_is_carried_out_every_time_it_is_sent() -> None:
    """A button sends the same bytes each time, and a sender that was restarted counts from 1 again."""
    asked, answers, counters = Asked(), [], Counter()
    commands = Commands(asked.handlers(), answers.append, counters, obey=True)
    commands.hear(b'{"id": "1", "op": "mark"}', False)
    await until(lambda: len(answers) == 1)
    for n in (2, 3, 4):
        commands.hear(b'{"id": "1", "op": "stop_stimulation"}', False)
        await until(lambda n=n: len(answers) == n)
    assert [r["op"] for r in asked.requests] == ["mark_stim"] + ["stop_stimulation"] * 3
    assert all(a["ok"] and a["op"] == "stop_stimulation" for a in answers[1:])
    commands.hear(b'{"id": "1", "op": "mark"}', False)
    await until(lambda: len(answers) == 5)
    assert answers[-1]["repeated"] and answers[-1]["op"] == "mark" and len(asked.requests) == 4


async def test_an_emergency_stop_is_obeyed_whatever_else_is_wrong_with_it() -> None:
    asked, answers, counters = Asked(), [], Counter()
    commands = Commands(asked.handlers(), answers.append, counters, obey=False)
    payloads = (
        b'{"op": "stop_stimulation"}', b'{"op": "stop_stimulation", "id": 7}', b'{"op": "stop_stimulation", "id": "x", "reason": "smoke", "why": 3}',
        b'{"op": "stop_stimulation", "id": "y", "why": "smoke"}',
    )  # fmt: skip
    for n, payload in enumerate(payloads, 1):
        commands.hear(payload, False)
        await until(lambda n=n: len(answers) == n)
    assert [(a["id"], a["ok"]) for a in answers] == [(None, True), (None, True), ("x", True), ("y", True)]
    assert [r.get("why") for r in asked.requests] == [None, None, None, "smoke"]
    commands.hear(payloads[0], True)  # the broker would repeat it at every connection
    assert not answers[-1]["ok"] and len(asked.requests) == 4


async def test_an_id_that_was_used_for_another_command_is_refused() -> None:
    """It is not told that it was carried out."""
    asked, answers, counters = Asked(), [], Counter()
    commands = Commands(asked.handlers(), answers.append, counters, obey=True)
    asked.go.set()
    for payload in (
        b'{"id": "1", "op": "mark", "sample": 5}', b'{"id": "1", "op": "mark", "sample": 6}', b'{"id": "1", "op": "stop"}',
    ):  # fmt: skip
        n = len(answers)
        commands.hear(payload, False)
        await until(lambda n=n: len(answers) > n)
    assert [a["ok"] for a in answers] == [True, False, False] and len(asked.requests) == 1
    assert [a.get("error") for a in answers[1:]] == [
        "the id was used for another command, mark; take a new one"
    ] * 2
    assert (counters["commands"], counters["refused"], counters["repeated"]) == (1, 2, 0)


async def test_a_flood_is_limited_and_the_emergency_stop_is_not() -> None:
    asked, answers, counters = Asked(), [], Counter()
    commands = Commands(asked.handlers(), answers.append, counters, obey=True)
    start = time.monotonic()
    for i in range(5000):
        commands.hear(b"nonsense" if i % 2 else json.dumps({"id": str(i), "op": "mark"}).encode(), False)
    for i in range(100):
        commands.hear(json.dumps({"id": f"e{i}", "op": "stop_stimulation"}).encode(), False)
    seconds = time.monotonic() - start
    await until(lambda: sum(r["op"] == "stop_stimulation" for r in asked.requests) == 100)
    marks = len(asked.requests) - 100
    assert 1 <= marks <= 11 + 5 * seconds and counters["busy"] >= 5000 - 21 - 5 * seconds
    assert len(answers) <= 100 + 22 + 6 * seconds and any(
        "too many commands" in a.get("error", "") for a in answers
    )
    for _ in range(300):  # what is remembered is bounded too
        commands._remember({"id": str(time.monotonic_ns())}, None)
    assert len(commands._answers) == 256
