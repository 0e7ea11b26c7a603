"""One session: from the first sample of its streams to curated units, as a state machine over child processes.

starting -> recording -> stopping -> finalizing -> offline -> done, or failed with the reason. Whatever dies is
restarted from the ring; what cannot be restarted ends the session cleanly, with what was recorded kept.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from spiked import config as configuration
from spiked.errors import RecordingError, SpikedError
from spiked.journal import Journal
from spiked.processes.child import Child
from spiked.ring import GAP_REASONS, Ring
from spiked.stream import StreamInfo

RESTARTS, WITHIN_S = 5, 60.0
FINISH_S = 120.0
PROGRESS_NOTE_S = 5.0


class Track:
    """One stream of a session: its ring and its processes."""

    def __init__(self, cfg: configuration.Stream, ring_path: Path) -> None:
        self.cfg, self.ring_path = cfg, ring_path
        self.ring: Ring | None = None
        self.children: dict[str, Child] = {}
        self.lives = {"acquire": 0, "record": 0, "live": 0}
        self.deaths: dict[str, deque[float]] = {role: deque(maxlen=RESTARTS) for role in self.lives}
        self.over: set[str] = set()  # roles that ended for good
        self.endpoints: dict[str, str] = {}
        self.lost: list[dict[str, Any]] = []  # what the ring lost before it was recorded
        self._gaps: list[dict[str, Any]] = []
        self._facts: dict[str, Any] = {"samples": 0, "fs_hz": None, "channels": None, "first_sample": None}

    @property
    def name(self) -> str:
        return self.cfg.name

    def gaps(self) -> list[dict[str, Any]]:
        """The gap table, as everybody is told it."""
        if self.ring is not None:
            rows, _, _ = self.ring.rows("gaps", 0)
            self._gaps = [
                {"start": int(r["start"]), "stop": int(r["stop"]), "reason": GAP_REASONS[r["reason"]], "n_channels": int(r["n_channels"])}
                for r in rows
            ]  # fmt: skip
        return self.lost + self._gaps

    def facts(self) -> dict[str, Any]:
        """Samples so far, rate, channels and first sample number; None before the stream is known."""
        if self.ring is not None:
            r = self.ring
            self._facts = {
                "samples": r.committed,
                "fs_hz": r.info.fs_hz,
                "channels": r.info.n_channels,
                "first_sample": r.first_sample,
            }
        return self._facts

    def release(self) -> None:
        """The ring's memory goes; what it said stays."""
        self.gaps(), self.facts()
        if self.ring is not None:
            self.ring.close()
            self.ring = None
        self.ring_path.unlink(missing_ok=True)


def ring_path(runtime: Path, session: str, stream: str) -> Path:
    """Where a ring lies; the name tells whose it is."""
    return runtime / f"spiked-{os.getpid()}-{session}-{stream}.ring"


def clear_leftovers(runtime: Path) -> list[Path]:
    """Remove rings and calibration data of supervisors that are gone; what was removed."""
    removed = []
    for path in runtime.glob("spiked-*-*"):
        owner = path.name.split("-")[1]
        if (
            path.suffix not in (".ring", ".new", ".calibration")
            or not owner.isdigit()
            or psutil.pid_exists(int(owner))
        ):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def new_folder(config: configuration.Config) -> Path:
    """A fresh session folder, or RecordingError with the remedy."""
    root = config.rig.sessions.expanduser()
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
        await child.start(self.folder / f"{track.name}.{role}.stderr", env=env)
        self.journal.note(
            "process", f"{track.name}: {role} started (pid {child.pid})", role=role, pid=child.pid
        )
        task = asyncio.create_task(self._attend(track, role, child), name=f"attend {track.name} {role}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _heard(self, track: Track, child: Child, event: dict[str, Any]) -> None:
        kind = event["event"]
        rest = {k: v for k, v in event.items() if k not in ("event", "text", "level", "t_ns")}
        if kind == "stream" and child.name == "acquire" and track.ring is None:
            self._make_ring(track, child, event)
        elif kind == "ready" and child.name == "live":
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

    def _not_recorded(self, track: Track, start: int, stop: int) -> None:
        """The recorder was away for longer than the ring holds: clients are told of the same gap as the file."""
        channels = 0 if track.ring is None else track.ring.info.n_channels
        track.lost.append({"start": start, "stop": stop, "reason": "lost", "n_channels": channels})
        if live := track.children.get("live"):
            live.command("lost", start=start, stop=stop)

    def _make_ring(self, track: Track, child: Child, event: dict[str, Any]) -> None:
        try:
            info = StreamInfo.from_json(event["info"])
            track.ring = Ring.create(track.ring_path, info, self.config.ring.seconds)
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
        if track.children.get(role) is not child:
            return
        fatal = child.last.get("fatal")
        expected = code == 0 and (
            self._stop.is_set() or (track.ring is not None and track.ring.ended) or role == "acquire"
        )
        if expected:
            track.over.add(role)
            if role == "acquire":
                self.stop(f"stream {track.name} ended")
        elif fatal or not await self._restart(track, role, code):
            track.over.add(role)
            self._lost(track, role, code, fatal)
        self._changed.set()

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
        if role == "acquire" and track.ring is not None:
            track.ring.end()
        if role == "live" and not self._stop.is_set():
            # the recording comes first: it goes on without the live path
            if acquire := track.children.get("acquire"):
                acquire.command("forget", reader="live")
            self.error, self.exit_code = self.error or why, self.exit_code or exit_code
            self.journal.note("error", f"{why}; recording goes on without live sorting", level="error")
            return
        self.fail(why, exit_code)

    # ---- the run -----------------------------------------------------------------------------------------------

    async def run(self, duration_s: float | None = None) -> dict[str, Any]:
        """The whole session. Cancelling is not a way to stop it: call `stop`."""
        try:
            await self._start_streams()
            if not self._stop.is_set():
                self._become("recording", f"recording into {self.folder}")
                await self._until_stopped(duration_s)
            await self._end_streams()
            self._become("finalizing")
            await self._finalize()
        finally:
            for track in self.tracks.values():
                track.release()
        recorded = any(t.facts()["samples"] for t in self.tracks.values())
        wanted = recorded and self.config.offline.enabled and self.config.record.enabled
        self._become(
            "failed" if self._not_whole or (self.error and not recorded) else "queued" if wanted else "done"
        )
        return self.summary()

    async def _start_streams(self) -> None:
        """All processes at once: record and live load what they need while the stream is waited for."""
        roles = (
            ("acquire", True),
            ("record", self.config.record.enabled),
            ("live", self.config.live.enabled),
        )
        for track in self.tracks.values():
            for role, on in roles:
                if on:
                    await self._spawn(track, role)
        while any(t.ring is None for t in self.tracks.values()) and not self._stop.is_set():
            await self._news()

    async def _news(self) -> None:
        self._changed.clear()
        waits = [asyncio.create_task(self._changed.wait()), asyncio.create_task(self._stop.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=0.5)
        for w in waits:
            w.cancel()

    async def _until_stopped(self, duration_s: float | None) -> None:
        while not self._stop.is_set():
            await self._news()
            if duration_s is not None and all(
                t.ring is not None and t.ring.committed >= duration_s * t.ring.info.fs_hz
                for t in self.tracks.values()
            ):
                self.stop(f"{duration_s:g} s recorded")

    async def _end_streams(self) -> None:
        self._become("stopping")
        for track in self.tracks.values():
            if acquire := track.children.get("acquire"):
                await acquire.stop()
            if track.ring is not None:
                track.ring.end()
                continue
            for role in ("record", "live"):  # they wait for a ring that will not come
                if role in track.children:
                    track.children[role].command("stop")
        until = time.monotonic() + FINISH_S
        roles = [(t, r) for t in self.tracks.values() for r in ("record", "live") if r in t.children]
        while time.monotonic() < until and any(r not in t.over for t, r in roles):
            await self._news()
            await asyncio.sleep(0.05)
        for track, role in roles:
            if role not in track.over:
                self.journal.note(
                    "error", f"{track.name}: {role} did not finish within {FINISH_S:g} s", level="error"
                )
                await track.children[role].stop()
                track.over.add(role)

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
            await child.start(self.folder / f"{track.name}.finalize.stderr")
            if await child.wait(600.0) != 0 and not child.last.get("fatal"):
                self.fail(
                    f"{track.name}: the session file could not be finalized; run `spiked recover {self.folder}`",
                    4,
                )
            elif fatal := child.last.get("fatal"):
                self.fail(str(fatal["error"]), int(fatal["code"]))

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
        streams = {}
        for t in self.tracks.values():
            last = {
                role: {k: v for k, v in c.last.get("progress", {}).items() if k not in ("event", "process")}
                for role, c in t.children.items()
            }
            gaps = t.gaps()
            streams[t.name] = {
                **t.facts(),
                "gaps": len([g for g in gaps if g["reason"] != "reset"]), "gap_samples": sum(g["stop"] - g["start"] for g in gaps if g["reason"] != "partial"),
                "processes": last, "pids": {r: c.pid for r, c in t.children.items() if c.running}, "lives": t.lives,
                "calibration": t.children["live"].last.get("calibration") if "live" in t.children else None,
            }  # fmt: skip
        return {
            "session": self.folder.name,
            "folder": str(self.folder),
            "state": self.state,
            "error": self.error,
            "streams": streams,
        }

    def summary(self) -> dict[str, Any]:
        """`status` plus every gap, for the end of the session."""
        return {
            **self.status(),
            "gap_list": {t.name: t.gaps() for t in self.tracks.values()},
            "offline": self.offline,
        }
