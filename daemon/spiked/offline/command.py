"""`spiked sort` and `spiked jobs`. The queue of a recording lies beside the folder its results go to."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiked import config as configuration
from spiked.errors import ConfigError, OfflineError
from spiked.offline import presets
from spiked.offline.queue import NAME, Queue, Row
from spiked.offline.runner import Runner
from spiked.offline.standby import stand_by
from spiked.offline.task import Task, tasks

CHOICE = ("well", "probe", "fs_hz", "n_channels", "dtype", "gain_uv", "zero_code")
Say = Callable[[str], None]


def sort(args: argparse.Namespace, say: Say) -> tuple[int, dict[str, Any]]:
    """Queue what was asked for and run it: (exit status, {path of a report.json: its mapping}).

    Each recording is a job; one that fails does not keep the others from being sorted.
    """
    if args.scheduler and not re.fullmatch(r"[a-z]+://\S+:\d{1,5}", args.scheduler):
        raise ConfigError(f"--scheduler {args.scheduler!r} must look like tcp://HOST:8786")
    choice = {
        k: str(v.absolute()) if k == "probe" else v for k in CHOICE if (v := getattr(args, k)) is not None
    }
    todo = tasks(args.paths, args.concatenate, args.out, args.stream, choice)
    todo = [dataclasses.replace(t, params=_params(t, args.set, args.sorter, args.preset)) for t in todo]
    for task in todo:
        _writable(task)
        _not_of_another(task)
    queued = []
    for task in todo:
        if args.recompute:
            from spiked.offline.job import forget

            forget(task, args.recompute)
        with Queue(task.folder.parent) as jobs:
            queued.append((task.folder.parent, jobs.again(task), task))
    if args.later:
        for folder, job, task in queued:
            say(f"job {job}: {task.name} is queued in {folder / NAME}")
        return 0, {}
    teller = Teller(say)
    for folder in dict.fromkeys(folder for folder, _, _ in queued):
        numbers = [job for at, job, _ in queued if at == folder]
        if args.scheduler:
            from spiked.offline.cluster import run_on

            with Queue(folder) as jobs:
                run_on(args.scheduler, jobs, numbers, teller)
        else:
            for job in numbers:
                Runner(folder, teller).drain(job)
    return _outcome(queued, say)


def _writable(task: Task) -> None:
    """ConfigError where neither results nor their job can be written: recordings often lie where nobody may."""
    root = task.folder.parent
    there = next(p for p in (root, *root.parents) if p.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        what = (
            "check its owner and how the drive is mounted"
            if task.is_session
            else "give --out in a folder that can"
        )
        raise ConfigError(f"{there} cannot be written, and the results would go there; {what}")


def _not_of_another(task: Task) -> None:
    """ConfigError where the results' folder has those of other recordings, which are still there."""
    root, mine = task.folder.parent, {*task.paths}
    if task.is_session or not (root / NAME).is_file():
        return
    with Queue(root) as jobs:
        for row in jobs.jobs("queued", "running", "done"):
            theirs = {*row.task.paths}
            same = mine <= theirs or theirs <= mine  # a folder that grew
            if row.task.folder == task.folder and not same and all(map(os.path.exists, theirs)):
                what = " and ".join(row.task.paths[:2])
                raise ConfigError(
                    f"{task.folder} is for the results of {what} (job {row.id}); give another --out"
                )


def _params(task: Task, settings: list[str], sorter: str | None, preset: str | None) -> dict[str, Any]:
    """A session's own [offline] section, changed by what the command says; unknown keys are the sorter's.

    With another sorter than the session's, the session's preset and parameters are not for it.
    """
    params: dict[str, Any] = {}
    if task.is_session:
        try:
            section = configuration.load(task.folder / "session.toml").offline
            params = presets.params_of(section)
        except ConfigError:
            params = {}  # another version's configuration does not stop a sorting
    if sorter is not None and sorter != params.get("sorter", "kilosort4"):
        params |= {"sorter": sorter, "preset": "auto", "sorter_params": {}}
    if preset is not None:
        params["preset"] = preset
    known = {f.name for f in dataclasses.fields(presets.JobSettings)}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text} is not KEY=VALUE")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        table, dot, inner = key.partition(".")
        if key in known:
            params[key] = parsed
        elif dot and table in known:
            try:
                params[table] = _put(params.get(table, {}), inner, parsed)
            except TypeError as e:
                raise ConfigError(
                    f"--set {text}: it would go into a value, not into a table; leave out the --set that put that there"
                ) from e
        else:
            given = _absolute(parsed) if key in configuration.PATHS["offline.params"] else parsed
            params["sorter_params"] = {**params.get("sorter_params", {}), key: given}
    presets.JobSettings.of(params)
    return params


def _absolute(value: Any) -> Any:
    """A path that is there, as it is found from wherever the job runs; anything else as it is."""
    there = Path(os.path.expanduser(value)) if isinstance(value, str) and value else None
    return str(there.absolute()) if there is not None and there.exists() else value


def _put(table: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The table with `key` set; a dotted key is one of a table in it, as in labels.criteria.snr."""
    first, dot, rest = key.partition(".")
    return {**table, first: _put(table.get(first, {}), rest, value) if dot else value}


def sorters(args: argparse.Namespace, say: Say) -> int:
    """Which sorters there are and whether they can run here, or what one can be told."""
    from spiked.offline import sorters as known

    if args.json:
        told = [known.as_mapping(name) for name in ([args.name] if args.name else known.NAMES)]
        say(json.dumps(told[0] if args.name else told, indent=1, default=str))
    else:
        say("\n".join(known.describe(args.name)))
    return 0


class Teller:
    """Prints a runner's events, each line once."""

    def __init__(self, say: Say) -> None:
        self._say, self._last = say, ""

    def __call__(self, event: dict[str, Any]) -> None:
        what = event["event"]
        if what == "progress":
            line = f"{event['session']}: {event['overall']:4.0%} {event['stage']}: {event['text']}"
        elif what == "job":
            line = f"{event['session']}: {event['state']}: {event['text']}"
        elif what == "skipped":
            line = f"{event['session']}: {event['text']}"
        elif what == "waits":
            line = str(event["text"])
        else:
            return
        if line != self._last:
            self._last = line
            self._say(line)


def _outcome(queued: list[tuple[Path, int, Task]], say: Say) -> tuple[int, dict[str, Any]]:
    status, results = 0, {}
    for folder, job, _ in queued:
        with Queue(folder) as jobs:
            row = jobs.job(job)
        if row.state == "done":
            file = Path(row.report).with_suffix(".json")
            results[str(file)] = json.loads(file.read_text(encoding="utf-8"))
            say(f"report: {row.report}")
        else:
            status = OfflineError.exit_code
            if len(queued) == 1:
                raise OfflineError(f"{row.name} is {row.state}: {row.text}", row.kind or "environment")
            say(f"{row.name} is {row.state}: {row.text}")
    return status, results


def jobs(args: argparse.Namespace, say: Say) -> int:
    """List the jobs of a queue, or cancel, retry, show or run some."""
    if args.wait and args.action == "run" and not args.job:
        stand_by(args.folder)
        return 0
    folder = _queue_folder(args.folder)
    if not (folder / NAME).is_file():
        raise ConfigError(
            f"there is no queue in {folder}; give --folder the sessions folder or the rig's file"
        )
    with Queue(folder) as queue:
        if args.action in ("cancel", "retry", "show") and not args.job:
            raise ConfigError(f"say which: spiked jobs {args.action} NUMBER")
        if args.action == "list":
            rows = [r for r in queue.jobs() if not args.job or r.id in args.job]
            say(json.dumps([r.as_dict() for r in rows], indent=1) if args.json else listing(rows))
        for job in args.job:
            if args.action == "cancel":
                say(f"job {job}: {queue.cancel(job)}")
            elif args.action == "retry":
                queue.retry(job)
                say(f"job {job}: queued; the daemon's next start or `spiked jobs run` does it")
            elif args.action == "show":
                _show(queue, job, args.json, say)
    return _run(folder, args.job, say) if args.action == "run" else 0


def _run(folder: Path, numbers: list[int], say: Say) -> int:
    """Run what is queued, or these jobs; 6 where one failed. OfflineError for one that is over."""
    with Queue(folder) as queue:
        for row in map(queue.job, numbers):
            if row.state not in ("queued", "running"):
                raise OfflineError(
                    f"job {row.id} is {row.state}; `spiked jobs retry {row.id}` queues it again"
                )
    failed, teller = [], Teller(say)

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "job" and event["state"] == "failed":
            failed.append(event)
        teller(event)

    wanted: list[int | None] = [*numbers] or [None]
    for only in wanted:
        Runner(folder, tell).drain(only)
    return OfflineError.exit_code if failed else 0


def _queue_folder(path: Path) -> Path:
    """The folder of the queue that is meant by a sessions folder, a session or a rig's file."""
    if path.is_file():
        return configuration.load(path).rig.sessions.expanduser()
    return path if (path / NAME).is_file() or not path.exists() else path.resolve().parent


def listing(rows: list[Row]) -> str:
    """A table for the terminal, in the order the jobs are run."""
    if not rows:
        return "no jobs"
    head = ("job", "state", "", "stage", "starts", "what", "")
    table = [head]
    for r in rows:
        state = "stale" if r.stale else r.state
        share = f"{r.overall:.0%}" if r.state == "running" else ""
        table.append((str(r.id), state, share, r.stage, str(r.starts), r.name, r.text))
    widths = [max(len(row[k]) for row in table) for k in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in table
    )


def _show(queue: Queue, job: int, as_json: bool, say: Say) -> None:
    row, log = queue.job(job), queue.log(job)
    if as_json:
        say(
            json.dumps(
                {**row.as_dict(), "log": [{"t": t, "state": s, "text": x} for t, s, x in log]}, indent=1
            )
        )
        return
    say(f"job {row.id}: {row.name}, {row.sorter}, {row.state}")
    say("\n".join(f"  {path}" for path in row.task.paths))
    if row.state == "failed" and row.failure:
        from spiked.offline.failed import lines

        say("\n".join(f"  {line}" for line in lines(row.failure)))
    for t, state, text in log:
        say(f"  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(t))} {state}: {text}")
