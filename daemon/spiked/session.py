"""One session: from the first sample of its streams to curated units, as a state machine over child processes.

starting -> recording -> stopping -> finalizing -> offline -> done, or failed with the reason. Whatever dies is
restarted from the ring; what cannot be restarted ends the session cleanly, with what was recorded kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from spiked import config as configuration
from spiked.act.shared import account
from spiked.errors import RecordingError, SpikedError
from spiked.hang import Hangs
from spiked.journal import Journal
from spiked.processes.child import Child
from spiked.record import superblock
from spiked.ring import Ring
from spiked.stream import StreamInfo
from spiked.timekeeping import Timekeeper
from spiked.track import RESTARTS, Track, ring_path

WITHIN_S = 60.0
SOURCE_RETRY_S = 3.0  # before a source that went away is looked for again, each time for stream.wait_s
START_RETRY_S = 2.0  # before a process that could not be started is tried again
RECORD_UP_S = 10.0  # that a stream waits for its recorder, at most
ACQUIRE_ENDS_S = 30.0  # one that is only being started hears of it then
FINISH_S = 120.0
FINALIZE_S = 600.0
PROGRESS_NOTE_S = 5.0


def new_folder(config: configuration.Config) -> Path:
    """A fresh session folder, or RecordingError with the remedy."""
    root = config.rig.sessions.expanduser()
    if not str(root).isprintable():  # what is not UTF-8 travels in no message, and stands in no file
        raise RecordingError(f"the path {str(root)!a} is not readable text; choose another rig.sessions")
    stamp = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    for extra in ("", *(f"-{i}" for i in range(2, 100))):
        folder = root / f"{stamp}_{config.rig.name}{extra}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as e:
            raise RecordingError(
                f"cannot create a session folder in {root}: {e.strerror}; check rig.sessions and its disk"
            ) from e
    raise RecordingError(f"cannot find a free session name in {root}")


def left_open(path: Path) -> bool:
    """Whether a session file is there that its writer did not close, or that cannot be told to be whole."""
    try:
        return superblock.read(path).open_for_write
    except RecordingError:
        return path.exists()


class Session:
    """See the module. `run` takes it through all states and returns a summary."""

    def __init__(
        self, config: configuration.Config, on_news: Callable[[str, dict[str, Any]], None] | None = None
    ) -> None:
        self.config, self.on_news = config, on_news or (lambda _topic, _news: None)
        self.folder = new_folder(config)
        self.journal = Journal(self.folder / "log.jsonl")
        self.state, self.error, self.exit_code = "starting", "", 0
        self.started = datetime.now().astimezone()
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self.offline: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._noted: dict[str, float] = {}
        self.timekeeper = Timekeeper(self.folder, self.journal, lambda news: self.on_news("session", news))
        self._not_whole = False  # a session file could not be closed properly
        self.tracks = {
            s.name: Track(s, ring_path(config.rig.runtime, self.folder.name, s.name)) for s in config.stream
        }
        try:
            (self.folder / "session.toml").write_text(configuration.dump(config), encoding="utf-8")
            self._save_state()
        except OSError as e:
            raise RecordingError(f"cannot write into {self.folder}: {e.strerror}; check the disk") from e

    # ---- state -------------------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        d = {
            "state": self.state,
            "pid": os.getpid(),
            "started": self.started.isoformat(),
            "error": self.error,
        }
        new = self.folder / "state.json.new"
        new.write_text(json.dumps(d), encoding="utf-8")
        new.replace(self.folder / "state.json")

    def _become(self, state: str, text: str = "") -> None:
        self.state = state
        self.journal.note("state", text or f"session {state}", state=state)
        try:
            self._save_state()
        except OSError as e:
            self.journal.note("error", f"state file: {e.strerror}", level="error")
        self.on_news("session", {"event": "state", "state": state, "session": self.folder.name, "text": text})

    def stop(self, why: str = "") -> None:
        """End the session cleanly; safe to call at any time, any number of times."""
        if not self._stop.is_set():
            self.journal.note("stop", f"stopping: {why or 'asked to'}")
            self._stop.set()

    def fail(self, error: str, code: int) -> None:
        """End the session because of an error; what was recorded is kept."""
        if not self.error:
            self.error, self.exit_code = error, code
        self.journal.note("error", error, level="error")
        self.on_news("session", {"event": "error", "text": error, "session": self.folder.name})
        self._stop.set()

    # ---- children ----------------------------------------------------------------------------------------------

    async def _spawn(self, track: Track, role: str) -> None:
        args = [role, "--session", str(self.folder), "--stream", track.name, "--ring", str(track.ring_path)]
        args += ["--life", str(track.lives[role])]
        child = Child(role, "spiked.processes.run", args, partial(self._heard, track))
        track.children[role] = child
        env = (
            {"OMP_NUM_THREADS": str(self.config.live.threads)} if role == "live" else {"OMP_NUM_THREADS": "1"}
        )
        try:
            if track.renew_ring_name():
                text = f"{track.name}: somebody removed {track.ring_path}, it is there again; does this user's last login end (`loginctl enable-linger`)?"
                self.journal.note("warning", text, level="warning")
            await child.start(self.folder / f"{track.name}.{role}.stderr", env=env)
        except OSError as e:  # no memory or no process number left: it is tried again, like one that died
            text = f"{track.name}: {role} cannot be started: {e.strerror or e}"
            self.journal.note("error", text, level="error", role=role)
            await asyncio.sleep(START_RETRY_S)
        else:
            text = f"{track.name}: {role} started (pid {child.pid})"
            self.journal.note("process", text, role=role, pid=child.pid)
            if role == "acquire" and self._stop.is_set():
                child.command("stop")  # it was being started when the others were told
        task = asyncio.create_task(self._attend(track, role, child), name=f"attend {track.name} {role}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _heard(self, track: Track, child: Child, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress" and child.name == "acquire" and track.state in ("starting", "lost"):
            self._heard_samples(track, int(event["samples"]))
        rest = {k: v for k, v in event.items() if k not in ("event", "text", "level", "t_ns")}
        if kind == "ready" and child.name == "live":
            track.endpoints = event.get("endpoints", {})
            self.journal.note(
                "live", f"{track.name}: live path ready, network {event.get('network')}", **rest
            )
        elif kind == "lost":
            self._not_recorded(track, int(event["start"]), int(event["stop"]))
        elif kind == "log":
            self.journal.note("log", f"{track.name}: {event.get('text')}", level=event.get("level", "info"))
        elif kind == "act":
            self.journal.note("act", f"{track.name}: {event.get('text')}", level=event.get("level", "info"))
        elif kind in ("calibrated", "fatal", "crash"):
            level = "info" if kind == "calibrated" else "error"
            text = event.get("error") or f"calibrated: {event.get('units')} units"
            self.journal.note(kind, f"{track.name}: {child.name}: {text}", level=level, **rest)
        if kind in ("calibrated", "calibration", "act"):
            self.on_news("session", {**event, "stream": track.name})
        self._changed.set()

    def _heard_samples(self, track: Track, samples: int) -> None:
        """A stream records once its count rises; after a loss that is news."""
        if track.state == "lost":
            if samples <= track.lost_at:
                return
            self._say("stream_back", track, f"stream {track.name} is back", "warning")
        track.state, track.error = "recording", ""

    def _not_recorded(self, track: Track, start: int, stop: int) -> None:
        """The recorder was away for longer than the ring holds: clients are told of the same gap as the file."""
        channels = 0 if track.ring is None else track.ring.info.n_channels
        track.lost.append({"start": start, "stop": stop, "reason": "lost", "n_channels": channels})
        if live := track.children.get("live"):
            live.command("lost", start=start, stop=stop)

    def _make_ring(self, track: Track, child: Child, event: dict[str, Any]) -> None:
        try:
            info = StreamInfo.from_json(event["info"])
            track.hold(Ring.create(track.ring_path, info, self.config.ring.seconds))
        except SpikedError as e:
            self.fail(str(e), e.exit_code)
            return
        child.command("ring")
        self.journal.note(
            "stream", f"{info.name}: {info.n_channels} channels at {info.fs_hz:g} Hz from {info.source}, {info.dtype}",
            channels=info.n_channels, fs_hz=info.fs_hz,
        )  # fmt: skip
        if not info.geometry_known:
            self.journal.note(
                "warning", f"{info.name}: no probe map; positions are a placeholder. Set stream.probe or stream.electrode_map",
                level="warning",
            )  # fmt: skip

    async def _attend(self, track: Track, role: str, child: Child) -> None:
        """What to do when a process ends."""
        code = await child.wait()
        if track.children.get(role) is not child or role in track.over:
            return
        fatal = child.last.get("fatal")
        expected = code == 0 and (
            self._stop.is_set() or (track.ring is not None and track.ring.ended) or role == "acquire"
        )
        if expected:
            track.over.add(role)
            if role == "acquire":
                self._ended(track)
        elif role == "acquire" and fatal and self._may_come_back(track, fatal):
            await self._source_lost(track, str(fatal["error"]))
        elif fatal or not await self._restart(track, role, code):
            track.over.add(role)
            self._lost(track, role, code, fatal)
        self._changed.set()

    def _others(self, track: Track) -> list[Track]:
        return [t for t in self.tracks.values() if t is not track and t.goes_on]

    def _ended(self, track: Track) -> None:
        """Its source has no more: the session goes on while another stream does."""
        if track.goes_on:
            track.finish("ended")
        if not any(t.goes_on for t in self.tracks.values()):
            self.stop(f"stream {track.name} ended")
        elif not self._stop.is_set():
            self._say("stream_ended", track, f"stream {track.name} ended; the others go on", "warning")

    def _may_come_back(self, track: Track, fatal: dict[str, Any]) -> bool:
        """A device that fell silent while other streams record; alone, or never heard, it ends the session."""
        recording = [t for t in self._others(track) if t.state == "recording"]
        curable = fatal.get("kind") in ("SourceError", "StreamChanged")
        return curable and track.ring is not None and bool(recording) and not self._stop.is_set()

    async def _source_lost(self, track: Track, why: str) -> None:
        """Say so and look for it again, as long as the session lasts."""
        track.state, track.error, track.lost_at = "lost", why, track.facts()["samples"]
        text = f"{why}. The other streams go on; {track.name} is looked for until the session ends"
        self._say("stream_lost", track, text, "error")
        try:
            async with asyncio.timeout(SOURCE_RETRY_S):
                await self._stop.wait()
            track.over.add("acquire")
        except TimeoutError:
            track.lives["acquire"] += 1
            await self._spawn(track, "acquire")

    def _say(self, event: str, track: Track, text: str, level: str) -> None:
        self.journal.note(event, text, level=level, stream=track.name)
        self.on_news("session", {"event": event, "stream": track.name, "text": text})

    async def _restart(self, track: Track, role: str, code: int | None) -> bool:
        deaths, now = track.deaths[role], time.monotonic()
        if len(deaths) == RESTARTS and now - deaths[0] < WITHIN_S:
            return False
        if role == "acquire" and self._stop.is_set():
            return False
        deaths.append(now)
        track.lives[role] += 1
        self.journal.note(
            "restart",
            f"{track.name}: {role} died (exit {code}); restarting it",
            level="warning",
            role=role,
            exit=code,
        )
        self.on_news("session", {"event": "restart", "stream": track.name, "process": role})
        await self._spawn(track, role)
        return True

    def _lost(self, track: Track, role: str, code: int | None, fatal: dict[str, Any] | None) -> None:
        why = (
            fatal["error"]
            if fatal
            else f"{role} of {track.name} keeps dying (exit {code}); see {track.name}.{role}.stderr"
        )
        exit_code = int(fatal.get("code", 1)) if fatal else 1
        if role == "live" and not self._stop.is_set():
            # the recording comes first: it goes on without the live path
            if acquire := track.children.get("acquire"):
                acquire.command("forget", reader="live")
            self.error, self.exit_code = self.error or why, self.exit_code or exit_code
            track.error = why
            self._say("error", track, f"{why}; recording goes on without live sorting", "error")
            return
        track.finish("failed", why)
        if track.ring is None or not self._others(track):
            self.fail(
                f"{why}. The session was ended; start a new session"
                if role == "acquire" and track.ring
                else why,
                exit_code,
            )
            return
        self.error, self.exit_code = self.error or why, self.exit_code or exit_code
        self._say("stream_failed", track, f"{why}; {track.name} is over, the other streams go on", "error")

    # ---- the run -----------------------------------------------------------------------------------------------

    async def run(self, duration_s: float | None = None) -> dict[str, Any]:
        """The whole session. Cancelling is not a way to stop it: call `stop`."""
        try:
            await self._start_streams()
            if not self._stop.is_set():
                self._become("recording", f"recording into {self.folder}")
                self.timekeeper.begin(self.tracks.values())
                await self._until_stopped(duration_s)
            await self._end_streams()
            self.timekeeper.finish(self.tracks.values())
            self._become("finalizing")
            await self._finalize()
        finally:
            for track in self.tracks.values():
                track.release()
            account(self.config.rig.runtime, os.getpid(), self.folder.name).unlink(missing_ok=True)
        recorded = any(t.facts()["samples"] for t in self.tracks.values())
        to_sort = any(t.facts()["samples"] and t.cfg.spikes for t in self.tracks.values())
        wanted = to_sort and self.config.offline.enabled and self.config.record.enabled
        self._become(
            "failed" if self._not_whole or (self.error and not recorded) else "queued" if wanted else "done"
        )
        return self.summary()

    async def _start_streams(self) -> None:
        """All processes at once: record and live load what they need while the stream is waited for."""
        live = sum("live" in t.roles(self.config) for t in self.tracks.values())
        have = len(os.sched_getaffinity(0))
        if live > 1 and live * self.config.live.threads > have:
            text = f"{live} live paths of {self.config.live.threads} threads on {have} cores: they will not all keep up; lower live.threads or set spikes = false"
            self.journal.note("warning", text, level="warning")
        for track in self.tracks.values():
            for role in track.roles(self.config):
                await self._spawn(track, role)
        while not self._stop.is_set():
            for track in (t for t in self.tracks.values() if t.ring is None):
                self._begin_stream(track)
            if all(t.ring is not None for t in self.tracks.values()):
                break
            await self._news()

    def _begin_stream(self, track: Track) -> None:
        """Make its ring once its source is there and its recorder is up. What comes until then waits in the source's queue, and comes on top of
        what the ring holds for a recorder that is slow to start.
        """
        acquire, record = track.children.get("acquire"), track.children.get("record")
        offer = acquire.last.get("stream") if acquire else None
        if acquire is None or offer is None or not acquire.running:
            return
        waited_s = (time.monotonic_ns() - int(offer.get("t_ns", 0))) / 1e9
        patience_s = min(RECORD_UP_S, self.config.ring.seconds / 2)  # the ring has to hold it all at once
        if record is None or "up" in record.last or "record" in track.over or waited_s > patience_s:
            self._make_ring(track, acquire, offer)

    async def _news(self) -> None:
        self._changed.clear()
        waits = [asyncio.create_task(self._changed.wait()), asyncio.create_task(self._stop.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=0.5)
        for w in waits:
            w.cancel()

    def _kill_hanging(self, hangs: Hangs) -> None:
        there = [
            (t, role, c)
            for t in self.tracks.values()
            if t.state == "recording"
            for role, c in t.children.items()
        ]
        names = {id(c): t.name for t, _, c in there}
        for role, child, silent_s in hangs.look([(role, c) for _, role, c in there]):
            text = f"{names[id(child)]}: {role} says nothing for {silent_s:.0f} s; killing it, to be restarted from the ring"
            self.journal.note("hang", text, level="warning", role=role, pid=child.pid)
            child.kill()

    async def _until_stopped(self, duration_s: float | None) -> None:
        hangs = Hangs(self.config.ring.seconds)
        while not self._stop.is_set():
            await self._news()
            if self.timekeeper.look(self.tracks.values()):
                self.on_news("clock", self.timekeeper.news())
            self._kill_hanging(hangs)
            coming = [t.ring for t in self.tracks.values() if t.ring is not None and t.state == "recording"]
            if (
                duration_s is not None
                and coming
                and all(r.committed >= duration_s * r.info.fs_hz for r in coming)
            ):
                self.stop(f"{duration_s:g} s recorded")

    async def _end_streams(self) -> None:
        for track in self.tracks.values():
            if track.state == "lost":
                self.error, self.exit_code = self.error or track.error, self.exit_code or 3
        self._become("stopping")
        for track in self.tracks.values():
            if acquire := track.children.get("acquire"):
                await acquire.stop(ACQUIRE_ENDS_S)
            if track.ring is not None:
                track.ring.end()
                continue
            for role in ("record", "live"):  # they wait for a ring that will not come
                if role in track.children:
                    track.children[role].command("stop")
        late = await self._late(
            [(t, r) for t in self.tracks.values() for r in ("record", "live") if r in t.children]
        )
        for track, role in late:
            rest = "; another one writes what is left in the ring" if role == "record" else ""
            text = f"{track.name}: {role} did not finish within {FINISH_S:g} s{rest}"
            self.journal.note("error", text, level="error")
            if role == "record":
                track.children[role].kill()
            else:
                track.over.add(role)
                await track.children[role].stop()
        for track, role in await self._late([(t, r) for t, r in late if r == "record"]):
            track.over.add(role)
            await track.children[role].stop()
            self.fail(f"{track.name}: {role} does not finish; the disk may hang", 4)

    async def _late(self, roles: list[tuple[Track, str]]) -> list[tuple[Track, str]]:
        """Those of them that do not end within FINISH_S."""
        until = time.monotonic() + FINISH_S
        while time.monotonic() < until and any(r not in t.over for t, r in roles):
            await self._news()
            await asyncio.sleep(0.05)
        return [(t, r) for t, r in roles if r not in t.over]

    async def _finalize(self) -> None:
        for track in self.tracks.values():
            if track.ring is None or not self.config.record.enabled:
                continue
            args = [
                "finalize",
                "--session",
                str(self.folder),
                "--stream",
                track.name,
                "--ring",
                str(track.ring_path),
            ]
            child = Child("finalize", "spiked.processes.run", args, partial(self._heard, track))
            try:
                await child.start(self.folder / f"{track.name}.finalize.stderr")
                code = await child.wait(FINALIZE_S)
            except OSError:
                code = None
            if code == 0:
                continue
            self._not_whole |= left_open(self.folder / f"{track.name}.nwb")
            if fatal := child.last.get("fatal"):
                self.fail(str(fatal["error"]), int(fatal["code"]))
            else:
                self.fail(
                    f"{track.name}: the session file could not be finalized; run `spiked recover {self.folder}`",
                    4,
                )

    def offline_heard(self, event: dict[str, Any]) -> bool:
        """What the queue's runner tells of this session's job; True when the job is over."""
        if event["event"] == "progress":
            now, stage = time.monotonic(), str(event.get("stage"))
            if now - self._noted.get(stage, 0.0) > PROGRESS_NOTE_S:
                self._noted[stage] = now
                fraction = event.get("fraction")
                share = f" {100 * fraction:.0f} %" if isinstance(fraction, int | float) else ""
                self.journal.note("offline", f"offline: {stage}{share} {event.get('text', '')}".rstrip())
        elif event["event"] == "job":
            return self._offline_state(str(event["state"]), str(event.get("text", "")))
        self.on_news("session", {**event, "event": "offline", "session": self.folder.name})
        return False

    def _offline_state(self, state: str, text: str) -> bool:
        if state == "running":
            self._become("offline", "offline sorting started")
        elif state == "queued":
            self._become("queued", f"offline sorting waits: {text}")
        elif state == "done":
            self.offline = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
            self._become("done", text)
        elif state == "cancelled":
            self._become("done", "offline sorting was cancelled")
        else:
            self.error, self.exit_code = self.error or text, self.exit_code or 6
            self._become("failed", f"offline sorting failed: {text}")
        return state in ("done", "cancelled", "failed")

    # ---- what others see ---------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The session as the control port and the health topic tell it."""
        clocks = self.timekeeper.told()
        return {
            "session": self.folder.name,
            "folder": str(self.folder),
            "state": self.state,
            "error": self.error,
            "streams": {t.name: {**t.told(), "clock": clocks.get(t.name)} for t in self.tracks.values()},
        }

    def summary(self) -> dict[str, Any]:
        """`status` plus every gap, for the end of the session."""
        return {
            **self.status(),
            "gap_list": {t.name: t.gaps() for t in self.tracks.values()},
            "offline": self.offline,
        }
