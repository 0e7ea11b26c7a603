"""A broker that freezes, refuses, or wants certificates: one clear line, bounded memory, and it goes on afterwards."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mqtt_rig import MOSQUITTO, SBIN, Broker, authority, certificate, hear, listener, until
from output_rig import quickly

from spiked.errors import ConfigError
from spiked.publish.mqtt import MqttStatus

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")
Make = Callable[..., Broker]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Broker] = []

    def start(*lines: str) -> Broker:
        made.append(Broker(tmp_path, *lines))
        made[-1].start()
        return made[-1]

    yield start
    for broker in made:
        broker.stop()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.slow
async def test_a_frozen_broker_holds_up_nobody_and_costs_no_memory(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spiked.publish.mqtt.GOODBYE_S", 1.0)  # what an answer may take
    broker = make()
    me = psutil.Process()
    async with MqttStatus(broker.settings(), "rigA", outbox=100, retry_s=0.1, retry_max_s=0.2) as mqtt:
        await until(lambda: mqtt.connected)
        broker.signal(signal.SIGSTOP)
        rates = {"A": {"rates_hz": {str(u): 1.0 for u in range(1000)}}}
        gc.collect()
        before, files = me.memory_info().rss, me.num_fds()
        for i in range(160):  # five seconds: publications run out of time, then connections are not greeted
            quickly(lambda i=i: mqtt.event("state", n=i, text="x" * 1000))
            quickly(lambda i=i: mqtt.state(n=i))
            quickly(mqtt.rates, rates)
            await asyncio.sleep(0.03)
        await until(lambda: mqtt.counters["failures"] >= 3)
        assert not mqtt.connected and mqtt.counters["dropped"] == 60
        assert me.memory_info().rss - before < 20e6
        assert me.num_fds() - files <= 2  # connections that were given up are closed
        monkeypatch.setattr("spiked.publish.mqtt.GOODBYE_S", 30.0)
        broker.signal(signal.SIGCONT)
        await until(lambda: mqtt.connected)
        async with listener(broker) as heard:
            mqtt.event("last")
            async with asyncio.timeout(60):
                while json.loads(await hear(heard, "lab/rigA/session"))["event"] != "last":
                    pass
            async with listener(broker) as late:
                assert json.loads(await hear(late, "lab/rigA/state"))["n"] == 159
        await until(lambda: mqtt.told()["waiting"] == 0)
    assert mqtt.told()["waiting"] == 0


async def test_a_wrong_password_is_one_line_and_tried_again_with_patience(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spiked.publish.mqtt.GOODBYE_S", 30.0)  # what an answer may take
    tool, passwords, secret = (
        shutil.which("mosquitto_passwd", path=SBIN),
        tmp_path / "passwords",
        tmp_path / "secret",
    )
    assert tool is not None
    await asyncio.to_thread(
        subprocess.run, [tool, "-c", "-b", str(passwords), "rig", "right"], check=True, capture_output=True
    )
    broker = make("allow_anonymous false", f"password_file {passwords}")
    secret.write_text("wrong\n")
    settings = broker.settings(username="rig", password_file=secret)
    async with MqttStatus(settings, "rigA", retry_s=0.05, retry_max_s=0.2) as mqtt:
        mqtt.event("state", state="recording")
        await until(lambda: mqtt.counters["failures"] >= 4)
    where, advice = f"MQTT broker 127.0.0.1:{broker.port}", "check mqtt.username and mqtt.password_file"
    expected = f"{where}: it refuses the login (Not authorized); {advice}; trying again in 0.05 s, then up to every 0.2 s"
    assert warnings_of(caplog) == [expected]
    assert mqtt.told()["trouble"] and not mqtt.connected
    secret.write_text("right\n")
    async with (
        MqttStatus(settings, "rigA") as mqtt,
        listener(broker, username="rig", password="right") as heard,
    ):
        assert await hear(heard, "lab/rigA/status") == "online"
        assert mqtt.told()["trouble"] == ""


# paho leaves the socket of a handshake that failed to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_tls_with_an_authority_and_a_certificate_of_ones_own(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spiked.publish.mqtt.GOODBYE_S", 30.0)  # what an answer may take
    for ca in ("ca", "stranger"):
        authority(tmp_path, ca)
    for name in ("broker", "rig"):
        certificate(tmp_path, name)
    pem = {
        n: tmp_path / n for n in ("ca.crt", "stranger.crt", "rig.crt", "rig.key", "broker.crt", "broker.key")
    }
    broker = make(
        "allow_anonymous true", f"cafile {pem['ca.crt']}", f"certfile {pem['broker.crt']}", f"keyfile {pem['broker.key']}", "require_certificate true",
    )  # fmt: skip
    mine = {"cert_file": pem["rig.crt"], "key_file": pem["rig.key"]}
    patience = {"retry_s": 0.05, "retry_max_s": 0.1}
    right = broker.settings(tls=True, ca_file=pem["ca.crt"], **mine)
    context = ssl.create_default_context(cafile=str(pem["ca.crt"]))
    context.load_cert_chain(pem["rig.crt"], pem["rig.key"])
    async with MqttStatus(right, "rigA", **patience) as mqtt:
        mqtt.event("state", state="recording")
        await until(lambda: mqtt.connected)
        async with listener(broker, tls_context=context) as heard:
            assert await hear(heard, "lab/rigA/status") == "online"
    assert warnings_of(caplog) == []
    for settings, expected in (
        (broker.settings(tls=True, ca_file=pem["stranger.crt"], **mine), "its certificate is not trusted"),
        (
            broker.settings(tls=True, ca_file=pem["ca.crt"], host="localhost", **mine),
            "its certificate is not trusted",
        ),
        (
            broker.settings(tls=True, ca_file=pem["ca.crt"]),
            "wants a certificate of this rig",
        ),  # the broker wants a certificate
        (broker.settings(), "check"),  # no TLS at all
    ):
        caplog.clear()
        # without a certificate the library waits for an answer that does not come
        monkeypatch.setattr("spiked.publish.mqtt.GOODBYE_S", 30.0 if settings.cert_file else 10.0)
        async with MqttStatus(settings, "rigA", **patience) as mqtt:
            await until(lambda: mqtt.counters["failures"] >= 1)
            monkeypatch.setattr("spiked.publish.mqtt.GOODBYE_S", 1.0)  # there is nobody to say goodbye to
            assert not mqtt.connected
        lines = warnings_of(caplog)
        assert expected in lines[0] and "\n" not in lines[0]
        assert len(set(lines)) == len(lines) <= 2
    gc.collect()  # here, where its warnings are expected


@pytest.mark.parametrize(("name", "content"), [("nowhere.pem", None), ("text.pem", "no certificate")])
async def test_certificates_that_cannot_be_used_are_one_line(
    tmp_path: Path, name: str, content: str | None
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    settings = Broker(tmp_path).settings(tls=True, ca_file=tmp_path / name)
    with pytest.raises(ConfigError, match=r"cannot use the mqtt certificates .*check the paths"):
        MqttStatus(settings, "rigA")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to cut a network")
@pytest.mark.skipif(shutil.which("ip", path=SBIN) is None, reason="needs iproute2")
@pytest.mark.slow
def test_a_network_that_is_cut_is_noticed_and_found_again(tmp_path: Path) -> None:
    """In a network of its own: the loopback goes down, packets vanish, and nobody says so."""
    script = f"""
        import asyncio, subprocess, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from mqtt_rig import Broker, until
        from spiked.publish import mqtt as module
        from spiked.publish.mqtt import MqttStatus

        module.GOODBYE_S = 1.0

        def loopback(state):
            subprocess.run(["ip", "link", "set", "lo", state], check=True)

        async def main():
            loopback("up")
            broker = Broker(Path({str(tmp_path)!r}))
            broker.start()
            try:
                async with MqttStatus(broker.settings(), "rigA", outbox=50, keepalive_s=4, retry_s=0.2, retry_max_s=0.5) as mqtt:
                    await until(lambda: mqtt.connected)
                    loopback("down")
                    for i in range(80):
                        mqtt.event("state", n=i)
                    await until(lambda: not mqtt.connected)
                    module.GOODBYE_S = 30.0  # those that come after it take their time
                    await until(lambda: mqtt.counters["failures"] >= 2)
                    loopback("up")
                    await until(lambda: mqtt.connected and mqtt.told()["waiting"] == 0)
                    print("OK", mqtt.counters["dropped"], mqtt.counters["connects"])
            finally:
                broker.stop()

        asyncio.run(main())
    """
    import sys
    import textwrap

    file = tmp_path / "cut.py"
    file.write_text(textwrap.dedent(script))
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-n", "true"], check=False).returncode:
        pytest.skip("no network namespaces here")
    done = subprocess.run(
        [unshare, "-n", sys.executable, str(file)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stdout.split() == ["OK", "30", "2"], done.stdout + done.stderr


async def test_a_socket_that_is_closed_before_it_is_watched_is_left_alone(make: Make) -> None:
    """Its number may be somebody else's by then."""
    client = MqttStatus(make("allow_anonymous true").settings(), "rigA")._client()
    mine, other = socket.socketpair()
    number = mine.fileno()
    for told in (client._on_socket_open, client._on_socket_register_write):
        client._client._sock = mine
        told(client._client, None, mine)
    client._client._sock = None
    mine.close()
    with other, socket.socket() as somebody:
        assert somebody.fileno() == number
        await asyncio.sleep(0.05)
        loop = asyncio.get_running_loop()
        assert not loop.remove_reader(number) and not loop.remove_writer(number)
    assert client._misc_task is not None
    client._misc_task.cancel()
