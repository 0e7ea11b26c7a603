"""What happens after a session, as the supervisor sees it: every finished session in the queue, and its runner.

The recording never depends on it: whatever goes wrong here is noted, and the queue is completed from the session
folders at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from spiked import config as configuration
from spiked.errors import OfflineError, SpikedError
from spiked.journal import Journal
from spiked.offline.collect import collect, enqueue
from spiked.offline.queue import Queue, Row
from spiked.processes.child import Child

OVER = ("done", "failed", "cancelled")
Hear = Callable[[dict[str, Any]], None]
Op = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]
LOOK_S = 1.0  # at a queue that is run elsewhere
RESTART_S = 5.0  # before a runner that died is followed by another
LISTED = 200  # jobs that are told at once, the newest


class Afterwards:
    """The runner of the queue beside the rig's sessions; it is started when there is something to run.

    With `elsewhere` another service runs the queue (`spiked jobs run --wait`): this one enters sessions, and
    reads from the queue what becomes of them.
    """

    def __init__(
        self, config: configuration.Config, journal: Journal, hear: Hear, elsewhere: bool = False
    ) -> None:
        self.config, self.journal, self.hear, self.elsewhere = config, journal, hear, elsewhere
        self._watched: dict[int, str] = {}  # job -> state, of those that are run elsewhere
        self._watching: asyncio.Task[None] | None = None
        self._minding: asyncio.Task[None] | None = None
        self.root = config.rig.sessions.expanduser()
        self.runner: Child | None = None
        self._over: dict[int, asyncio.Event] = {}
        self._stopping = self._starting = False

    async def begin(self) -> None:
        """Complete the queue from the session folders, and go on with what is in it."""
        if not self.config.offline.enabled:
            return
        try:
            for session in await asyncio.to_thread(collect, self.root):
                self.journal.note("offline", f"{session.name} was recorded but not sorted: it is queued")
            waiting = await asyncio.to_thread(self._waiting)
        except OfflineError as e:
            self.journal.note("offline", str(e), level="error")
            return
        if waiting:
            await self._start()

    async def enqueue(self, session: Path) -> int | None:
        """Queue a session that has ended and start the runner; its job, or None where the queue cannot be used."""
        try:
            job = await asyncio.to_thread(enqueue, self.root, session, self.config.offline)
        except SpikedError as e:
            self.journal.note("offline", f"{session.name} is not queued: {e}", level="error")
            return None
        if self.elsewhere:
            self._watch(job)
        elif not self._stopping:
            await self._start()
        return job

    async def finished(self, job: int) -> None:
        """Until the job is over, or the runner cannot go on, or `stop`."""
        over = self._over.setdefault(job, asyncio.Event())
        while not over.is_set() and not self._stopping and self.runner is not None:
            ended = asyncio.create_task(self.runner.wait())
            heard = asyncio.create_task(over.wait())
            await asyncio.wait({ended, heard}, return_when=asyncio.FIRST_COMPLETED)
            for task in (ended, heard):
                task.cancel()
            if not self.runner.running and not over.is_set():
                if self.runner.last.get("fatal") or await asyncio.to_thread(self._state, job) in OVER:
                    return
                await self._start()

    async def status(self) -> dict[str, Any]:
        """Jobs per state, and those that are running with how far they are; {} where there is no queue."""
        if not (self.root / "jobs.sqlite").is_file():
            return {}
        try:
            return await asyncio.to_thread(self._status)
        except OfflineError as e:
            return {"error": str(e)}

    def operations(self) -> dict[str, Op]:
        """The control port's operations on jobs."""
        return {"jobs": self._jobs, "cancel_job": self._cancel_job, "retry_job": self._retry_job}

    async def _jobs(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"jobs": await asyncio.to_thread(self._list)}

    async def _cancel_job(self, request: dict[str, Any]) -> dict[str, Any]:
        job = _number(request)
        return {"job": job, "state": await asyncio.to_thread(self._change, lambda jobs: jobs.cancel(job))}

    async def _retry_job(self, request: dict[str, Any]) -> dict[str, Any]:
        job = _number(request)
        await asyncio.to_thread(self._change, lambda jobs: jobs.retry(job))
        await self._start()
        return {"job": job, "state": "queued"}

    def stop(self) -> None:
        """The job at hand goes back into the queue; does not wait."""
        self._stopping = True
        if self.runner is not None and self.runner.running and self.runner.process is not None:
            self.runner.process.terminate()

    async def shutdown(self) -> None:
        """`stop`, and wait until nothing of it runs any more."""
        self.stop()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._minding is not None:
            self._minding.cancel()
            await asyncio.gather(self._minding, return_exceptions=True)
        if self.runner is not None and await self.runner.wait(90.0) is None:
            with contextlib.suppress(ProcessLookupError):
                if self.runner.process is not None:
                    self.runner.process.kill()

    async def _start(self) -> None:
        if self.elsewhere or self._stopping or self._starting or (self.runner and self.runner.running):
            return
        nice = self.config.offline.nice
        args = [
            str(self.root),
            "--nice",
            str(nice),
            "--runtime",
            str(self.config.rig.runtime),
            "--parent",
            str(os.getpid()),
        ]
        self.runner = runner = Child("offline", "spiked.offline.runner", args, self._heard)
        self._starting = True
        try:
            await runner.start(self.root / "jobs.stderr", nice=nice)
        except OSError as e:
            text = f"offline sorting cannot be started: {e.strerror or e}"
            self.journal.note("offline", text, level="error")
        finally:
            self._starting = False
        self._minding = asyncio.create_task(self._mind(runner), name="offline runner")

    async def _mind(self, runner: Child) -> None:
        """One that ended while a job waits is followed by another: it was killed, or was leaving when the job came."""
        code = await runner.wait()
        if code != 0:
            await asyncio.sleep(RESTART_S)
        if self._stopping or self.runner is not runner or runner.last.get("fatal"):
            return
        try:
            waiting = await asyncio.to_thread(self._waiting)
        except OfflineError as e:
            self.journal.note("offline", str(e), level="error")
            return
        if waiting and self.runner is runner:
            if code != 0:
                self.journal.note(
                    "offline", f"the jobs' runner ended (exit {code}): another one goes on", level="warning"
                )
            await self._start()

    def _heard(self, _child: Child, event: dict[str, Any]) -> None:
        if event["event"] == "fatal":
            self.journal.note("offline", str(event.get("error")), level="error")
            return
        if event["event"] == "job" and event.get("state") in OVER:
            self._over.setdefault(int(event["job"]), asyncio.Event()).set()
        self.hear(event)

    def _watch(self, job: int) -> None:
        """Tell from now on what becomes of a job that is run elsewhere."""
        self._watched[job] = "queued"
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._follow(), name="jobs elsewhere")

    async def _follow(self) -> None:
        while self._watched:
            await asyncio.sleep(LOOK_S)
            try:
                rows = await asyncio.to_thread(self._rows, list(self._watched))
            except OfflineError as e:
                self.journal.note("offline", str(e), level="warning")
                continue
            for row in rows:
                self._tell(row)

    def _rows(self, numbers: list[int]) -> list[Row]:
        with Queue(self.root) as jobs:
            return [jobs.job(n) for n in numbers]

    def _tell(self, row: Row) -> None:
        """The events that our own runner would have sent."""
        about = {"job": row.id, "session": row.name, "folder": str(row.task.folder)}
        if row.state != self._watched[row.id]:
            self._watched[row.id] = row.state
            self.hear({"event": "job", "state": row.state, "text": row.text, **about})
        elif row.state == "running":
            progress = {"stage": row.stage, "fraction": row.overall, "text": row.text}
            self.hear({"event": "progress", **progress, **about})
        if row.state in OVER:
            del self._watched[row.id]

    def _list(self) -> list[dict[str, Any]]:
        if not (self.root / "jobs.sqlite").is_file():
            return []
        with Queue(self.root) as jobs:
            rows = sorted(jobs.jobs(), key=lambda r: r.id)[-LISTED:]
            return [{k: v for k, v in r.as_dict().items() if k != "paths"} for r in rows]

    def _change(self, what: Callable[[Queue], Any]) -> Any:
        if not (self.root / "jobs.sqlite").is_file():
            raise SpikedError("there are no offline jobs yet")
        with Queue(self.root) as jobs:
            return what(jobs)

    def _waiting(self) -> bool:
        with Queue(self.root) as jobs:
            return any(r.state == "queued" or r.stale for r in jobs.jobs("queued", "running"))

    def _state(self, job: int) -> str:
        with Queue(self.root) as jobs:
            return jobs.job(job).state

    def _status(self) -> dict[str, Any]:
        with Queue(self.root) as jobs:
            running = [
                {
                    "job": r.id,
                    "session": r.name,
                    "stage": r.stage,
                    "overall": round(r.overall, 3),
                    "text": r.text,
                }
                for r in jobs.jobs("running")
            ]
            return {**jobs.counts(), "now": running}


def _number(request: dict[str, Any]) -> int:
    job = request.get("job")
    if type(job) is not int:
        raise SpikedError("say which job: its number, as `spiked jobs` lists them")
    return job
