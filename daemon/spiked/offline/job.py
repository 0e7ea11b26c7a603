"""An offline job: sort what was recorded, curate it, compare live with offline, report.

python -m spiked.offline.job SESSION_DIR [--stream NAME] [--json-progress]
python -m spiked.offline.job --task JSON --json-progress     (what the queue starts; see task.Task)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiked.errors import OfflineError, SpikedError
from spiked.offline import failed, failures, presets
from spiked.offline.lock import alone
from spiked.offline.manifest import Manifest, write_json
from spiked.offline.pipeline import Job, tidy
from spiked.offline.presets import params_of
from spiked.offline.progress import STAGES, Progress, Step
from spiked.offline.session import Session, StreamFiles, open_session
from spiked.offline.task import Task
from spiked.priority import end_with

ENDING_S = 60.0  # a job whose runner was killed ends its sorter first, which may take all of sort.GRACE_S


def run_offline(
    session_dir: Path | str,
    params: dict[str, Any] | None = None,
    progress: Callable[[Step], None] | None = None,
    stream: str | None = None,
) -> dict[str, Any]:
    """Sort, curate, compare and report one stream of a session folder; on a rerun only what is not done yet.

    `params` are fields of presets.JobSettings. `progress` gets a Step at least every few seconds. Returns
    the mapping of report.json: sorter, offline_units, labels, merged_units, live_units, accuracy_offline
    and accuracy_live ({true unit: accuracy}, None without truth), agreement, report, seconds per stage,
    and more. Raises OfflineError (kind biology, environment or resource; stage) or ConfigError.
    """
    session = open_session(session_dir)
    return run_stream(session, session.stream(stream), params, progress)


def run_stream(
    session: Session,
    recorded: StreamFiles,
    params: dict[str, Any] | None = None,
    progress: Callable[[Step], None] | None = None,
    patience_s: float = 0.0,
) -> dict[str, Any]:
    """`run_offline` for a stream of any recording; joined ones are split back, under "epochs" in the mapping."""
    settings = presets.JobSettings.of(params)
    folder = session.folder(recorded, settings.sorter)
    with alone(folder, recorded.nwb, patience_s), Progress(progress) as p:
        tidy(folder, sorted_=True)  # after a job that was killed
        try:
            result = Job(session, recorded, settings, p).run()
        except SpikedError as e:
            failed.write(session, recorded, settings.sorter, failures.told(e, "preflight"))
            raise
        failed.clear(session, recorded, settings.sorter)
        epochs = getattr(recorded, "epochs", ())
        if len(epochs) > 1:
            from spiked.offline.epochs import split

            result["epochs"] = split(folder, epochs, recorded.fs_hz)
            write_json(session.report(recorded, "json"), result)
        return result


def forget(task: Task, stage: str) -> None:
    """Make `stage` and all after it run again at the next run. OfflineError while a job is at work there."""
    if stage not in STAGES:
        raise OfflineError(f"there is no stage {stage}; known are {', '.join(STAGES)}")
    session = task.open()
    for recorded in (
        [session.stream(task.stream)] if task.stream and task.is_session else session.streams.values()
    ):
        folder = session.folder(recorded, task.sorter)
        with alone(folder, recorded.nwb):
            Manifest(folder).forget(STAGES[STAGES.index(stage) :])


def main(argv: list[str] | None = None) -> int:
    """Run the job of every stream, or of one. Exit status 0, or the error's (6 for a failed stage)."""
    parser = argparse.ArgumentParser(prog="python -m spiked.offline.job", description=__doc__.splitlines()[0])
    parser.add_argument("session", type=Path, nargs="?", help="session folder")
    parser.add_argument("--task", help="JSON of a task, instead of a session folder; - reads it from stdin")
    parser.add_argument("--parent", type=int, help="the process that runs the queue, with which the job ends")
    parser.add_argument("--stream", help="one stream only; default: all of them")
    parser.add_argument(
        "--params", default="{}", help="JSON that overrides the [offline] section of session.toml"
    )
    parser.add_argument("--json-progress", action="store_true", help="one JSON object per line on stdout")
    args = parser.parse_args(argv)
    if (args.task is None) == (args.session is None):
        parser.error("give a session folder or --task")
    signal.signal(signal.SIGTERM, _stop)
    if args.task == "-":
        args.task = sys.stdin.read()
    if args.task:
        end_with(args.parent or os.getppid())  # a job that nobody listens to would be run twice
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    write = _json_line if args.json_progress else _text_line
    out = sys.stdout

    def tell(event: dict[str, Any]) -> None:
        out.write(write(event) + "\n")
        out.flush()

    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no progress
        return _run(args, tell)


def _run(args: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> int:
    """Every stream that was asked for; failures become an event and an exit status."""
    try:
        _sort_all(args, tell)
    except SpikedError as e:
        _tell_failure(tell, e)
        return e.exit_code
    return 0


def _sort_all(args: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> None:
    """SpikedError for whatever goes wrong: a job that just ended would be taken for killed, and started again."""
    try:
        task = Task.load(args.task) if args.task else _of_session(args)
        session = task.open()
        results, patience = {}, ENDING_S if args.task else 0.0
        wanted = [session.stream(task.stream)] if task.stream and task.is_session else session.to_sort()
        failed_ones: dict[str, OfflineError] = {}
        for recorded in wanted:
            try:
                result = run_stream(
                    session, recorded, task.params, lambda step: tell(step.as_event()), patience
                )
            except OfflineError as e:  # the others are sorted all the same
                failed_ones[recorded.name] = e
                if len(wanted) > 1:
                    tell(
                        {
                            "event": "skipped",
                            "stream": recorded.name,
                            "text": f"{recorded.name} is left out: {e}",
                        }
                    )
                continue
            results[recorded.name] = result
            tell(_finished(session, result))
        if len(wanted) > 1:
            left_out = {name: {"failed": failures.told(e)} for name, e in failed_ones.items()}
            write_json(session.path / "report.json", {"streams": {**results, **left_out}})
        for why in sorted(failed_ones.values(), key=lambda error: error.kind == "biology"):
            if not results or why.kind != "biology":  # a well without cells is nothing to try again
                raise why
        if len(wanted) > 1:
            tell(_finished_all(session, results, list(failed_ones)))
    except SpikedError:
        raise
    except Exception as e:
        traceback.print_exc(file=sys.stderr)
        raise failures.of_exception(e, "preflight") from e


def _tell_failure(tell: Callable[[dict[str, Any]], None], error: SpikedError) -> None:
    told = failures.told(error, "preflight")
    tell(
        {
            "event": "failed",
            "kind": told["class"],
            "stage": told["stage"],
            "text": str(error),
            "failure": told,
        }
    )


def _of_session(args: argparse.Namespace) -> Task:
    config = open_session(args.session).config
    params = (params_of(config.offline) if config else {}) | _overrides(args.params)
    return Task.of_session(args.session, params, args.stream or "")


def _overrides(text: str) -> dict[str, Any]:
    try:
        params = json.loads(text)
    except ValueError as e:
        raise OfflineError(f"--params is not JSON: {e}") from e
    if not isinstance(params, dict):
        raise OfflineError("--params must be a JSON object")
    return params


def _finished(session: Session, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "event": "finished",
        "session": str(session.path),
        "stream": result["stream"],
        "report": result["report"],
        "text": f"{result['merged_units']} units; report: {result['report']}",
    }


def _finished_all(
    session: Session, results: dict[str, dict[str, Any]], left_out: list[str]
) -> dict[str, Any]:
    text = f"{sum(r['merged_units'] for r in results.values())} units in {len(results)} streams"
    if left_out:
        text += f"; nothing to sort in {', '.join(left_out)}"
    report = session.path / "report.json"
    return {
        "event": "finished",
        "session": str(session.path),
        "stream": "",
        "report": str(report),
        "text": text,
    }


def _stop(signum: int, frame: object) -> None:
    """SIGTERM ends the job like Ctrl-C would: the sorter is stopped, the temporary binary removed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a parent that dies may send it once per thread
    raise KeyboardInterrupt


def _json_line(event: dict[str, Any]) -> str:
    return json.dumps(event)


def _text_line(event: dict[str, Any]) -> str:
    head = (
        f"{event['overall']:4.0%} {event['stage']}: "
        if event["event"] == "progress"
        else f"{event['event']}: "
    )
    return f"{head}{event['text']}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)  # taking down torch and numba costs a second that somebody waits for
