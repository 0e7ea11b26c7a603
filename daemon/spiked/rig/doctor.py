"""`spiked doctor`: everything that has to be right before a session, tried rather than assumed where it can be."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from spiked import config as configuration
from spiked.errors import SpikedError
from spiked.rig import check_config, check_machine, check_network, check_software
from spiked.rig.findings import FAIL, OK, WARN, Finding, Scene

Say = Callable[[str], None]
Check = Callable[[Scene], Iterable[Finding]]
# streams first: the others need to know what they bring
CHECKS: tuple[tuple[str, Check], ...] = (
    ("probe", check_config.streams), ("files", check_config.files), ("ports", check_network.ports), ("peers", check_network.peers),
    ("outputs", check_network.outputs), ("broker", check_network.broker), ("disk", check_machine.disk), ("memory", check_machine.memory),
    ("rtprio", check_machine.realtime), ("rmem", check_machine.buffers), ("limits", check_machine.limits), ("clock", check_machine.clock),
    ("cpu", check_machine.processor), ("gpu", check_machine.gpu), ("versions", check_software.versions), ("kernels", check_software.kernels),
    ("hdf5", check_software.plugin), ("service", check_software.service),
)  # fmt: skip
SHOWN = {OK: " ok ", WARN: "warn", FAIL: "FAIL"}


def options(c: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    c.add_argument("config", nargs="?", type=lambda t: Path(os.path.expanduser(t)), help="the rig's TOML file; default: ./rig.toml, ~/.config/spiked/rig.toml or /etc/spiked/rig.toml; without any, only the computer is looked at")  # fmt: skip
    c.add_argument(
        "--quick", action="store_true", help=f"without writing {check_machine.TEST_MB} MB to the disk"
    )
    c.add_argument(
        "--only", action="append", default=[], choices=[name for name, _ in CHECKS], help="these checks"
    )
    c.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, say: Say) -> int:
    """The command; 1 when something will not work."""
    findings = examine(args.config or _usual(), args.quick, tuple(args.only))
    failed = sum(f.level == FAIL for f in findings)
    warned = sum(f.level == WARN for f in findings)
    if args.json:
        rows = [{"check": f.check, "level": f.level, "text": f.text, "fix": f.fix} for f in findings]
        say(json.dumps({"ok": not failed, "failed": failed, "warned": warned, "findings": rows}, indent=1))
    else:
        for f in findings:
            say(f"{SHOWN[f.level]}  {f.check:9} {f.text}")
            if f.fix and f.level != OK:
                say(f"{'':16}-> {f.fix}")
        say(f"{failed} to mend, {warned} to look at" if failed or warned else "everything is as it should be")
    return 1 if failed else 0


def examine(path: Path | None, quick: bool = False, only: tuple[str, ...] = ()) -> list[Finding]:
    """All findings. A check that breaks is a finding too; it hides no other."""
    scene = Scene(path, quick=quick)
    out = [_config(scene)]
    for name, check in CHECKS:
        needed = name == "probe"  # fills in what the streams bring
        if only and name not in only and not needed:
            continue
        try:
            found = list(check(scene))
        except Exception as e:  # noqa: BLE001 - the doctor must not die of what it looks for
            found = [Finding(name, WARN, f"could not be checked: {type(e).__name__}: {e}")]
        out += found if not only or name in only else []
    return out


def _config(scene: Scene) -> Finding:
    if scene.path is None:
        return Finding(
            "config", WARN, "there is no rig.toml: only the computer is looked at", "spiked init rig.toml"
        )
    try:
        scene.config = configuration.load(scene.path)
    except SpikedError as e:
        fix = f"edit {scene.path}; `spiked init` writes one to start from"
        return Finding("config", FAIL, str(e), fix)
    names = ", ".join(f"{s.name} ({s.source})" for s in scene.config.stream)
    return Finding("config", OK, f"{scene.path}: {scene.config.rig.name} with {names}")


def _usual() -> Path | None:
    for path in (
        Path("rig.toml"),
        Path("~/.config/spiked/rig.toml").expanduser(),
        Path("/etc/spiked/rig.toml"),
    ):
        if path.is_file():
            return path
    return None
