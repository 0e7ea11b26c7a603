"""MQTT against a real mosquitto: status and will, events, rates, a broker that goes away."""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import aiomqtt
import pytest
from mqtt_rig import MOSQUITTO, Broker, hear, listener, until
from output_rig import quickly

from spiked.config import Mqtt
from spiked.errors import ConfigError
from spiked.publish.mqtt import MqttStatus
from spiked.rehearsal import free_ports


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
    """What an answer of the broker may take; on a busy computer it takes seconds now and then."""
    monkeypatch.setattr("spiked.publish.mqtt.GOODBYE_S", 30.0)


async def test_online_events_rates_offline(broker: Broker) -> None:
    async with listener(broker) as heard:
        async with MqttStatus(broker.settings(), "rigA") as mqtt:
            assert await hear(heard, "lab/rigA/status") == "online"
            await until(lambda: mqtt.connected)
            mqtt.event("state", state="recording", folder=Path("/data/s1"))
            event = json.loads(await hear(heard, "lab/rigA/session"))
            # rates come when the broker has said that it has the event
            await until(lambda: mqtt.counters["events"] == 1)
            start = time.monotonic()
            for i in range(45):
                mqtt.rates({"A": {"rates_hz": {"3": i}}, "B": {}})
                await asyncio.sleep(0.05)
            took = time.monotonic() - start
        rates, status = [], ""
        while status != "offline":
            topic, payload = await asyncio.wait_for(heard.get(), 60)
            rates += [json.loads(payload)] if topic.startswith("lab/rigA/rates/") else []
            assert topic != "lab/rigA/rates/B"
            status = payload if topic == "lab/rigA/status" else status
    assert (event["event"], event["state"], event["folder"]) == ("state", "recording", "/data/s1")
    assert abs(event["time_s"] - time.time()) < 60
    assert 2 <= len(rates) <= took + 1 and rates[-1]["rates_hz"]["3"] > rates[0]["rates_hz"]["3"]
    async with listener(broker) as late:  # retained: who comes later learns it too
        assert await hear(late, "lab/rigA/status") == "offline"


async def test_the_will_is_left_when_the_daemon_is_killed(broker: Broker) -> None:
    code = f"""
        import asyncio
        from spiked.config import Mqtt
        from spiked.publish import mqtt
        from spiked.publish.mqtt import MqttStatus

        mqtt.GOODBYE_S = 30.0

        async def main():
            async with MqttStatus(Mqtt(enabled=True, port={broker.port}, prefix="lab"), "rigA"):
                await asyncio.sleep(300)

        asyncio.run(main())
    """
    async with listener(broker) as heard:
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(code))
        try:
            assert await hear(heard, "lab/rigA/status", 90) == "online"
        finally:
            child.kill()
            await child.wait()
        assert await hear(heard, "lab/rigA/status") == "crashed"
        async with MqttStatus(broker.settings(), "rigA"):
            assert await hear(heard, "lab/rigA/status") == "online"


async def test_a_broker_that_restarts_gets_the_newest_events_and_the_status(broker: Broker) -> None:
    async with MqttStatus(broker.settings(), "rigA", outbox=10, retry_s=0.1, retry_max_s=0.3) as mqtt:
        await until(lambda: mqtt.connected)
        broker.stop()
        await until(lambda: not mqtt.connected)
        for i in range(100):  # the caller does not wait
            quickly(lambda i=i: mqtt.event("restart", n=i))
            quickly(mqtt.rates, {"A": {"rates_hz": {}}})
        assert mqtt.counters["dropped"] == 90
        await until(lambda: mqtt.counters["failures"] >= 2)
        broker.start()
        async with listener(broker) as heard:
            # the listener may come after them; the last event comes after it in any case, and finds room when they are gone
            await until(lambda: mqtt.counters["events"] == 10)
            mqtt.event("last")
            async with asyncio.timeout(60):
                while json.loads(await hear(heard, "lab/rigA/session"))["event"] != "last":
                    pass
        await until(lambda: mqtt.counters["events"] == 11)
        assert mqtt.counters["dropped"] == 90
        assert mqtt.counters["connects"] == 2 and mqtt.counters["failures"] >= 2
        async with listener(broker) as late:
            assert await hear(late, "lab/rigA/status") == "online"


async def test_a_connection_that_breaks_in_an_odd_way_is_made_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library hands on what its socket raised while it says goodbye."""
    talk, breaks = MqttStatus._talk, iter([True])

    async def once(self: MqttStatus, client: aiomqtt.Client) -> None:
        if next(breaks, False):
            raise BrokenPipeError(32, "Broken pipe")
        await talk(self, client)

    monkeypatch.setattr(MqttStatus, "_talk", once)
    async with MqttStatus(broker.settings(), "rigA", retry_s=0.05) as mqtt:
        await until(lambda: mqtt.connected)
        assert (mqtt.counters["failures"], mqtt.counters["connects"]) == (1, 1)


async def test_the_state_is_kept_and_sent_when_it_changes(broker: Broker) -> None:
    async with MqttStatus(broker.settings(), "rigA") as mqtt:
        mqtt.state(state="recording", alarms=[])
        await until(lambda: mqtt.connected)
        async with listener(broker) as heard:
            assert json.loads(await hear(heard, "lab/rigA/state"))["state"] == "recording"
            for _ in range(20):
                mqtt.state(state="recording", alarms=[])
            mqtt.state(state="done", alarms=[])
            assert json.loads(await hear(heard, "lab/rigA/state"))["state"] == "done"
            mqtt.alarm(figure="disk_free_gb", level="bad", value=1.0)
            alarm = json.loads(await hear(heard, "lab/rigA/alarm"))
    assert (alarm["figure"], alarm["level"], alarm["value"]) == ("disk_free_gb", "bad", 1.0)


async def test_an_absent_broker_holds_up_nobody() -> None:
    (port,) = free_ports(1)
    mqtt = MqttStatus(Mqtt(enabled=True, port=port), "rigA", retry_s=0.05)
    await mqtt.start()
    await until(lambda: mqtt.counters["failures"] >= 2)
    mqtt.event("state", state="recording")
    start = time.monotonic()
    await mqtt.close()
    assert time.monotonic() - start < 20 and not mqtt.connected


async def test_a_password_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read mqtt\.password_file .*nowhere.*check the path"):
        MqttStatus(Mqtt(enabled=True, username="u", password_file=tmp_path / "nowhere"), "rigA")


async def test_a_stop_is_heard_from_any_client(broker: Broker) -> None:
    heard: list[str] = []
    async with MqttStatus(broker.settings(), "rigA", on_stop=heard.append) as status:
        await until(lambda: status.connected)
        async with aiomqtt.Client("127.0.0.1", broker.port) as client:
            await client.publish("lab/rigB/stop", "not this rig", qos=1)
            await client.publish("lab/rigA/stop", "", qos=1)
            await client.publish("lab/rigA/stop", "animal moved", qos=1)
        await until(lambda: len(heard) >= 2)
    assert heard == ["", "animal moved"]
