"""The supervisor: one asyncio process that starts sessions, answers control, tells health, and never sees a sample."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import traceback
from pathlib import Path
from typing import Any

import psutil

from spiked import marks
from spiked.afterwards import Afterwards
from spiked.config import Config
from spiked.errors import SourceError, SpikedError
from spiked.journal import Journal
from spiked.lookout import Lookout
from spiked.notify import Teller
from spiked.offline.failures import POLICIES
from spiked.publish.control import ControlServer
from spiked.publish.health import HealthPublisher
from spiked.publish.zmq_pub import LAST_WORDS_S
from spiked.session import Session, left_open, new_folder
from spiked.showing import Showing
from spiked.sources.presence import absent
from spiked.stimulation import Stimulation
from spiked.track import clear_leftovers
from spiked.webpage import WebPage

HEALTH_S = 1.0
PRESENCE_S = 3.0  # between looks whether samples come
CLOSING_S = 120.0  # for a job that ends, and for last words
ORPHAN_S = 20.0  # what is left of a killed daemon drains its ring and closes its file


class Service:
    """`run` is the life of the daemon: startup, sessions one after the other, shutdown."""

    def __init__(self, config: Config, jobs_elsewhere: bool = False) -> None:
        self.config = config
        self.journal = Journal(None)
        self.systemd = Teller([s.silence_s for s in config.stream])
        self.session: Session | None = None
        self.last: dict[str, Any] = {}
        self.exit_code = 0
        self.waits_for = ""  # a daemon that records when samples come: whose
        self._interrupted = False  # an earlier daemon died while it recorded
        self._quit = asyncio.Event()
        self._start = asyncio.Event()
        self._skip_offline = False
        self._untold = ""
        self._signals = 0
        self.health: HealthPublisher | None = None
        self.control: ControlServer | None = None
        self.lookout = Lookout(
            config, lambda: self.session.journal if self.session else self.journal, self._news
        )
        self.stimulation = Stimulation(lambda: self.session)
        self.showing = Showing(lambda: self.session)
        self.page = WebPage(config, self._control_port, self.journal)
        self.afterwards = Afterwards(config, self.journal, self._offline_news, jobs_elsewhere)
        self._to_sort: dict[str, Session] = {}  # sessions whose offline job is not over, by folder

    # ---- control -----------------------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, Any]:
        async def status(_request: dict[str, Any]) -> dict[str, Any]:
            return {**self.status(), "jobs": await self.afterwards.status()}

        async def endpoints(_request: dict[str, Any]) -> dict[str, Any]:
            tracks = self.session.tracks.values() if self.session else ()
            streams = {t.name: t.endpoints for t in tracks if t.endpoints}
            return {"streams": streams, "health": self.health.endpoint if self.health else None}

        async def start_session(_request: dict[str, Any]) -> dict[str, Any]:
            if self.session is not None and self.session.state not in ("done", "failed", "queued", "offline"):
                raise SpikedError(
                    f"session {self.session.folder.name} is {self.session.state}; stop it first"
                )
            new_folder(self.config).rmdir()  # who asked is told of a disk that takes nothing
            self._start.set()
            return {}

        async def stop_session(_request: dict[str, Any]) -> dict[str, Any]:
            if self.session is None:
                raise SpikedError("no session is running; start one first")
            self.session.stop("asked over the control port")
            return {"session": self.session.folder.name}

        async def calibrate(request: dict[str, Any]) -> dict[str, Any]:
            self._command("live", "calibrate", stream=request.get("stream"))
            return {}

        async def cancel_calibration(request: dict[str, Any]) -> dict[str, Any]:
            self._command("live", "cancel_calibration", stream=request.get("stream"))
            return {}

        async def mark_stim(request: dict[str, Any]) -> dict[str, Any]:
            keep = {
                **marks.checked(request),
                **({"stream": request["stream"]} if "stream" in request else {}),
            }
            if "sample" in keep and "stream" not in keep and self.session and len(self.session.tracks) > 1:
                raise SpikedError(f"name the stream of that sample: {', '.join(self.session.tracks)}")
            for t in self.session.tracks.values() if self.session else ():
                if t.ring is not None and keep.get("stream") in (None, t.name):
                    marks.event(
                        keep, t.ring.first_sample, t.ring.next_sample, t.ring.info.fs_hz
                    )  # or say why not
            self._command("acquire", "mark", **keep)
            return {}

        async def clocks(_request: dict[str, Any]) -> dict[str, Any]:
            if self.session is None:
                raise SpikedError("no session is running; start one first")
            return self.session.timekeeper.everything()

        async def shutdown(_request: dict[str, Any]) -> dict[str, Any]:
            self._stop("asked over the control port")
            return {}

        return {
            "status": status, "endpoints": endpoints, "start_session": start_session, "stop_session": stop_session,
            "calibrate": calibrate, "cancel_calibration": cancel_calibration, "mark_stim": mark_stim, "shutdown": shutdown, "clocks": clocks,
            **self.stimulation.operations(), **self.showing.operations(), **self.afterwards.operations(),
        }  # fmt: skip

    def _command(self, role: str, op: str, **fields: Any) -> None:
        if self.session is None or self.session.state != "recording":
            raise SpikedError("no session is recording; start one first")
        wanted = fields.pop("stream", None)
        tracks = [t for t in self.session.tracks.values() if wanted in (None, t.name)]
        if not tracks:
            raise SpikedError(f"no stream {wanted}; the session has {', '.join(self.session.tracks)}")
        children = [c for t in tracks if (c := t.children.get(role)) is not None and c.running]
        if not children:
            raise SpikedError(f"there is no {role} process for {op}; it is off, or being restarted")
        for child in children:
            child.command(op, **fields)

    # ---- what happens ------------------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        self.systemd.stopping(why)
        self._quit.set()
        self._start.set()
        if self.session is not None:
            self.session.stop(why)

    def _stop_over_mqtt(self, why: str) -> None:
        with contextlib.suppress(SpikedError):  # no session: nothing can be sent
            self.stimulation.stop(f"MQTT: {why or 'no reason given'}")

    def _on_signal(self, sig: signal.Signals) -> None:
        self._signals += 1
        self._stop(f"{sig.name}")
        if sig is signal.SIGTERM or self._signals > 1:
            self._skip_offline = True
            self.afterwards.stop()

    def _news(self, topic: str, news: dict[str, Any]) -> None:
        if self.health is not None and topic == "session":
            self.health.session(
                str(news.get("event")),
                **{k: v for k, v in news.items() if k not in ("event", "v", "seq", "run")},
            )
        if topic == "clock":
            if self.health is not None:
                self.health.clock(**news)
            return
        self.lookout.news(news)

    def _offline_news(self, event: dict[str, Any]) -> None:
        """What the queue's runner tells: to the session it is about, or of one of an earlier daemon."""
        if event["event"] == "job":
            self._news("session", {**event, "policy": POLICIES.get(str(event.get("kind")), "")})
        session = self._to_sort.get(str(event.get("folder")))
        if session is None:
            if event["event"] in ("job", "waits"):
                self.journal.note("offline", f"{event.get('session', 'offline')}: {event.get('text')}")
                self._news("session", {**event, "event": "offline"})
        elif session.offline_heard(event):
            del self._to_sort[str(event["folder"])]
            session.journal.close()

    def status(self) -> dict[str, Any]:
        """What `spiked status` prints."""
        me = psutil.Process()
        ports = {"control": self.control, "health": self.health}
        told = {name: dict(port.counters) for name, port in ports.items() if port is not None}
        d: dict[str, Any] = {
            "rig": self.config.rig.name,
            "pid": me.pid,
            "ports": told,
            **self.lookout.facts(),
        }
        if (page := self.page.told()) is not None:
            d["web"] = page
        if self.waits_for:
            d["waits_for"] = self.waits_for
        if self.session is None:
            return {**d, "state": "idle", "streams": {}}
        free = self._free_bytes(self.session)
        return {**d, **self.session.status(), "disk_free_gb": round(free / 1e9, 2), "cpu": self._cpu()}

    @staticmethod
    def _free_bytes(session: Session) -> int:
        """As a recorder said last, where there is one: to ask a disk that hangs would hold up everything."""
        told = [
            c.last.get("progress", {}).get("free_bytes")
            for t in session.tracks.values()
            for c in t.children.values()
        ]
        known = [int(n) for n in told if n]
        return min(known) if known else int(psutil.disk_usage(str(session.folder)).free)

    def _cpu(self) -> dict[str, float]:
        """CPU seconds each process has used so far."""
        out = {}
        for track in self.session.tracks.values() if self.session else ():
            for role, child in track.children.items():
                if child.running:
                    with contextlib.suppress(psutil.Error):
                        t = psutil.Process(child.pid).cpu_times()
                        out[f"{track.name}.{role}"] = round(t.user + t.system, 2)
        return out

    async def _tell_health(self) -> None:
        while True:
            try:
                status = self.status()
            except (OSError, psutil.Error) as e:  # a session folder that was just removed, say
                self.journal.note("health", f"no status: {e}", level="warning")
                await asyncio.sleep(HEALTH_S)
                continue
            self._show(status)
            self.systemd.tell(status, self._quit.is_set())
            await asyncio.sleep(HEALTH_S)

    def _show(self, status: dict[str, Any]) -> None:
        """To everybody who looks. A figure that cannot be told is noted, once; systemd would end a daemon that falls silent."""
        try:
            if self.health is not None:
                self.health.health(**status)
            self.lookout.see(status)
        except Exception as e:  # noqa: BLE001
            text = f"the health of this second cannot be told ({type(e).__name__}: {e})"
            if text != self._untold:
                self._untold = text
                self.journal.note("health", text, level="error", trace=traceback.format_exc(limit=20))

    # ---- life --------------------------------------------------------------------------------------------------

    async def startup(self) -> None:
        """Bind the ports, then recover what an earlier life left behind."""
        self.systemd.starting("starting")
        for sig in (
            signal.SIGHUP,
            signal.SIGTSTP,
        ):  # a terminal that closes, or Ctrl-Z: every process of ours gets it
            signal.signal(sig, signal.SIG_IGN)  # and inherits this
        p = self.config.publish
        doors: dict[str, Any] = {"keys": p.keys, "peers": p.peers}
        self.health = HealthPublisher(p.host, p.health_port, f"{self.config.rig.name}-{os.getpid()}", **doors)
        self.control = ControlServer(p.host, p.control_port, self._handlers(), **doors)
        await self.control.start()
        await self.page.start()
        await self.lookout.start(
            self._handlers(), self._stop_over_mqtt, self.afterwards.status, self._control_port()
        )
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._on_signal, sig)
        await asyncio.to_thread(self._recover_left_behind)
        await self.afterwards.begin()
        self.systemd.ready()

    def _control_port(self) -> int:
        return (
            int(self.control.endpoint.rpartition(":")[2])
            if self.control
            else self.config.publish.control_port
        )

    def _recover_left_behind(self) -> None:
        for path in clear_leftovers(self.config.rig.runtime):
            self.journal.note("leftover", f"removed {path}, left by a daemon that died", level="warning")
        root = self.config.rig.sessions.expanduser()
        for path in sorted(root.glob("*/state.json")) if root.is_dir() else ():
            state = unfinished(path)
            if state is None:
                continue
            from spiked.record.recover import recover

            self.systemd.starting(f"recovering {path.parent.name}")
            try:
                recover(path.parent, ORPHAN_S)
                self._interrupted = True
                new = path.with_name("state.json.new")
                new.write_text(json.dumps({**state, "state": "queued", "recovered": True}), encoding="utf-8")
                new.replace(path)
                self.journal.note("recover", f"recovered {path.parent}", level="warning")
            except (SpikedError, OSError) as e:
                self.journal.note("recover", f"{path.parent}: {e}", level="error")

    async def run(self, duration_s: float | None = None, once: bool = True) -> int:
        """Exit code. With `once`, ends after the first session; else waits for start_session."""
        await self.startup()
        teller = asyncio.create_task(self._tell_health(), name="health")
        try:
            if once:
                await self._one_session(duration_s, once)
                return self.exit_code
            if self.config.rig.begin == "samples" or self._interrupted:
                self._start.set()
            while True:
                await self._start.wait()
                self._start.clear()
                if self._quit.is_set():
                    return 0  # it was asked to end; how each session went is in its folder
                await self._one_session(duration_s, once)
                while self._source_left() and await self._samples_come():
                    await self._one_session(duration_s, once)
        finally:
            teller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await teller
            await self.shutdown()

    def _source_left(self) -> bool:
        """Whether the session ended because nobody sent (any more); of one that got nothing no trace is left."""
        session = self.session
        if session is None or self._quit.is_set() or self.config.rig.begin == "asked":
            return False
        if session.exit_code != SourceError.exit_code:
            return False
        if not any(t.facts()["samples"] for t in session.tracks.values()):
            shutil.rmtree(session.folder, ignore_errors=True)
            self.session = None
        return True

    async def _samples_come(self) -> bool:
        """Wait until every stream's program sends; False when a session is asked for first, or the end."""
        try:
            while not self._start.is_set():
                found = {s.name: await asyncio.to_thread(absent, s) for s in self.config.stream}
                why = next((f"{name}: {text}" for name, text in found.items() if text), "")
                if not why:
                    self.journal.note("waits", "samples come")
                    return True
                if why != self.waits_for:
                    self.waits_for = why
                    self.journal.note("waits", f"recording begins when samples come; {why}")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PRESENCE_S):
                        await self._start.wait()
            return False
        finally:
            self.waits_for = ""

    async def _one_session(self, duration_s: float | None, once: bool) -> None:
        if self._quit.is_set():  # while it recovered, or looked for samples
            return
        session = self.session = Session(self.config, self._news)
        self.last = await session.run(duration_s)
        if session.state == "queued":
            self._to_sort[str(session.folder.resolve())] = session
            job = await self.afterwards.enqueue(session.folder)
            if job is None:  # said why; a later start queues it
                del self._to_sort[str(session.folder.resolve())]
                session.journal.close()
            if self._skip_offline and not self.afterwards.elsewhere:
                text = "offline sorting waits for the daemon's next start"
                self.journal.note(
                    "offline", f"{text}; `spiked sort {session.folder}` runs it now", level="warning"
                )
            elif once and job is not None:
                await self.afterwards.finished(job)
                self.last = session.summary()
        else:
            session.journal.close()
        self.exit_code = session.exit_code

    async def shutdown(self) -> None:
        self.systemd.stopping("closing", CLOSING_S)
        await self.afterwards.shutdown()
        for session in self._to_sort.values():
            session.journal.close()
        await self.lookout.close()
        await self.page.close()
        if self.control is not None:
            await self.control.close()
        if self.health is not None:
            self.health.close(LAST_WORDS_S)


def unfinished(state_file: Path) -> dict[str, Any] | None:
    """The state of a session whose supervisor is gone before it ended; None when there is nothing to do."""
    try:
        text = state_file.read_text(encoding="utf-8")
        if not text.strip("\0") and any(map(left_open, state_file.parent.glob("*.nwb"))):
            return {"started": "", "error": ""}  # what a power cut leaves of a file that was just written
        state = json.loads(text)
        if state["state"] in ("done", "failed", "queued", "offline"):
            return None
        pid = int(state["pid"])
        began = state_file.stat().st_mtime
        if psutil.pid_exists(pid) and psutil.Process(pid).create_time() <= began:
            return None  # still somebody's session
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, psutil.Error):
        return None  # not ours, or damaged
    return dict(state)


async def serve(
    config: Config, duration_s: float | None = None, once: bool = True, jobs_elsewhere: bool = False
) -> tuple[int, dict[str, Any]]:
    """Run the daemon; (exit code, summary of the last session).

    With `jobs_elsewhere` sessions are queued, and something else (`spiked jobs run --wait`) sorts them.
    """
    service = Service(config, jobs_elsewhere)
    code = await service.run(duration_s, once)
    return code, service.last
