"""`spiked discover`: what acquisition programs offer, as the [[stream]] sections that record it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from spiked.config import toml_value
from spiked.errors import ConfigError, SourceError
from spiked.rig.discover import PROGRAMS, Found, discover

# What a program does not tell, and the operator has to.
UNTOLD = {
    "openephys": ('# probe = "probe.json"  # where the electrodes are: Open Ephys does not tell',),
    "maxwell": (
        '# electrode_map = "routing.cfg"  # where the electrodes are: saved from MaxLab Scope',
        "# gain = 512  # as set in MaxLab Scope",
    ),
    "spikeglx": (),
}


def options(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--host", default="127.0.0.1", help="computer on which the programs run")
    p.add_argument(
        "--address", action="append", default=[], metavar="SOURCE=tcp://HOST:PORT",
        help="look for openephys, maxwell or spikeglx there instead of at its usual port",
    )  # fmt: skip


def sections(found: list[Found]) -> list[str]:
    """Lines of TOML: a comment and a [[stream]] for each that sends or could."""
    out: list[str] = []
    names: set[str] = set()
    for f in found:
        out += [f"# {f.text}", "[[stream]]"]
        keys: dict[str, Any] = {
            "name": _name(f, names),
            "source": f.source,
            "address": f.address,
            **f.options,
        }
        if f.options.get("device") in ("nidq", "onebox"):
            keys["spikes"] = False
        out += [f"{k} = {toml_value(v)}" for k, v in keys.items()]
        out += [*UNTOLD[f.source], ""]
    return out


def _name(f: Found, taken: set[str]) -> str:
    """imec0, nidq0, well2, probe, array; each once."""
    if f.source == "spikeglx" and f.options:
        base = f"{f.options['device']}{f.options['probe_index']}"
    elif "well" in f.options:
        base = f"well{f.options['well']}"
    else:
        base = "array" if f.source == "maxwell" else "probe"
    name = next(n for n in (base, *(f"{base}-{k}" for k in range(2, 1000))) if n not in taken)
    taken.add(name)
    return name


def run(args: argparse.Namespace, say: Callable[[str], None]) -> list[Found]:
    """Print what is there. Raises SourceError when nothing is."""
    addresses = {}
    for text in args.address:
        source, equals, address = text.partition("=")
        if not equals or source not in PROGRAMS:
            raise ConfigError(f"--address {text!r} must look like spikeglx=tcp://192.168.0.5:4142")
        addresses[source] = address
    found = discover(args.host, addresses)
    if not found:
        raise SourceError(
            f"no acquisition program answers on {args.host}; start Open Ephys (with a ZMQ Interface), MaxLab Live "
            "or SpikeGLX (with its command server enabled), or say where with --address"
        )
    say("\n".join(sections(found)).rstrip())
    return found
