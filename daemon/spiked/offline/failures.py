"""Why a sorter failed, from what it left behind: biology (skip), environment (fix), resource (retry smaller).

SpikeInterface raises one type for everything and drops the chain, so the text in spikeinterface_log.json and
the child's exit status are all there is. Rules are tried in order; the first that matches wins.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

from spiked.errors import OfflineError

GPU_MEMORY = "CUDA out of memory"
HOST_MEMORY = (
    "DefaultCPUAllocator: can't allocate|Unable to allocate|MemoryError|Cannot allocate memory|std::bad_alloc"
    "|could not create a (primitive|memory)"  # oneDNN, which does torch's convolutions on a CPU
)
RULES: tuple[tuple[str, str, str], ...] = (
    (r"No module named|is not installed", "environment", "a package is missing; install spiked[offline]"),
    (
        r"not compiled with CUDA|Found no NVIDIA driver|no CUDA-capable device",
        "environment",
        "CUDA was asked for and is not there; set device = 'auto' or install a CUDA build of torch",
    ),
    (GPU_MEMORY, "resource", "the GPU's memory is full; use a smaller batch_size"),
    (r"CUDA error", "environment", "the GPU failed; look at dmesg and nvidia-smi, then start the job again"),
    (HOST_MEMORY, "resource", "the computer's memory is full; use a smaller batch_size"),
    (r"No space left on device|Errno 28", "resource", "the disk is full; free space and start the job again"),
    (r"PermissionError|Read-only file system", "environment", "the session folder cannot be written"),
    (
        r"urlopen error|Name or service not known",
        "environment",
        "Kilosort wanted to download its templates; keep templates_from_data = true",
    ),
    (
        r"Unrecognized settings|Invalid parameters|must be odd",
        "environment",
        "Kilosort does not know a parameter in [offline] params",
    ),
    (
        r"TruncatedSVD|should be >= n_clusters|No spikes detected|0 sample\(s\)",
        "biology",
        "too few spikes to sort",
    ),
    (
        r"linalg\.svd|non-finite|LinAlgError",
        "biology",
        "the recording is too short or its first seconds are not usable",
    ),
)


class OutOfMemory(OfflineError):
    """The sorter had too little memory, of the computer or of the GPU; it may fit in smaller pieces."""

    def __init__(self, message: str, stage: str = "") -> None:
        super().__init__(message, "resource", stage)


MEMORY = re.compile(f"{GPU_MEMORY}|{HOST_MEMORY}")


def classify(text: str) -> tuple[str, str]:
    """(kind, what it means) of a failure's text; ('environment', '') when no rule knows it."""
    for pattern, kind, meaning in RULES:
        if re.search(pattern, text):
            return kind, meaning
    return "environment", ""


def from_exit(returncode: int) -> tuple[str, str] | None:
    """(kind, what it means) when the child was ended by a signal, else None."""
    if returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return (
            "resource",
            "the sorter was killed, most likely because memory ran out; use a smaller batch_size",
        )
    if returncode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL):
        return (
            "environment",
            f"the sorter crashed ({signal.Signals(-returncode).name}); reinstall spiked[offline]",
        )
    return None


def error_of(sorter_folder: Path) -> str | None:
    """The error trace SpikeInterface logged, '' when it logged success, None when it logged nothing."""
    try:
        log = json.loads((sorter_folder / "spikeinterface_log.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not log.get("error"):
        return ""
    trace = log.get("error_trace") or []
    return "\n".join(str(line).rstrip("\n") for line in trace) if isinstance(trace, list) else str(trace)


def sorting_error(sorter: str, returncode: int, sorter_folder: Path, stderr_tail: str) -> OfflineError:
    """The OfflineError for a sorter process that did not succeed."""
    trace = error_of(sorter_folder) or stderr_tail
    killed = from_exit(returncode)
    if killed and MEMORY.search(trace):  # C++ ends with SIGABRT when an allocation fails
        killed = None
    kind, meaning = killed or classify(trace)
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else f"exit status {returncode}"
    text = meaning if killed else f"{meaning} ({last})" if meaning else f"{last}; see {sorter_folder}"
    if (killed and kind == "resource") or (not killed and MEMORY.search(trace)):
        return OutOfMemory(f"{sorter}: {text}", "sort")
    return OfflineError(f"{sorter}: {text}", kind, "sort")
