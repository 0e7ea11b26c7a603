"""The jobs' runner, as the daemon keeps it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from spiked import afterwards
from spiked import config as configuration
from spiked.afterwards import Afterwards
from spiked.journal import Journal
from spiked.offline.queue import Queue
from spiked.offline.task import Task


def test_a_runner_that_is_killed_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a daemon that waits for the next session nothing else would start one before that session's end."""
    monkeypatch.setattr(afterwards, "RESTART_S", 0.1)
    config = configuration.parse(
        {"rig": {"sessions": str(tmp_path), "runtime": str(tmp_path)}, "stream": [{"name": "s", "source": "maxwell"}]}
    )  # fmt: skip
    recording = tmp_path / "x.npy"
    recording.write_bytes(b"")
    with Queue(tmp_path) as jobs:
        jobs.enqueue(Task((str(recording),), str(tmp_path / "out")))

    async def scene() -> list[int]:
        heard: list[dict[str, Any]] = []
        after = Afterwards(config, Journal(None), heard.append)
        await after.begin()
        pids = []
        for _ in range(3):
            until = time.monotonic() + 90
            while not (after.runner and after.runner.running and after.runner.pid not in pids):
                assert time.monotonic() < until
                await asyncio.sleep(0.05)
            assert after.runner.pid is not None
            pids.append(after.runner.pid)
            os.kill(pids[-1], signal.SIGKILL)
        await after.shutdown()
        return pids

    with (tmp_path / "jobs.slot").open("w") as slot:
        fcntl.flock(slot, fcntl.LOCK_EX)  # a runner waits for it with the job before it
        assert len(set(asyncio.run(scene()))) == 3
