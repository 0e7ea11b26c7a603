"""The drop-in that fits the services to one rig's configuration: paths, addresses and devices it names."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from spiked import config as configuration
from spiked.rig.paths import named
from spiked.rig.units import CONFIG, Layout, Line

HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")  # the services have their own
LOOPBACK = ("localhost", "127.0.0.1", "::1", "")


def drop_in(config: configuration.Config, layout: Layout) -> list[Line]:
    """What the units that ship cannot know. A user's own service needs the configuration's path only."""
    out = []
    path = layout.config.absolute()
    usual = CONFIG if not layout.instance else f"/etc/spiked/{layout.instance}.toml"
    if str(path) != usual or layout.user:
        out.append(Line("Service", "Environment", f"SPIKED_CONFIG={path}", "the rig's file"))
    if layout.user:
        return out
    sessions = config.rig.sessions.expanduser()
    if config.rig.sessions.is_absolute():
        why = "the disk of rig.sessions has to be mounted, else sessions would lie below its mount point"
        out.insert(0, Line("Unit", "RequiresMountsFor", str(sessions), why))
        out.append(Line("Service", "ReadWritePaths", f"-{sessions}", "rig.sessions"))
    out += list(_hidden(config, path, sessions))
    out += list(_addresses(config))
    out += list(_serial(config))
    return sorted(out, key=lambda d: d.section != "Unit")


def program_folders() -> list[Path]:
    """Where this program, its Python and its packages lie."""
    import spiked
    import spiked_client
    import spiked_models

    roots = {Path(sys.prefix), Path(sys.base_prefix)}
    for package in (spiked, spiked_client, spiked_models):
        source = Path(str(package.__file__)).parent
        if not any(source.is_relative_to(r) for r in roots):
            roots.add(source.parent)
    return sorted(roots)


def below(path: Path, folders: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(f) for f in folders)


def _hidden(config: configuration.Config, path: Path, sessions: Path) -> Iterator[Line]:
    """What the sandbox hides (homes, /tmp) and the rig needs: the program, files that are named, sessions."""
    gone = HOMES + TEMPORARY
    shown = {p for p in program_folders() if below(p, gone)}
    shown |= {
        p.parent if p.is_file() else p for p in [path, *(p for _, p in named(config))] if below(p, gone)
    }
    written = [sessions] if config.rig.sessions.is_absolute() and below(sessions, gone) else []
    if any(below(p, HOMES) for p in [*shown, *written]):
        yield Line("Service", "ProtectHome", "tmpfs", "of the homes only what follows is there")
    for folder in sorted(shown):
        yield Line(
            "Service", "BindReadOnlyPaths", f"-{folder}", "the program, or what the configuration names"
        )
    for folder in written:
        yield Line("Service", "BindPaths", f"-{folder}", "rig.sessions")


def peers(config: configuration.Config) -> list[tuple[str, str]]:
    """(what, host) of everybody that the configuration has the daemon speak to."""
    out = [(f"stream {s.name}", _host(s.address)) for s in config.stream if s.address]
    out += [(f"output {o.name}", _host(o.address)) for o in config.output if "://" in o.address]
    if config.mqtt.enabled:
        out.append(("the MQTT broker", config.mqtt.host))
    hosts = {"publish": config.publish.host, "web": getattr(getattr(config, "web", None), "host", "")}
    # who listens beyond loopback may be spoken to by anybody: keys decide who is answered
    out += [(f"{name}.host", "any") for name, host in hosts.items() if str(host) not in LOOPBACK]
    return out


def _host(address: str) -> str:
    return urlsplit(address).hostname or ""


def _addresses(config: configuration.Config) -> Iterator[Line]:
    for what, host in peers(config):
        if host in LOOPBACK:
            continue
        try:
            yield Line("Service", "IPAddressAllow", str(ipaddress.ip_address(host)), what)
        except ValueError:
            why = what if host == "any" else f"{what} is at {host}, a name, whose address may change"
            yield Line("Service", "IPAddressAllow", "any", why)


def _serial(config: configuration.Config) -> Iterator[Line]:
    ports = [o.address for o in config.output if o.kind == "serial"]
    for port in ports:
        yield Line("Service", "DeviceAllow", f"{port} rw", "a serial output")
    if ports:
        yield Line("Service", "SupplementaryGroups", "dialout", "serial ports belong to this group")
