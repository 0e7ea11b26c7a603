"""A child process as the supervisor sees it: spawn, listen to its lines, command it, wait for it."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger("spiked")
LOOK_S = 0.25
LAST_WORDS_S = 2.0  # for what a process said before it ended; one of its own may hold the pipe open
LOOKS = 20  # so often in that time: a supervisor that is held up for seconds misses one of them
LINE_LIMIT = 8 << 20  # a stream description with thousands of channels is one line


class Child:
    """One process. `on_event(child, event)` gets each JSON line; stderr goes to a file."""

    def __init__(
        self, name: str, module: str, args: list[str], on_event: Callable[[Child, dict[str, Any]], None]
    ) -> None:
        self.name, self.module, self.args, self.on_event = name, module, args, on_event
        self.process: asyncio.subprocess.Process | None = None
        self.last: dict[str, Any] = {}  # newest event of each kind
        self._listener: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def start(self, stderr: Path, nice: int = 0, env: dict[str, str] | None = None) -> None:
        """Raises OSError where the computer has no room for it. A file for stderr that cannot be had is done without."""
        try:
            log = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        except OSError:
            log = os.open(os.devnull, os.O_WRONLY)
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self.module, *self.args,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                env={**os.environ, **(env or {})}, limit=LINE_LIMIT,
                preexec_fn=(lambda: os.nice(nice)) if nice else None,
            )  # fmt: skip
        finally:
            os.close(log)
        self._listener = asyncio.create_task(self._listen(), name=f"listen {self.name}")

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def _listen(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        while True:
            try:
                line = await self.process.stdout.readline()
            except ValueError:  # a line over the limit: skip it, keep listening
                continue
            if not line:
                return
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                if event["event"] == "answer":
                    self._answered(event)
                    continue
                self.last[event["event"]] = event
                try:
                    self.on_event(self, event)
                except Exception:
                    log.exception("what %s told could not be handled: %s", self.name, event["event"])

    def command(self, op: str, **fields: Any) -> None:
        """Send one command; silently nothing when the process is gone."""
        if self.running and self.process is not None and self.process.stdin is not None:
            try:
                self.process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            except (BrokenPipeError, ConnectionResetError):
                return

    async def ask(self, op: str, timeout_s: float, **fields: Any) -> dict[str, Any] | None:
        """Send one command and wait for its answer; None when there is none within the time."""
        question = next(self._ids)
        answer = self._asked[question] = asyncio.get_running_loop().create_future()
        self.command(op, id=question, **fields)
        try:
            for patience in (timeout_s, LOOK_S):  # an answer may lie unread because we were held up ourselves
                if not answer.done():
                    await asyncio.wait([answer], timeout=patience)
            return answer.result() if answer.done() else None
        finally:
            del self._asked[question]

    def _answered(self, event: dict[str, Any]) -> None:
        answer = self._asked.get(event.get("id", 0))
        if answer is not None and not answer.done():
            answer.set_result({k: v for k, v in event.items() if k not in ("event", "process", "t_ns", "id")})

    async def wait(self, timeout_s: float | None = None) -> int | None:
        """Exit code once it ended and all its lines were heard; None on timeout."""
        if self.process is None:
            return None
        ended = asyncio.ensure_future(self.process.wait())
        end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        over = False
        try:
            # The library's own wait lasts until the pipe is closed, which one of the process' own may hold open.
            while self.process.returncode is None:
                if over:
                    return None
                over = time.monotonic() >= end  # before the last look, not after it
                await asyncio.wait([ended], timeout=LOOK_S if over else min(end - time.monotonic(), LOOK_S))
        finally:
            ended.cancel()
        for _ in range(LOOKS):
            if self._listener is None or self._listener.done():
                break
            await asyncio.wait([self._listener], timeout=LAST_WORDS_S / LOOKS)
        return self.process.returncode

    def kill(self) -> None:
        """End it at once; it cannot refuse."""
        if self.running and self.process is not None:
            self.process.kill()

    async def stop(self, grace_s: float = 10.0) -> int | None:
        """Ask, then insist."""
        self.command("stop")
        code = await self.wait(grace_s)
        for sig in (signal.SIGTERM, signal.SIGKILL):
            if code is not None or not self.running or self.process is None:
                break
            self.process.send_signal(sig)
            code = await self.wait(5.0)
        return code
