"""A real mosquitto with what a test needs: a listener, passwords, a certificate authority of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiomqtt

from spiked.config import Mqtt
from spiked.rehearsal import free_ports

SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
MOSQUITTO = shutil.which("mosquitto", path=SBIN)
HOST = "127.0.0.1"


class Broker:
    """A mosquitto child on a port of its own; may be stopped and started again, or frozen."""

    def __init__(self, folder: Path, *lines: str) -> None:
        (self.port,) = free_ports(1)
        self._conf = folder / "mosquitto.conf"
        rest = lines or ("allow_anonymous true",)
        user = ["user root"] if os.geteuid() == 0 else []  # else it gives up its rights to the test's folder
        self._conf.write_text(
            "\n".join([*user, f"listener {self.port} {HOST}", *rest, "persistence false", ""])
        )
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = subprocess.DEVNULL
        self._child = subprocess.Popen([str(MOSQUITTO), "-c", str(self._conf)], stdout=quiet, stderr=quiet)
        for _ in range(800):
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 0.2):
                return
            time.sleep(0.05)
        raise AssertionError("mosquitto did not start")

    def signal(self, sig: signal.Signals) -> None:
        assert self._child is not None
        self._child.send_signal(sig)

    def stop(self) -> None:
        if self._child is not None:
            self._child.send_signal(signal.SIGCONT)
            self._child.kill()
            self._child.wait()
            self._child = None

    def settings(self, **more: Any) -> Mqtt:
        return Mqtt(**{"enabled": True, "port": self.port, "prefix": "lab", **more})


def authority(folder: Path, name: str = "ca") -> None:
    """A throw-away certificate authority: `name`.crt and .key."""
    _openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN=test {name}",
             "-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.crt")  # fmt: skip


def certificate(folder: Path, name: str, ca: str = "ca", san: str = "IP:127.0.0.1") -> None:
    """`name`.crt and .key, signed by that authority."""
    (folder / f"{name}.ext").write_text(f"subjectAltName={san}\n")
    _openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{folder}/{name}.key",
             "-out", f"{folder}/{name}.csr")  # fmt: skip
    _openssl("x509", "-req", "-in", f"{folder}/{name}.csr", "-CA", f"{folder}/{ca}.crt", "-CAkey", f"{folder}/{ca}.key",
             "-CAcreateserial", "-days", "2", "-extfile", f"{folder}/{name}.ext", "-out", f"{folder}/{name}.crt")  # fmt: skip


def _openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True, timeout=240)


@contextlib.asynccontextmanager
async def listener(broker: Broker, **client: Any) -> AsyncIterator[asyncio.Queue[tuple[str, str]]]:
    """A queue of (topic, payload) of everything the broker has and gets."""
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    async with aiomqtt.Client(HOST, broker.port, **client) as c:
        await c.subscribe("#", qos=1)

        async def listen() -> None:
            async for m in c.messages:
                heard.put_nowait((m.topic.value, bytes(m.payload).decode()))

        task = asyncio.create_task(listen())
        try:
            yield heard
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def hear(heard: asyncio.Queue[tuple[str, str]], topic: str, seconds: float = 60) -> str:
    async with asyncio.timeout(seconds):
        while True:
            got, payload = await heard.get()
            if got == topic:
                return payload


async def until(true: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - waits for another process
            await asyncio.sleep(0.02)
