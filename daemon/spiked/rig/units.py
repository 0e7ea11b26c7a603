"""The systemd files of a rig, from the ones that ship: for the computer or one user, for one rig or several.

The files in `systemd/` are whole as they are (a rig at /etc/spiked/rig.toml, the program in /opt/spiked). Each
directive in them has a comment above it that says why, which is what `spiked install-service --explain` prints.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from spiked.errors import ConfigError

PROGRAM, CONFIG = "/opt/spiked/bin/spiked", "/etc/spiked/rig.toml"  # as they stand in the files that ship
SERVICES = ("spiked", "spiked-jobs")
SLICES = ("spiked.slice", "spikedjobs.slice")
MARK = "# Written by `spiked install-service`, which overwrites it; put your changes into a drop-in: systemctl edit"
SUM = "# sha256 of what follows: "
# What a user's own systemd can grant: the rest needs root, or is about a user of its own.
FOR_USERS = {
    "Description", "StartLimitBurst", "StartLimitIntervalSec", "Type", "NotifyAccess", "Environment", "ExecStartPre", "ExecStart",
    "TimeoutStartSec", "WatchdogSec", "WatchdogSignal", "TimeoutStopSec", "TimeoutAbortSec", "KillMode", "Restart", "RestartSec",
    "RestartPreventExitStatus", "OOMPolicy", "Slice", "UMask", "Nice", "CPUSchedulingPolicy", "LimitCORE", "NoNewPrivileges",
    "LockPersonality", "RestrictSUIDSGID", "SystemCallArchitectures", "WantedBy", "Also", "After", "CPUWeight", "IOWeight", "MemoryHigh",
    "MemoryMax", "MemorySwapMax",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One directive, and why it is there."""

    section: str
    key: str
    value: str
    why: str


@dataclass(frozen=True)
class Layout:
    """Where things go. `root` is put before every path that is written, for packages and tests."""

    config: Path
    instance: str = ""
    user: bool = False
    root: Path = Path("/")
    program: str = field(default_factory=lambda: program())

    def __post_init__(self) -> None:
        if self.instance and not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.instance):
            raise ConfigError(f"instance {self.instance!r}: letters, digits, - and _, as in a rig's name")

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    @property
    def units(self) -> Path:
        """The folder of the unit files."""
        if not self.user:
            return self.at("/etc/systemd/system")
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        return self.at(str(base / "systemd/user"))

    def unit(self, service: str) -> str:
        """The name to start: spiked.service, or spiked@rigA.service."""
        return f"{service}@{self.instance}.service" if self.instance else f"{service}.service"


def program() -> str:
    """The command line that starts this very `spiked`."""
    python = Path(sys.executable)
    script = python.with_name("spiked")
    return _quoted(script) if script.is_file() else f"{_quoted(python)} -m spiked.cli"


def _quoted(path: Path) -> str:
    return f'"{path}"' if " " in str(path) else str(path)


def shipped(name: str) -> str:
    """The text of a file in `systemd/`."""
    here = Path(__file__).parent / "units"
    folder = here if here.is_dir() else Path(__file__).parents[3] / "systemd"
    try:
        return (folder / name).read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read {folder / name}: {e.strerror}; install spiked again") from e


def lines(text: str) -> list[Line]:
    """The directives of a unit file, each with the comment above it."""
    out, section, why = [], "", ""
    for row in text.splitlines():
        if row.startswith("#"):
            why = f"{why} {row[1:].strip()}".strip()
        elif row.startswith("["):
            section = row.strip("[]")
        elif "=" in row:
            key, _, value = row.partition("=")
            out.append(Line(section, key, value, why))
            why = ""
    return out


def write_unit(directives: list[Line]) -> str:
    """The text of a unit file; `lines` reads it back."""
    out: list[str] = []
    section = ""
    for d in directives:
        if d.section != section:
            section = d.section
            out += ([""] if out else []) + [f"[{section}]"]
        out += ([f"# {d.why}"] if d.why else []) + [f"{d.key}={d.value}"]
    return "\n".join(out) + "\n"


def service(name: str, layout: Layout) -> str:
    """The unit of a service for this layout."""
    directives = lines(shipped(f"{name}.service"))
    if layout.user:
        directives = [d for d in directives if _for_users(d)]
    return write_unit([_placed(d, layout) for d in directives])


def _for_users(d: Line) -> bool:
    if d.key == "Environment" and "/var/" in d.value:
        return False
    return d.key in FOR_USERS and (d.key != "After" or d.value == "spiked.service")


def _placed(d: Line, layout: Layout) -> Line:
    value = d.value.replace(PROGRAM, layout.program)
    if layout.instance:
        value = re.sub(r"\b(spiked(?:-jobs)?)\.service\b", r"\1@%i.service", value)
        value = f"{value} (%i)" if d.key == "Description" else value
        value = value.replace(CONFIG, "/etc/spiked/%i.toml")
    if layout.user:
        value = value.replace("/etc/spiked/", "%E/spiked/").replace("multi-user.target", "default.target")
    return Line(d.section, d.key, value, d.why)


def files(layout: Layout, drop_in: list[Line]) -> dict[Path, str]:
    """Everything that is to be on this computer, with its text."""
    kind = "@.service" if layout.instance else ".service"
    out = {layout.units / f"{name}{kind}": service(name, layout) for name in SERVICES}
    for name in SLICES:
        slices = lines(shipped(name))
        out[layout.units / name] = write_unit([d for d in slices if not layout.user or _for_users(d)])
    for name in SERVICES:
        own = [d for d in drop_in if name == "spiked" or d.key in JOBS_TOO]
        if own:
            out[layout.units / f"{layout.unit(name)}.d/10-rig.conf"] = write_unit(own)
    if not layout.user:
        out[layout.at("/etc/sysusers.d/spiked.conf")] = shipped("spiked.sysusers")
        out[layout.at("/etc/tmpfiles.d/spiked.conf")] = shipped("spiked.tmpfiles")
    return {path: signed(text) for path, text in out.items()}


# Of the rig's drop-in, what the sorting service needs too.
JOBS_TOO = {
    "Environment", "RequiresMountsFor", "ReadWritePaths", "ProtectHome", "BindPaths", "BindReadOnlyPaths",
}  # fmt: skip


def signed(text: str) -> str:
    """The text with a head that tells it is ours, and whether it was changed since."""
    return f"{MARK}\n{SUM}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def is_ours(text: str) -> bool:
    return text.startswith(MARK)


def is_untouched(text: str) -> bool:
    """True when a file of ours is as it was written."""
    head, _, rest = text.partition("\n")
    told, _, body = rest.partition("\n")
    return head == MARK and told.removeprefix(SUM) == hashlib.sha256(body.encode()).hexdigest()


def explained(text: str) -> list[str]:
    """A unit file as a table: directive, and why."""
    out, section = [], ""
    for d in lines("\n".join(r for r in text.splitlines() if not r.startswith((MARK, SUM)))):
        if d.section != section:
            section = d.section
            out.append(f"  [{section}]")
        out += [f"    {d.key}={d.value}", f"        {d.why}"]
    return out


def command(layout: Layout, *words: str) -> list[str]:
    """A systemctl command for this layout."""
    return ["systemctl", *(["--user"] if layout.user else []), *words]


def shell(words: list[str]) -> str:
    return shlex.join(words)
