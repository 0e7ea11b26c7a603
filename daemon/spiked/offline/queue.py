"""The queue of offline jobs: one SQLite file beside the sessions, exactly one row per thing to be sorted.

    queued -> running -> done
       ^         |-> failed      (retry: queued again)
       |         '-> cancelled   (retry: queued again)
       '-- running whose owner is gone, or that was interrupted

Every change is one transaction, so a process that dies leaves a job as it was before or after it, never
between. Who runs a job is written with the start of the process and the boot of the computer: a process that
happens to have the same number is not taken for it.
"""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from spiked.errors import OfflineError
from spiked.offline import failures
from spiked.offline.owner import Owner
from spiked.offline.progress import STAGES
from spiked.offline.task import Task

NAME = "jobs.sqlite"
VERSION = 2  # 2: failure
MAX_STARTS = 3  # a job whose process died so often in one stage is not started again by itself
STATES = ("queued", "running", "done", "failed", "cancelled")
WAIT_S = 30.0
SILENT_S = 600.0  # a runner notes every few seconds how far its job is
SCHEMA = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, name TEXT NOT NULL, sorter TEXT NOT NULL,
    task TEXT NOT NULL, state TEXT NOT NULL, priority INTEGER NOT NULL DEFAULT 0, starts INTEGER NOT NULL DEFAULT 0,
    reached INTEGER NOT NULL DEFAULT -1,
    created REAL NOT NULL, changed REAL NOT NULL, owner TEXT, cancel INTEGER NOT NULL DEFAULT 0,
    stage TEXT NOT NULL DEFAULT '', overall REAL NOT NULL DEFAULT 0, text TEXT NOT NULL DEFAULT '',
    kind TEXT NOT NULL DEFAULT '', report TEXT NOT NULL DEFAULT '', failure TEXT NOT NULL DEFAULT '');
CREATE TABLE log (job INTEGER NOT NULL, t REAL NOT NULL, state TEXT NOT NULL, text TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Row:
    """A job as it is now. Times are seconds since 1970; `overall` is 0 to 1."""

    id: int
    key: str
    name: str
    sorter: str
    task: Task
    state: str
    priority: int
    starts: int  # since it reached the furthest stage
    reached: int
    created: float
    changed: float
    owner: Owner | None
    cancel: bool
    stage: str
    overall: float
    text: str
    kind: str
    report: str
    failure: dict[str, Any]  # failures.told of the last run, {} when it did not fail

    @property
    def stale(self) -> bool:
        """Running, but the process that ran it is gone."""
        return self.state == "running" and (self.owner is None or not self.owner.alive())

    @property
    def silent(self) -> bool:
        """Run on a computer of another name, which has said nothing for long: it may be this one under its old name."""
        elsewhere = self.owner is not None and self.owner.host != socket.gethostname()
        return self.state == "running" and elsewhere and time.time() - self.changed > SILENT_S

    def as_dict(self) -> dict[str, Any]:
        """What `spiked jobs --json` prints."""
        d = {k: v for k, v in self.__dict__.items() if k not in ("task", "key", "owner")}
        return {**d, "paths": list(self.task.paths), "pid": None if self.owner is None else self.owner.pid, "stale": self.stale}  # fmt: skip


class Queue:
    """The queue in `folder`; made when it is not there. Use it from one thread. A context manager.

    Raises OfflineError('environment') where the file cannot be used.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.path = self.folder / NAME
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._write_ahead()
            self._db.execute("PRAGMA synchronous=FULL")
        if self._version() == 0:
            with self._change() as db:
                if self._version() == 0:
                    for statement in filter(str.strip, SCHEMA.split(";")):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={VERSION}")
        if self._version() == 1:
            with self._change() as db:
                if self._version() == 1:
                    db.execute("ALTER TABLE jobs ADD COLUMN failure TEXT NOT NULL DEFAULT ''")
                    db.execute(f"PRAGMA user_version={VERSION}")
        if (found := self._version()) != VERSION:
            raise OfflineError(
                f"{self.path} is of version {found}, not {VERSION}; use the spiked it belongs to"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def _write_ahead(self) -> None:
        """Readers and a writer side by side. SQLite does not wait for others when it changes to this."""
        until = time.monotonic() + WAIT_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or time.monotonic() > until:
                    raise
                time.sleep(0.05)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as e:
            raise OfflineError(f"the queue {self.path} cannot be used ({e}); {_remedy(str(e))}") from e

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction that nobody else writes in."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _version(self) -> int:
        return int(self._ask("PRAGMA user_version")[0][0])

    def _ask(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._errors():
            return self._db.execute(sql, values).fetchall()

    def _set(self, db: sqlite3.Connection, job: int, state: str, text: str, **columns: Any) -> None:
        columns = {"state": state, "text": text, "changed": time.time(), **columns}
        names = ", ".join(f"{c} = ?" for c in columns)
        db.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*columns.values(), job))
        db.execute("INSERT INTO log VALUES (?, ?, ?, ?)", (job, time.time(), state, text))

    # ---- what is there -------------------------------------------------------------------------------------

    def jobs(self, *states: str) -> list[Row]:
        """All jobs, or those in one of `states`, in the order they are run."""
        marks = ", ".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        return [_row(r) for r in self._ask(f"SELECT * FROM jobs {where} ORDER BY priority DESC, id", *states)]

    def job(self, job: int) -> Row:
        """One job; OfflineError when there is none of this number."""
        rows = self._ask("SELECT * FROM jobs WHERE id = ?", job)
        if not rows:
            raise OfflineError(f"there is no job {job} in {self.path}; `spiked jobs` lists them")
        return _row(rows[0])

    def log(self, job: int) -> list[tuple[float, str, str]]:
        """What happened to a job: (seconds since 1970, state, text), oldest first."""
        return [
            tuple(r) for r in self._ask("SELECT t, state, text FROM log WHERE job = ? ORDER BY rowid", job)
        ]

    def counts(self) -> dict[str, int]:
        """Jobs per state."""
        found = {r[0]: r[1] for r in self._ask("SELECT state, count(*) FROM jobs GROUP BY state")}
        return {s: int(found.get(s, 0)) for s in STATES}

    # ---- what happens to it --------------------------------------------------------------------------------

    def enqueue(self, task: Task, priority: int = 0) -> tuple[int, bool]:
        """(number of the task's job, whether it is new). There is one job per task, however often this is asked."""
        with self._change() as db:
            found = db.execute("SELECT id FROM jobs WHERE key = ?", (task.key,)).fetchone()
            if found is not None:
                return int(found[0]), False
            now = time.time()
            columns = "key, name, sorter, task, state, priority, created, changed"
            job = db.execute(
                f"INSERT INTO jobs ({columns}) VALUES (?, ?, ?, ?, 'queued', ?, ?, ?)",
                (task.key, task.name, task.sorter, task.dump(), priority, now, now),
            ).lastrowid
            assert job is not None
            self._set(db, job, "queued", "waits for its turn")
            return job, True

    def again(self, task: Task, priority: int = 0) -> int:
        """The task's job, queued with the settings it has now, whatever became of it before.

        OfflineError when somebody is running it.
        """
        job, new = self.enqueue(task, priority)
        if not new:
            with self._change() as db:
                self._not_running(db, job)
                self._set(db, job, "queued", "asked for again", starts=0, reached=-1, cancel=0, kind="", failure="", owner=None,
                          task=task.dump(), sorter=task.sorter, priority=priority)  # fmt: skip
        return job

    def _not_running(self, db: sqlite3.Connection, job: int) -> Row:
        row = self.job(job)
        if row.state == "running" and not row.stale and not row.silent:
            assert row.owner is not None
            where = "" if row.owner.host == socket.gethostname() else f" on {row.owner.host}"
            raise OfflineError(
                f"job {job} ({row.name}) is being run by process {row.owner.pid}{where}; wait, or `spiked jobs cancel {job}`"
            )
        return row

    def claim(
        self, may: Callable[[Row], bool] = lambda row: True, only: int | None = None, own: bool = False
    ) -> Row | None:
        """Take the next job that is queued or whose owner is gone, and is `may` be run; None when there is none.

        `own`: this process runs none now, so one that is noted as run by it is over too. A job whose process died MAX_STARTS times becomes failed instead.
        """
        me = Owner.me()
        with self._change() as db:
            for row in self.jobs("queued", "running"):
                over = row.stale or (own and row.owner == me)
                if (only is not None and row.id != only) or (row.state == "running" and not over):
                    continue
                if row.cancel:
                    self._set(db, row.id, "cancelled", "cancelled", owner=None)
                elif row.starts >= MAX_STARTS:
                    text = f"its process died {row.starts} times (last: {row.text}); look at the system's log, then `spiked jobs retry {row.id}`"
                    told = json.dumps(_told("resource", row.stage, text, "process_died"))
                    self._set(db, row.id, "failed", text, kind="resource", owner=None, failure=told)
                elif may(row):
                    text = f"taken over: its process {row.owner.pid} is gone" if row.owner else "started"
                    text = "again: how it ended could not be noted" if row.owner == me else text
                    self._set(db, row.id, "running", text, owner=me.dump(), starts=row.starts + 1)
                    return self.job(row.id)
        return None

    def progress(self, job: int, stage: str, overall: float, text: str) -> bool:
        """Note how far it is; True when the job is to be given up."""
        at = STAGES.index(stage) if stage in STAGES else -1
        with self._change() as db:
            db.execute(
                "UPDATE jobs SET stage = ?, overall = ?, text = ?, changed = ? WHERE id = ?",
                (stage, overall, text, time.time(), job),
            )
            db.execute("UPDATE jobs SET reached = ?, starts = 1 WHERE id = ? AND reached < ?", (at, job, at))
        return self.job(job).cancel

    def finish(self, job: int, report: str, text: str) -> None:
        """It is done."""
        with self._change() as db:
            self._set(db, job, "done", text, report=report, owner=None, overall=1.0, kind="", failure="")

    def fail(self, job: int, kind: str, text: str, failure: dict[str, Any] | None = None) -> None:
        """It failed; `kind` as in OfflineError, `failure` as failures.told says it."""
        told = failure or _told(kind, self.job(job).stage, text)
        with self._change() as db:
            self._set(db, job, "failed", text, kind=kind, owner=None, failure=json.dumps(told))

    def put_back(self, job: int, why: str) -> None:
        """It was interrupted on purpose: it waits again, and this start does not count."""
        with self._change() as db:
            row = self.job(job)
            state = "cancelled" if row.cancel else "queued"
            self._set(db, job, state, why, owner=None, starts=max(row.starts - 1, 0))

    def lost(self, job: int, why: str) -> None:
        """Its process died: it waits again, unless that has happened MAX_STARTS times."""
        with self._change() as db:
            if self.job(job).starts >= MAX_STARTS:
                text = f"{why}; {MAX_STARTS} times, so it is not started again: `spiked jobs retry {job}`"
                told = json.dumps(_told("resource", self.job(job).stage, text, "process_died"))
                self._set(db, job, "failed", text, kind="resource", owner=None, failure=told)
            else:
                self._set(db, job, "queued", why, owner=None)

    def cancel(self, job: int) -> str:
        """Give it up: "cancelled" at once, or "cancelling" when somebody runs it and has to stop first."""
        with self._change() as db:
            row = self.job(job)
            if row.state not in ("queued", "running"):
                raise OfflineError(f"job {job} is {row.state}; there is nothing to cancel")
            if row.state == "running" and not row.stale and not row.silent:
                self._set(db, job, "running", "to be cancelled", cancel=1)
                return "cancelling"
            self._set(db, job, "cancelled", "cancelled", owner=None, cancel=0)
            return "cancelled"

    def retry(self, job: int) -> None:
        """Queue a job that is over once more; it goes on after its last finished stage."""
        with self._change() as db:
            row = self._not_running(db, job)
            if row.state != "queued":
                self._set(
                    db,
                    job,
                    "queued",
                    "to be tried again",
                    starts=0,
                    reached=-1,
                    cancel=0,
                    kind="",
                    failure="",
                    owner=None,
                )


def _remedy(error: str) -> str:
    """What to do about an error of SQLite's or the system's."""
    known = {
        "locked": "another program holds it; end that one, or try again",
        "full": "free space there",
        "No space": "free space there",
        "readonly|unable to open|Permission|Read-only": "check its owner and how the drive is mounted",
        "not a database|malformed|encrypted": "move the file away: finished sessions are queued anew at the daemon's next start",
    }
    return next((what for words, what in known.items() if re.search(words, error)), "check the disk")


def _told(kind: str, stage: str, text: str, name: str = "") -> dict[str, Any]:
    return {**failures.told(OfflineError(text, kind, stage, name)), "evidence": [text]}


def _row(r: sqlite3.Row) -> Row:
    d = dict(r)
    d["failure"] = json.loads(d["failure"] or "{}")
    return Row(**{**d, "task": Task(**json.loads(d["task"])), "owner": Owner.read(d["owner"]), "cancel": bool(d["cancel"])})  # fmt: skip
