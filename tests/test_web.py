"""The page's server over real sockets: what it tells, whom it lets in, and what too many or too slow pages can do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
from browser import Page, installed

from spiked.bench.web_rig import STREAM, WebRig
from spiked.cli import main
from spiked.errors import SpikedError
from spiked_client.access import AccessList, Entry, dump_access, hash_token
from spiked_client.control import Control
from spiked_client.errors import ClientError
from spiked_client.protocol import BLIND, SPIKE, STIM, decode, encode
from spiked_client.subscribe import Client
from spiked_client.web import door, frames, server, viewer
from spiked_client.web import feed as feeding
from spiked_client.web.feed import Feed
from spiked_client.web.stream import Stream

UNITS, CHANNELS = 30, 64
ORIGIN = {"Content-Type": "application/json"}


class Rig(WebRig):
    """Also takes orders, and remembers them."""

    def __init__(self, **how: Any) -> None:
        super().__init__(UNITS, CHANNELS, chunk_ms=5.0, **how)
        self.asked: list[dict[str, Any]] = []

    def handlers(self) -> dict[str, Any]:
        async def noted(request: dict[str, Any]) -> dict[str, Any]:
            self.asked.append(request)
            return {}

        ops = (
            "start_session",
            "stop_session",
            "calibrate",
            "mark_stim",
            "stop_stimulation",
            "clear_stop",
            "retry_job",
        )
        return {**super().handlers(), **dict.fromkeys(ops, noted)}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(rate_hz=20.0) as r:
        yield r


@contextlib.asynccontextmanager
async def serving(
    rig: WebRig, access: AccessList | None = None, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, server.Pages]]:
    """The server in this loop, on a free port: its address, and itself."""

    def ask() -> Control:
        return Control("127.0.0.1", rig.port)

    feed = Feed(lambda: Client("127.0.0.1", rig.port), ask)
    pages = server.Pages(
        feed, door.guard_for("127.0.0.1", access, context is not None), ask, secure=context is not None
    )
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(door.serve(pages, "127.0.0.1", 0, context, ready.set_result))
    try:
        yield await asyncio.wait_for(ready, 60), pages
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def told(
    ws: aiohttp.ClientWebSocketResponse, wanted: set[str], timeout_s: float = 90.0
) -> dict[str, Any]:
    """The first message of each wanted kind; "frame" is a frame with spikes, as bytes."""
    found: dict[str, Any] = {}
    async with asyncio.timeout(timeout_s):
        while not wanted <= set(found):
            m = await ws.receive()
            if m.type == aiohttp.WSMsgType.BINARY:
                if int.from_bytes(m.data[4:8], "little"):
                    found.setdefault("frame", m.data)
            else:
                assert m.type == aiohttp.WSMsgType.TEXT, m
                d = json.loads(m.data)
                found.setdefault(d["t"], d)
    return found


def unpacked(data: bytes) -> dict[str, Any]:
    """A frame by the table in frames.py."""
    kind, number, old, n, m, left_out, late, lost, base, stop = frames.HEAD.unpack_from(data)
    at = frames.HEAD.size
    out: dict[str, Any] = {
        "kind": kind,
        "number": number,
        "old": old,
        "left_out": left_out,
        "late": late,
        "lost": lost,
        "stop": stop,
    }
    for name, dtype, count in (
        ("start", "<f8", m), ("end", "<f8", m), ("sample", "<i4", n), ("unit", "<i4", n), ("blind_channel", "<i4", m), ("reason", "<i4", m),
        ("channel", "<u2", n), ("uv", "<i2", n),
    ):  # fmt: skip
        assert at % np.dtype(dtype).itemsize == 0
        out[name] = np.frombuffer(data, dtype, count, at)
        at += out[name].nbytes
    assert at == len(data)
    out["sample"] = out["sample"].astype(np.int64) + int(base)
    return out


# ---- frames and what waits ---------------------------------------------------------------------------------------


def some(n: int, first: int = 1 << 40) -> np.ndarray:
    s = np.zeros(n, SPIKE)
    s["sample"], s["unit"], s["channel"], s["amplitude_uv"] = (
        first + np.arange(n),
        np.arange(n) % 7 - 1,
        np.arange(n) % 1000,
        -50.4,
    )
    return s


def test_a_frame_holds_what_was_gathered_and_says_what_it_left_out() -> None:
    blind = np.array([(5, 1 << 41, -1, 4)], BLIND)
    data = frames.pack(3, some(101), blind, (1 << 40) + 500, lost=2)
    got = unpacked(data)
    assert (
        got["sample"].tolist() == some(101)["sample"].tolist()
        and got["unit"].tolist() == some(101)["unit"].tolist()
    )
    assert (got["number"], got["lost"], got["stop"], got["uv"][0]) == (3, 2, (1 << 40) + 500, -50)
    assert (got["start"].tolist(), got["end"].tolist(), got["reason"].tolist()) == (
        [5.0],
        [float(1 << 41)],
        [4],
    )
    assert unpacked(frames.as_old(data))["old"] == 1
    gathered = frames.Gathered([some(frames.MAX_SPIKES), some(50)], [], 9, 0)
    big, n = gathered.frame(0)
    assert (
        n == frames.MAX_SPIKES
        and len(unpacked(big)["unit"]) == frames.MAX_SPIKES
        and unpacked(big)["left_out"] == 50
    )
    assert not gathered


async def test_what_waits_is_bounded_and_the_page_is_told_what_was_dropped() -> None:
    one = frames.pack(0, some(100), np.zeros(0, BLIND), 0)
    box = frames.Outbox(10 * len(one))
    for _ in range(25):
        box.put_frame(one, 100)
    assert box.bytes <= 10 * len(one) and not box.overrun
    box.put_text("{}")
    assert await box.take() == "{}"  # before the frames
    assert unpacked(bytes(await box.take()))["late"] == 1600  # 25 came, one more went for the text
    assert unpacked(bytes(await box.take()))["late"] == 0
    while not box.overrun:
        box.put_text("x" * 1000)
    assert not box._frames  # texts are kept for last


# ---- what pages get ----------------------------------------------------------------------------------------------


async def test_a_late_page_gets_everything_that_was_told_once_and_the_last_seconds(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "ABSENT_S", 60.0)  # a busy computer may let health wait
    async with serving(rig) as (url, pages), aiohttp.ClientSession() as http:
        async with http.ws_connect(url + "live") as first:
            await told(first, {"units", "streams", "frame", "figures"})
            async with http.ws_connect(url + "live") as late:
                got = await told(
                    late, {"link", "state", "units", "streams", "frame", "figures", "events", "jobs"}
                )
        frame = unpacked(got["frame"])
        assert got["link"]["daemon"] and got["state"]["state"] == "recording"
        assert got["units"]["id"] == list(range(UNITS)) and got["units"]["channel"] == rig.roots.tolist()
        about = got["streams"]["rows"][0]
        assert (about["name"], about["number"], len(about["positions_um"])) == (STREAM, 0, CHANNELS)
        assert frame["old"] == 1 and set(frame["unit"].tolist()) <= set(range(-1, UNITS))
        async with http.ws_connect(url + "live") as page:
            right = False
            async with asyncio.timeout(120):  # of the last seconds, in which a busy computer may send less
                while not right:
                    figures = (await told(page, {"figures"}))["figures"]["streams"][STREAM]
                    right = sum(figures["rates_hz"].values()) == pytest.approx(UNITS * 20, rel=0.35)
                    right = right and sum(figures["mua_hz"]) == pytest.approx(CHANNELS * 20, rel=0.35)
    assert not pages.feed.viewers


async def test_units_that_were_lost_on_the_way_are_asked_for_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told once; nothing that comes later would say that they are missing. And nothing is listed twice for that."""
    monkeypatch.setattr(feeding, "MISSING_S", 0.5)
    async with serving(rig) as (url, pages), aiohttp.ClientSession() as http:
        async with http.ws_connect(url + "live") as page:
            await told(page, {"units", "frame"})
            stream = pages.feed.streams[STREAM]
            before = list(stream.gaps), list(stream.stims)
            stream.units = stream.units[:0]
            assert (await told(page, {"units"}))["units"]["id"] == list(range(UNITS))
        assert (list(stream.gaps), list(stream.stims)) == before


async def test_triggers_are_asked_for_until_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Live processes take long to start, and may be busy; nothing else would say later what they are to do."""
    monkeypatch.setattr(feeding, "BUSY_S", 0.2)
    asked = 0

    async def triggers(_request: dict[str, Any]) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise SpikedError("the live process did not answer within 5 s; is it still starting?")
        return {"streams": {STREAM: {"triggers": [], "armed": []}}}

    monkeypatch.setattr(Rig, "handlers", lambda r, others=Rig.handlers: {**others(r), "triggers": triggers})
    with Rig() as rig:
        async with (
            serving(rig) as (url, pages),
            aiohttp.ClientSession() as http,
            http.ws_connect(url + "live") as page,
        ):
            assert (await told(page, {"triggers"}))["triggers"]["streams"] == {
                STREAM: {"triggers": [], "armed": []}
            }
            sorts = pages.feed._sorts
            pages.feed._status = {"state": "recording", "streams": {"A": {"processes": {"live": {}}}}}
            assert not sorts()
            pages.feed._status["streams"]["A"]["processes"]["live"] = {"units": 0}
            assert sorts()
            pages.feed._status["state"] = "queued"
            assert not sorts()


def test_a_ttl_edge_is_no_stimulus() -> None:
    def message(kind: int) -> Any:
        row = np.array([(100 + kind, kind, 6, 1, 0.0)], STIM)
        return SimpleNamespace(message=decode(encode(f"stim.{STREAM}", 1, "s-0", stims=row)))

    stream = Stream(STREAM, "s", 0)
    assert stream.tell(message(1)) is None and not stream.stims  # the clocks' pulses, a camera
    assert stream.tell(message(2)) == {"t": "stim", "stream": STREAM, "rows": [[102, 2, 6, 1]]}
    assert stream.tell(message(2)) is None and len(stream.stims) == 1  # again


async def test_files_and_headers(rig: Rig) -> None:
    async with serving(rig) as (url, _), aiohttp.ClientSession() as http:
        async with http.get(url) as r:
            policy = r.headers["Content-Security-Policy"]
            text = await r.text()
        assert (
            r.status == 200
            and "default-src 'none'" in policy
            and "unsafe" not in policy
            and "frame-ancestors 'none'" in policy
        )
        assert "//" not in text.replace("https://", "").replace("<!doctype", "") or "cdn" not in text
        assert "<script>" not in text and " style=" not in text and " onclick=" not in text
        for path in (
            "static/nothing.js",
            "static/..%2fserver.py",
            "static/%2e%2e/%2e%2e/etc/passwd",
            "etc/passwd",
        ):
            async with http.get(url + path) as r:
                assert r.status == 404


# ---- who may ------------------------------------------------------------------------------------------------------


async def test_another_site_and_another_name_get_nothing(rig: Rig) -> None:
    async with serving(rig) as (url, pages), aiohttp.ClientSession() as http:
        order = json.dumps({"op": "start_session"})
        for headers in (
            {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"},
            {"Host": "127.0.0.1.evil.example"}, {"Origin": url[:-1].replace("127.0.0.1", "localhost")},
        ):  # fmt: skip
            async with http.post(url + "do", data=order, headers={**ORIGIN, **headers}) as r:
                assert r.status == 403, headers
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await http.ws_connect(url + "live", headers=headers)
            assert refused.value.status == 403
        for body, kind, status in (
            ("op=start_session", "application/x-www-form-urlencoded", 415), (order, "text/plain", 415), ("[1]", "application/json", 400),
            ("{", "application/json", 400), ('{"op": "shutdown"}', "application/json", 400), ("[" * 5000, "application/json", 400),
            ("x" * 100_000, "application/json", 413),
        ):  # fmt: skip
            async with http.post(url + "do", data=body, headers={"Content-Type": kind}) as r:
                assert r.status == status, body[:30]
        assert not rig.asked and pages.counters["foreign"] == 12
        async with http.post(url + "do", data=order, headers={**ORIGIN, "Origin": url[:-1]}) as r:
            assert r.status == 200 and rig.asked.pop()["op"] == "start_session"
        # no more orders than a person gives; the stop is not counted

        async def order() -> int:
            async with http.post(url + "do", data=json.dumps({"op": "calibrate"}), headers=ORIGIN) as r:
                return r.status

        began = time.monotonic()
        answers = await asyncio.gather(*(order() for _ in range(60)))
        assert 9 <= answers.count(200) <= 11 + 2 * (time.monotonic() - began)
        assert answers.count(429) == 60 - answers.count(200) > 0
        async with http.post(url + "do", data=json.dumps({"op": "stop_stimulation"}), headers=ORIGIN) as r:
            assert r.status == 200 and rig.asked[-1]["why"] == "web page, this computer"
        rig.asked.clear()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", cert,
         "-days", "2", "-subj", "/CN=rig", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


async def test_tokens_give_roles_over_tls_and_end_when_they_are_taken_away(
    rig: Rig, tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "RECHECK_S", 0.2)
    tokens = {role: f"secret-of-{role}" for role in ("watch", "control", "stimulate")}
    entries = tuple(
        Entry(f"some {role}".replace(" ", "."), role, token_sha256=hash_token(t))
        for role, t in tokens.items()
    )
    file = tmp_path / "access.toml"
    file.write_text(dump_access(entries))
    file.chmod(0o600)
    context = ssl.create_default_context(cafile=str(certificate[0]))
    async with serving(rig, AccessList(tmp_path), door.tls(*certificate)) as (url, _):
        assert url.startswith("https://")
        tries: dict[str, dict[str, int]] = {}
        for role, token in {"": "", "wrong": "nonsense", **tokens}.items():
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=context), cookie_jar=aiohttp.CookieJar(unsafe=True)
            ) as http:
                if role:
                    async with http.post(url + "login", json={"token": token}) as r:
                        assert r.status == (401 if role == "wrong" else 200)
                        cookie = r.headers.get("Set-Cookie", "")
                        assert role == "wrong" or all(
                            x in cookie for x in ("HttpOnly", "Secure", "SameSite=Strict")
                        )
                        assert token not in cookie
                tries[role] = {}
                for op in ("stop_stimulation", "start_session", "clear_stop"):
                    async with http.post(url + "do", json={"op": op}) as r:
                        tries[role][op] = r.status
                try:
                    async with http.ws_connect(url + "live") as ws:
                        await told(ws, {"link"})
                        tries[role]["live"] = 101
                except aiohttp.WSServerHandshakeError as e:
                    tries[role]["live"] = e.status
        nobody = {"stop_stimulation": 401, "start_session": 401, "clear_stop": 401, "live": 401}
        assert tries[""] == tries["wrong"] == nobody
        assert tries["watch"] == {
            "stop_stimulation": 200,
            "start_session": 403,
            "clear_stop": 403,
            "live": 101,
        }
        assert tries["control"] == {
            "stop_stimulation": 200,
            "start_session": 200,
            "clear_stop": 403,
            "live": 101,
        }
        assert tries["stimulate"] == {
            "stop_stimulation": 200,
            "start_session": 200,
            "clear_stop": 200,
            "live": 101,
        }
        bearer = {"Authorization": f"Bearer {tokens['watch']}"}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context), headers=bearer) as http:
            async with http.ws_connect(url + "live") as ws:
                await told(ws, {"link"})
                file.write_text(dump_access(entries[1:]))
                async with asyncio.timeout(60):
                    while (m := await ws.receive()).type in (
                        aiohttp.WSMsgType.TEXT,
                        aiohttp.WSMsgType.BINARY,
                    ):
                        pass
                assert m.type == aiohttp.WSMsgType.CLOSE and "token" in m.extra
            statuses, began = [401], time.monotonic()
            while statuses[-1] != 429:  # five, and one every five seconds
                async with http.post(url + "login", json={"token": "guess"}) as r:
                    statuses.append(r.status)
                assert len(statuses) <= 8 + 0.2 * (time.monotonic() - began)
    rig.asked.clear()


@pytest.mark.skipif(installed() is None, reason="no Chromium on this computer; apt install chromium")
async def test_the_page_asks_for_a_token_and_shows_what_its_holder_may(rig: Rig, tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    file.write_text(dump_access((Entry("anna", "watch", token_sha256=hash_token("annas-token")),)))
    file.chmod(0o600)

    def look(url: str) -> None:
        with Page(tmp_path / "profile", 375, 812) as tab:
            tab.open(url)
            tab.wait("document.getElementById('login').open")
            tab.eval(
                "document.getElementById('token').value = 'nonsense'; document.getElementById('loginform').requestSubmit()"
            )
            tab.wait("document.getElementById('loginsays').textContent.includes('not in the rig')")
            tab.open("about:blank")
            tab.open(url + "#token=annas-token")
            tab.wait("spiked.drawn.spikes > 0 && document.getElementById('link').textContent === 'live'")
            assert tab.eval("location.hash") == "" and not tab.eval("document.getElementById('login').open")
            assert tab.eval("document.getElementById('who').textContent").startswith("anna (watch)")
            tab.wait("document.getElementById('session').textContent.includes('recording')")
            assert (
                tab.eval("Array.from(document.querySelectorAll('#actions button'), (b) => b.disabled)")
                == [True] * 4
            )
            tab.eval("document.getElementById('stop').click()")
            tab.wait("document.getElementById('stop').firstElementChild.textContent !== 'Stop stimulation'")
            until = time.monotonic() + 60
            while not rig.asked and time.monotonic() < until:  # the page says so before it was heard
                time.sleep(0.02)

    async with serving(rig, AccessList(tmp_path)) as (url, _):
        await asyncio.to_thread(look, url)
    assert rig.asked.pop()["why"] == "web page, anna"


def test_beyond_this_computer_only_with_tls_and_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["web", "--host", "0.0.0.0", "--port", "0"]) != 0
    assert "needs TLS" in capsys.readouterr().err
    (tmp_path / "x.pem").write_text("nothing")
    with pytest.raises(ClientError, match="not a certificate and its key"):
        door.tls(tmp_path / "x.pem", tmp_path / "x.pem")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["web", "--port", str(port)]) != 0
    assert f"cannot be served at 127.0.0.1:{port}" in capsys.readouterr().err


# ---- too much and too slow ---------------------------------------------------------------------------------------


async def test_a_page_that_does_not_read_is_sent_away_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(viewer, "STUCK_S", 3.0)
    monkeypatch.setattr(viewer, "OUTBOX_BYTES", 200_000)
    monkeypatch.setattr(frames, "MAX_SPIKES", 4_000)  # also what came while this computer did nothing fits
    with Rig(rate_hz=150.0) as rig:
        async with serving(rig) as (url, pages), aiohttp.ClientSession() as http:
            port = int(url.rsplit(":", 1)[1].strip("/"))
            slow = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", port))
            slow.sendall(
                f"GET /live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            async with http.ws_connect(url + "live") as ws:
                await told(ws, {"frame"})
                n, late, most, ticks = 0, 0, 0, 0

                async def tick() -> None:
                    nonlocal ticks
                    sent = rig.sent
                    while True:
                        await asyncio.sleep(1 / 30)
                        ticks, sent = ticks + (rig.sent > sent), rig.sent

                ticking = asyncio.create_task(tick())
                async with asyncio.timeout(150):
                    while not pages.counters["sent_away"]:
                        m = await ws.receive()
                        if m.type == aiohttp.WSMsgType.BINARY:
                            n += 1
                            late += unpacked(m.data)["late"]
                        most = max(most, *(v.outbox.bytes for v in pages.feed.viewers))
                ticking.cancel()
                assert len(pages.feed.viewers) == 1
            slow.close()
        assert (
            n > ticks / 2 > 10 and late == 0
        )  # the other one saw everything, as often as this loop gets its turn and something came
        assert most <= 200_000 and pages.counters["frames_dropped"] > 10


async def test_no_more_pages_and_connections_than_there_is_room_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_VIEWERS", 3)
    monkeypatch.setattr(door, "MAX_CONNECTIONS", 12)
    monkeypatch.setattr(door, "IDLE_S", 6.0)
    async with serving(rig) as (url, pages), aiohttp.ClientSession() as http:
        port = int(url.rsplit(":", 1)[1].strip("/"))
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(http.ws_connect(url + "live"))
            with pytest.raises(aiohttp.WSServerHandshakeError) as full:
                await http.ws_connect(url + "live")
            assert full.value.status == 503
            ends = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
            for _, writer in ends[:5]:
                writer.write(b"GET / HT")  # and never the rest
            gone = await asyncio.gather(
                *(asyncio.wait_for(r.read(), 90) for r, _ in ends), return_exceptions=True
            )
            assert sum(b"503" in g for g in gone if isinstance(g, bytes)) >= 18
            assert not any(isinstance(g, TimeoutError) for g in gone)  # those that said nothing were closed
            for _, writer in ends:
                writer.close()
            assert pages.counters["turned_away"] >= 18 and len(pages.feed.viewers) == 3
        async with http.ws_connect(url + "live") as ws:  # room again
            await told(ws, {"frame"})


@pytest.mark.parametrize("word", ["{", "[]", '{"stream": 1, "x": ' + '"y"' * 3, "x" * 5000, b"\x00\x01"])
async def test_a_page_that_talks_nonsense_is_closed(rig: Rig, word: str | bytes) -> None:
    async with (
        serving(rig) as (url, pages),
        aiohttp.ClientSession() as http,
        http.ws_connect(url + "live") as ws,
    ):
        await told(ws, {"link"})
        await (ws.send_str(word) if isinstance(word, str) else ws.send_bytes(word))
        async with asyncio.timeout(60):
            while (m := await ws.receive()).type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                pass
        assert m.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
        for _ in range(1000):
            if not pages.feed.viewers:
                break
            await asyncio.sleep(0.05)
        assert not pages.feed.viewers


async def test_a_page_says_when_the_daemon_is_gone_and_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spiked_client.web.feed.ABSENT_S", 1.8)
    with contextlib.ExitStack() as lives:
        rig = lives.enter_context(Rig())
        async with (
            serving(rig) as (url, _),
            aiohttp.ClientSession() as http,
            http.ws_connect(url + "live") as ws,
        ):
            await told(ws, {"frame"})
            await asyncio.to_thread(lives.close)
            async with asyncio.timeout(90):
                while True:
                    link = (await told(ws, {"link"}))["link"]
                    if not link["daemon"]:
                        break
            assert link["age_s"] > 1


def test_the_client_stays_light() -> None:
    code = "import sys, spiked_client, spiked_client.subscribe, spiked_client.web.command; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
