"""The log, on a disk or a terminal that does not take it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from spiked.cli import _logging_behind
from spiked.journal import Journal


def full_pipe() -> tuple[int, int]:
    """(end to read, end that whoever writes to waits at)."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, b"\n" * 4096)
    return read, write


def drained(read: int) -> list[str]:
    with open(read) as f:
        return [line for line in f if line.strip()]


def test_what_is_noted_is_in_the_file_once_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spiked.journal.CLOSE_S", 120.0)  # the disk does not hang, the computer is busy
    journal = Journal(tmp_path / "log.jsonl")
    for k in range(500):
        journal.note("event", f"line {k}", number=k)
    journal.close()
    journal.close()
    journal.note("event", "too late")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["number"] for r in rows] == list(range(500)) and journal.failed == 1


def test_a_disk_that_hangs_holds_up_nobody(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log.jsonl")
    assert journal._file is not None
    journal._file.close()
    read, write = full_pipe()
    journal._file = open(write, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    begun = time.monotonic()
    for k in range(200):
        journal.note("event", f"line {k}")
    assert time.monotonic() - begun < 60  # nobody reads: who waited for it would wait for ever
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(drained(read)))
    reader.start()
    journal.close()
    reader.join(30)
    assert [json.loads(line)["text"] for line in lines] == [f"line {k}" for k in range(200)]


def test_a_terminal_that_was_stopped_holds_up_nobody() -> None:
    read, write = full_pipe()
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(drained(read)))
    root, terminal = logging.getLogger(), open(write, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    before, root.handlers = root.handlers, [logging.StreamHandler(terminal)]
    try:
        with _logging_behind():
            for k in range(300):
                logging.getLogger("spiked").error("line %d", k)
            reader.start()  # Ctrl-Q
    finally:
        root.handlers = before
        terminal.close()
    reader.join(30)
    assert lines == [f"line {k}\n" for k in range(300)]
