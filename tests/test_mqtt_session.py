"""A whole session with a broker that freezes, dies and comes back: the recording does not notice, and the lab hears the rest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiomqtt
import numpy as np
import psutil
import pytest
from mqtt_rig import HOST, MOSQUITTO, Broker, hear, listener, until
from session_rig import recorded, rehearsal
from status_rig import status

from spiked import config as configuration
from spiked.journal import Journal
from spiked.lookout import Lookout
from spiked.service import Service

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    b = Broker(tmp_path)
    b.start()
    yield b
    b.stop()


Heard = list[tuple[float, str, Any]]


async def collect(broker: Broker, heard: Heard, listens: asyncio.Event) -> None:
    """Everything the broker gets into `heard`, across its restarts; `listens` once it does."""
    while True:
        try:
            async with aiomqtt.Client(HOST, broker.port, timeout=10) as client:
                await client.subscribe("#", qos=1)
                listens.set()
                async for m in client.messages:
                    payload = bytes(m.payload).decode()
                    told = json.loads(payload) if payload.startswith("{") else payload
                    heard.append((time.monotonic(), m.topic.value.removeprefix("lab/test/"), told))
        except (aiomqtt.MqttError, OSError):
            await asyncio.sleep(0.1)


async def command(broker: Broker, heard: Heard, **fields: Any) -> dict[str, Any]:
    """Say it and wait for the acknowledgement; again where nobody was there to hear that."""

    def answered() -> bool:
        return any(t == "ack" and m["id"] == fields["id"] for _, t, m in heard)

    async with aiomqtt.Client(HOST, broker.port) as lab:
        for _ in range(6):
            await lab.publish("lab/test/command", json.dumps(fields), qos=1)
            with contextlib.suppress(TimeoutError):
                await until(answered, 20)
                break
    return next(m for _, t, m in heard if t == "ack" and m["id"] == fields["id"])


def events(heard: Heard, kind: str) -> list[dict[str, Any]]:
    return [m for _, topic, m in heard if topic == "session" and m["event"] == kind]


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_session_with_a_broker_that_freezes_dies_and_comes_back(
    broker: Broker, tmp_path: Path
) -> None:
    mqtt = {"enabled": True, "port": broker.port, "prefix": "lab", "commands": True}
    drop = (40_000, 41_000)
    r = rehearsal(
        tmp_path / "rig",
        seconds=900.0,
        simulate=("--drop", f"{drop[0]}:{drop[1]}"),
        live={"enabled": True},
        mqtt=mqtt,
    )
    heard: Heard = []
    listens = asyncio.Event()
    listening = asyncio.create_task(collect(broker, heard, listens))
    samples: list[tuple[float, int]] = []

    async def look(seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            told = await asyncio.to_thread(r.status)
            samples.append((time.monotonic(), told["streams"]["sim"]["samples"]))
            if time.monotonic() > end:
                return told
            await asyncio.sleep(0.2)

    async with asyncio.timeout(60):
        await listens.wait()
    await asyncio.to_thread(r.__enter__)
    try:
        await asyncio.to_thread(r.wait_state, ("recording",), 120)
        await until(
            lambda: (
                bool(events(heard, "gap"))
                and any(t == "alarm" and m["figure"] == "gaps" for _, t, m in heard)
            ),
            120,
        )
        assert events(heard, "started")
        gap = events(heard, "gap")[0]
        assert (gap["stream"], gap["gaps"], gap["samples"]) == ("sim", 1, 1000)
        alarm = next(m for _, t, m in heard if t == "alarm" and m["figure"] == "gaps")
        assert alarm["level"] == "warning" and alarm["good"] == 0 and alarm["bad"] == 10 and alarm["todo"]
        await until(lambda: any(t == "rates/sim" for _, t, _ in heard), 120)
        marked = await command(broker, heard, id="m1", op="mark", text="light", line=3)
        assert marked["ok"] is True
        refused = await command(broker, heard, id="s1", op="start")
        assert refused["ok"] is False and "stop it first" in refused["error"]

        assert r.daemon is not None
        supervisor = psutil.Process(r.daemon.pid)
        before = supervisor.memory_info().rss
        broker.signal(signal.SIGSTOP)  # packets are taken and never answered
        frozen = time.monotonic()
        r.control("stop_stimulation", why="test")  # an event that the broker does not acknowledge
        while (told := await look(1.0))["mqtt"]["connected"]:
            assert time.monotonic() - frozen < 120
        told = await look(4.0)
        while not [a for a in told["alarms"] if a["figure"] == "mqtt_connected"]:
            assert time.monotonic() - frozen < 180
            told = await look(1.0)
        assert told["mqtt"]["connected"] is False and "MQTT broker" in told["mqtt"]["trouble"]
        broker.stop()  # nobody listens
        told = await look(4.0)
        assert supervisor.memory_info().rss - before < 30e6
        broker.start()
        late = None
        until_s = time.monotonic() + 120
        while late is None and time.monotonic() < until_s:
            told = await look(0.5)
            if told["mqtt"]["connected"]:
                late = await command(broker, heard, id="late", op="mark")
        assert late is not None and late["ok"]
        stopped = await command(broker, heard, id="e1", op="stop")
        assert stopped["ok"] is True and stopped["session"] == told["session"]
        summary = await asyncio.to_thread(r.wait_daemon, 120)
        await until(
            lambda: (
                bool(events(heard, "ended")) and [m for _, t, m in heard if t == "status"][-1] == "offline"
            ),
            60,
        )
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await asyncio.to_thread(r.__exit__, None, None, None)

    ended = events(heard, "ended")[-1]
    assert ended["streams"]["sim"]["gaps"] == 1 and ended["state"] == "done"
    state = [m for _, t, m in heard if t == "state"][-1]
    assert state["session"] == told["session"] and "sim" in state["streams"]
    # acquisition did not notice: samples came all the time, and the file holds what was sent
    at, n = np.array([s[0] for s in samples]), np.array([s[1] for s in samples])
    rate = np.polyfit(at, n, 1)[0]
    behind_s = json.loads((tmp_path / "rig" / "simulator.json").read_text())["most_behind_s"]
    assert (
        abs(rate / 20_000 - 1) < 0.05 + behind_s / (at[-1] - at[0]) and summary["streams"]["sim"]["gaps"] == 1
    )
    data, gaps = recorded(Path(summary["folder"]))
    assert gaps == [drop]
    sent = np.fromfile(tmp_path / "rig" / "sent.raw", "uint16").reshape(-1, 16)[: len(data)]
    sent[slice(*drop)] = 0
    assert len(data) > 200_000 and np.array_equal(data, sent)
    assert summary["streams"]["sim"]["processes"]["live"]["counters"]["skipped_samples"] == 0


async def test_jobs_and_alarms_are_events(broker: Broker, tmp_path: Path) -> None:
    config = configuration.parse({
        "rig": {"name": "test", "sessions": str(tmp_path / "s")}, "stream": [{"name": "sim", "source": "maxwell"}],
        "mqtt": {"enabled": True, "port": broker.port, "prefix": "lab"},
    })  # fmt: skip
    service = Service(config)
    published: list[dict[str, Any]] = []

    async def no_jobs() -> dict[str, Any]:
        return {"queued": 1, "now": []}

    async with listener(broker) as heard:
        await service.lookout.start({}, lambda _why: None, no_jobs, 0)
        mqtt = service.lookout.mqtt
        assert mqtt is not None
        await until(lambda: mqtt.connected)
        failed = {
            "event": "job",
            "state": "failed",
            "kind": "resource",
            "text": "the GPU's memory is full; use a smaller batch_size",
            "session": "s1",
            "job": 3,
        }
        service._offline_news({**failed, "folder": "/data/s1"})
        told = json.loads(await hear(heard, "lab/test/session"))
        assert {k: told[k] for k in failed} == failed and told["policy"] == "retry smaller, or with more room"
        assert service.lookout.facts()["jobs"]["ended"]["resource"] == 1
        await service.lookout.close()
    quiet = config.model_copy(update={"mqtt": config.mqtt.model_copy(update={"enabled": False})})
    journal = Journal(tmp_path / "log.jsonl")
    lookout = Lookout(quiet, lambda: journal, lambda topic, news: published.append(news))
    for _ in range(5):
        lookout.see(status(disk_free_gb=1.0))
        await asyncio.sleep(1.0)
    alarm = next(n for n in published if n.get("figure") == "disk_free_gb")
    assert (alarm["event"], alarm["level"], alarm["value"]) == ("alarm", "bad", 1.0)
    assert next(n for n in published if n["event"] == "gap")["samples"] == 10
    assert lookout.facts()["alarms"][0]["level"] == "bad"
    journal.close()  # a thread of its own writes it
    assert "Delete or move old sessions" in (tmp_path / "log.jsonl").read_text()
