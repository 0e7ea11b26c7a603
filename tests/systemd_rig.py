"""spiked in a systemd of its own (systemd_box): what the tests of its services have in common."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from systemd_box import Box

SPIKED = [sys.executable, "-m", "spiked.cli"]
RIG = "/etc/spiked/rig.toml"


@contextmanager
def entered(folder: Path) -> Iterator[Box]:
    """A box that has booted; the test is skipped where there can be none."""
    try:
        box = Box(folder).__enter__()
    except (OSError, RuntimeError) as e:
        pytest.skip(f"no systemd of our own: {e}")
    try:
        readable(box)
        yield box
    finally:
        box.__exit__(None, None, None)


def readable(box: Box) -> None:
    """In the box everybody may enter the folders above this checkout and its Python."""
    for start in (Path(__file__), Path(sys.executable), Path(sys.base_prefix)):
        for folder in (*start.parents, start.resolve().parent):
            box.run("chmod", "a+rx", str(folder), check=False)


def until(what: Callable[[], Any], timeout_s: float, box: Box, every_s: float = 1.0) -> Any:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(every_s)
    journal = box.run("journalctl", "--no-pager", "-o", "cat", "-n", "60", check=False).stdout
    raise AssertionError(f"not within {timeout_s} s; the journal ends with\n{journal}")


def daemon_status(box: Box) -> dict[str, Any]:
    done = box.run(*SPIKED, "status", check=False)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def recording(box: Box, samples: int) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        status = daemon_status(box)
        return status if status.get("streams", {}).get("chip0", {}).get("samples", 0) >= samples else {}

    return dict(until(look, 180, box, every_s=2.0))
