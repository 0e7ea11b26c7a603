"""`spiked init`: a rig's TOML file from a few questions, or from flags, with every other option beside it as a comment."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from spiked import config as configuration
from spiked.errors import ConfigError
from spiked.rig.discover import PROGRAMS, Found, discover
from spiked.rig.findings import FAIL, Scene
from spiked.rig.write import rig_file
from spiked.sources.presence import DEFAULTS

Say = Callable[[str], None]
MAP_KEY = {"maxwell": "electrode_map", "openephys": "probe"}  # SpikeGLX tells its geometry
SOURCES = (*DEFAULTS, "replay")


def options(c: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    c.add_argument(
        "file", nargs="?", type=_path, default=Path("rig.toml"), help="what to write; default: rig.toml here"
    )
    c.add_argument(
        "--source", choices=SOURCES, help="who sends the samples; default: what is found at the usual ports"
    )
    c.add_argument(
        "--address", help="where, tcp://HOST:PORT; default: the program's own port on this computer"
    )
    c.add_argument("--stream", help="a name for the stream; default: probe0, chip0 or recording")
    c.add_argument("--probe", type=_path, help="probeinterface JSON")
    c.add_argument("--electrode-map", type=_path, help="MaxLab: .cfg, or a .raw.h5 of the same configuration")
    c.add_argument("--gain", type=float, help="MaxLab: amplifier gain; default 512")
    c.add_argument("--recording", type=_path, help="replay: file or folder")
    c.add_argument("--stim-lines", help="TTL lines that mean a stimulus, such as 0,1")
    c.add_argument("--name", help="of the rig; default: this computer's name")
    c.add_argument("--sessions", type=_path, help="where session folders go; default: /data/sessions where there is /data, else ~/spiked-sessions, or for root /var/lib/spiked/sessions")  # fmt: skip
    c.add_argument("--subject", help="who is on the rig, for NWB")
    c.add_argument("--yes", action="store_true", help="ask nothing: flags and defaults")
    c.add_argument("--force", action="store_true", help="write over a file that is there")


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def run(args: argparse.Namespace, say: Say, ask: Callable[[str], str] = input) -> int:
    """The command."""
    if args.file.exists() and not args.force:
        raise ConfigError(f"{args.file} is there already; give another name, or --force to write over it")
    if not args.yes and not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask at; give --yes and flags (spiked init --help)")
    answers = Questions(args, say, None if args.yes else ask).answers()
    text = rig_file(answers, _head(args.file))
    _write(args.file, text)
    say(f"wrote {args.file}")
    for finding in _doubts(args.file):
        say(f"  {finding}")
    say(f"next: spiked doctor {args.file}, then spiked run {args.file}, or as a service: sudo {Path(sys.executable).with_name('spiked')} install-service --config {args.file.absolute()} --start")  # fmt: skip
    return 0


def _head(path: Path) -> str:
    return (
        f"The rig's configuration, written by `spiked init` on {date.today().isoformat()}.\n"
        "What begins with # is a default: remove the # to change it. Relative paths are relative to this file.\n"
        f"`spiked doctor {path.name}` checks it, and the computer with it."
    )


def _write(path: Path, text: str) -> None:
    """The file, 0640; only one that can be read back as a configuration."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text(text, encoding="utf-8")
        new.chmod(0o640)
        try:
            configuration.load(new)
        except ConfigError as e:
            new.unlink()
            raise ConfigError(str(e).replace(str(new), "what was answered")) from e
        os.replace(new, path)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; choose a folder that you may write to") from e


def _doubts(path: Path) -> list[str]:
    """What `spiked doctor` will say about the file itself."""
    from spiked.rig import check_config

    scene = Scene(path, configuration.load(path))
    found = [*check_config.streams(scene), *check_config.files(scene)]
    return [f"{'wrong' if f.level == FAIL else 'note'}: {f.text}; {f.fix}" for f in found if f.fix]


def _default_sessions() -> Path:
    """Where there is room, or else what is one's own: root's home is for nobody else to read, the service's is for its group."""
    if Path("/data").is_dir():
        return Path("/data/sessions")
    return Path("/var/lib/spiked/sessions" if os.geteuid() == 0 else "~/spiked-sessions").expanduser()


class Questions:
    """What to write, from flags, from what is found, and, with `ask`, from the operator."""

    def __init__(self, args: argparse.Namespace, say: Say, ask: Callable[[str], str] | None) -> None:
        self.args, self.say, self.ask = args, say, ask

    def answers(self) -> dict[str, Any]:
        args = self.args
        name = self._text("Name of the rig", args.name, _clean(socket.gethostname()))
        sessions = self._text("Folder for sessions", args.sessions, str(_default_sessions()))
        streams = self._streams()
        rig = {"name": name, "sessions": str(Path(sessions).expanduser().absolute())}
        out: dict[str, Any] = {"rig": rig, "stream": streams}
        subject = self._text("Subject on the rig (for NWB; empty: later)", args.subject, "")
        if subject:
            out["subject"] = {"id": subject}
        return out

    def _text(self, question: str, given: Any, default: str) -> str:
        """A flag's value, the answer, or the default."""
        if given is not None:
            return str(given)
        if self.ask is None:
            return default
        try:
            return self.ask(f"{question} [{default}]: " if default else f"{question}: ").strip() or default
        except EOFError as e:
            raise ConfigError("nothing was written: the questions were not answered") from e

    def _choice(self, question: str, listed: list[str]) -> int:
        """Which of several; the first where nobody is asked."""
        if self.ask is None or len(listed) == 1:
            return 0
        for i, text in enumerate(listed, 1):
            self.say(f"  {i}  {text}")
        while True:
            said = self._text(question, None, "1")
            if said.isdigit() and 1 <= int(said) <= len(listed):
                return int(said) - 1
            self.say(f"a number from 1 to {len(listed)}")

    # ---- streams -----------------------------------------------------------------------------------------------

    def _streams(self) -> list[dict[str, Any]]:
        source = self.args.source
        if source == "replay":
            return [self._stream(Found(source, "", ""), 0)]
        found = discover(
            addresses={source: self.args.address} if source and self.args.address else None, only=source
        )
        absent = [s for s in ([source] if source else PROGRAMS) if s not in {f.source for f in found}]
        choices = found + [
            Found(s, self.args.address or "", f"{PROGRAMS[s]}, not started yet") for s in absent
        ]
        if source is None and self.ask is None and not found:
            raise ConfigError("no acquisition program was found at its usual port; say --source openephys, maxwell, spikeglx or replay")  # fmt: skip
        if self.ask is None:
            self.say(f"{'found ' if found else ''}{choices[0].text}")
        elif source is None:
            self.say("Who sends the samples?")
        chosen = choices[0 if source else self._choice("Number", [f.text for f in choices])]
        alike = [f for f in found if f.source == chosen.source and f.options]
        if len(alike) > 1:
            self.say(
                f"{PROGRAMS[chosen.source]} has {len(alike)} streams: {'; '.join(f.text for f in alike)}"
            )
            picked = self._choice("Which", ["all of them, as one session", *(f.text for f in alike)])
            alike = alike if picked == 0 else [alike[picked - 1]]
            return [self._stream(f, i) for i, f in enumerate(alike)]
        return [self._stream(chosen, 0)]

    def _stream(self, found: Found, index: int) -> dict[str, Any]:
        args, source = self.args, found.source
        default = {"maxwell": "chip0", "replay": "recording"}.get(source, f"probe{index}")
        if "device" in found.options:
            default = f"{found.options['device']}{found.options['probe_index']}"
        elif "well" in found.options:
            default = f"well{found.options['well']}"
        named = self.args.stream if index == 0 else None
        asked = self.ask is not None and not found.options
        name = self._text("Name of the stream", named, default) if asked else named or default
        out: dict[str, Any] = {"name": name, "source": source}
        if source == "replay":
            path = self._text("Recording to replay (file or folder)", args.recording, "")
            if not path:
                raise ConfigError("a replay needs a recording; give --recording FILE")
            return {**out, "path": str(Path(path).expanduser().absolute())}
        out["address"] = self._text(f"Address of {PROGRAMS[source]}", args.address or found.address or None, DEFAULTS[source])  # fmt: skip
        out |= found.options
        if found.options.get("device") in ("nidq", "onebox"):
            out["spikes"] = False  # no electrodes
        if source in MAP_KEY:
            out |= self._map(MAP_KEY[source])
        if source == "maxwell":
            out["gain"] = self._number("Amplifier gain set in MaxLab Scope", args.gain, 512.0)
        lines = "" if source == "maxwell" else self._text("TTL lines that mean a stimulus, such as 0,1 (empty: none)", args.stim_lines, "")  # fmt: skip
        if lines:
            out["stim_lines"] = _numbers(lines)
        return out

    def _map(self, key: str) -> dict[str, str]:
        """The probe file or electrode map, made sure of while there is somebody to ask."""
        given = self.args.electrode_map if key == "electrode_map" else self.args.probe
        what = (
            "MaxLab electrode map (.cfg or .raw.h5)"
            if key == "electrode_map"
            else "Probe file (probeinterface JSON)"
        )
        while True:
            said = self._text(f"{what} (empty: later)", given, "")
            if not said:
                return {}
            path = Path(said).expanduser().absolute()
            if path.is_file() or self.ask is None or given is not None:
                return {key: str(path)}
            self.say(f"there is no {path}")

    def _number(self, question: str, given: float | None, default: float) -> float:
        while True:
            said = self._text(question, given, f"{default:g}")
            try:
                return float(said)
            except ValueError:
                self.say("a number, please")


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:40].strip("-") or "rig"


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in re.split(r"[,\s]+", text.strip()) if part]
    except ValueError as e:
        raise ConfigError(f"{text!r} are no line numbers; write them like 0,1") from e
