"""The supervisor's control port: MessagePack requests in, replies out, one line for every refusal."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import zmq
import zmq.asyncio

from spiked.errors import SpikedError
from spiked.gate import Allowance, Gate
from spiked.publish.sockets import bind
from spiked_client import access, protocol
from spiked_client.access import Entry
from spiked_client.protocol import ProtocolError

log = logging.getLogger(__name__)

Op = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]
RUNNING = 64  # requests that may be under way at once; further ones are told to come back
OF_ONE = RUNNING // 2  # the same for one client
REQUESTS_PER_S, REQUESTS_AT_ONCE = 200.0, 1000.0  # per client
STOP = "stop_stimulation"  # heard when nothing else is
STOPS_PER_S, STOPS_AT_ONCE = 5.0, 20.0  # per client, beyond its other requests
UNREAD_REQUESTS = 8  # per client; beyond it the network keeps them
HEARD_PER_S, HEARD_AT_ONCE = float(2 << 20), float(16 << 20)  # bytes from one client
CUT_BYTES = protocol.MAX_REQUEST_BYTES + (1 << 16)  # a message longer than this costs the connection
PEERS = 128
MOST_VALUES, MOST_DEPTH = 10_000, 16  # of one request
UNREAD_REPLIES = 256  # per client; beyond it replies to that client are dropped
LAST_REPLIES_MS = 5000  # at most, for the reply to "shutdown" to leave


class ControlServer:
    """Answers requests with `handlers`: op name -> async callable(request) -> fields of the reply, or None.

    A handler refuses by raising SpikedError; its line goes to the client. Requests of one client may be
    answered out of order: a long one holds up nobody, and the emergency stop is taken when too many others are under way. Malformed requests and those over 1 MiB get an error and are
    counted; a message much longer than that makes ZeroMQ drop the connection. With `keys` (a folder of
    `spiked keys`) only clients of the access list are heard, and each may ask for what its role allows at that
    moment. Port 0 takes any free port; `endpoint` is the address. Raises ConfigError when the port is taken, or
    the keys cannot be used.

    `counters`: requests, refused, malformed, failed (a handler broke), busy, unsent; of what was refused before any
    operation saw it: refused_roles, refused_requests (too many a second), refused_size, and those of Gate.
    """

    def __init__(
        self,
        host: str,
        port: int,
        handlers: Mapping[str, Op],
        *,
        keys: Path | None = None,
        peers: int = PEERS,
        per_s: float = REQUESTS_PER_S,
        at_once: float = REQUESTS_AT_ONCE,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._handlers = handlers
        self._context = zmq.Context()
        self._running: set[asyncio.Task[None]] = set()
        self._of: Counter[bytes] = Counter()  # under way, per client
        self._serving: asyncio.Task[None] | None = None
        self._requests, self._stops = Allowance(per_s, at_once), Allowance(STOPS_PER_S, STOPS_AT_ONCE)
        self._gate: Gate | None = None
        try:
            self._gate = Gate(self._context, keys, peers, self.counters)
            self._router = self._context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.MAXMSGSIZE, CUT_BYTES)
            self._router.setsockopt(zmq.SNDHWM, UNREAD_REPLIES)
            self._router.setsockopt(zmq.RCVHWM, UNREAD_REQUESTS)
            self._gate.guard(self._router, "control", per_s=HEARD_PER_S, burst=HEARD_AT_ONCE)
            self.endpoint = bind(self._router, host, port, "the control port")
        except BaseException:
            if self._gate is not None:
                self._gate.close()
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
            self._async.close(LAST_REPLIES_MS)
        self._router.close(LAST_REPLIES_MS)
        if self._gate is not None:
            self._gate.close()
        self._context.term()

    async def _serve(self) -> None:
        while True:
            # What lies there already is read without a wait: nobody else would get a turn, and quick requests would be too many at once.
            await asyncio.sleep(0)
            parts = await self._async.recv_multipart(copy=False)
            frames = [part.bytes for part in parts]
            envelope = frames[:2] if len(frames) == 3 and not frames[1] else frames[:1]
            request = self._read(envelope, frames[len(envelope) :])
            if request is None or not self._permit(envelope, request, parts[-1]):
                continue
            client = envelope[0]
            many = len(self._running) >= RUNNING or self._of[client] >= OF_ONE
            if many and request["op"] != STOP:
                self.counters["busy"] += 1
                self._reply(
                    envelope, request["id"], False, error="too many requests are under way; ask again"
                )
                continue
            task = asyncio.create_task(self._answer(envelope, request), name=f"control {request['op'][:40]}")
            self._running.add(task)
            self._of[client] += 1
            task.add_done_callback(lambda done, client=client: self._done(done, client))  # type: ignore[misc]

    def _done(self, task: asyncio.Task[None], client: bytes) -> None:
        self._running.discard(task)
        self._of[client] -= 1
        if self._of[client] <= 0:
            del self._of[client]

    def _permit(self, envelope: list[bytes], request: dict[str, Any], part: Any) -> bool:
        """Whether this client may ask for that now; else it is told why not, and counted."""
        assert self._gate is not None
        op, who = request["op"], self._gate.who(part)
        wait = self._requests.take(envelope[0])
        if wait and not (op == STOP and not self._stops.take(envelope[0])):
            self.counters["refused_requests"] += 1
            line = f"over {self._requests.per_s:g} requests a second; ask again in {wait:.2g} s"
            self._reply(envelope, request["id"], False, error=line, retry_ms=int(1000 * wait) + 1)
            return False
        if who is None or not access.allowed(who.role, op):
            self.counters["refused_roles"] += 1
            self._reply(envelope, request["id"], False, error=_no(who, op))
            return False
        if who.key and access.needed(op) != "watch":
            log.info("%s asked for by %s (%s)", op[:40], who.name, who.role)
        return True

    def _read(self, envelope: list[bytes], body: list[bytes]) -> dict[str, Any] | None:
        """The request, or None after an error was sent and counted."""
        if len(body) == 1 and len(body[0]) > protocol.MAX_REQUEST_BYTES:
            self.counters["refused_size"] += 1
        request: dict[str, Any] = {}
        try:
            read_request(body, request)
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
        # Through the asyncio socket: a send takes the wake-up of requests that came meanwhile, and only that one looks for them after it.
        sent = cast("asyncio.Future[Any]", self._async.send_multipart([*envelope, reply], zmq.NOBLOCK))
        if sent.exception() is not None:  # the client went away, or does not read
            self.counters["unsent"] += 1


def read_request(body: list[bytes], request: dict[str, Any]) -> None:
    """Fill `request` from the frames of one. Raises ProtocolError; what was read until then stays in it.

    Its values are plain: numbers that are finite and below 2^63, text, lists and maps with text keys. They go on to
    other processes as JSON.
    """
    if len(body) != 1:
        raise ProtocolError(f"{len(body)} frames, a request has one")
    if len(body[0]) > protocol.MAX_REQUEST_BYTES:
        raise ProtocolError(
            f"a request of {len(body[0])} bytes; at most {protocol.MAX_REQUEST_BYTES} are read"
        )
    request.update(protocol.unpack(body[0]))
    protocol.check_version(request.get("v"))
    if not protocol.is_count(request.get("id"), 0) or not isinstance(request.get("op"), str):
        raise ProtocolError("a request needs id and op")
    if not isinstance(request.get("stream"), str | None):
        raise ProtocolError("stream is the name of one, or left out for all")
    _check_plain(request)


def _check_plain(request: dict[str, Any]) -> None:
    left: list[tuple[Any, int]] = [(request, 0)]
    for _ in range(MOST_VALUES):
        if not left:
            return
        x, depth = left.pop()
        if isinstance(x, dict | list) and depth < MOST_DEPTH:
            left += [(y, depth + 1) for y in (x.values() if isinstance(x, dict) else x)]
            if isinstance(x, dict) and not all(isinstance(k, str) for k in x):
                raise ProtocolError("a request has text keys only")
        elif not (
            isinstance(x, bool | str | None)
            or (isinstance(x, int) and abs(x) < 1 << 63)
            or (isinstance(x, float) and math.isfinite(x))
        ):
            raise ProtocolError(
                "a request holds plain values only: text, finite numbers, lists and maps, not too deep"
            )
    raise ProtocolError(f"a request holds at most {MOST_VALUES} values")


def _no(who: Entry | None, op: str) -> str:
    if who is None:
        return "this key was removed from the access list; ask for a new one on the rig: `spiked keys add`"
    least = access.needed(op)
    return f"{op[:40]} needs the role {least}, {who.name} has {who.role}; `spiked keys add NAME --role {least}` on the rig"
