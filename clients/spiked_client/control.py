"""Asking the daemon: status, sessions, calibration, stimulation marks.

async with Control() as rig:              with SyncControl() as rig:
    print(await rig.status())                 print(rig.status())
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import zmq
import zmq.asyncio

from spiked_client import protocol
from spiked_client.access import ClientKey, load_key, why_silent
from spiked_client.errors import AccessError, ClientError, DaemonAbsent, Incompatible, Refused
from spiked_client.protocol import ProtocolError, VersionMismatch

CONTROL_PORT = 5572
LAST_LOOK_S = 0.05
Answer = TypeVar("Answer")


def address(host: str, port: int) -> str:
    """tcp://host:port, with the brackets IPv6 needs."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def dealer(context: Any, endpoint: str, key: ClientKey | None = None) -> Any:
    """A socket for requests to `endpoint`. Nothing is queued for a peer that is not there."""
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if "[" in endpoint:
        socket.ipv6 = True
    if key is not None:
        key.secure(socket)
    socket.connect(endpoint)
    return socket


def read_reply(op: str, request_id: int, frames: list[bytes]) -> dict[str, Any] | None:
    """The reply's fields; None when it answers some other request. Raises Refused, Incompatible."""
    try:
        reply = protocol.unpack(frames[0])
        protocol.check_version(reply.get("v"))
    except VersionMismatch as e:
        raise Incompatible(str(e)) from e
    except ProtocolError:
        return None
    if reply.get("id") != request_id:
        return None
    if not reply.get("ok"):
        raise Refused(op, str(reply.get("error", f"{op} was refused without a reason")))
    return {k: v for k, v in reply.items() if k not in ("v", "id", "ok")}


async def until(future: asyncio.Future[Any], end: float) -> Any:
    """Its result; TimeoutError where there is none at `end`, nor a moment after it: what came while this program itself
    was held up still lies unread then.
    """
    try:
        for patience in (end - time.monotonic(), LAST_LOOK_S):
            if not future.done():
                await asyncio.wait([future], timeout=max(patience, 0.0))
        if future.done():
            return future.result()
        raise TimeoutError
    finally:
        future.cancel()


def _only(stream: str | None) -> dict[str, Any]:
    return {} if stream is None else {"stream": stream}


class _Operations(Generic[Answer]):
    """The operations; `Answer` is the reply's fields, or an awaitable of them.

    `keys`: the key file that `spiked keys add` made on the rig, for daemons that use keys; else SPIKED_KEYS names it.
    Raises AccessError when it cannot be used, and later when the daemon does not take it.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        control_port: int = CONTROL_PORT,
        *,
        timeout: float = 10.0,
        keys: Path | str | ClientKey | None = None,
    ) -> None:
        self.endpoint = address(host, control_port)
        self.key = keys if isinstance(keys, ClientKey) else load_key(keys)
        self.timeout = timeout
        self._ids = itertools.count(1)

    def request(self, op: str, *, timeout: float | None = None, **fields: Any) -> Answer:
        """Ask any operation; waits `timeout` seconds for a daemon that is not there yet.

        Raises DaemonAbsent, AccessError, Refused or Incompatible.
        """
        raise TypeError("use Control or SyncControl")

    def status(self) -> Answer:
        """State, session, streams and their figures."""
        return self.request("status")

    def endpoints(self) -> Answer:
        """Where the streams and health are published."""
        return self.request("endpoints")

    def describe(self) -> Answer:
        """The streams that are received: rate, channels, positions of their electrodes."""
        return self.request("describe")

    def template(self, stream: str, unit: int) -> Answer:
        """What the sorter looks for in one unit, per electrode; see the contract."""
        return self.request("template", stream=stream, unit=unit)

    def snippets(
        self, stream: str, samples: list[int], channels: list[int], *, before: int, after: int
    ) -> Answer:
        """Raw microvolts around some samples of the last seconds, on some channels; see the contract."""
        return self.request(
            "snippets", stream=stream, samples=samples, channels=channels, before=before, after=after
        )

    def jobs(self) -> Answer:
        """The offline jobs."""
        return self.request("jobs")

    def cancel_job(self, job: int) -> Answer:
        """Give up an offline job."""
        return self.request("cancel_job", job=job)

    def retry_job(self, job: int) -> Answer:
        """Queue an offline job that is over once more."""
        return self.request("retry_job", job=job)

    def start_session(self) -> Answer:
        """Start a session."""
        return self.request("start_session")

    def stop_session(self) -> Answer:
        """End the session; offline sorting follows."""
        return self.request("stop_session")

    def calibrate(self, *, stream: str | None = None) -> Answer:
        """Find the units anew, of one stream or of all, while the present ones go on being sorted."""
        return self.request("calibrate", **_only(stream))

    def cancel_calibration(self, *, stream: str | None = None) -> Answer:
        """Give up calibrating, at whatever stage; the present units stay. Nothing happens where none is under way."""
        return self.request("cancel_calibration", **_only(stream))

    def mark_stim(
        self,
        sample: int | None = None,
        pattern: str = "",
        *,
        stream: str | None = None,
        line: int = 0,
        value: float = 0.0,
        text: str = "",
    ) -> Answer:
        """A stimulus that you gave at `sample` (None: now), in one stream or in all: into the recording, and to the live path.

        Stimuli of one `pattern` (at most 96 bytes; else `text`, else the line) share an artifact template.
        """
        given: dict[str, Any] = {
            "sample": sample,
            "stream": stream,
            "line": line,
            "value": value,
            "text": pattern or text,
        }
        return self.request("mark_stim", **{k: v for k, v in given.items() if v is not None})

    def triggers(self, *, stream: str | None = None) -> Answer:
        """Per stream: the rules, which are armed, the limits and how much of them is used, the outputs."""
        return self.request("triggers", **_only(stream))

    def set_trigger(self, trigger: dict[str, Any]) -> Answer:
        """Add a rule, or replace the one of its name: the keys of a [[trigger]] section. Not while anything is armed."""
        return self.request("set_trigger", trigger=trigger)

    def remove_trigger(self, name: str, *, stream: str | None = None) -> Answer:
        """Forget a rule. Not while anything is armed."""
        return self.request("remove_trigger", name=name, **_only(stream))

    def arm(
        self, triggers: list[str] | None = None, *, lease_s: float = 5.0, stream: str | None = None
    ) -> Answer:
        """Let these rules (None: all, and `stimulate`) stimulate from now on. The reply's `lease` must be renewed within `lease_s`."""
        named: dict[str, Any] = {} if triggers is None else {"triggers": triggers}
        return self.request("arm", lease_s=lease_s, **named, **_only(stream))

    def renew(self, lease: str) -> Answer:
        """Stay armed for another lease. Raises Refused when it was over: nothing of it is armed any more."""
        return self.request("renew", lease=lease)

    def disarm(self, lease: str | None = None) -> Answer:
        """End one lease, or all of all clients."""
        held: dict[str, Any] = {} if lease is None else {"lease": lease}
        return self.request("disarm", **held)

    def set_limits(self, *, stream: str | None = None, **limits: float | None) -> Answer:
        """Change limits of the [act] section by name. While armed they can only be lowered."""
        return self.request("set_limits", limits=limits, **_only(stream))

    def stimulate(
        self,
        lease: str,
        output: str,
        pattern: str = "default",
        *,
        electrodes: list[int] | None = None,
        amplitude_ua: float | None = None,
        width_us: float | None = None,
        pulses: int = 1,
        stream: str | None = None,
    ) -> Answer:
        """Ask for one stimulus now. The reply says its number in the ledger and what became of it: outcome, reason."""
        given: dict[str, Any] = {
            "lease": lease,
            "output": output,
            "pattern": pattern,
            "electrodes": electrodes,
            "amplitude_ua": amplitude_ua,
            "width_us": width_us,
            "pulses": pulses,
            "stream": stream,
        }
        return self.request("stimulate", **{k: v for k, v in given.items() if v is not None})

    def stop_stimulation(self, why: str = "") -> Answer:
        """The emergency stop: nothing is sent any more, in no stream, until `clear_stop`."""
        return self.request("stop_stimulation", why=why)

    def clear_stop(self) -> Answer:
        """Lift the emergency stop. Nothing is armed by that."""
        return self.request("clear_stop")

    def shutdown(self) -> Answer:
        """End the session and the daemon."""
        return self.request("shutdown")

    def _absent(self, patience: float) -> ClientError:
        """Why nobody answered; looks once more, for a second at most."""
        why = why_silent(self.endpoint, self.key)
        if why:
            return DaemonAbsent(why) if "did not answer" in why else AccessError(why)
        return DaemonAbsent(
            f"no spiked daemon answered on {self.endpoint} within {patience:g} s; start it with "
            "`spiked run`, or give its control_port"
        )


class Control(_Operations[Coroutine[Any, Any, dict[str, Any]]]):
    """Control for asyncio. Requests of one Control go one after the other; open a second for two at once.

    Only the emergency stop waits for no other.
    """

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self._socket = dealer(self._context, self.endpoint, self.key)
        self._asking = asyncio.Lock()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._socket.close(0)
        self._context.term()

    async def request(self, op: str, *, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        patience = self.timeout if timeout is None else timeout
        try:
            return await self.attempt(op, patience, **fields)
        except TimeoutError:
            raise await asyncio.to_thread(self._absent, patience) from None

    async def attempt(self, op: str, patience: float, **fields: Any) -> dict[str, Any]:
        """`request` for who asks again anyway: raises TimeoutError at once, without a look why nobody answered."""
        if op == "stop_stimulation" and self._asking.locked():
            return await self._ask_apart(op, fields, patience)
        async with self._asking:
            try:
                return await self._ask(self._socket, op, fields, patience)
            except TimeoutError:
                self._socket.close(0)  # whatever is still under way must not answer a later question
                self._socket = dealer(self._context, self.endpoint, self.key)
                raise

    async def _ask_apart(self, op: str, fields: dict[str, Any], patience: float) -> dict[str, Any]:
        """Over a connection of its own, past a request that waits for its answer."""
        socket = dealer(self._context, self.endpoint, self.key)
        try:
            return await self._ask(socket, op, fields, patience)
        finally:
            socket.close(0)

    async def _ask(self, socket: Any, op: str, fields: dict[str, Any], patience: float) -> dict[str, Any]:
        end, request_id = time.monotonic() + patience, next(self._ids)
        await until(socket.send(protocol.encode_request(request_id, op=op, **fields)), end)
        while True:
            reply = read_reply(op, request_id, await until(socket.recv_multipart(), end))
            if reply is not None:
                return reply


class SyncControl(_Operations[dict[str, Any]]):
    """Control without asyncio."""

    def __enter__(self) -> Self:
        self._context = zmq.Context()
        self._socket = dealer(self._context, self.endpoint, self.key)
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close(0)
        self._context.term()

    def request(self, op: str, *, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        patience = self.timeout if timeout is None else timeout
        try:
            return self.attempt(op, patience, **fields)
        except TimeoutError:
            raise self._absent(patience) from None

    def attempt(self, op: str, patience: float, **fields: Any) -> dict[str, Any]:
        """`request` for who asks again anyway: raises TimeoutError at once, without a look why nobody answered."""
        end = time.monotonic() + patience
        request_id = next(self._ids)
        if self._wait(zmq.POLLOUT, end):
            with contextlib.suppress(zmq.Again):  # the daemon went away just now
                self._socket.send(protocol.encode_request(request_id, op=op, **fields), zmq.NOBLOCK)
            while self._wait(zmq.POLLIN, end):
                reply = read_reply(op, request_id, self._socket.recv_multipart())
                if reply is not None:
                    return reply
        self._socket.close(0)
        self._socket = dealer(self._context, self.endpoint, self.key)
        raise TimeoutError

    def _wait(self, events: int, end: float) -> bool:
        left_s = max(end - time.monotonic(), LAST_LOOK_S)
        return bool(self._socket.poll(int(left_s * 1000), events))
