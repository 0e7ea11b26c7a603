"""The supervisor's control port: MessagePack requests in, replies out, one line for every refusal."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import zmq
import zmq.asyncio

from spiked.errors import SpikedError
from spiked.publish.sockets import bind
from spiked_client import protocol
from spiked_client.protocol import ProtocolError

log = logging.getLogger(__name__)

Op = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]
RUNNING = 64  # requests that may be under way at once; further ones are told to come back
UNREAD_REPLIES = 256  # per client; beyond it replies to that client are dropped


class ControlServer:
    """Answers requests with `handlers`: op name -> async callable(request) -> fields of the reply, or None.

    A handler refuses by raising SpikedError; its line goes to the client. Requests of one client may be
    answered out of order: a long one holds up nobody. Malformed requests get an error and are counted; those
    over 1 MiB make ZeroMQ drop the connection. Port 0 takes any free port; `endpoint` is the address. Raises
    ConfigError when the port is taken.

    `counters`: requests, refused, malformed, failed (a handler broke), busy, unsent.
    """

    def __init__(self, host: str, port: int, handlers: Mapping[str, Op]) -> None:
        self.counters: Counter[str] = Counter()
        self._handlers = handlers
        self._context = zmq.Context()
        self._running: set[asyncio.Task[None]] = set()
        self._serving: asyncio.Task[None] | None = None
        try:
            self._router = self._context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_REQUEST_BYTES)
            self._router.setsockopt(zmq.SNDHWM, UNREAD_REPLIES)
            self.endpoint = bind(self._router, host, port, "the control port")
        except BaseException:
            self._context.destroy(0)
            raise

    async def start(self) -> None:
        """Answer from now on, in a task of the running loop."""
        self._async = zmq.asyncio.Socket.from_socket(self._router)
        self._serving = asyncio.create_task(self._serve(), name="control")

    async def close(self) -> None:
        """Let the replies under way go out, then free the port; handlers still running are cancelled."""
        if self._serving is not None:
            self._serving.cancel()
            if self._running:
                await asyncio.wait(self._running, timeout=0.5)
            for task in self._running:
                task.cancel()
            await asyncio.gather(self._serving, *self._running, return_exceptions=True)
            self._async.close(200)  # the reply to "shutdown" should still leave
        self._router.close(200)
        self._context.term()

    async def _serve(self) -> None:
        while True:
            frames = await self._async.recv_multipart()
            envelope = frames[:2] if len(frames) == 3 and not frames[1] else frames[:1]
            request = self._read(envelope, frames[len(envelope) :])
            if request is None:
                continue
            if len(self._running) >= RUNNING:
                self.counters["busy"] += 1
                self._reply(
                    envelope, request["id"], False, error="too many requests are under way; ask again"
                )
                continue
            task = asyncio.create_task(self._answer(envelope, request), name=f"control {request['op']}")
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _read(self, envelope: list[bytes], body: list[bytes]) -> dict[str, Any] | None:
        """The request, or None after an error was sent and counted."""
        request: dict[str, Any] = {}
        try:
            if len(body) != 1:
                raise ProtocolError(f"{len(body)} frames, a request has one")
            request = protocol.unpack(body[0])
            protocol.check_version(request.get("v"))
            if not protocol.is_count(request.get("id"), 0) or not isinstance(request.get("op"), str):
                raise ProtocolError("a request needs id and op")
        except ProtocolError as e:
            self.counters["malformed"] += 1
            request_id = request.get("id")
            self._reply(
                envelope, request_id if protocol.is_count(request_id, 0) else None, False, error=str(e)
            )
            return None
        self.counters["requests"] += 1
        return request

    async def _answer(self, envelope: list[bytes], request: dict[str, Any]) -> None:
        request_id, op = request["id"], request["op"]
        handler = self._handlers.get(op)
        try:
            if handler is None:
                raise SpikedError(f"no operation {op[:40]!r}; there are {', '.join(sorted(self._handlers))}")
            self._reply(envelope, request_id, True, **(await handler(request) or {}))
        except SpikedError as e:
            self.counters["refused"] += 1
            self._reply(envelope, request_id, False, error=str(e))
        except Exception as e:  # one broken operation must not take the daemon down
            self.counters["failed"] += 1
            log.exception("control operation %s failed", op)
            line = f"{op} failed inside the daemon ({type(e).__name__}); its log says more"
            self._reply(envelope, request_id, False, error=line)

    def _reply(self, envelope: list[bytes], request_id: int | None, ok: bool, **fields: Any) -> None:
        reply = protocol.encode_reply(request_id, ok, **fields)
        try:
            self._router.send_multipart([*envelope, reply], zmq.NOBLOCK)
        except zmq.ZMQError:  # the client went away, or does not read
            self.counters["unsent"] += 1
