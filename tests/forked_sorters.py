"""Kilosort many times for the price of one import: `python forked_sorters.py CASES.json` forks a process per case.

A case is {"name", "job": what sort_child reads} or {"name", "call": keywords of run_kilosort, with the binary's shape},
and "crash": seconds after which the process reads address 0. Its end goes to NAME.end as JSON: {"code", "error"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


def results(cases: list[dict[str, Any]], folder: Path, timeout_s: float = 800.0) -> dict[str, dict[str, Any]]:
    """{name: {"code": exit status or -signal, "error": what it left}} of all cases, run one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    large = str(4 << 30)
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg",
        "MALLOC_MMAP_THRESHOLD_": large, "MALLOC_TRIM_THRESHOLD_": large,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "cases.json")], env=env, capture_output=True, text=True, timeout=timeout_s
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {c["name"]: json.loads((folder / f"{c['name']}.end").read_text()) for c in cases}


def _crash_after(seconds: float) -> None:
    def crash() -> None:
        time.sleep(seconds)
        ctypes.string_at(0)

    threading.Thread(target=crash, daemon=True).start()


def _run(case: dict[str, Any], folder: Path) -> int:
    """In the forked process."""
    if case.get("crash") is not None:
        _crash_after(case["crash"])
    if "job" in case:
        from spiked.offline.sort_child import main as sort

        path = folder / f"{case['name']}.job.json"
        path.write_text(json.dumps({**case["job"], "parent": os.getppid()}))
        return sort(str(path))
    import numpy as np
    import torch
    from kilosort import run_kilosort

    call = dict(case["call"])
    probe = call.pop("probe", None)
    if probe is not None:
        call["probe"] = {k: np.asarray(v) if isinstance(v, list) else v for k, v in probe.items()}
    try:
        run_kilosort(**call, device=torch.device("cpu"))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(path: Path) -> None:
    import faiss  # noqa: F401
    import kilosort.run_kilosort  # noqa: F401
    import sklearn.decomposition  # noqa: F401

    import spiked.offline.sort_child  # noqa: F401

    for case in json.loads(path.read_text()):
        began = time.monotonic()
        log = path.parent / f"{case['name']}.stderr"
        child = os.fork()
        if child == 0:
            with log.open("wb") as f:
                os.dup2(f.fileno(), 2)
                os.dup2(f.fileno(), 1)
            code = 99
            try:
                code = _run(case, path.parent)
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        trace = Path(case["job"]["folder"]) / "error.txt" if "job" in case else log
        text = trace.read_text(errors="replace") if trace.is_file() else log.read_text(errors="replace")
        end = {"code": os.waitstatus_to_exitcode(status), "error": text, "seconds": time.monotonic() - began}
        (path.parent / f"{case['name']}.end").write_text(json.dumps(end))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
