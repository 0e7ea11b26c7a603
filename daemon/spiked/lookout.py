"""What the supervisor looks at once a second beside the session, and whom it tells: jobs, GPUs, gaps and alarms; to the
session topic, MQTT, Prometheus and the journal. Starts the bridges that read the public protocol from processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from spiked.config import Config
from spiked.errors import SpikedError
from spiked.journal import Journal
from spiked.publish.gpu import read_gpus
from spiked_client.access import ENVIRONMENT, local_key
from spiked_client.figures import hours_left
from spiked_client.judge import Judge, Judged

if TYPE_CHECKING:
    from spiked.publish.metrics import MetricsServer
    from spiked.publish.mqtt import MqttStatus
    from spiked.publish.mqtt_commands import Op

LOOK_S = 5.0  # between looks at jobs and GPUs
RETRY_S, RETRY_MAX_S, GOODBYE_S = 1.0, 60.0, 5.0
UNTOLD = ("calibration", "offline", "alarm", "gap")  # progress; and what goes to MQTT in another way
ENDED = ("queued", "done", "failed")

Tell = Callable[[str, dict[str, Any]], None]


class Lookout:
    """`tell(topic, news)` publishes on the health port; `journal()` is where alarms are written.

    `facts` belongs into every status, `see` hears every status, `news` everything that goes to the session topic.
    """

    def __init__(self, config: Config, journal: Callable[[], Journal], tell: Tell) -> None:
        self.config, self._journal, self._tell = config, journal, tell
        self.judge = Judge()
        self.mqtt: MqttStatus | None = None
        self.metrics: MetricsServer | None = None
        self._jobs: dict[str, Any] = {}
        self._jobs_ended = dict.fromkeys(("done", "cancelled", "biology", "environment", "resource"), 0)
        self._gpus: list[dict[str, Any]] = []
        self._gaps: dict[tuple[str, str], tuple[int, int]] = {}
        self._running = ""  # session that was told to have started
        self._status: dict[str, Any] = {}
        self._lsl: dict[str, Any] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(
        self,
        handlers: Mapping[str, Op],
        on_stop: Callable[[str], None],
        jobs: Callable[[], Awaitable[dict[str, Any]]],
        control_port: int,
    ) -> None:
        """Connect and listen as configured. Raises ConfigError where that cannot be."""
        cfg = self.config
        if cfg.metrics.enabled:
            from spiked.publish.metrics import MetricsServer

            self.metrics = MetricsServer(cfg.metrics)
            await self.metrics.start()
        if cfg.mqtt.enabled:
            from spiked.publish.mqtt import MqttStatus

            self.mqtt = MqttStatus(cfg.mqtt, cfg.rig.name, on_stop=on_stop, handlers=handlers)
            await self.mqtt.start()
        self._tasks.append(asyncio.create_task(self._look(jobs), name="lookout"))
        if cfg.lsl.enabled:
            self._tasks.append(asyncio.create_task(self._keep("spiked_client.lsl", control_port), name="lsl"))

    async def close(self) -> None:
        """Say goodbye; takes seconds at most."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.mqtt is not None:
            await self.mqtt.close()
        if self.metrics is not None:
            await self.metrics.close()

    # ---- what is seen ------------------------------------------------------------------------------------------

    async def _look(self, jobs: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        while True:
            with contextlib.suppress(
                OSError, SpikedError
            ):  # a queue that cannot be read is told by who uses it
                self._jobs = await jobs()
            self._gpus = await read_gpus()
            await asyncio.sleep(LOOK_S)

    def facts(self) -> dict[str, Any]:
        """jobs, gpus, alarms (those that stand), and mqtt where it is on."""
        told: dict[str, Any] = {"jobs": {**self._jobs, "ended": dict(self._jobs_ended)}, "gpus": self._gpus}
        told["alarms"] = [a.as_dict() for a in self.judge.alarms]
        if self.mqtt is not None:
            told["mqtt"] = self.mqtt.told()
        if self.metrics is not None:
            told["metrics"] = {"port": self.metrics.port, **self.metrics.counters}
        if self._lsl:
            told["lsl"] = self._lsl
        return told

    def see(self, status: dict[str, Any]) -> None:
        """The status of this second, as it is published."""
        self._status = status
        for judged in self.judge.update(status, time.monotonic()):
            if judged.figure.alarm:
                self._alarm(judged)
        self._see_gaps(status)
        if self.metrics is not None:
            self.metrics.see(status)
        if self.mqtt is not None:
            self.mqtt.rates(_rates(status))
            self.mqtt.state(**_kept(status))

    def _alarm(self, judged: Judged) -> None:
        about = judged.as_dict()
        level = {"good": "info", "warning": "warning", "bad": "error"}[judged.level]
        self._journal().note("alarm", judged.line(), level=level, alarm=about)
        self._tell("session", {"event": "alarm", **about})
        if self.mqtt is not None:
            self.mqtt.alarm(**about)

    def _see_gaps(self, status: dict[str, Any]) -> None:
        """One event per stream and second with new gaps, however many there are."""
        session = str(status.get("session"))
        for name, s in status["streams"].items():
            now = (int(s["gaps"]), int(s["gap_samples"]))
            before = self._gaps.get((session, name), (0, 0))
            if now != before:
                news = {
                    "stream": name,
                    "gaps": now[0] - before[0],
                    "samples": now[1] - before[1],
                    "gaps_so_far": now[0],
                }
                self._tell("session", {"event": "gap", **news})
                if self.mqtt is not None:
                    self.mqtt.event("gap", session=session, **news)
            self._gaps[session, name] = now
        self._gaps = {key: n for key, n in self._gaps.items() if key[0] == session}

    def news(self, news: dict[str, Any]) -> None:
        """Something of the session or a job, for MQTT."""
        event, session = str(news.get("event")), str(news.get("session", ""))
        if event == "job":
            how = str(news.get("kind") if news.get("state") == "failed" else news.get("state"))
            if how in self._jobs_ended:
                self._jobs_ended[how] += 1
        if self.mqtt is None:
            return
        rest = {k: v for k, v in news.items() if k != "event"}
        if event not in UNTOLD:
            self.mqtt.event(event, **rest)
        if event == "state" and news.get("state") == "recording":
            self._running = session
            self.mqtt.event("started", session=session)
        elif event == "state" and news.get("state") in ENDED and self._running == session:
            self._running = ""
            self.mqtt.event("ended", session=session, state=news["state"], streams=_summary(self._status))

    # ---- bridges -----------------------------------------------------------------------------------------------

    async def _keep(self, module: str, port: int) -> None:
        """A reader of the public protocol beside us, started again when it dies."""
        host, wait_s = self.config.publish.host, RETRY_S
        own = local_key(self.config.publish.keys)
        env = {**os.environ, **({ENVIRONMENT: str(own)} if own and ENVIRONMENT not in os.environ else {})}
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        for lives in itertools.count():
            began = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, "--host", host, "--port", str(port), "--parent", stdin=asyncio.subprocess.PIPE, env=env,
            )  # fmt: skip
            self._lsl = {"pid": process.pid, "lives": lives}
            try:
                code = await process.wait()
            finally:
                self._lsl["pid"] = None
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                async with asyncio.timeout(GOODBYE_S):
                    await process.wait()
            if time.monotonic() - began > RETRY_MAX_S:
                wait_s = RETRY_S
            self._journal().note(
                "bridge", f"{module} ended (exit {code}); again in {wait_s:g} s", level="warning"
            )
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MAX_S)


def _rates(status: dict[str, Any]) -> dict[str, Any]:
    live = {name: s["processes"].get("live", {}) for name, s in status["streams"].items()}
    return {
        name: {k: p[k] for k in ("rates_hz", "units", "latency_ms") if k in p} for name, p in live.items()
    }


def _summary(status: dict[str, Any]) -> dict[str, Any]:
    """samples, gaps and units of each stream."""
    return {
        name: {
            **{k: s.get(k) for k in ("samples", "gaps", "gap_samples")},
            "units": s["processes"].get("live", {}).get("units"),
        }
        for name, s in status.get("streams", {}).items()
    }


def _kept(status: dict[str, Any]) -> dict[str, Any]:
    """What changes seldom, for who comes later."""
    hours = hours_left(status)
    streams = {
        name: {"channels": s.get("channels"), "fs_hz": s.get("fs_hz"), "units": s["processes"].get("live", {}).get("units"),
               "calibration": (s.get("calibration") or {}).get("state")}
        for name, s in status["streams"].items()
    }  # fmt: skip
    jobs = {k: n for k, n in status.get("jobs", {}).items() if isinstance(n, int)}
    alarms = [{k: v for k, v in a.items() if k != "value"} for a in status.get("alarms", ())]
    return {
        "state": status.get("state"), "session": status.get("session"), "error": status.get("error"), "streams": streams,
        "disk_hours_left": None if hours is None else round(hours), "jobs": jobs, "alarms": alarms,
    }  # fmt: skip
