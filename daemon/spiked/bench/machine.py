"""What machine and conditions a figure was measured under."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil


def conditions() -> dict[str, Any]:
    """CPU, memory, load and library versions, for the head of every benchmark's JSON."""
    name = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    versions = {}
    for package in ("spiked", "numpy", "torch", "numba", "pyzmq", "h5py", "kilosort", "spikeinterface"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": name, "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(), "kernel": platform.release(), "versions": versions,
    }  # fmt: skip
