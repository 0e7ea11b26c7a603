"""A rig as the web page sees one, without electrodes: real publisher, control and health ports, spikes drawn by a random generator.

For measuring the page where no daemon on this computer could sort so many units.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, Self

import numpy as np

from spiked.publish.control import ControlServer
from spiked.publish.health import HealthPublisher
from spiked.publish.zmq_pub import Publisher
from spiked_client.protocol import BLIND, SPIKE, UNIT

HOST, STREAM, FS_HZ, PITCH_UM = "127.0.0.1", "array", 20_000.0, 17.5
SESSION = "2026-01-02T03-04-05_bench"


class WebRig:
    """`units` units on a square array of `channels` electrodes, `rate_hz` spikes per second each, and as many unsorted detections
    per electrode; a message per `chunk_ms`, as the live process sends them. A context manager; `port` is the control port's.
    """

    def __init__(
        self,
        units: int = 1000,
        channels: int = 1024,
        rate_hz: float = 5.0,
        chunk_ms: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self.side, self._chunk = int(np.sqrt(channels)), chunk_ms / 1000
        self.channels, self._n_units, self._rate = self.side**2, units, rate_hz
        self.positions = [
            [PITCH_UM * (i % self.side), PITCH_UM * (i // self.side)] for i in range(self.channels)
        ]
        self.roots = np.sort(self._rng.integers(0, self.channels, units))
        weights = self._rng.lognormal(0, 0.8, units)
        self._cumulative = np.cumsum(weights / weights.sum())
        self.sent = 0  # sorted spikes
        self._samples = 0
        self._publisher = Publisher(HOST, 0, 0, f"{SESSION}-0")
        self._health = HealthPublisher(HOST, 0, "bench-1")
        self._quit = threading.Event()
        self._up = threading.Event()
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._talk, self._answer)]
        self.port = 0

    def __enter__(self) -> Self:
        rows = np.zeros(self._n_units, UNIT)
        rows["unit"], rows["channel"] = np.arange(self._n_units), self.roots
        rows["x_um"], rows["y_um"] = np.array(self.positions)[self.roots].T
        rows["amplitude_uv"], rows["rate_hz"] = -self._rng.uniform(40, 160, self._n_units), self._rate
        self._publisher.send(f"units.{STREAM}", {"from_sample": 0, "sorter": "templates"}, units=rows)
        for t in self._threads:
            t.start()
        if not self._up.wait(60):
            raise RuntimeError("the rig's ports did not open")
        return self

    def __exit__(self, *exc: object) -> None:
        self._quit.set()
        for t in self._threads:
            t.join(10)
        self._publisher.close()
        self._health.close()

    # ---- spikes ------------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        begun, n, told = time.monotonic(), 0, 0.0
        per_chunk = round(self._chunk * FS_HZ)
        while not self._quit.wait(max(begun + (n + 1) * self._chunk - time.monotonic(), 0)):
            first = n * per_chunk
            sorted_, mua = self._some(first, per_chunk, True), self._some(first, per_chunk, False)
            now = time.monotonic_ns()
            header = {"first": first, "stop": first + per_chunk, "stamps": {"arrival": now}}
            self._publisher.send(f"spikes.{STREAM}", header, spikes=sorted_, blind=np.zeros(0, BLIND))
            if len(mua):
                self._publisher.send(f"mua.{STREAM}", {"stop": first + per_chunk}, spikes=mua)
            self.sent += len(sorted_)
            n += 1
            self._samples = n * per_chunk
            if time.monotonic() - told > 1:
                told = time.monotonic()
                self._health.health(**self._status())

    def _some(self, first: int, samples: int, known: bool) -> np.ndarray:
        each = self._n_units if known else self.channels
        n = int(self._rng.poisson(each * self._rate * self._chunk))
        out = np.zeros(n, SPIKE)
        out["sample"] = first + np.sort(self._rng.integers(0, samples, n))
        if known:
            unit = np.searchsorted(self._cumulative, self._rng.random(n))
            out["unit"], out["channel"] = unit, self.roots[np.minimum(unit, self._n_units - 1)]
        else:
            out["unit"], out["channel"] = -1, self._rng.integers(0, self.channels, n)
        out["amplitude_uv"] = -self._rng.normal(80, 10, n)
        return out

    # ---- control -----------------------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        stream = {
            "samples": self._samples, "fs_hz": FS_HZ, "channels": self.channels, "first_sample": 0, "gaps": 0, "gap_samples": 0,
            "processes": {"live": {"units": self._n_units}}, "pids": {}, "lives": {}, "calibration": None,
        }  # fmt: skip
        return {
            "rig": "bench",
            "state": "recording",
            "session": SESSION,
            "error": "",
            "streams": {STREAM: stream},
        }

    def handlers(self) -> dict[str, Any]:
        """What the control port answers."""

        async def endpoints(_request: dict[str, Any]) -> dict[str, Any]:
            at = {**self._publisher.endpoints, "run": self._publisher.run}
            return {"streams": {STREAM: at}, "health": self._health.endpoint}

        async def describe(_request: dict[str, Any]) -> dict[str, Any]:
            about = {
                "fs_hz": FS_HZ, "channel_ids": [str(i) for i in range(self.channels)], "positions_um": self.positions,
                "geometry_known": True, "source": "bench", "first_sample": 0,
            }  # fmt: skip
            return {"session": SESSION, "streams": {STREAM: about}}

        async def jobs(_request: dict[str, Any]) -> dict[str, Any]:
            return {"jobs": []}

        async def triggers(_request: dict[str, Any]) -> dict[str, Any]:
            return {"streams": {}}

        return {"endpoints": endpoints, "describe": describe, "jobs": jobs, "triggers": triggers}

    def _answer(self) -> None:
        async def life() -> None:
            control = ControlServer(HOST, 0, self.handlers())
            await control.start()
            self.port = int(control.endpoint.rsplit(":", 1)[1])
            self._up.set()
            await asyncio.to_thread(self._quit.wait)
            await control.close()

        asyncio.run(life())
