"""What a check found, and what every check is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from spiked import config as configuration

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """`level` ok, warn (works, but not as it should) or fail (will not work). `fix`: the command, or the line, that mends it."""

    check: str
    level: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Expected:
    """What a stream will bring, as far as its configuration tells."""

    name: str
    channels: int
    fs_hz: float
    sample_bytes: int
    wire_bytes: int  # of a sample, before it is stored
    guessed: bool  # the number of channels is the device's largest, nothing tells it

    @property
    def stored_per_s(self) -> float:
        return self.channels * self.fs_hz * self.sample_bytes

    @property
    def received_per_s(self) -> float:
        return self.channels * self.fs_hz * self.wire_bytes


@dataclass
class Scene:
    """The rig that is looked at. Without a configuration only the computer is."""

    path: Path | None
    config: configuration.Config | None = None
    streams: list[Expected] = field(default_factory=list)
    quick: bool = False  # no writing to the disk

    @property
    def stored_per_s(self) -> float:
        """Bytes per second into the session files, all streams."""
        return sum(s.stored_per_s for s in self.streams)

    @property
    def rig(self) -> str:
        """The argument by which commands know this rig."""
        return str(self.path) if self.path else "rig.toml"
