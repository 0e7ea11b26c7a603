"""`spiked install-service`: write the units of a rig, check them, explain them, renew them, take them away again.

Only files that carry our mark are written over or removed. One that was changed by hand since is kept beside the
new one as NAME.saved. Drop-ins of others, configurations and recordings are never touched.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spiked import config as configuration
from spiked.errors import ConfigError
from spiked.rig import adapt, units
from spiked.rig.paths import named
from spiked.rig.units import Layout

Say = Callable[[str], None]
EXPOSURE = 1.5  # of `systemd-analyze security`, at most
ANALYZE = "systemd-analyze"


def options(c: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    c.add_argument("--config", type=lambda t: Path(os.path.expanduser(t)), help="the rig's TOML file; default: /etc/spiked/rig.toml, or NAME.toml there with --instance, or ~/.config/spiked/rig.toml with --user")  # fmt: skip
    c.add_argument("--instance", default="", metavar="NAME", help="one of several rigs on this computer: spiked@NAME.service")  # fmt: skip
    c.add_argument("--user", action="store_true", help="a service of the user who runs this, without root")
    c.add_argument(
        "--start",
        action="store_true",
        help="enable and start it, now and with the computer; one that runs is restarted where its files changed, which ends its session",
    )
    c.add_argument("--check", action="store_true", help="change nothing: is what is installed complete, current and sound?")  # fmt: skip
    c.add_argument("--explain", action="store_true", help="change nothing: say what each line is for")
    c.add_argument("--uninstall", action="store_true", help="stop it and remove its files; never a recording or a configuration")  # fmt: skip
    c.add_argument("--force", action="store_true", help="write over files of these names that are not ours")
    c.add_argument("--root", type=Path, default=Path("/"), help="put this before every path and start nothing: for packages")  # fmt: skip


def run(args: argparse.Namespace, say: Say) -> int:
    """The command. Exit code 1: with --check, something is wrong."""
    layout = _layout(args)
    if args.uninstall:
        return uninstall(layout, say)
    wanted = units.files(layout, adapt.drop_in(_config(layout, say, asked=args.config is not None), layout))
    if args.explain:
        for path, text in wanted.items():
            say(f"{path}")
            say("\n".join(units.explained(text)) if path.suffix in (".service", ".slice", ".conf") else text)
        return 0
    if args.check:
        return check(layout, wanted, say)
    return install(layout, wanted, say, start=args.start, force=args.force)


def _layout(args: argparse.Namespace) -> Layout:
    name = f"{args.instance or 'rig'}.toml"
    folder = Path("/etc/spiked")
    if args.user:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "spiked"
    config = args.config.absolute() if args.config else folder / name
    return Layout(config, args.instance, args.user, args.root)


def _config(layout: Layout, say: Say, *, asked: bool) -> configuration.Config:
    """The rig's configuration, or a plain one where there is none yet; one that was `asked` for must be there."""
    path = layout.config if layout.config.exists() else layout.at(str(layout.config))
    if path.exists():
        return configuration.load(path)
    if asked:
        raise ConfigError(
            f"there is no {layout.config}; check the path, or write it with `spiked init {layout.config}`"
        )
    say(f"there is no {layout.config} yet; `spiked init {layout.config}` writes it, then run this again")
    return configuration.parse({"stream": [{"name": "none", "source": "openephys"}]})


# ---- what would change -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What is to be done about one file. `kind`: new, same, changed, edited (by hand), foreign, gone."""

    path: Path
    kind: str
    text: str = ""  # as it is to be
    before: str = ""

    def difference(self) -> list[str]:
        """The lines that change, without comments."""
        old, new = ([r for r in t.splitlines() if r and r[0] not in "#["] for t in (self.before, self.text))
        diff = difflib.unified_diff(old, new, lineterm="", n=0)
        return [row for row in diff if row[:1] in "+-" and row[:3] not in ("+++", "---")]


def changes(layout: Layout, wanted: dict[Path, str]) -> list[Change]:
    """Every file of ours, and what is to be done about it; "gone" are ours that are not wanted any more."""
    out = []
    for path, text in wanted.items():
        try:
            before = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            out.append(Change(path, "new", text))
            continue
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}; run this as root, or with --user") from e
        if not units.is_ours(before):
            kind = "foreign"
        elif before == text:
            kind = "same"
        else:
            kind = "changed" if units.is_untouched(before) else "edited"
        out.append(Change(path, kind, text, before))
    return out + [Change(p, "gone") for p in ours(layout) if p not in wanted]


def ours(layout: Layout) -> list[Path]:
    """Files on this computer that this layout's services consist of, by their mark."""
    kind = "@.service" if layout.instance else ".service"
    places = [layout.units / f"{name}{kind}" for name in units.SERVICES]
    places += [layout.units / f"{layout.unit(name)}.d/10-rig.conf" for name in units.SERVICES]
    places += [layout.units / name for name in units.SLICES]
    if not layout.user:
        places += [layout.at("/etc/sysusers.d/spiked.conf"), layout.at("/etc/tmpfiles.d/spiked.conf")]
    out = []
    for path in places:
        with contextlib.suppress(OSError):
            if units.is_ours(path.read_text(encoding="utf-8")):
                out.append(path)
    return out


# ---- install ---------------------------------------------------------------------------------------------------


def install(
    layout: Layout, wanted: dict[Path, str], say: Say, start: bool = False, force: bool = False
) -> int:
    """Write what is new or changed, and have systemd read it."""
    todo = changes(layout, wanted)
    foreign = [c.path for c in todo if c.kind == "foreign"]
    if foreign and not force:
        theirs = ", ".join(str(p) for p in foreign)
        raise ConfigError(f"{theirs} is not ours; move it away, or give --force (it is kept as .saved)")
    for change in todo:
        _apply(change, say)
    done = [c for c in todo if c.kind != "same"]
    if not done:
        say("everything is as it should be; nothing was written")
    if layout.root == Path("/"):
        _activate(layout, bool(done), say)
        _trial(layout, say)
    code = 0 if _sound(wanted, layout, say) else 1
    if start and layout.root == Path("/"):
        names = [layout.unit(name) for name in units.SERVICES]
        begin = "restart" if done else "start"
        runs = all(_do(units.command(layout, word, *names), say) for word in ("enable", begin))
        shows = units.shell(units.command(layout, "status", names[0]))
        say(
            f"{names[0]} {'runs' if runs else 'does not run'}; `{shows}` {'shows it' if runs else 'says why'}"
        )
        code = code if runs else 1
    elif layout.root == Path("/"):
        say(f"start it, now and with the computer: {units.shell(units.command(layout, 'enable', '--now', layout.unit('spiked')))}")  # fmt: skip
        if done and any(c.kind != "new" for c in done):
            say(f"a service that runs goes on as it was until: {units.shell(units.command(layout, 'restart', layout.unit('spiked')))}")  # fmt: skip
    if layout.user:
        say(f"so that it also runs when nobody is logged in: loginctl enable-linger {_who()}")
    return code


def _who() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _apply(change: Change, say: Say) -> None:
    path = change.path
    try:
        if change.kind == "gone":
            path.unlink()
            say(f"removed {path}: not needed any more")
            return
        if change.kind == "same":
            return
        if change.kind in ("edited", "foreign"):
            shutil.copy2(path, path.with_name(path.name + ".saved"))
            say(f"{path} was changed by hand; kept as {path.name}.saved")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text(change.text, encoding="utf-8")
        new.chmod(0o644)
        new.replace(path)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; run this as root, or with --user") from e
    say(f"{'wrote' if change.kind == 'new' else 'renewed'} {path}")
    if change.kind != "new":
        for row in change.difference():
            say(f"    {row}")


def _activate(layout: Layout, changed: bool, say: Say) -> None:
    """Make the user and folders; have a systemd that runs read the files."""
    if not layout.user:
        _do(["systemd-sysusers", str(layout.at("/etc/sysusers.d/spiked.conf"))], say)
        _do(["systemd-tmpfiles", "--create", str(layout.at("/etc/tmpfiles.d/spiked.conf"))], say)
        _own_sessions(layout, say)
    if changed and systemd_runs(layout):
        _do(units.command(layout, "daemon-reload"), say)


def _own_sessions(layout: Layout, say: Say) -> None:
    """The sessions folder, where it is not there yet, for the service user; one that is there is left as it is."""
    if not layout.config.exists():
        return
    with contextlib.suppress(OSError, KeyError):
        who = pwd.getpwnam("spiked")
        if layout.config.is_relative_to("/etc/spiked"):  # elsewhere it is somebody's own file
            os.chown(layout.config, -1, who.pw_gid)
            layout.config.chmod(0o640)
    sessions = configuration.load(layout.config).rig.sessions.expanduser()
    if sessions.exists() or not sessions.is_absolute():
        return
    try:
        sessions.mkdir(parents=True, mode=0o750)
        shutil.chown(sessions, "spiked", "spiked")
        say(f"made {sessions}, which belongs to spiked")
    except (OSError, LookupError) as e:
        say(f"could not make {sessions} ({e}); make it and give it to spiked: chown spiked:spiked {sessions}")


def _trial(layout: Layout, say: Say) -> None:
    """Whether the service user can run the program and has what it needs, tried rather than assumed."""
    if layout.user or os.geteuid() != 0 or shutil.which("setpriv") is None:
        return
    if not _as_service():
        say("there is no user spiked, and systemd-sysusers could not make it; the service cannot start")
        return
    tried = subprocess.run([*_as_service(), sys.executable, "-c", "import spiked.service"], capture_output=True, text=True, check=False, cwd="/")  # fmt: skip
    if tried.returncode:
        last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"the user spiked cannot run this program ({last}); install it where everybody may read, such as /opt/spiked")  # fmt: skip
    for text, fix in refused(layout):
        say(f"{text}; {fix}")


def _as_service() -> list[str]:
    """The words before a command that run it as the service user; none where there is no such user."""
    try:
        who = pwd.getpwnam("spiked")
    except KeyError:
        return []
    return ["setpriv", f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--init-groups", "--inh-caps=-all"]


def refused(layout: Layout) -> list[tuple[str, str]]:
    """(what the service user may not do, the command that lets it), as root; files only, not the sandbox."""
    before = _as_service()
    if layout.user or os.geteuid() != 0 or shutil.which("setpriv") is None or not before:
        return []
    if not layout.config.exists():
        return []

    def may(how: str, path: Path) -> bool:
        return not subprocess.run([*before, "test", how, str(path)], check=False, cwd="/").returncode

    config = configuration.load(layout.config)
    out = [
        (f"the user spiked cannot read {path}", f"chgrp spiked {path} && chmod g+r {path}")
        for path in [layout.config, *(p for _, p in named(config))]
        if path.exists() and not may("-r", path)
    ]
    sessions = config.rig.sessions.expanduser()
    if sessions.exists() and not may("-w", sessions):
        fix = f"chown spiked:spiked {sessions}, or setfacl -m u:spiked:rwx {sessions}"
        out.append((f"the user spiked cannot write into {sessions}", fix))
    return out


def systemd_runs(layout: Layout) -> bool:
    """Whether a systemd is there to be told."""
    if layout.user:
        return (
            bool(os.environ.get("XDG_RUNTIME_DIR"))
            and Path(os.environ["XDG_RUNTIME_DIR"], "systemd").is_dir()
        )
    return Path("/run/systemd/system").is_dir()


def _do(words: list[str], say: Say) -> bool:
    """Run one command; what it said when it failed."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as e:
        say(f"{units.shell(words)}: {e.strerror}")
        return False
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        say(f"{units.shell(words)} failed: {said[-1]}")
    return done.returncode == 0


# ---- check -----------------------------------------------------------------------------------------------------


def check(layout: Layout, wanted: dict[Path, str], say: Say) -> int:
    """What is installed against what should be; 0 when all of it is complete, current and sound."""
    wrong = [c for c in changes(layout, wanted) if c.kind != "same"]
    again = "spiked install-service" + (f" --instance {layout.instance}" if layout.instance else "")
    for c in wrong:
        what = {"new": "missing", "changed": "not current", "edited": "changed by hand", "foreign": "not ours", "gone": "not needed any more"}  # fmt: skip
        say(
            f"{c.path}: {what[c.kind]}; {again} {'--user ' if layout.user else ''}mends it".replace("  ", " ")
        )
        if c.before:
            for row in c.difference():
                say(f"    {row}")
    sound = _sound(wanted, layout, say)
    if sound and not wrong:
        say("the service is complete and current")
    return 0 if sound and not wrong else 1


def _sound(wanted: dict[Path, str], layout: Layout, say: Say) -> bool:
    """systemd's own opinion of the files: `verify`, and `security` for those with rights to give up."""
    if shutil.which(ANALYZE) is None:
        say(f"{ANALYZE} is not here: the files were not checked")
        return True
    with tempfile.TemporaryDirectory(prefix="spiked-units-") as scratch:
        folder = Path(scratch)
        for path, text in wanted.items():
            if path.is_relative_to(layout.units):
                copy = folder / path.relative_to(layout.units)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(text, encoding="utf-8")
        names = [layout.unit(name) for name in units.SERVICES]
        good = True
        for name in names:
            good &= _verified(folder, name, layout, say)
            good &= layout.user or _exposed(folder, name, say)
    return good


def _verified(folder: Path, name: str, layout: Layout, say: Say) -> bool:
    """`systemd-analyze verify`; an instance of a template is verified as a copy of it."""
    words = [
        ANALYZE,
        "--user" if layout.user else "--system",
        "--man=no",
        "verify",
        str(_whole(folder, name)),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"})  # fmt: skip
    told = [row for row in done.stderr.splitlines() if "spiked" in row]
    for said in told:
        say(f"systemd: {said}")
    if not told and done.returncode and layout.user:  # no bus to speak to: nothing was said about our files
        return True
    return not told


def _exposed(folder: Path, name: str, say: Say) -> bool:
    """`systemd-analyze security` of the unit with its drop-in."""
    whole = _whole(folder, name)
    words = [
        ANALYZE,
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={EXPOSURE * 10:.0f}",
        str(whole),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    level = last.rpartition(": ")[2]
    if not done.returncode:
        say(f"{name}: exposure {level} (systemd-analyze security; at most {EXPOSURE})")
        return True
    say(
        f"{name}: exposure {level}, more than {EXPOSURE}; the lines of the drop-in say what the configuration needs"
    )
    return True  # what a configuration needs is its owner's to decide


def _whole(folder: Path, name: str) -> Path:
    """The unit's file; for an instance, its template under the instance's name."""
    path = folder / name
    if not path.exists():
        shutil.copy2(folder / f"{name.partition('@')[0]}@.service", path)
    return path


# ---- remove ----------------------------------------------------------------------------------------------------


def uninstall(layout: Layout, say: Say) -> int:
    """Stop, disable and remove what is ours."""
    found = ours(layout)
    names = [layout.unit(name) for name in units.SERVICES]
    if layout.root == Path("/") and found and systemd_runs(layout):
        _do(units.command(layout, "disable", "--now", *names), say)
    shared = _shared(layout)
    for path in found:
        if path in shared:
            continue
        try:
            path.unlink()
        except OSError as e:
            raise ConfigError(f"cannot remove {path}: {e.strerror}; run this as root, or with --user") from e
        say(f"removed {path}")
        with contextlib.suppress(OSError):
            if path.parent.name.endswith(".service.d"):  # tmpfiles.d and the like are systemd's own
                path.parent.rmdir()  # a folder with drop-ins of others stays
    if not found:
        say("nothing of ours is installed")
    elif layout.root == Path("/") and systemd_runs(layout):
        _do(units.command(layout, "daemon-reload"), say)
    say("recordings, configurations and the user spiked were not touched")
    return 0


def _shared(layout: Layout) -> set[Path]:
    """What other rigs on this computer still need."""
    drop_ins = list(layout.units.glob("spiked@*.service.d/10-rig.conf"))
    others = [p for p in drop_ins if p.parent.name != f"{layout.unit('spiked')}.d"]
    plain = layout.units / "spiked.service"
    if layout.instance and plain.exists():
        others.append(plain)
    if not others:
        return set()
    own = {layout.units / f"{layout.unit(n)}.d/10-rig.conf" for n in units.SERVICES}
    if not layout.instance:
        own |= {layout.units / f"{n}.service" for n in units.SERVICES}
    return set(ours(layout)) - own
