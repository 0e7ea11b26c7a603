"""What a computer says of itself: memory, disk, a process with its descendants, NVIDIA GPUs. Plain numbers."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

SMI = "nvidia-smi"  # comes with every driver; a library for it would be one more thing to install
SMI_FIELDS = "memory.used,memory.total,temperature.gpu"
SMI_S = 10.0
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Of the computer, or of the control group that this process may not outgrow if that is smaller. GB."""

    total_gb: float
    available_gb: float

    @property
    def percent(self) -> float:
        """In use."""
        return 100.0 * (1.0 - self.available_gb / self.total_gb)


@dataclass(frozen=True)
class Tree:
    """A process and all it started. `cpu_s` and `moved_bytes` only ever grow while the same processes live."""

    rss_gb: float
    cpu_s: float
    moved_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. `celsius` is None where the driver does not say."""

    index: int
    used_gb: float
    total_gb: float
    celsius: float | None

    @property
    def percent(self) -> float:
        return 100.0 * self.used_gb / self.total_gb

    @property
    def free_gb(self) -> float:
        return self.total_gb - self.used_gb


def memory() -> Memory:
    """Whichever leaves less: the computer, or a systemd unit's MemoryMax or a container's limit."""
    now = psutil.virtual_memory()
    whole = Memory(now.total / 1e9, now.available / 1e9)
    group = group_memory()
    return group if group is not None and group.available_gb < whole.available_gb else whole


def group_memory(cgroups: Path = CGROUPS, listed: Path = Path("/proc/self/cgroup")) -> Memory | None:
    """The tightest limit among this process's control groups (version 2); None where there is none.

    Pages that only cache files are counted as available.
    """
    found: list[Memory] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        own = next(line for line in listed.read_text().splitlines() if line.startswith("0::"))
        at = cgroups / own.removeprefix("0::").strip("/")
        for folder in (at, *at.parents):
            if not folder.is_relative_to(cgroups):
                break
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used -= int(stat.get("inactive_file", 0))
                found.append(Memory(limit / 1e9, max(limit - used, 0) / 1e9))
    return min(found, key=lambda m: m.available_gb, default=None)


def oom_kills() -> int | None:
    """How many processes the system has ended for want of memory since it started; None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def free_gb(folder: Path) -> float:
    """What a user may still write there."""
    return shutil.disk_usage(folder).free / 1e9


def tree(pid: int) -> Tree | None:
    """None when there is no such process any more."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None
    rss, cpu, moved = 0, 0.0, 0
    for process in family:
        with contextlib.suppress(psutil.Error):
            own = process.memory_info()
            rss += own.rss - own.shared  # without libraries and mapped files: what memory_gb limits
            times = process.cpu_times()
            cpu += times.user + times.system + times.children_user + times.children_system
            io = process.io_counters()
            moved += io.read_bytes + io.write_bytes + io.read_chars + io.write_chars
    return Tree(rss / 1e9, cpu, moved)


def gpus() -> list[Gpu]:
    """All of them; [] without a driver, or when it does not answer."""
    try:
        said = subprocess.run(
            [SMI, f"--query-gpu=index,{SMI_FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=SMI_S, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [gpu for line in said.splitlines() if (gpu := _gpu(line)) is not None]


def gpu(device: str) -> Gpu | None:
    """The one that torch calls `device` ('cuda' or 'cuda:1'); None for 'cpu'."""
    if not device.startswith("cuda"):
        return None
    index = int(device.partition(":")[2] or 0)
    return next((g for g in gpus() if g.index == index), None)


def _gpu(line: str) -> Gpu | None:
    """A line of nvidia-smi: index, MiB used, MiB in all, degrees."""
    parts = [p.strip() for p in line.split(",")]
    try:
        index, used, total = int(parts[0]), float(parts[1]), float(parts[2])
    except (ValueError, IndexError):
        return None
    celsius = float(parts[3]) if len(parts) > 3 and parts[3].replace(".", "", 1).isdigit() else None
    return Gpu(index, used * 2**20 / 1e9, total * 2**20 / 1e9, celsius) if total else None
