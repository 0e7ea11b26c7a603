"""Runs the jobs of a queue, one at a time, each in its own niced process that ends with this one.

python -m spiked.offline.runner FOLDER [--only JOB] [--nice N] [--runtime DIR]    one JSON object per line on stdout

A job whose process was killed goes on after its last finished stage. One that wants the GPU waits while live
sorting has it, and gives it up, to be resumed later, when live sorting wants it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from spiked.errors import OfflineError, SpikedError
from spiked.lease import Lease, hold_for_job, live_has_it
from spiked.offline.manifest import write_json
from spiked.offline.queue import Queue, Row
from spiked.offline.task import Task
from spiked.priority import end_with, lower_priority

POLL_S, NOTE_S, WAIT_S, GRACE_S = 0.25, 1.0, 1.0, 60.0
RECORDED = ("queued", "offline", "done", "failed")  # states of a session that has ended
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
Tell = Callable[[dict[str, Any]], None]


def wants_gpu(task: Task) -> bool:
    """Whether the job may use a GPU here."""
    device = str(task.params.get("device", "auto"))
    return device.startswith("cuda") or (device == "auto" and any(Path(d).exists() for d in GPU_DEVICES))


class Runner:
    """`drain` runs what is queued in `folder`; `stop`, from a signal handler, ends it soon.

    `tell` gets the events of the jobs' processes, with "job" and "session", and {"event": "job", "state", "text"}.
    """

    def __init__(self, folder: Path, tell: Tell, nice: int = 15, runtime: Path = Path("/dev/shm")) -> None:
        self.folder, self.tell, self.nice, self.runtime = folder, tell, nice, runtime
        self._stopped = threading.Event()
        self._lease: Lease | None = None

    def stop(self) -> None:
        """The job at hand is put back into the queue."""
        self._stopped.set()

    def drain(self, only: int | None = None) -> None:
        """Run every job, or one, until nothing is queued. OfflineError where the queue cannot be used."""
        told = False
        with Queue(self.folder) as jobs, self._slot():
            while not self._stopped.is_set():
                try:
                    row = jobs.claim(self._may, only, own=True)
                    if row is not None:
                        told = False
                        self._run(jobs, row)
                    elif any(only in (None, r.id) for r in jobs.jobs("queued")):
                        if not told:
                            self.tell(
                                {
                                    "event": "waits",
                                    "text": "waiting for the GPU: live sorting, or another job, has it",
                                }
                            )
                            told = True
                        self._stopped.wait(WAIT_S)
                    else:
                        return
                finally:
                    self._let_go()

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One runner per queue at a time."""
        told = False
        try:
            file = (self.folder / "jobs.slot").open("w")
        except OSError as e:
            raise OfflineError(
                f"cannot write {e.filename}: {e.strerror}; check its owner and the disk"
            ) from e
        with file as slot:
            while not self._stopped.is_set():
                try:
                    fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        self.tell(
                            {
                                "event": "waits",
                                "text": "another job of this queue is being run; waiting for it",
                            }
                        )
                        told = True
                    self._stopped.wait(WAIT_S)
            yield

    def _may(self, row: Row) -> bool:
        if not wants_gpu(row.task):
            return True
        self._lease = hold_for_job(self.runtime)
        return self._lease is not None

    def _let_go(self) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    # ---- one job -------------------------------------------------------------------------------------------

    def _run(self, jobs: Queue, row: Row) -> None:
        about = {"job": row.id, "session": row.name, "folder": str(row.task.folder)}

        def tell(event: dict[str, Any]) -> None:
            self.tell({**event, **about})

        tell({"event": "job", "state": "running", "text": row.text})
        mark(row.task, "offline")
        try:
            process = self._start(row.task)
        except OSError as e:
            why = (
                f"cannot start in {row.task.folder}: {e.strerror}; check that it is there and may be written"
            )
            jobs.fail(row.id, "environment", why)
            mark(row.task, "failed", why)
            tell({"event": "job", "state": "failed", "text": why})
            return
        last: dict[str, dict[str, Any]] = {}
        why = ""
        try:
            why = self._follow(jobs, row.id, process, last, tell)
        finally:
            code = end(process)
            state, text = self._settle(
                jobs, row, code, last, why or ("interrupted" if sys.exc_info()[0] else "")
            )
            failed = last.get("failed", {}) if state == "failed" else {}
            told = {
                "kind": failed.get("kind", ""),
                **({"failure": failed["failure"]} if failed.get("failure") else {}),
            }
            tell({"event": "job", "state": state, "text": text, **told})

    def _start(self, task: Task) -> subprocess.Popen[bytes]:
        if not task.is_session:
            task.folder.mkdir(parents=True, exist_ok=True)
        return begin(task, self.nice, "--parent", str(os.getpid()))

    def _follow(
        self,
        jobs: Queue,
        job: int,
        process: subprocess.Popen[bytes],
        last: dict[str, dict[str, Any]],
        tell: Tell,
    ) -> str:
        """Hear the process out; "" when it ended by itself, else why it has to be ended."""
        noted, stage = 0.0, ""
        for event in events(process):
            now = time.monotonic()
            if event is not None:
                last[str(event["event"])] = event
            p = last.get("progress", {"stage": "", "overall": 0.0, "text": "starting"})
            given_up = False
            if now - noted > NOTE_S or p["stage"] != stage:
                noted, stage = now, p["stage"]
                with contextlib.suppress(OfflineError):  # a full disk: the job may still get through
                    given_up = jobs.progress(job, stage, p["overall"], p["text"])
            if event is not None:
                tell(event)
            if given_up:
                return "cancelled"
            if self._lease is not None and now == noted and live_has_it(self.runtime):
                return "gave the GPU to live sorting"
            if self._stopped.is_set():
                return "interrupted"
        return ""

    def _settle(
        self, jobs: Queue, row: Row, code: int, last: dict[str, dict[str, Any]], why: str
    ) -> tuple[str, str]:
        """What became of a job whose process has ended: its state and a sentence, in the queue and the session."""
        if code == 0 and "finished" in last:
            done = last["finished"]
            jobs.finish(row.id, done["report"], done["text"])
            mark(row.task, "done")
            return "done", done["text"]
        if "failed" in last and not why:
            failed = last["failed"]
            jobs.fail(row.id, failed["kind"], failed["text"], failed.get("failure"))
            mark(row.task, "failed", failed["text"])
            return "failed", failed["text"]
        if why:
            jobs.put_back(row.id, why)
        else:
            why = f"its process ended with exit {code}; see {row.task.folder / 'offline.stderr'}"
            jobs.lost(row.id, why)
        state = jobs.job(row.id).state
        mark(row.task, {"cancelled": "done"}.get(state, state), "" if state == "cancelled" else why)
        return state, why


def begin(task: Task, nice: int, *more: str) -> subprocess.Popen[bytes]:
    """A job's process. It reads the task from its stdin: a thousand recordings do not fit into a command line."""
    with tempfile.TemporaryFile() as told, (task.folder / "offline.stderr").open("ab") as log:
        told.write(task.dump().encode())
        told.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", "spiked.offline.job", "--task", "-", "--json-progress", *more],
            stdin=told, stdout=subprocess.PIPE, stderr=log, preexec_fn=partial(lower_priority, nice),
        )  # fmt: skip


def events(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any] | None]:
    """The JSON lines of a process until it closes its stdout, and None whenever POLL_S passed without one."""
    assert process.stdout is not None
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(process.stdout, lines), name="job-lines", daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=POLL_S)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "event" in event:
                yield event


def _read(pipe: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in pipe:
            lines.put(line)
    lines.put(None)


def end(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process that has closed its stdout, or ask one that has not to end, then insist. Its exit status."""
    for ask, patience in ((lambda: None, 0.5), (process.terminate, GRACE_S), (process.kill, None)):
        if process.poll() is None:
            ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    if process.stdout is not None:
        process.stdout.close()
    return int(process.returncode)


def mark(task: Task, state: str, error: str = "") -> None:
    """Write a session's state into its state.json; other recordings have none.

    One that is still being recorded, or was when its daemon died, is left to the daemon: it would not recover it.
    """
    path = task.folder / "state.json"
    if not task.is_session or not path.is_file():
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["state"] in RECORDED:
            write_json(path, {**told, "state": state, "error": error})


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when nothing is left to run, 130 when it was told to stop."""
    parser = argparse.ArgumentParser(
        prog="python -m spiked.offline.runner", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", type=int)
    parser.add_argument("--parent", type=int, help="the process with which this one ends")
    parser.add_argument("--nice", type=int, default=15)
    parser.add_argument("--runtime", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args(argv)

    def tell(event: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(event) + "\n")
            sys.stdout.flush()

    stopped = False
    runner = Runner(args.folder, tell, args.nice, args.runtime)

    def on_signal(_signum: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        runner.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon gets the terminal's Ctrl-C too, and decides
    end_with(args.parent or os.getppid())
    try:
        runner.drain(args.only)
    except SpikedError as e:
        tell({"event": "fatal", "error": str(e), "code": e.exit_code})
        return e.exit_code
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
