"""Between the daemon and the pages: one follower of the public protocol, however many pages there are.

The streams of spikes are subscribed to only while somebody looks. Nothing here is asked for again when it was lost on the way:
a page that shows the present has no use for it, and the daemon's replay port has better customers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from spiked_client.control import Control
from spiked_client.errors import ClientError, Refused
from spiked_client.figures import hours_left
from spiked_client.order import Batch
from spiked_client.subscribe import Client
from spiked_client.web.picture import Pictures
from spiked_client.web.stream import Stream
from spiked_client.web.viewer import Viewer

log = logging.getLogger("spiked.web")

FRAMES_HZ = 30.0
LINGER_S = 10.0  # the spikes go on coming for so long after the last page left
ABSENT_S = 4.0  # without health: the daemon is gone
JOBS_S, TRIGGERS_S, DESCRIBE_S = 5.0, 2.0, 2.0
BUSY_S = 10.0  # before live processes that did not answer are asked for their triggers again
MISSING_S = 5.0  # without units that there are: they are asked for again
KEPT_EVENTS = 60
MAX_STREAMS = 64
QUIET_EVENTS = ("calibration",)  # progress: the status has it


def text(message: dict[str, Any]) -> str:
    """JSON; what is not finite becomes null."""
    return json.dumps(_finite(message), separators=(",", ":"), default=str, allow_nan=False)


def _finite(x: Any) -> Any:
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {str(k): _finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(v) for v in x]
    return x


class Feed:
    """`run` follows the daemon until it is cancelled. `connect` makes a Client, `ask` a Control; both with this rig's address and key."""

    def __init__(self, connect: Callable[[], Client], ask: Callable[[], Control]) -> None:
        self._connect, self._ask = connect, ask
        self.viewers: set[Viewer] = set()
        self.streams: dict[str, Stream] = {}
        self.problem = "not connected yet"
        self.session: str | None = None
        self._status: dict[str, Any] = {}
        self._last: dict[str, str] = {}  # newest message of each kind that a new page needs
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._health_s = self._complete_s = 0.0
        self._watched = asyncio.Event()
        self._describe, self._jobs, self._triggers = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.pictures = Pictures(lambda stream: self.streams.get(stream))

    # ---- pages -------------------------------------------------------------------------------------------------

    def enter(self, viewer: Viewer) -> None:
        """A page came: it gets everything that is known now."""
        self.viewers.add(viewer)
        self._watched.set()
        self._describe.set()
        self._jobs.set()
        self._triggers.set()
        viewer.outbox.put_text(self._link())
        for message in self._last.values():
            viewer.outbox.put_text(message)
        viewer.outbox.put_text(text({"t": "events", "rows": list(self._events)}))
        for stream in self.streams.values():
            for told in stream.all_messages():
                viewer.outbox.put_text(text(told))
        self.choose(viewer, viewer.stream or next((s.name for s in self._in_order()), ""))

    def leave(self, viewer: Viewer) -> None:
        self.viewers.discard(viewer)

    def choose(self, viewer: Viewer, stream: str) -> None:
        """The page wants to see this stream's spikes."""
        viewer.stream = stream
        viewer.outbox.forget_frames()
        if stream in self.streams:
            for data, n in self.streams[stream].history():
                viewer.outbox.put_frame(data, n)

    def changed(self, op: str) -> None:
        """A page did something: what may be different is asked for soon."""
        if op in ("cancel_job", "retry_job"):
            self._jobs.set()
        elif op in ("stop_stimulation", "clear_stop", "disarm"):
            self._triggers.set()

    def _tell(self, message: dict[str, Any], keep: str = "") -> None:
        data = text(message)
        if keep:
            self._last[keep] = data
        for viewer in self.viewers:
            viewer.outbox.put_text(data)

    def _link(self) -> str:
        """Whether the daemon is heard, honestly."""
        age = time.monotonic() - self._health_s if self._health_s else None
        heard = age is not None and age < ABSENT_S
        return text(
            {
                "t": "link",
                "daemon": heard,
                "age_s": age and round(age, 1),
                "problem": "" if heard else self.problem,
            }
        )

    # ---- life --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Everything at once; whatever breaks is begun again."""
        jobs: tuple[Callable[[], Awaitable[None]], ...] = (
            self._service, self._seldom, self._spikes, self._ask_about,
        )  # fmt: skip
        async with asyncio.TaskGroup() as tasks:
            for job in jobs:
                tasks.create_task(self._again(job), name=job.__name__)
            tasks.create_task(self._draw(), name="frames")
            tasks.create_task(self._every_second(), name="figures")

    async def _again(self, job: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await job()
            except ClientError as e:
                self.problem = str(e)
            except Exception:  # the page goes on without what this one brings until it works again
                log.exception("%s begins again", job.__name__)
            await asyncio.sleep(1.0)

    async def _batches(self, topics: tuple[str, ...], **how: Any) -> AsyncGenerator[Batch | None, None]:
        """Messages, and None when there was none for a second."""
        async with self._connect() as client, client.messages(topics, **how) as messages:
            while True:
                yield await messages.get(1.0)

    async def _service(self) -> None:
        async with contextlib.aclosing(self._batches(("health", "session"))) as batches:
            async for batch in batches:
                if batch is None:
                    continue
                if batch.topic == "health":
                    self._on_health(batch.header)
                else:
                    self._on_event(batch.header)

    async def _seldom(self) -> None:
        topics = ("gaps", "stim", "units", "ledger")
        self._complete_s = time.monotonic()
        async with contextlib.aclosing(self._batches(topics, from_start=True)) as batches:
            async for batch in batches:
                if batch is not None and (stream := self._stream_of(batch)) is not None:
                    if batch.restarted and batch.message.kind == "units":
                        self._describe.set()
                    if (told := stream.tell(batch)) is not None:
                        self._tell(told)
                if self._units_missing():
                    log.info("units that the status tells were not heard: everything is asked for again")
                    return

    def _units_missing(self) -> bool:
        """Whether some stream's units were published and not heard, for a while: a topic that is silent from then on has no other sign."""
        now, told = time.monotonic(), self._status.get("streams")
        missing = False
        for name, s in told.items() if isinstance(told, dict) else ():
            processes = s.get("processes") if isinstance(s, dict) else None
            live = processes.get("live") if isinstance(processes, dict) else None
            stream = self.streams.get(name)
            missing = missing or bool(
                isinstance(live, dict) and live.get("units") and stream is not None and not len(stream.units)
            )
        if not missing:
            self._complete_s = now
        return now - self._complete_s > MISSING_S

    async def _spikes(self) -> None:
        await self._watched.wait()
        alone_since = 0.0
        async with contextlib.aclosing(self._batches(("spikes", "mua"), replay=False)) as batches:
            async for batch in batches:
                now = time.monotonic()
                alone_since = 0.0 if self.viewers else alone_since or now
                if alone_since and now - alone_since > LINGER_S:
                    self._watched.clear()
                    return
                if batch is not None and (stream := self._stream_of(batch)) is not None:
                    stream.add(batch, now)

    def _stream_of(self, batch: Batch) -> Stream | None:
        # a publisher's life is named SESSION-LIFE
        return self._stream(batch.stream, str(batch.header.get("run")).rpartition("-")[0])

    def _stream(self, name: str, session: str) -> Stream | None:
        """The stream of this session, made when it is new; None where there are too many."""
        found = self.streams.get(name)
        if found is None or found.session != session:
            if found is None and len(self.streams) >= MAX_STREAMS:
                return None
            taken = {s.number for s in self.streams.values() if s is not found}
            number = next(n for n in range(MAX_STREAMS) if n not in taken)
            found = self.streams[name] = Stream(name, session, number)
            self._describe.set()
        return found

    def _in_order(self) -> list[Stream]:
        """As the rig's file has them, whichever was heard first; those that the status does not tell come last."""
        told = self._status.get("streams")
        place = {name: k for k, name in enumerate(told if isinstance(told, dict) else ())}
        return sorted(self.streams.values(), key=lambda s: place.get(s.name, len(place)))

    # ---- what is heard -----------------------------------------------------------------------------------------

    def _on_health(self, header: dict[str, Any]) -> None:
        self._health_s = time.monotonic()
        session = header.get("session")
        session = session if isinstance(session, str) else None
        changed = session != self.session
        if changed:
            self.session = session
            self.streams = {n: s for n, s in self.streams.items() if s.session == session}
            self.pictures.forget()
            self._last.pop("triggers", None)
            self._last.pop("streams", None)
            self._tell({"t": "session", "session": session})
            self._describe.set()
            self._triggers.set()
        self._status = header
        if any(s not in self.streams or not self.streams[s].about for s in header.get("streams") or ()):
            self._describe.set()
        self._tell({"t": "state", **slim(header), "disk_hours_left": hours_left(header)}, keep="state")
        self._tell_link()
        if changed:  # what came of the new session before its name did
            for told in (m for s in self.streams.values() for m in s.all_messages()):
                self._tell(told)

    def _tell_link(self) -> None:
        data = self._link()
        for viewer in self.viewers:
            viewer.outbox.put_text(data)

    def _on_event(self, header: dict[str, Any]) -> None:
        event = {k: v for k, v in header.items() if k not in ("v", "seq", "run", "arrays", "sent_ns", "t_ns")}
        event["at"] = round(time.time(), 1)
        if event.get("event") == "offline":
            self._jobs.set()
        if event.get("event") == "act":
            self._triggers.set()
        if event.get("event") == "calibrated":
            event = {k: v for k, v in event.items() if k not in ("id_confidence", "expected")}
            self.pictures.forget()
        if (
            event.get("event") not in QUIET_EVENTS
            and event.get("kind") != "progress"
            and "fraction" not in event
        ):
            self._events.append(event)
        self._tell({"t": "event", "row": event})

    # ---- what is asked for -------------------------------------------------------------------------------------

    async def _ask_about(self) -> None:
        """Descriptions, triggers and jobs, when there is a reason to ask and somebody looks."""
        wait = {"describe": 0.0, "triggers": 0.0, "jobs": 0.0}
        async with self._ask() as ask, self._ask() as self.pictures.control:
            while True:
                await asyncio.sleep(0.1)
                now = time.monotonic()
                if not self.viewers:
                    continue
                if self._describe.is_set() and now > wait["describe"]:
                    wait["describe"] = now + DESCRIBE_S
                    await self._described(await ask.request("describe", timeout=3.0))
                if self._triggers.is_set() and now > wait["triggers"] and self._sorts():
                    wait["triggers"] = now + TRIGGERS_S
                    self._triggers.clear()
                    try:
                        told = await ask.request("triggers", timeout=6.0)
                    except ClientError as e:
                        wait["triggers"] = now + BUSY_S
                        self._triggers.set()
                        if not isinstance(e, Refused):
                            raise
                    else:
                        self._tell({"t": "triggers", **told}, keep="triggers")
                if now > wait["jobs"] or (self._jobs.is_set() and now > wait["jobs"] - JOBS_S + 1.0):
                    wait["jobs"] = now + JOBS_S
                    self._jobs.clear()
                    told = await ask.request("jobs", timeout=5.0)
                    self._tell({"t": "jobs", "rows": told.get("jobs", [])}, keep="jobs")

    def _sorts(self) -> bool:
        """Whether every live process of the session is up: one that is only starting knows of no triggers."""
        told = self._status.get("streams")
        processes = (
            [s.get("processes") for s in told.values() if isinstance(s, dict)]
            if isinstance(told, dict)
            else []
        )
        live = [p["live"] for p in processes if isinstance(p, dict) and "live" in p]
        return self._status.get("state") == "recording" and bool(live) and all(live)

    async def _described(self, told: dict[str, Any]) -> None:
        streams = told.get("streams")
        if not isinstance(streams, dict) or told.get("session") != self.session:
            return
        for name, about in streams.items():
            if isinstance(about, dict) and (stream := self._stream(str(name), str(self.session))) is not None:
                stream.about = about
        wanted = set(self._status.get("streams") or ())
        if wanted <= {n for n, s in self.streams.items() if s.about}:
            self._describe.clear()
        rows = [{"name": s.name, "number": s.number, **s.about} for s in self._in_order() if s.about]
        self._tell({"t": "streams", "session": self.session, "rows": rows}, keep="streams")
        for viewer in self.viewers:
            if viewer.stream not in self.streams and self.streams:
                self.choose(viewer, self._in_order()[0].name)

    # ---- out ---------------------------------------------------------------------------------------------------

    async def _draw(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + 1 / FRAMES_HZ, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            for stream in self.streams.values():
                made = stream.frame(due)
                if made is None:
                    continue
                for viewer in self.viewers:
                    if viewer.stream == stream.name:
                        viewer.outbox.put_frame(*made)

    async def _every_second(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            if now - self._health_s > 1.5:
                self._tell_link()
            if self.viewers:
                streams = {s.name: s.figures(now) for s in self.streams.values()}
                self._tell({"t": "figures", "streams": streams, "pages": len(self.viewers)})


def slim(status: dict[str, Any]) -> dict[str, Any]:
    """A health message without what the pages get another way."""
    out = {k: v for k, v in status.items() if k not in ("v", "seq", "run", "arrays", "sent_ns", "streams")}
    streams = status.get("streams")
    out["streams"] = {}
    for name, s in streams.items() if isinstance(streams, dict) else ():
        if not isinstance(s, dict):
            continue
        processes = s.get("processes")
        kept = {
            role: {k: v for k, v in p.items() if k != "rates_hz"}
            for role, p in (processes.items() if isinstance(processes, dict) else ())
            if isinstance(p, dict)
        }
        out["streams"][str(name)] = {**s, "processes": kept}
    return out
