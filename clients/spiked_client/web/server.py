"""The page's server: static files, one WebSocket per page, a few requests, and limits on all of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from spiked_client.access import allowed
from spiked_client.control import Control
from spiked_client.errors import ClientError, DaemonAbsent, Refused
from spiked_client.web.feed import Feed, text
from spiked_client.web.guard import COOKIE, Bucket, Buckets, Guard, Visitor
from spiked_client.web.viewer import Viewer

log = logging.getLogger("spiked.web")

STATIC = Path(__file__).with_name("static")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MAX_VIEWERS = 32
MAX_BODY, MAX_WORD = 8192, 2048  # bytes of a request, and of what a page says over its socket
WORDS_PER_S = 20  # what a page may say
BODY_S, CONTROL_S, STOP_S = 5.0, 10.0, 5.0
RECHECK_S = 5.0  # whether the token of an open page still holds
# What a page may ask the control port for, and the fields that go with it.
ACTIONS: dict[str, tuple[str, ...]] = {
    "start_session": (), "stop_session": (), "calibrate": ("stream",), "cancel_calibration": ("stream",), "mark_stim": ("pattern", "stream"),
    "cancel_job": ("job",), "retry_job": ("job",), "disarm": (), "stop_stimulation": ("why",), "clear_stop": (),
}  # fmt: skip
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def problem(status: int, why: str, **fields: Any) -> web.Response:
    return web.json_response({"error": why, **fields}, status=status)


class Pages:
    """The application. `connect` and `ask` reach the daemon; `secure` marks cookies for TLS only."""

    def __init__(self, feed: Feed, guard: Guard, ask: Callable[[], Control], *, secure: bool) -> None:
        self.feed, self.guard, self._secure = feed, guard, secure
        self._ask = ask
        self.counters: Counter[str] = Counter()
        self._requests, self._logins, self._doing = Buckets(240, 60), Buckets(5, 0.2), Buckets(10, 2)
        self._lines = Bucket(10, 0.1)  # of the log: a flood must not fill the disk
        self._last_word: dict[Any, float] = {}  # per connection; inf: at work
        self._control: Control | None = None
        self._stop: Control | None = None
        self._files = {
            f.name: (f.read_bytes(), TYPES[f.suffix]) for f in STATIC.iterdir() if f.suffix in TYPES
        }
        self.app = web.Application(client_max_size=MAX_BODY, middlewares=[self._limits()])
        self.app.add_routes([
            web.get("/", self._file), web.get("/static/{name}", self._file), web.get("/live", self._live), web.get("/me", self._me),
            web.get("/unit", self._unit), web.post("/do", self._do), web.post("/login", self._login), web.post("/logout", self._logout),
        ])  # fmt: skip

    # ---- every request -----------------------------------------------------------------------------------------

    def _limits(self) -> Any:
        @web.middleware
        async def limits(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._last_word[request.protocol] = float("inf")
            try:
                response = await self._admitted(request, handler)
            except web.HTTPException as e:
                response = problem(e.status, e.reason)
            finally:
                self._last_word[request.protocol] = time.monotonic()
            if not response.prepared:
                self._harden(request, response)
            return response

        return limits

    async def _admitted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        stop = request.path == "/do"  # counted by itself, so that nothing keeps the stop from getting through
        if not stop and not self._requests.take(request.remote or ""):
            self.counters["too_many"] += 1
            return problem(429, "too many requests; wait a second")
        if why := self.guard.foreign(request):
            self.counters["foreign"] += 1
            return problem(403, why)
        return await handler(request)

    def _harden(self, request: web.Request, response: web.StreamResponse) -> None:
        host = request.host if all(c.isalnum() or c in ".-:[]" for c in request.host) else ""
        response.headers.update({
            "Content-Security-Policy": f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' ws://{host} wss://{host}; "
            "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-cache", "Server": "spiked",
        })  # fmt: skip
        if self._secure:
            response.headers["Strict-Transport-Security"] = "max-age=31536000"

    def opened(self, connection: Any) -> None:
        """A connection that has not asked anything yet."""
        self._last_word[connection] = time.monotonic()

    def idle_s(self, connection: Any) -> float:
        """For how long it has said nothing whole."""
        return time.monotonic() - self._last_word.get(connection, 0.0)

    def forget(self, connection: Any) -> None:
        """It is closed."""
        self._last_word.pop(connection, None)

    def known(self) -> list[Any]:
        """All connections that were opened and not forgotten."""
        return list(self._last_word)

    async def _body(self, request: web.Request) -> dict[str, Any]:
        """The JSON map that was posted; raises HTTPException."""
        if request.content_type != "application/json":  # which no form of another site can send
            raise web.HTTPUnsupportedMediaType(reason="send application/json")
        try:
            async with asyncio.timeout(BODY_S):
                found = json.loads(await request.text())
        except (ValueError, RecursionError) as e:
            raise web.HTTPBadRequest(reason="not JSON") from e
        except TimeoutError as e:
            raise web.HTTPRequestTimeout(reason="the request did not end") from e
        if not isinstance(found, dict):
            raise web.HTTPBadRequest(reason="not a map")
        return found

    def _visitor(self, request: web.Request) -> Visitor:
        visitor = self.guard.visitor(request)
        if visitor is None:
            self.counters["unknown"] += 1
            raise web.HTTPUnauthorized(reason="log in first")
        return visitor

    # ---- files and names ---------------------------------------------------------------------------------------

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name", "index.html")
        if name not in self._files:
            raise web.HTTPNotFound(reason="there is no such file")
        data, kind = self._files[name]
        return web.Response(body=data, content_type=kind, charset="utf-8")

    async def _me(self, request: web.Request) -> web.StreamResponse:
        visitor = self.guard.visitor(request)
        may = [op for op in ACTIONS if visitor and allowed(visitor.role, op)]
        told = {"name": visitor.name, "role": visitor.role} if visitor else {"name": None, "role": None}
        room = max(MAX_VIEWERS - len(self.feed.viewers), 0)
        return web.json_response({**told, "may": may, "tokens": self.guard.access is not None, "room": room})

    async def _login(self, request: web.Request) -> web.StreamResponse:
        if not self._logins.take(request.remote or ""):
            return problem(429, "too many attempts; wait a few seconds")
        token = (await self._body(request)).get("token")
        found = self.guard.login(token) if isinstance(token, str) else None
        if found is None:
            self.counters["wrong_token"] += 1
            log.warning("a wrong token from %s", request.remote)
            return problem(401, "this token is not in the rig's access list")
        cookie, visitor = found
        log.info("%s logged in from %s (%s)", visitor.name, request.remote, visitor.role)
        response = web.json_response({"name": visitor.name, "role": visitor.role})
        response.set_cookie(COOKIE, cookie, httponly=True, samesite="Strict", secure=self._secure, path="/")
        return response

    async def _logout(self, request: web.Request) -> web.StreamResponse:
        self.guard.logout(request)
        response = web.json_response({})
        response.del_cookie(COOKIE, path="/")
        return response

    # ---- asking the rig ----------------------------------------------------------------------------------------

    async def _unit(self, request: web.Request) -> web.StreamResponse:
        self._visitor(request)
        unit = request.query.get("unit", "")
        if not unit.isdecimal() or len(unit) > 9:
            raise web.HTTPBadRequest(reason="unit is a whole number")
        try:
            told = await self.feed.pictures.of(request.query.get("stream", ""), int(unit))
        except ClientError as e:
            return problem(404, str(e))
        return web.Response(text=text(told), content_type="application/json")

    async def _do(self, request: web.Request) -> web.StreamResponse:
        visitor = self._visitor(request)
        body = await self._body(request)
        op = body.get("op")
        if not isinstance(op, str) or op not in ACTIONS:
            raise web.HTTPBadRequest(reason="there is no such action")
        if not allowed(visitor.role, op):
            self.counters["refused"] += 1
            return problem(403, f"{visitor.name} may {visitor.role} here; {op} needs more")
        stop = op == "stop_stimulation"
        if not stop and not self._doing.take(f"{visitor.name} {request.remote}"):
            return problem(429, "too many actions; wait a second")
        fields = {k: body[k] for k in ACTIONS[op] if isinstance(body.get(k), str | int)}
        fields = {k: v[:96] if isinstance(v, str) else v for k, v in fields.items()}
        if stop:
            fields["why"] = f"web page, {visitor.name}"
        elif op == "mark_stim":
            fields["text"] = fields.pop("pattern", "")
        log.info("%s from %s: %s %s", visitor.name, request.remote, op, fields)
        control = self._stop if stop else self._control
        if control is None:
            return problem(503, "the page's server is only starting")
        try:
            told = await control.request(op, timeout=STOP_S if stop else CONTROL_S, **fields)
        except Refused as e:
            return problem(409, str(e))
        except DaemonAbsent as e:
            return problem(504, str(e))
        except ClientError as e:
            return problem(502, str(e))
        self.feed.changed(op)
        return web.Response(text=text(told), content_type="application/json")

    # ---- live --------------------------------------------------------------------------------------------------

    async def _live(self, request: web.Request) -> web.StreamResponse:
        visitor = self._visitor(request)
        if len(self.feed.viewers) >= MAX_VIEWERS:
            self.counters["full"] += 1
            return problem(503, f"{MAX_VIEWERS} pages are open already; close one")
        ws = web.WebSocketResponse(heartbeat=10.0, max_msg_size=MAX_WORD, compress=False, timeout=2.0)
        if not ws.can_prepare(request).ok:
            raise web.HTTPBadRequest(reason="this address is for WebSockets")
        viewer = Viewer(ws, visitor.name, visitor.role)
        self.feed.viewers.add(viewer)  # its place, before anything waits
        try:
            await ws.prepare(request)
            await self._serve(request, viewer, ws)
        finally:
            self.feed.leave(viewer)
            self.counters["frames_dropped"] += viewer.outbox.counters["frames_dropped"]
            if request.transport is not None:
                request.transport.abort()  # nothing that still waits for a page that does not read
        return ws

    async def _serve(self, request: web.Request, viewer: Viewer, ws: web.WebSocketResponse) -> None:
        self.feed.enter(viewer)
        tasks = [
            asyncio.create_task(viewer.write()), asyncio.create_task(self._listen(viewer, ws)), asyncio.create_task(self._recheck(request)),
        ]  # fmt: skip
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            why = "; ".join(str(t.result()) for t in done if not t.cancelled() and t.exception() is None)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not ws.closed:
            self.counters["sent_away"] += 1
            if self._lines.take():
                log.info("a page of %s was sent away: %s", viewer.who, why)
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(1.0):
                    await ws.close(code=1008, message=why.encode()[:100])

    async def _listen(self, viewer: Viewer, ws: web.WebSocketResponse) -> str:
        """What the page wants to see; why it ends."""
        words = Buckets(WORDS_PER_S, WORDS_PER_S)
        async for message in ws:
            if message.type != WSMsgType.TEXT or not words.take(""):
                self.counters["nonsense"] += 1
                return "a page does not say that"
            try:
                wanted = json.loads(message.data)
                stream = wanted["stream"]
            except (ValueError, TypeError, KeyError, RecursionError):
                self.counters["nonsense"] += 1
                return "a page does not say that"
            if isinstance(stream, str):
                self.feed.choose(viewer, stream[:64])
        return "the page is gone"

    async def _recheck(self, request: web.Request) -> str:
        while True:
            await asyncio.sleep(RECHECK_S)
            if self.guard.visitor(request) is None:
                return "the token does not hold any more"

    async def run(self, ready: Callable[[], None]) -> None:
        """Follow the rig until cancelled."""
        async with self._ask() as self._control, self._ask() as self._stop:
            ready()
            await self.feed.run()
