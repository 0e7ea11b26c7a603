"""The sorter's own process: `python -m spiked.offline.sort_child JOB.json`.

A fresh process per sort, because a failed in-process run leaves log handlers behind, memory is only returned
by ending, and thread settings must stand in the environment before torch is imported. The job file holds what sort.sorter_job
says. outcome.json, written last, means that all of it is there; error.txt holds the trace of what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from spiked.offline import reading, sorters
from spiked.offline.manifest import write_json
from spiked.offline.sorters import phy
from spiked.priority import end_with

OUTCOME, ERROR = "outcome.json", "error.txt"


def work_of(job: dict[str, Any]) -> sorters.Work:
    """What the sorter is given."""
    stream = reading.binary_stream(job) if job.get("binary") else reading.stream_of(job["source"])
    return sorters.Work(
        recording={k: job[k] for k in ("binary", "source", "fs_hz", "gain_uv", "positions_um") if k in job},
        stream=stream,
        params=job["params"],
        left_out=list(job.get("left_out", [])),
        folder=Path(job["folder"]),
        device=job.get("device", "cpu"),
        threads=job["threads"],
    )


def main(path: str) -> int:
    """Run the sorter; 0 and outcome.json, or 1 and error.txt."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    end_with(job["parent"])
    if limit := int(job["memory_gb"] * 1e9):  # of what it allocates; a GPU's mappings do not count
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    folder = Path(job["folder"])
    started = time.time()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = work_of(job)
        told = sorters.of(job["sorter"]).run(work)
        if (plain := reading.plain_file(work.stream)) is not None:
            phy.show_traces(folder / sorters.OUTPUT, plain, work.stream.fs_hz)
        write_json(folder / OUTCOME, {**told, "sorter": job["sorter"], "seconds": time.time() - started})
    except Exception:  # noqa: BLE001 - whatever a sorter raises is read by the process that waits
        trace = traceback.format_exc()
        sys.stderr.write(trace)
        with contextlib.suppress(OSError):  # a full disk: stderr has it
            (folder / ERROR).write_text(trace, encoding="utf-8")
        return 1
    return 0


def leave(code: int) -> None:
    """End now: taking torch and numba down costs seconds and changes nothing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
