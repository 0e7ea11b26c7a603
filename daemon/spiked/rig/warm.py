"""Whether the kernels of this installation are compiled already: a stamp that `spiked warmup` leaves in the cache."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import spiked

STAMP = "spiked-warm"
COMPILED = ("numba", "llvmlite", "numpy")


def stamp_file() -> Path:
    """Beside numba's cache where that has a place of its own, else in the user's cache."""
    if folder := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(folder) / STAMP
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spiked" / STAMP


def fingerprint() -> str:
    """Everything that makes compiled kernels useless when it changes: program, compiler, Python, processor."""
    root = Path(str(spiked.__file__)).parent
    newest = max((p.stat().st_mtime_ns for p in root.rglob("*.py")), default=0)
    versions = []
    for name in COMPILED:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return " ".join(
        [spiked.__version__, str(root), str(newest), sys.version.split()[0], *versions, _processor()]
    )


def _processor() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next(
        (row.partition(":")[2].strip() for row in rows if row.startswith("model name")), platform.machine()
    )


def is_warm(stamp: Path | None = None) -> bool:
    """True when `spiked warmup` has finished for exactly this installation."""
    try:
        return (stamp or stamp_file()).read_text(encoding="utf-8") == fingerprint()
    except OSError:
        return False


def leave_stamp() -> None:
    """After the kernels were compiled. A cache that cannot be written is compiled again next time."""
    path = stamp_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fingerprint(), encoding="utf-8")
    except OSError:
        return
