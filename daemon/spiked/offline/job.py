"""An offline job: sort a recorded session again, curate it, compare live with offline, report.

python -m spiked.offline.job SESSION_DIR [--stream NAME] [--json-progress]
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spiked.config import Offline
from spiked.errors import OfflineError, SpikedError
from spiked.offline import presets
from spiked.offline.manifest import write_json
from spiked.offline.pipeline import BINARY, Job
from spiked.offline.progress import Progress, Step
from spiked.offline.session import Session, open_session


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
    settings = presets.JobSettings.of(params)
    recorded = session.stream(stream)
    folder = session.folder(recorded, settings.sorter)
    with _alone(folder), Progress(progress) as p:
        for left in (BINARY, f"{BINARY}.part"):  # of a job that was killed
            (folder / left).unlink(missing_ok=True)
        return Job(session, recorded, settings, p).run()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a results folder for one job; the system lets go of it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "job.lock").open("w")
    except OSError as e:
        raise OfflineError(f"cannot write {folder}: {e.strerror}; check its owner", stage="preflight") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise OfflineError(f"another job is working in {folder}; wait for it", stage="preflight") from e
        yield


def params_of(section: Offline) -> dict[str, Any]:
    """The [offline] section of a configuration as parameters of `run_offline`."""
    return {
        "sorter": section.sorter,
        "sorter_params": section.params,
        "device": section.device,
        "curate": section.curate,
        "timeout_s": section.timeout_s,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the job of every stream, or of one. Exit status 0, or the error's (6 for a failed stage)."""
    parser = argparse.ArgumentParser(prog="python -m spiked.offline.job", description=__doc__.splitlines()[0])
    parser.add_argument("session", type=Path, help="session folder")
    parser.add_argument("--stream", help="one stream only; default: all of them")
    parser.add_argument(
        "--params", default="{}", help="JSON that overrides the [offline] section of session.toml"
    )
    parser.add_argument("--json-progress", action="store_true", help="one JSON object per line on stdout")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
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
        session = open_session(args.session)
        params = (params_of(session.config.offline) if session.config else {}) | _overrides(args.params)
        results = {}
        for name in [args.stream] if args.stream else list(session.streams):
            results[name] = run_offline(args.session, params, lambda step: tell(step.as_event()), name)
            tell(_finished(session, results[name]))
        if len(results) > 1:
            write_json(session.path / "report.json", {"streams": results})
    except SpikedError as e:
        kind, stage = getattr(e, "kind", "environment"), getattr(e, "stage", "")
        tell({"event": "failed", "kind": kind, "stage": stage, "text": str(e)})
        return e.exit_code
    return 0


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


def _stop(signum: int, frame: object) -> None:
    """SIGTERM ends the job like Ctrl-C would: the sorter is stopped, the temporary binary removed."""
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
        sys.exit(130)
