"""Finished sessions into the queue beside them: each is one job, however often this is asked."""

from __future__ import annotations

import json
from pathlib import Path

from spiked import config as configuration
from spiked.errors import ConfigError
from spiked.offline.presets import params_of
from spiked.offline.queue import Queue
from spiked.offline.task import Task, is_session


def enqueue(root: Path, session: Path, offline: configuration.Offline) -> int:
    """The session's job in the queue of `root`; the same one however often this is called."""
    with Queue(root) as jobs:
        return jobs.enqueue(Task.of_session(session, params_of(offline)))[0]


def collect(root: Path) -> list[Path]:
    """Queue every session of `root` that was recorded to its end and has no job; the sessions that were queued.

    A daemon that dies between a session's end and the queue leaves such a session; so does one that recovers it.
    """
    found = []
    for file in sorted(root.glob("*/state.json")) if root.is_dir() else ():
        try:
            state = json.loads(file.read_text(encoding="utf-8"))["state"]
            if state not in ("queued", "offline") or not is_session(file.parent):
                continue
            config = configuration.load(file.parent / "session.toml")
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            continue
        if config.offline.enabled:
            with Queue(root) as jobs:
                _, new = jobs.enqueue(Task.of_session(file.parent, params_of(config.offline)))
            found += [file.parent] if new else []
    return found
