"""Status, events, rates and alarms over MQTT, for dashboards and lab automation, and a few commands. Never samples.

| topic                         | kept | QoS | payload                                                            |
|-------------------------------|------|-----|--------------------------------------------------------------------|
| <prefix>/<rig>/status         | yes  | 1   | online, offline, or crashed (the last will)                        |
| <prefix>/<rig>/state          | yes  | 1   | JSON whenever it changes: state, session, streams, alarms that stand|
| <prefix>/<rig>/session        | no   | 1   | JSON: event, time_s, and what belongs to the event                 |
| <prefix>/<rig>/alarm          | no   | 1   | JSON: a figure became good, a warning or bad; its limits, what to do|
| <prefix>/<rig>/rates/<stream> | no   | 0   | JSON once a second: time_s, rates_hz (unit -> Hz)...               |
| <prefix>/<rig>/command        |      | 1   | heard: see spiked.publish.mqtt_commands                            |
| <prefix>/<rig>/ack            | no   | 1   | JSON: id and op of a command, ok, and error or what it gave        |
| <prefix>/<rig>/stop           |      | 1   | heard: an emergency stop of stimulation; the text, if any, its reason|

QoS 1 means at least once: an event may come twice after a broken connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import aiomqtt
from paho.mqtt.reasoncodes import ReasonCode

from spiked.config import Mqtt
from spiked.errors import ConfigError
from spiked.publish.mqtt_commands import Commands, Op

log = logging.getLogger(__name__)

RATES_EVERY_S = 1.0
GOODBYE_S = 5.0  # for an answer of the broker, and for the last messages when the daemon ends
HEARD = 500  # messages of others that may wait; beyond it they are dropped
REMIND_S = 600.0  # the same trouble is told again after this
LOGIN = ("Bad user name or password", "Not authorized", "Bad authentication method", "Banned")


class _Overheard(logging.Handler):
    """What the library only logs: why a connection that was not greeted yet was closed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


class MqttStatus:
    """Speaks to one broker from the supervisor's loop; `event`, `alarm`, `state` and `rates` return at once in any case.

    While the broker is away at most `outbox` events wait, the oldest is dropped first; of the state only the newest waits,
    rates are not kept. Reconnects after `retry_s`, doubling up to `retry_max_s`. `handlers` are the control port's
    operations, for commands. Raises ConfigError when a password or certificate file cannot be used.

    `counters`: events, rates (sent), dropped (events), connects, failures (connection attempts and losses), and those of Commands.
    `trouble` is the line that says why there is no connection.
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
        handlers: Mapping[str, Op] | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.connected, self.trouble = False, ""
        self._cfg, self._on_stop = cfg, on_stop
        self._base = f"{cfg.prefix}/{rig_name}"
        # One fixed name per rig: the broker then sends a dead daemon's will before it greets its successor.
        self._name = f"spiked-{rig_name}"
        self._password, self._tls = self._read_password(), self._read_certificates()
        self._keepalive_s, self._retry_s, self._retry_max_s = keepalive_s, retry_s, retry_max_s
        self._outbox: deque[tuple[str, str]] = deque(maxlen=outbox)
        self._state, self._state_told = "", ""
        self._rates: dict[str, dict[str, Any]] = {}
        self._rates_after = 0.0
        self._news, self._closing = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._told = ("", 0.0)
        self._overheard, self._library = _Overheard(), logging.Logger("spiked.mqtt.library")
        self._library.addHandler(self._overheard)
        self._commands = (
            Commands(handlers, self._acknowledge, self.counters, obey=cfg.commands) if handlers else None
        )

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

    def _read_certificates(self) -> ssl.SSLContext | None:
        cfg = self._cfg
        if not cfg.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=cfg.ca_file and str(cfg.ca_file.expanduser()))
            if cfg.cert_file and cfg.key_file:
                context.load_cert_chain(cfg.cert_file.expanduser(), cfg.key_file.expanduser())
        except (OSError, ssl.SSLError) as e:
            files = ", ".join(str(f) for f in (cfg.ca_file, cfg.cert_file, cfg.key_file) if f)
            raise ConfigError(
                f"cannot use the mqtt certificates {files}: {e}; check the paths, their rights, and that they are PEM"
            ) from e
        return context

    async def start(self) -> None:
        """Begin to connect, in the background; a broker that is absent is tried again for ever."""
        self._task = asyncio.create_task(self._run(), name="mqtt")

    async def close(self) -> None:
        """Send what waits and `offline`, if the broker listens, and disconnect; takes seconds at most."""
        self._closing.set()
        self._news.set()
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self._task

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # ---- what is said ------------------------------------------------------------------------------------------

    def event(self, event: str, **about: Any) -> None:
        """Tell that something happened to the session or to a job."""
        self._put("session", {"time_s": time.time(), **about, "event": event})

    def alarm(self, **about: Any) -> None:
        """Tell that a figure became better or worse."""
        self._put("alarm", {"time_s": time.time(), **about})

    def state(self, **about: Any) -> None:
        """What who comes later must know; sent when it differs from what was sent last."""
        self._state = json.dumps(about, default=str)
        if self._state != self._state_told:
            self._news.set()

    def rates(self, streams: dict[str, dict[str, Any]]) -> None:
        """The newest figures per stream, such as {"A": {"rates_hz": {"3": 1.5}}}; sent once a second."""
        if self.connected:
            self._rates |= {name: figures for name, figures in streams.items() if figures}
            self._news.set()

    def told(self) -> dict[str, Any]:
        """For the health message."""
        return {
            "connected": self.connected,
            "waiting": len(self._outbox),
            "trouble": self.trouble,
            **self.counters,
        }

    def _acknowledge(self, answer: dict[str, Any]) -> None:
        self._put("ack", {"time_s": time.time(), **answer})

    def _put(self, topic: str, message: dict[str, Any]) -> None:
        if len(self._outbox) == self._outbox.maxlen:
            self.counters["dropped"] += 1
        self._outbox.append((topic, json.dumps(message, default=str)))
        self._news.set()

    # ---- the connection ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        wait_s = self._retry_s
        while not self._closing.is_set():
            client, connects = self._client(), self.counters["connects"]
            try:
                async with client:
                    await self._talk(client)
            # The library says goodbye on its way out, and hands on as it is what the socket raises then.
            except (aiomqtt.MqttError, OSError) as e:
                wait_s = self._retry_s if self.counters["connects"] > connects else wait_s
                self._failed(e, wait_s)
            finally:
                self.connected = False
                _release(client)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._closing.wait()
            wait_s = min(2 * wait_s, self._retry_max_s)

    def _failed(self, e: Exception, wait_s: float) -> None:
        """One line when the trouble begins or changes, and every ten minutes while it lasts."""
        self.counters["failures"] += 1
        why, self._overheard.text = _reason(e, self._overheard.text), ""
        self.trouble = f"MQTT broker {self._cfg.host}:{self._cfg.port}: {why}"
        was, at = self._told
        if self.trouble != was or time.monotonic() - at > REMIND_S:
            self._told = (self.trouble, time.monotonic())
            log.warning(
                "%s; trying again in %g s, then up to every %g s", self.trouble, wait_s, self._retry_max_s
            )

    def _client(self) -> aiomqtt.Client:
        client = aiomqtt.Client(
            self._cfg.host,
            self._cfg.port,
            username=self._cfg.username,
            password=self._password,
            identifier=self._name,
            keepalive=self._keepalive_s,
            timeout=GOODBYE_S,
            will=aiomqtt.Will(f"{self._base}/status", "crashed", qos=1, retain=True),
            tls_context=self._tls,
            max_queued_incoming_messages=HEARD,
            logger=self._library,
        )
        client._loop = cast(asyncio.AbstractEventLoop, _OpenOnly(client))
        return client

    async def _talk(self, client: aiomqtt.Client) -> None:
        """Until the daemon closes; raises MqttError when the broker is lost."""
        await client.publish(f"{self._base}/status", "online", qos=1, retain=True)
        for topic, heard in (("stop", self._on_stop), ("command", self._commands)):
            if heard is not None:
                await client.subscribe(f"{self._base}/{topic}", qos=1)
        self._state_told = ""
        self.connected = True
        self.counters["connects"] += 1
        if self.trouble:
            log.info("MQTT broker %s:%d: connected", self._cfg.host, self._cfg.port)
            self.trouble, self._told = "", ("", 0.0)
        tasks = [asyncio.create_task(self._pump(client)), asyncio.create_task(self._listen(client))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _listen(self, client: aiomqtt.Client) -> None:
        """Hear stops and commands until the connection breaks, and raise then."""
        async for message in client.messages:
            payload = bytes(message.payload) if isinstance(message.payload, bytes | bytearray) else b""
            if message.topic.value.endswith(
                "/stop"
            ):  # also an empty one: a button that sends no text must stop
                if self._on_stop is not None:
                    self.counters["stops"] += 1
                    self._on_stop(payload[:200].decode("utf-8", "replace"))
            elif self._commands is not None and payload:
                self._commands.hear(payload, bool(message.retain))

    async def _pump(self, client: aiomqtt.Client) -> None:
        while True:
            closing = self._closing.is_set()
            self._news.clear()
            while self._outbox:
                oldest = self._outbox[0]
                await client.publish(f"{self._base}/{oldest[0]}", oldest[1], qos=1)
                self.counters["events"] += 1
                if self._outbox and self._outbox[0] is oldest:  # else it was dropped meanwhile
                    self._outbox.popleft()
            await self._send_state(client)
            if closing:
                await client.publish(f"{self._base}/status", "offline", qos=1, retain=True)
                return
            await self._send_rates(client)
            patience = max(self._rates_after - time.monotonic(), 0.01) if self._rates else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._wake(patience is not None)

    async def _wake(self, rates_wait: bool) -> None:
        """Until there is an event, a new state or the end, or, unless rates wait for their time already, rates."""
        await self._news.wait()
        while (
            rates_wait and not self._outbox and self._state == self._state_told and not self._closing.is_set()
        ):
            self._news.clear()
            await self._news.wait()

    async def _send_state(self, client: aiomqtt.Client) -> None:
        if self._state and (text := self._state) != self._state_told:
            await client.publish(f"{self._base}/state", text, qos=1, retain=True)
            self._state_told = text

    async def _send_rates(self, client: aiomqtt.Client) -> None:
        if time.monotonic() < self._rates_after or not self._rates:
            return
        rates, self._rates = self._rates, {}
        self._rates_after = time.monotonic() + RATES_EVERY_S
        for stream, figures in rates.items():
            text = json.dumps({"time_s": time.time(), **figures}, default=str)
            await client.publish(f"{self._base}/rates/{stream}", text)
            self.counters["rates"] += 1


class _OpenOnly:
    """The event loop for aiomqtt, which has a socket watched one turn after it was opened: closed by then, its number
    may be somebody else's, who would be woken for ever."""

    def __init__(self, client: aiomqtt.Client) -> None:
        self._loop, self._paho = client._loop, client._client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_reader(self, fileno: int, callback: Callable[[], None]) -> None:
        if self._is_open(fileno):
            self._loop.add_reader(fileno, callback)

    def add_writer(self, fileno: int, callback: Callable[[], None]) -> None:
        if self._is_open(fileno):
            self._loop.add_writer(fileno, callback)

    def _is_open(self, fileno: int) -> bool:
        sock = self._paho.socket()
        return sock is not None and sock.fileno() == fileno >= 0


def _release(client: aiomqtt.Client) -> None:
    """Close a connection that was given up: aiomqtt leaves the socket of one that was never greeted open."""
    paho = client._client
    if paho.socket() is not None:
        paho._sock_close()


def _reason(e: Exception, overheard: str) -> str:
    """Why there is no connection, and what to do."""
    text = overheard if "SSL" in overheard else str(e)
    if isinstance(e, aiomqtt.MqttCodeError) and isinstance(e.rc, ReasonCode):
        if str(e.rc) in LOGIN:
            return f"it refuses the login ({e.rc}); check mqtt.username and mqtt.password_file"
        text = str(e.rc)
    if "ALERT" in text and "CERTIFICATE" in text:
        return f"it wants a certificate of this rig ({text}); check mqtt.cert_file and mqtt.key_file"
    if "certificate verify failed" in text:
        return f"its certificate is not trusted ({text}); check mqtt.ca_file, and that mqtt.host is the name in it"
    if "SSL" in text or "TLS" in text:
        return f"no TLS connection ({text}); check mqtt.tls, mqtt.port, mqtt.cert_file and mqtt.key_file"
    if "refused" in text or "timed out" in text or "unreachable" in text or "resolution" in text:
        return f"{text}; check that it runs, mqtt.host, mqtt.port, mqtt.tls and the network"
    return text
