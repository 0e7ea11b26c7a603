"""Status, session events and rates over MQTT, for dashboards and lab automation. Never samples.

| topic                         | kept | QoS | payload                                              |
|-------------------------------|------|-----|------------------------------------------------------|
| <prefix>/<rig>/status         | yes  | 1   | online, offline, or crashed (the last will)          |
| <prefix>/<rig>/session        | no   | 1   | JSON: event, time_s, and what belongs to the event   |
| <prefix>/<rig>/rates/<stream> | no   | 0   | JSON once a second: time_s, rates_hz (unit -> Hz)... |
| <prefix>/<rig>/stop           |      | 1   | heard, not said: any text is an emergency stop of    |
|                               |      |     | stimulation, the text its reason                     |

QoS 1 means at least once: an event may come twice after a broken connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Self

import aiomqtt

from spiked.config import Mqtt
from spiked.errors import ConfigError

log = logging.getLogger(__name__)

RATES_EVERY_S = 1.0
GOODBYE_S = 3.0  # what the last messages may take when the daemon ends


class MqttStatus:
    """Speaks to one broker from the supervisor's loop; `event` and `rates` return at once in any case.

    While the broker is away at most `outbox` events wait, the oldest is dropped first; rates are not kept.
    Reconnects after `retry_s`, doubling up to `retry_max_s`. Raises ConfigError when the password file cannot
    be read.

    `counters`: events, rates (sent), dropped (events), connects, failures (connection attempts and losses).
    """

    def __init__(
        self,
        cfg: Mqtt,
        rig_name: str,
        *,
        outbox: int = 1000,
        keepalive_s: int = 10,
        retry_s: float = 0.5,
        retry_max_s: float = 30.0,
        on_stop: Callable[[str], None] | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.connected = False
        self._cfg, self._on_stop = cfg, on_stop
        self._base = f"{cfg.prefix}/{rig_name}"
        # One fixed name per rig: the broker then sends a dead daemon's will before it greets its successor.
        self._name = f"spiked-{rig_name}"
        self._password = self._read_password()
        self._keepalive_s, self._retry_s, self._retry_max_s = keepalive_s, retry_s, retry_max_s
        self._outbox: deque[str] = deque(maxlen=outbox)
        self._rates: dict[str, dict[str, Any]] = {}
        self._rates_after = 0.0
        self._news, self._closing = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def _read_password(self) -> str | None:
        path = self._cfg.password_file
        if path is None:
            return None
        try:
            return path.expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"cannot read mqtt.password_file {path}: {e}; check the path and its rights"
            ) from e

    async def start(self) -> None:
        """Begin to connect, in the background; a broker that is absent is tried again for ever."""
        self._task = asyncio.create_task(self._run(), name="mqtt")

    async def close(self) -> None:
        """Send what waits and `offline`, if the broker listens, and disconnect; takes seconds at most."""
        self._closing.set()
        self._news.set()
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._task, GOODBYE_S)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def event(self, event: str, **about: Any) -> None:
        """Tell that something happened to the session."""
        if len(self._outbox) == self._outbox.maxlen:
            self.counters["dropped"] += 1
        self._outbox.append(json.dumps({"time_s": time.time(), **about, "event": event}, default=str))
        self._news.set()

    def rates(self, streams: dict[str, dict[str, Any]]) -> None:
        """The newest figures per stream, such as {"A": {"rates_hz": {"3": 1.5}}}; sent once a second."""
        if self.connected:
            self._rates |= {name: figures for name, figures in streams.items() if figures}
            self._news.set()

    async def _run(self) -> None:
        wait_s = self._retry_s
        while not self._closing.is_set():
            try:
                async with self._client() as client:
                    wait_s = self._retry_s
                    await self._talk(client)
            except aiomqtt.MqttError as e:
                self.counters["failures"] += 1
                where = f"{self._cfg.host}:{self._cfg.port}"
                log.warning("MQTT broker %s: %s; trying again in %g s", where, e, wait_s)
            finally:
                self.connected = False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), wait_s)
            wait_s = min(2 * wait_s, self._retry_max_s)

    def _client(self) -> aiomqtt.Client:
        return aiomqtt.Client(
            self._cfg.host,
            self._cfg.port,
            username=self._cfg.username,
            password=self._password,
            identifier=self._name,
            keepalive=self._keepalive_s,
            timeout=GOODBYE_S,
            will=aiomqtt.Will(f"{self._base}/status", "crashed", qos=1, retain=True),
        )

    async def _talk(self, client: aiomqtt.Client) -> None:
        """Until the daemon closes; raises MqttError when the broker is lost."""
        await client.publish(f"{self._base}/status", "online", qos=1, retain=True)
        if self._on_stop is not None:
            await client.subscribe(f"{self._base}/stop", qos=1)
        self.connected = True
        self.counters["connects"] += 1
        tasks = [asyncio.create_task(self._pump(client)), asyncio.create_task(self._until_lost(client))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _until_lost(self, client: aiomqtt.Client) -> None:
        """Hear stops until the connection breaks, and raise then."""
        async for message in client.messages:
            if (
                self._on_stop is not None
                and isinstance(message.payload, bytes | bytearray)
                and message.payload
            ):
                self._on_stop(bytes(message.payload[:200]).decode("utf-8", "replace"))

    async def _pump(self, client: aiomqtt.Client) -> None:
        while True:
            closing = self._closing.is_set()
            self._news.clear()
            while self._outbox:
                oldest = self._outbox[0]
                await client.publish(f"{self._base}/session", oldest, qos=1)
                self.counters["events"] += 1
                if self._outbox and self._outbox[0] is oldest:  # else it was dropped meanwhile
                    self._outbox.popleft()
            if closing:
                await client.publish(f"{self._base}/status", "offline", qos=1, retain=True)
                return
            await self._send_rates(client)
            patience = max(self._rates_after - time.monotonic(), 0.01) if self._rates else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake(patience is not None), patience)

    async def _wake(self, rates_wait: bool) -> None:
        """Until there is an event or the end, or, unless rates wait for their time already, rates."""
        await self._news.wait()
        while rates_wait and not self._outbox and not self._closing.is_set():
            self._news.clear()
            await self._news.wait()

    async def _send_rates(self, client: aiomqtt.Client) -> None:
        if time.monotonic() < self._rates_after or not self._rates:
            return
        rates, self._rates = self._rates, {}
        self._rates_after = time.monotonic() + RATES_EVERY_S
        for stream, figures in rates.items():
            text = json.dumps({"time_s": time.time(), **figures}, default=str)
            await client.publish(f"{self._base}/rates/{stream}", text)
            self.counters["rates"] += 1
