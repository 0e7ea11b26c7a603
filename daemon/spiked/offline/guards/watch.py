"""The eyes on a sorter's process: reads the sensors now and then, keeps the worst of what was seen, says when to end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from spiked.config import Guards
from spiked.errors import OfflineError
from spiked.offline.failures import OutOfMemory
from spiked.offline.guards import sensors
from spiked.offline.guards.limits import Alarm, Disk, GpuState, HostMemory, Silence, Stall

LOOK_S, GPU_S = 1.0, 5.0


class Watch:
    """Call `look` often while the process lives. `seen` is what becomes of it in the report."""

    def __init__(self, guards: Guards, folder: Path, device: str = "cpu", memory_gb: float = 0.0) -> None:
        self.folder, self.device = folder, device
        self._memory = HostMemory(guards.memory_percent, memory_gb)
        self._disk = Disk(guards.disk_gb)
        self._gpu = GpuState(guards.gpu_memory_percent, guards.gpu_celsius)
        self._stall = Stall(guards.stall_s)
        self._silence = Silence(guards.silent_s)
        self._next = self._next_gpu = 0.0
        self._began = time.monotonic()
        self.seen: dict[str, Any] = {"warnings": [], "peaks": {}}
        self._warned: set[str] = set()

    def begin(self) -> None:
        """A new process is watched: what the last one did no longer counts."""
        self._stall = Stall(self._stall.after_s)
        self._silence = Silence(self._silence.after_s)
        self._next = self._next_gpu = 0.0
        self._began = time.monotonic()

    def look(self, pid: int, pulse: object) -> None:
        """OfflineError when the process has to end: `name` is the guard's, `evidence` what was read.

        `pulse` is anything that changes when the sorter gets on.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK_S
        tree = sensors.tree(pid)
        memory, free = sensors.memory(), sensors.free_gb(self.folder)
        self._worst("memory_percent", memory.percent)
        self._worst("disk_free_gb", free, min)
        alarms = [self._memory.check(memory, tree), self._disk.check(free), self._silence.check(now, pulse)]
        if tree is not None:
            self._worst("sorter_gb", tree.rss_gb)
            alarms.append(self._stall.check(now, tree))
        if self.device.startswith("cuda") and now >= self._next_gpu:
            self._next_gpu = now + GPU_S
            alarms += self._look_at_gpu()
        self._judge([a for a in alarms if a is not None])

    def _look_at_gpu(self) -> list[Alarm | None]:
        gpu = sensors.gpu(self.device)
        if gpu is None:
            return []
        self._worst("gpu_memory_percent", gpu.percent)
        if gpu.celsius is not None:
            self._worst("gpu_celsius", gpu.celsius)
        return [self._gpu.check(gpu)]

    def _worst(self, name: str, value: float, worse: Any = max) -> None:
        peaks = self.seen["peaks"]
        peaks[name] = round(worse(peaks.get(name, value), value), 3)

    def _judge(self, alarms: list[Alarm]) -> None:
        for alarm in alarms:
            if not alarm.end and alarm.guard not in self._warned:
                self._warned.add(alarm.guard)
                self.seen["warnings"].append(alarm.text)
        ends = [a for a in alarms if a.end]
        if ends:
            raise self._error(ends[0])

    def _error(self, alarm: Alarm) -> OfflineError:
        evidence = (
            f"guard {alarm.guard}: {alarm.text}",
            f"after {time.monotonic() - self._began:.0f} s of sorting",
            "at most: " + ", ".join(f"{k} {v:g}" for k, v in self.seen["peaks"].items()),
        )
        message = f"the sorter was ended: {alarm.text}; {alarm.remedy}"
        if alarm.smaller:
            return OutOfMemory(message, "sort", alarm.guard, evidence)
        return OfflineError(message, alarm.kind, "sort", alarm.guard, evidence)
