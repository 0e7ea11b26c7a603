"""The same jobs on a Dask cluster: `spiked sort --scheduler tcp://...`.

Workers see the recordings under the same paths and have spiked[offline]. The queue stays with the process that
submits: a worker runs a job's process as the runner here would, and Dask gives the job of a worker that dies to
another one, which goes on after the last finished stage, because results lie with the recording.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from spiked.errors import ConfigError, OfflineError
from spiked.offline.queue import Queue, Row
from spiked.offline.runner import begin, end, events, mark
from spiked.offline.task import Task

CONNECT_S = 30.0
Tell = Callable[[dict[str, Any]], None]


def perform(task_json: str, topic: str, nice: int) -> dict[str, Any]:
    """On a worker: run a job's process; its last event. Progress goes to the scheduler under `topic`."""
    from distributed import Event, get_worker

    worker, task = get_worker(), Task.load(task_json)
    cancelled, looked = Event(f"{topic}-cancel"), time.monotonic()
    if not task.is_session:
        task.folder.mkdir(parents=True, exist_ok=True)
    process = begin(task, nice)
    last: dict[str, Any] = {}
    try:
        for event in events(process):
            if event is not None:
                last = event
                worker.log_event(topic, {**event, "worker": worker.address})
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                if cancelled.is_set():
                    return {"event": "cancelled", "text": "cancelled"}
    finally:
        code = end(process)
    if last.get("event") in ("finished", "failed"):
        return last
    raise RuntimeError(f"the job's process ended with exit {code}; see {task.folder / 'offline.stderr'}")


def run_on(scheduler: str, jobs: Queue, numbers: list[int], tell: Tell, nice: int = 15) -> None:
    """Run these jobs of the queue on the cluster, all at once, until each is over or the queue says cancel.

    Raises ConfigError without the package, OfflineError where the scheduler does not answer.
    """
    try:
        from distributed import Client
    except ImportError as e:
        raise ConfigError("--scheduler needs Dask, which is not installed: pip install 'spiked[dask]'") from e
    try:
        client = Client(scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as e:
        raise OfflineError(f"no Dask scheduler answers at {scheduler} ({e}); check its address") from e
    rows = [row for n in numbers if (row := jobs.claim(only=n)) is not None]
    topics = {row.id: f"spiked-{row.key}-{time.time_ns()}" for row in rows}  # of this run alone
    heard: list[tuple[Row, dict[str, Any]]] = []
    futures = {}
    try:
        for row in rows:
            topic = topics[row.id]
            client.subscribe_topic(topic, partial(_hear, heard, row))
            mark(row.task, "offline")
            future = client.submit(perform, row.task.dump(), topic, nice, key=topic, pure=False, retries=2)
            futures[future] = row
        while futures:
            for job in _note(jobs, heard, tell):
                _ask_to_stop(client, topics[job])
            for future in [f for f in futures if f.done()]:
                _settle(jobs, futures.pop(future), future, tell)
            time.sleep(0.2)
        _note(jobs, heard, tell)
    finally:
        for row in rows:
            if jobs.job(row.id).state == "running":
                _ask_to_stop(client, topics[row.id])
                jobs.put_back(row.id, "interrupted")
                mark(row.task, "queued")
        client.close()


def _hear(heard: list[tuple[Row, dict[str, Any]]], row: Row, event: tuple[float, Any]) -> None:
    """On Dask's own thread: the queue is written on ours."""
    if isinstance(event[1], dict):
        heard.append((row, event[1]))


def _note(jobs: Queue, heard: list[tuple[Row, dict[str, Any]]], tell: Tell) -> list[int]:
    """Tell what was heard and write it into the queue; the jobs that are to be given up."""
    latest: dict[int, dict[str, Any]] = {}
    while heard:
        row, event = heard.pop(0)
        tell({**event, "job": row.id, "session": row.name, "folder": str(row.task.folder)})
        if event.get("event") == "progress":
            latest[row.id] = event
    return [job for job, p in latest.items() if jobs.progress(job, p["stage"], p["overall"], p["text"])]


def _ask_to_stop(client: Any, topic: str) -> None:
    from distributed import Event

    Event(f"{topic}-cancel", client=client).set()


def _settle(jobs: Queue, row: Row, future: Any, tell: Tell) -> None:
    """What became of a job on the cluster, in the queue and the session."""
    about = {"job": row.id, "session": row.name, "folder": str(row.task.folder)}
    if future.status != "finished":
        said = future.exception() if future.status == "error" else future.status
        why = f"the cluster could not do it ({said}); look at its workers"
        jobs.fail(row.id, "resource", " ".join(why.split()))
        mark(row.task, "failed", why)
        tell({"event": "job", "state": "failed", "text": why, **about})
        return
    last = json.loads(json.dumps(future.result()))
    if last["event"] == "finished":
        jobs.finish(row.id, last["report"], last["text"])
    elif last["event"] == "failed":
        jobs.fail(row.id, last["kind"], last["text"], last.get("failure"))
    else:
        jobs.put_back(row.id, last["text"])
    state = jobs.job(row.id).state
    mark(row.task, "done" if state == "cancelled" else state, last["text"] if state == "failed" else "")
    tell({"event": "job", "state": state, "text": last["text"], "kind": last.get("kind", ""), **about})
