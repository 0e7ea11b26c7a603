"""The sorter on the first seconds, before hours are spent: what fails for the computer's sake fails here.

Versions, the probe, a plugin, a driver, memory: all of it is met within seconds. That the first seconds hold too few
spikes says nothing about the rest, and a failure that nobody knows is left to the whole recording to show.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiked.config import Guards
from spiked.errors import OfflineError
from spiked.offline.session import StreamFiles

BINARY, FOLDER = "canary.dat", "canary"
MARGIN = 1.1  # more than one batch, or whitening has nothing to work on
NT = 61


def length(stream: StreamFiles, guards: Guards, batch: int) -> tuple[int, str]:
    """(samples to try the sorter on, ""), or (0, why it is not tried)."""
    if not guards.canary_s:
        return 0, "switched off"
    if stream.duration_s < guards.canary_from_s:
        return 0, f"the recording is shorter than {guards.canary_from_s:g} s"
    n = max(round(guards.canary_s * stream.fs_hz), round(MARGIN * (batch + 4 * NT)))
    if 2 * n > stream.n_samples:
        return 0, "it would be half of the recording"
    return n, ""


def first(stream: StreamFiles, n_samples: int) -> StreamFiles:
    """The stream as if it had ended there."""
    return dataclasses.replace(stream, n_samples=n_samples)


def params(asked: dict[str, Any]) -> dict[str, Any]:
    """The sorter's parameters, without those that choose a part of the recording."""
    return {k: v for k, v in asked.items() if k not in ("tmin", "tmax")}


def sing(sort: Callable[[], list[str]], seconds: float) -> dict[str, Any]:
    """Run `sort`: {"ran", "seconds", "outcome", "text", "out_of_memory"}.

    OfflineError where the whole recording would fail alike.
    """
    try:
        return {"ran": True, "seconds": seconds, "outcome": "sorted", "text": "", "out_of_memory": sort()}
    except OfflineError as e:
        if e.kind != "biology" and e.name not in ("unknown", "killed"):
            e.stage = "canary"
            e.args = (f"on the first {seconds:.0f} s already: {e}",)
            raise
        outcome = "biology" if e.kind == "biology" else "unclear"
        return {"ran": True, "seconds": seconds, "outcome": outcome, "text": str(e), "out_of_memory": []}


def clear(folder: Path) -> None:
    """Nothing of it is of use afterwards."""
    for left in (BINARY, f"{BINARY}.part", f"{FOLDER}.job.json"):
        with contextlib.suppress(OSError):
            (folder / left).unlink(missing_ok=True)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
