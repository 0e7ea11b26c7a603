"""One stream of a session, as the supervisor sees it: its ring, its processes, and what became of it."""

from __future__ import annotations

import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import psutil

from spiked import config as configuration
from spiked.processes.child import Child
from spiked.ring import GAP_REASONS, Ring

RESTARTS = 5
GAPS_LISTED = 1 << 14  # of a stream; the file has them all


class Track:
    """One stream of a session: its ring and its processes."""

    def __init__(self, cfg: configuration.Stream, ring_path: Path) -> None:
        self.cfg, self.ring_path = cfg, ring_path
        self.ring: Ring | None = None
        self._ring_fd = -1
        self.children: dict[str, Child] = {}
        self.lives = {"acquire": 0, "record": 0, "live": 0}
        self.deaths: dict[str, deque[float]] = {role: deque(maxlen=RESTARTS) for role in self.lives}
        self.over: set[str] = set()  # roles that ended for good
        self.state = (
            "starting"  # then recording, lost (its source went away and is looked for), ended or failed
        )
        self.error = ""
        self.lost_at = 0  # samples there were when its source went away
        self.endpoints: dict[str, str] = {}
        self.lost: list[dict[str, Any]] = []  # what the ring lost before it was recorded
        self._gaps: deque[dict[str, Any]] = deque(maxlen=GAPS_LISTED)
        self._gap_row = 0
        self._gap_sums = [0, 0]  # gaps, and samples in them: of all, also those no longer listed
        self._facts: dict[str, Any] = {"samples": 0, "fs_hz": None, "channels": None, "first_sample": None}

    @property
    def name(self) -> str:
        return self.cfg.name

    @property
    def goes_on(self) -> bool:
        """Whether samples come, or may come again."""
        return self.state in ("starting", "recording", "lost")

    def roles(self, config: configuration.Config) -> list[str]:
        """Its processes, as configured."""
        live = config.live.enabled and self.cfg.spikes
        return [r for r, on in (("acquire", True), ("record", config.record.enabled), ("live", live)) if on]

    def hold(self, ring: Ring) -> None:
        """This is its ring. Its file stays within reach also when somebody removes its name."""
        self.ring, self._ring_fd = ring, os.open(ring.path, os.O_RDWR | os.O_CLOEXEC)

    def renew_ring_name(self) -> bool:
        """Before a process is started: True when the ring's file had lost its name, and got it back.

        systemd-logind removes what a user has in /dev/shm when the last session of the user ends (RemoveIPC).
        """
        if self._ring_fd < 0 or self.ring_path.exists():
            return False
        self.ring_path.unlink(missing_ok=True)
        self.ring_path.symlink_to(f"/proc/{os.getpid()}/fd/{self._ring_fd}")
        return True

    def finish(self, state: str, error: str = "") -> None:
        """No more samples: whoever reads the ring ends when it has read it."""
        self.state, self.error = state, error or self.error
        if acquire := self.children.get("acquire"):
            acquire.command("stop")
        if self.ring is not None:
            self.ring.end()

    def told(self) -> dict[str, Any]:
        """The stream as status tells it."""
        last = {
            role: {k: v for k, v in c.last.get("progress", {}).items() if k not in ("event", "process")}
            for role, c in self.children.items()
        }
        self.gaps()
        return {
            **self.facts(),
            "state": self.state,
            "error": self.error,
            "gaps": len(self.lost) + self._gap_sums[0],
            "gap_samples": sum(g["stop"] - g["start"] for g in self.lost) + self._gap_sums[1],
            "processes": last,
            "pids": {r: c.pid for r, c in self.children.items() if c.running},
            "lives": self.lives,
            "calibration": self.children["live"].last.get("calibration") if "live" in self.children else None,
        }

    def gaps(self) -> list[dict[str, Any]]:
        """The gap table, as everybody is told it; the newest GAPS_LISTED of it."""
        if self.ring is not None:
            rows, self._gap_row, missed = self.ring.rows("gaps", self._gap_row)
            told = rows[rows["reason"] != GAP_REASONS.index("reset")]
            whole = told[told["reason"] != GAP_REASONS.index("partial")]
            self._gap_sums[0] += len(told) + missed
            self._gap_sums[1] += int((whole["stop"] - whole["start"]).sum())
            self._gaps.extend(
                {"start": int(r["start"]), "stop": int(r["stop"]), "reason": GAP_REASONS[r["reason"]], "n_channels": int(r["n_channels"])}
                for r in rows
            )  # fmt: skip
        return [*self.lost, *self._gaps]

    def facts(self) -> dict[str, Any]:
        """Samples so far, rate, channels and first sample number; None before the stream is known."""
        if self.ring is not None:
            r = self.ring
            self._facts = {
                "samples": r.committed,
                "fs_hz": r.info.fs_hz,
                "channels": r.info.n_channels,
                "first_sample": r.first_sample,
            }
        return self._facts

    def release(self) -> None:
        """The ring's memory goes; what it said stays."""
        self.gaps(), self.facts()
        if self.ring is not None:
            self.ring.close()
            self.ring = None
        if self._ring_fd >= 0:
            os.close(self._ring_fd)
            self._ring_fd = -1
        self.ring_path.unlink(missing_ok=True)


def ring_path(runtime: Path, session: str, stream: str) -> Path:
    """Where a ring lies; the name tells whose it is."""
    return runtime / f"spiked-{os.getpid()}-{session}-{stream}.ring"


def clear_leftovers(runtime: Path) -> list[Path]:
    """Remove rings and calibration data of supervisors that are gone; what was removed."""
    removed = []
    for path in runtime.glob("spiked-*-*"):
        owner = path.name.split("-")[1]
        if (
            path.suffix not in (".ring", ".new", ".calibration", ".stimuli")
            or not owner.isdigit()
            or psutil.pid_exists(int(owner))
        ):
            continue
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError:  # another user's: theirs to remove
            continue
        removed.append(path)
    return removed
