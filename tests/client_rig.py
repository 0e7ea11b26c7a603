"""A daemon's ports without a daemon: publishers, control and health, on free ports, in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

from spiked.publish.control import ControlServer
from spiked.publish.health import HealthPublisher
from spiked.publish.zmq_pub import Publisher
from spiked_client.protocol import BLIND, SPIKE

HOST = "127.0.0.1"


def port_of(endpoint: str) -> int:
    return int(endpoint.rsplit(":", 1)[1])


def spikes(*samples: int, unit: int = 0) -> np.ndarray:
    out = np.zeros(len(samples), SPIKE)
    out["sample"], out["unit"], out["amplitude_uv"] = samples, unit, -50
    return out


def blind(*intervals: tuple[int, int], channel: int = -1) -> np.ndarray:
    return np.array([(a, b, channel, 0) for a, b in intervals], BLIND)


class Ports:
    """Control and health ports, answered by a thread; `streams` maps names to Publishers."""

    def __init__(
        self,
        *streams: str,
        handlers: dict[str, Any] | None = None,
        port: int = 0,
        keys: Path | None = None,
        peers: int = 128,
        host: str = HOST,
        **publisher: Any,
    ) -> None:
        self._port, self.host = port, host
        self.doors: dict[str, Any] = {"keys": keys, "peers": peers}
        self.options = {**publisher, **self.doors}
        self.streams = {name: self.publisher("run-1") for name in streams}
        self.health = HealthPublisher(host, 0, "service-1", **self.doors)
        self.asked: list[dict[str, Any]] = []
        self._handlers = handlers or {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="ports")
        self._up = threading.Event()

    def publisher(self, run: str, pub: int = 0, replay: int = 0) -> Publisher:
        return Publisher(self.host, pub, replay, run, **self.options)

    @property
    def port(self) -> int:
        return port_of(self.control.endpoint)

    async def _endpoints(self, _request: dict[str, Any]) -> dict[str, Any]:
        streams = {n: {**p.endpoints, "run": p.run} for n, p in self.streams.items()}
        return {"streams": streams, "health": self.health.endpoint}

    async def _noted(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        return {"noted": len(self.asked)}

    def _serve(self) -> None:
        async def life() -> None:
            ops = dict.fromkeys(
                ("calibrate", "cancel_calibration", "mark_stim", "start_session", "stop_session", "shutdown"),
                self._noted,
            )
            self.control = ControlServer(
                self.host, self._port, {"endpoints": self._endpoints, **ops, **self._handlers}, **self.doors
            )
            await self.control.start()
            self._stop = asyncio.Event()
            self._up.set()
            await self._stop.wait()
            await self.control.close()

        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(life())
        self._loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(60)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self.health.close()
        for p in self.streams.values():
            p.close()


class Talker(threading.Thread):
    """Sends one message of one spike every `every_s` until told to stop, see `say`."""

    def __init__(self, publisher: Publisher, topic: str, every_s: float = 0.005) -> None:
        super().__init__(name="talker")
        self.publisher, self.topic, self.every_s = publisher, topic, every_s
        self.sent = 0
        self._quit = threading.Event()

    def run(self) -> None:
        while not self._quit.wait(self.every_s):
            say(self.publisher, self.topic, self.sent)
            self.sent += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._quit.set()
        self.join(60)


def say(publisher: Publisher, topic: str, n: int, unit: int = 0) -> int:
    """Message number n of a stream: samples [30 n, 30 n + 30), one spike in it."""
    header = {
        "first": 30 * n,
        "stop": 30 * n + 30,
        "stamps": {"arrival": time.monotonic_ns()},
    }
    return publisher.send(topic, header, spikes=spikes(30 * n, unit=unit), blind=blind())
