"""Which process has a job: named so that another one with the same number is not taken for it."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Owner:
    """A process: computer, boot of that computer, number, and when it started (clock ticks since the boot)."""

    host: str
    boot: str
    pid: int
    start: int

    @classmethod
    def me(cls) -> Self:
        """This process."""
        return cls(socket.gethostname(), _boot(), os.getpid(), _start(os.getpid()) or 0)

    @classmethod
    def read(cls, text: str | None) -> Self | None:
        """From `dump`; None for anything else."""
        try:
            return cls(**json.loads(text or ""))
        except (ValueError, TypeError):
            return None

    def dump(self) -> str:
        return json.dumps(asdict(self))

    def alive(self) -> bool:
        """False once it has ended. Of a process on another computer nothing is known: True."""
        if self.host != socket.gethostname():
            return True
        return self.boot == _boot() and _start(self.pid) == self.start


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _start(pid: int) -> int | None:
    """When a process started; None when there is none of this number, or only its remains (proc(5), stat)."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
