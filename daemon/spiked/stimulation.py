"""The control port's operations on triggers: passed on to the live processes, which decide; the answers joined."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from spiked.act.arming import STOP
from spiked.errors import SpikedError
from spiked.processes.child import Child
from spiked.session import Session

ANSWER_S = 5.0
OVER = ("queued", "offline", "done", "failed")
KEPT_LEASES = 256  # the live processes end those that were not renewed
Op = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]


class Stimulation:
    """`session` gives the one that runs, or None."""

    def __init__(self, session: Callable[[], Session | None]) -> None:
        self._session = session
        self._leases: dict[str, list[str]] = {}  # streams in which each was given
        self._changing = asyncio.Lock()  # of limits: nobody arms between their check and the change
        self._unwritten: Path | None = None  # the session whose stop could not be put on file

    def operations(self) -> dict[str, Op]:
        return {
            "arm": self.arm, "renew": self.renew, "disarm": self.disarm, "triggers": self.triggers, "set_trigger": self.set_trigger,
            "remove_trigger": self.remove_trigger, "set_limits": self.set_limits, "stop_stimulation": self.stop_stimulation,
            "clear_stop": self.clear_stop, "stimulate": self.stimulate,
        }  # fmt: skip

    def _running(self) -> Session:
        session = self._session()
        if session is None or session.state != "recording":
            raise SpikedError("no session is recording; start one first")
        return session

    def _children(self, stream: str | None) -> dict[str, Child]:
        tracks = self._running().tracks
        if stream is not None and stream not in tracks:
            raise SpikedError(f"no stream {str(stream)[:40]}; the session has {', '.join(tracks)}")
        found = {
            name: c for name, t in tracks.items() if stream in (None, name) and (c := t.children.get("live")) and c.running
        }  # fmt: skip
        if not found:
            raise SpikedError("there is no live process; it is off, or being restarted")
        return found

    async def _ask(self, op: str, stream: str | None, **fields: Any) -> dict[str, dict[str, Any]]:
        """Stream -> answer. Raises SpikedError with the first refusal."""
        children = self._children(stream)
        fields["until_ns"] = _deadline()  # later it would be told that it failed, and be done
        answers = await asyncio.gather(*(c.ask(op, ANSWER_S, **fields) for c in children.values()))
        told = dict(zip(children, answers, strict=True))
        for name, answer in told.items():
            if answer is None:
                raise SpikedError(
                    f"{name}: the live process did not answer within {ANSWER_S:g} s; is it still starting?"
                )
            if not answer.pop("ok"):
                raise SpikedError(str(answer["error"]))
        return {name: answer for name, answer in told.items() if answer is not None}

    async def arm(self, request: dict[str, Any]) -> dict[str, Any]:
        wanted, lease = request.get("triggers"), secrets.token_hex(8)
        if wanted is not None and (
            not isinstance(wanted, list) or not all(isinstance(t, str) for t in wanted)
        ):
            raise SpikedError("triggers is a list of names, or left out for all of them")
        seconds = request.get("lease_s", 5.0)
        if not isinstance(seconds, int | float):
            raise SpikedError("lease_s is a number of seconds")
        if self._running().folder == self._unwritten:
            raise SpikedError("stimulation was stopped; clear_stop first, then arm")
        try:
            if self._changing.locked():  # what was asked before, the live processes see first
                raise SpikedError("limits are being changed just now; arm again")
            told = await self._ask(
                "arm", request.get("stream"), triggers=wanted, lease=lease, lease_s=seconds
            )
            armed = [t for answer in told.values() for t in answer["armed"]]
            unknown = sorted(set(wanted or ()) - set(armed))
            if unknown:
                raise SpikedError(f"there is no trigger {unknown[0][:40]!r}; nothing was armed")
        except SpikedError:
            for child in self._children(None).values():
                child.command("disarm", lease=lease)
            raise
        if len(self._leases) >= KEPT_LEASES:
            del self._leases[next(iter(self._leases))]
        self._leases[lease] = [name for name, answer in told.items() if wanted is None or answer["armed"]]
        return {"lease": lease, "lease_s": seconds, "armed": armed}

    async def renew(self, request: dict[str, Any]) -> None:
        lease = str(request.get("lease"))
        streams = self._leases.pop(lease, None)
        if streams is None:
            raise SpikedError("there is no such lease; arm first")
        self._leases[lease] = streams  # the last to be forgotten
        for stream in streams:
            await self._ask("renew", stream, lease=request["lease"])

    async def disarm(self, request: dict[str, Any]) -> None:
        self._leases.pop(str(request.get("lease")), None)
        await self._ask("disarm", request.get("stream"), lease=request.get("lease"))

    async def triggers(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"streams": await self._ask("triggers", request.get("stream"))}

    def _stream_of(self, name: Any) -> str:
        """The stream that is meant: the named one, or the only one."""
        tracks = self._running().tracks
        if not name and len(tracks) > 1:
            raise SpikedError(f"name the stream: {', '.join(tracks)}")
        return str(name or next(iter(tracks)))

    async def set_trigger(self, request: dict[str, Any]) -> None:
        trigger = request.get("trigger")
        stream = self._stream_of(trigger.get("stream") if isinstance(trigger, dict) else None)
        await self._ask("set_trigger", stream, trigger=trigger)

    async def remove_trigger(self, request: dict[str, Any]) -> None:
        await self._ask("remove_trigger", self._stream_of(request.get("stream")), name=request.get("name"))

    async def set_limits(self, request: dict[str, Any]) -> dict[str, Any]:
        """They hold for all streams together: while one is armed, none may be raised anywhere, and a refusal changes none."""
        limits, stream = request.get("limits"), request.get("stream")
        async with self._changing:
            children = self._children(None).values()
            about = {"limits": limits, "check": True, "until_ns": _deadline()}
            asked = (c.ask("set_limits", ANSWER_S, **about) for c in children)
            for answer in await asyncio.gather(*asked):
                if answer is not None and not answer["ok"]:
                    raise SpikedError(str(answer["error"]))
            return {"streams": await self._ask("set_limits", stream, limits=limits)}

    async def stimulate(self, request: dict[str, Any]) -> dict[str, Any]:
        fields = {k: v for k, v in request.items() if k not in ("v", "id", "op", "stream")}
        fields["asked_ns"] = time.monotonic_ns()  # one that is held up must not come late
        stream = self._stream_of(request.get("stream"))
        return (await self._ask("stimulate", stream, **fields))[stream]

    async def stop_stimulation(self, request: dict[str, Any]) -> None:
        why = str(request.get("why") or "asked over the control port")[:200]
        if trouble := self.stop(why):
            try:  # then each has to say it itself
                await self._ask("stop_stimulation", None, why=why)
            except SpikedError as e:
                raise SpikedError(f"{trouble}, and not every live process confirmed the stop: {e}") from e

    def stop(self, why: str) -> str:
        """The emergency stop. It needs no answer of a live process: the file in the session folder holds for all of them.

        Returns a line where that file cannot be written: then only those hold that heard of it.
        """
        session = self._session()
        if session is None or session.state in OVER:  # a stop of it would not hold for the next one
            raise SpikedError("there is no session, so nothing can be sent")
        for track in session.tracks.values():
            if live := track.children.get("live"):
                live.command("stop_stimulation", why=why)
        try:
            (session.folder / STOP).write_text(why + "\n", encoding="utf-8")
        except OSError as e:
            self._unwritten = session.folder
            trouble = f"the file {STOP} cannot be written ({e.strerror})"
            session.journal.note("error", trouble, level="error")
            return trouble
        return ""

    async def clear_stop(self, _request: dict[str, Any]) -> None:
        await self._ask("clear_stop", None)
        self._unwritten = None


def _deadline() -> int:
    """Monotonic ns after which nobody waits for an answer that is asked for now."""
    return time.monotonic_ns() + round(ANSWER_S * 1e9)
