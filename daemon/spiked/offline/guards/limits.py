"""When it is enough: what was read against what is allowed. No I/O and no clock; 0 turns a limit off.

Each `check` answers None, or an Alarm whose `end` says whether the sorter has to go.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spiked.offline.guards.sensors import Gpu, Memory, Tree

WARN_DISK = 5.0  # times the limit
WARN_PERCENT = 5.0  # below the limit
WARN_CELSIUS = 7.0
HELD = 3  # readings in a row: memory is let go of as quickly as it is taken
IDLE_CPU = 0.01  # cores; a process that waits still wakes now and then


@dataclass(frozen=True)
class Alarm:
    """`text` is a sentence's first half, `remedy` its second; `smaller`: it may fit in smaller pieces."""

    guard: str
    end: bool
    text: str
    remedy: str
    kind: str = "resource"
    smaller: bool = False


@dataclass
class HostMemory:
    """Memory in use on the computer, and what the sorter itself may have (GB)."""

    percent: float
    own_gb: float
    _over: int = 0

    def check(self, memory: Memory, tree: Tree | None) -> Alarm | None:
        used = 0.0 if tree is None else tree.rss_gb
        remedy = "use a smaller batch_size, or end other programs"
        if self.own_gb and used > self.own_gb:
            text = f"the sorter has {used:.1f} GB of memory, memory_gb allows {self.own_gb:g}"
            return Alarm("host_memory", True, text, "use a smaller batch_size", smaller=True)
        if not self.percent:
            return None
        self._over = self._over + 1 if memory.percent >= self.percent else 0
        text = (
            f"{memory.percent:.0f} % of {memory.total_gb:.1f} GB of memory is in use (limit {self.percent:g} %), "
            f"{used:.1f} GB of it by the sorter"
        )
        if self._over >= HELD:
            return Alarm("host_memory", True, text, remedy, smaller=True)
        if memory.percent >= self.percent - WARN_PERCENT:
            return Alarm("host_memory", False, text, remedy)
        return None


@dataclass
class Disk:
    """Free space where the results go."""

    least_gb: float

    def check(self, free_gb: float) -> Alarm | None:
        if not self.least_gb or free_gb >= WARN_DISK * self.least_gb:
            return None
        text = f"{free_gb:.2f} GB are free for the results (limit {self.least_gb:g} GB)"
        return Alarm("disk", free_gb < self.least_gb, text, "free space and start the job again")


@dataclass
class GpuState:
    """Memory and temperature of the sorter's GPU."""

    percent: float
    celsius: float
    _full: int = 0
    _hot: int = 0

    def check(self, gpu: Gpu) -> Alarm | None:
        return self._heat(gpu) or self._memory(gpu)

    def _memory(self, gpu: Gpu) -> Alarm | None:
        if not self.percent:
            return None
        self._full = self._full + 1 if gpu.percent >= self.percent else 0
        if gpu.percent < self.percent - WARN_PERCENT:
            return None
        text = f"{gpu.percent:.0f} % of the {gpu.total_gb:.0f} GB of GPU {gpu.index} are in use (limit {self.percent:g} %)"
        return Alarm("gpu_memory", self._full >= HELD, text, "use a smaller batch_size, or end what else uses the GPU", smaller=True)  # fmt: skip

    def _heat(self, gpu: Gpu) -> Alarm | None:
        if not self.celsius or gpu.celsius is None:
            return None
        self._hot = self._hot + 1 if gpu.celsius >= self.celsius else 0
        if gpu.celsius < self.celsius - WARN_CELSIUS:
            return None
        text = f"GPU {gpu.index} is at {gpu.celsius:.0f} degrees (limit {self.celsius:g})"
        remedy = "look at its fans and the room, then start the job again"
        return Alarm("gpu_temperature", self._hot >= HELD, text, remedy, "environment")


@dataclass
class Stall:
    """A sorter that neither computes nor reads nor writes: its disk, or what mounts it, does not answer.

    Bytes alone would not do: clustering reads nothing for many minutes, and mapped files are not counted.
    """

    after_s: float
    _since: float | None = None
    _last: Tree | None = None

    def check(self, now: float, tree: Tree) -> Alarm | None:
        if not self.after_s:
            return None
        last = self._last
        idle = (
            last is not None
            and self._since is not None
            and tree.moved_bytes == last.moved_bytes
            and tree.cpu_s - last.cpu_s <= IDLE_CPU * max(now - self._since, 1.0)
        )
        if not idle:
            self._since, self._last = now, tree
            return None
        assert self._since is not None
        if now - self._since < self.after_s:
            return None
        text = f"the sorter has neither computed nor read nor written for {now - self._since:.0f} s"
        return Alarm("stall", True, text, "look whether the disk or network drive answers, then start the job again", "environment")  # fmt: skip


@dataclass
class Silence:
    """A sorter that computes on and gets nowhere. `pulse` is anything that changes when it gets on."""

    after_s: float
    _since: float | None = None
    _pulse: object = field(default=None)

    def check(self, now: float, pulse: object) -> Alarm | None:
        if not self.after_s:
            return None
        if self._since is None or pulse != self._pulse:
            self._since, self._pulse = now, pulse
        if now - self._since < self.after_s:
            return None
        text = f"the sorter has shown no progress for {now - self._since:.0f} s"
        return Alarm("silence", True, text, "look at kilosort4.log; a slow computer needs a larger guards.silent_s")  # fmt: skip
