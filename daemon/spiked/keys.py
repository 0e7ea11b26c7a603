"""`spiked keys`: who may reach the rig from elsewhere. Makes and changes the files that spiked_client.access reads."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spiked.errors import ConfigError
from spiked_client import access
from spiked_client.access import (
    ACCESS_FILE,
    LOCAL_FILE,
    NAME,
    ROLES,
    SERVER_FILE,
    ClientKey,
    Entry,
)  # fmt: skip
from spiked_client.errors import AccessError

FOLDER = Path("~/.config/spiked/keys")
WAIT_S = 5.0  # for another change
Say = Callable[[str], None]


def options(c: argparse.ArgumentParser) -> None:
    """Of `spiked keys`."""
    sub = c.add_subparsers(dest="keys_command", required=True)
    texts = {
        "init": "make the daemon's own key pair",
        "add": "let somebody in: write a key file for them, or print a web token",
        "list": "who may",
        "remove": "let somebody in no more; takes effect at once",
    }
    for name, text in texts.items():
        k = sub.add_parser(name, help=text, description=text)
        k.add_argument(
            "--folder", type=_path, default=_path(str(FOLDER)), help="keys folder (default %(default)s)"
        )
        if name in ("add", "remove"):
            k.add_argument("name", help="a person or a machine")
        if name == "add":
            k.add_argument(
                "--role", choices=ROLES, default=ROLES[0], help="what they may do (default %(default)s)"
            )
            k.add_argument(
                "--token", action="store_true", help="a token for the web page instead of a key file"
            )
            k.add_argument("--out", type=_path, help="where the key file goes (default NAME.key)")


def run(args: argparse.Namespace, say: Say) -> int:
    """Carry out one of the commands; raises ConfigError."""
    try:
        if args.keys_command == "init":
            init(args.folder, say)
        elif args.keys_command == "add":
            add(args.folder, args.name, args.role, say, token=args.token, out=args.out)
        elif args.keys_command == "list":
            show(args.folder, say)
        else:
            remove(args.folder, args.name, say)
    except AccessError as e:
        raise ConfigError(str(e)) from e
    except OSError as e:
        raise ConfigError(
            f"cannot write {e.filename or args.folder}: {e.strerror}; check the folder and its owner"
        ) from e
    return 0


def init(folder: Path, say: Say) -> None:
    """The daemon's key pair, an access list, and a key for the daemon's own user on this computer."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    server = folder / SERVER_FILE
    if server.exists() or (folder / ACCESS_FILE).exists():
        raise ConfigError(
            f"{server} exists: every key file given out belongs to it; remove the folder to begin anew"
        )
    public, secret = _key_pair()
    text = f'# The daemon\'s own key pair; the secret stays on this computer.\npublic = "{public}"\nsecret = "{secret}"\n'
    _write(server, text, folder)
    own_public, own_secret = _key_pair()
    own = ClientKey("local", ROLES[-1], public, own_public, own_secret)
    _write(folder / LOCAL_FILE, own.dump(), folder)
    _write(folder / ACCESS_FILE, access.dump_access((Entry(own.name, own.role, own.public),)), folder)
    say(
        f"{server}: made. Let somebody in with `spiked keys add NAME --role {'|'.join(ROLES)}`, and say in the rig's TOML:"
    )
    say(f'\n[publish]\nhost = "0.0.0.0"        # or the one address to listen on\nkeys = "{folder}"\n')
    say(f"Commands on this computer take `--keys {folder / LOCAL_FILE}`, or SPIKED_KEYS set to it.")


def add(
    folder: Path, name: str, role: str, say: Say, *, token: bool = False, out: Path | None = None
) -> None:
    """A new entry of the access list, and what its owner needs: a key file (0600), or a token that is shown once."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name[:64]!r} cannot be a name: 1 to 64 letters, digits or any of _ . @ -")
    server, _ = _server(folder)
    file = out or Path(f"{name}.key")
    if not token and file.exists():
        raise ConfigError(f"{file} exists; give another --out, or remove it")
    with _changing(folder) as entries:
        if any(e.name == name for e in entries):
            raise ConfigError(f"{name} is in the list already; `spiked keys remove {name}` first")
        if token:
            secret = access.new_token()
            entries.append(Entry(name, role, token_sha256=access.hash_token(secret)))
        else:
            public, secret = _key_pair()
            entries.append(Entry(name, role, key=public))
            _write(file, ClientKey(name, role, server, public, secret).dump(), None)
    if token:
        say(f"{name} may {role} on the web page with this token, which is shown only now:\n{secret}")
    else:
        say(
            f"{file}: {name} may {role}. Bring it to their computer, where `--keys {file.name}` or SPIKED_KEYS names it."
        )


def remove(folder: Path, name: str, say: Say) -> None:
    """Take an entry out. A running daemon notices within a second."""
    with _changing(folder) as entries:
        found = [e for e in entries if e.name == name]
        if not found:
            there = ", ".join(e.name for e in entries) or "nobody"
            raise ConfigError(f"{name} is not in {folder / ACCESS_FILE}; there is {there}")
        entries.remove(found[0])
    say(f"{name} is let in no more")


def show(folder: Path, say: Say) -> None:
    """One line per entry."""
    entries = access.read_access(folder)
    width = max((len(e.name) for e in entries), default=0)
    for e in entries:
        say(f"{e.name:<{width}}  {e.role:<9}  {'key ' + e.key if e.key else 'token'}")
    if not entries:
        say("nobody may; see `spiked keys add`")


def _key_pair() -> tuple[str, str]:
    import zmq  # not for a command line that is only read

    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _server(folder: Path) -> tuple[str, str]:
    if not (folder / SERVER_FILE).exists():
        raise ConfigError(
            f"there is no {folder / SERVER_FILE}; make it with `spiked keys init`, or give --folder"
        )
    return access.read_server(folder)


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[list[Entry]]:
    """The entries, to be changed; written when the block ends without an error. One change at a time."""
    _server(folder)
    with open(folder / SERVER_FILE, "rb") as lock:  # the system lets go of it, whatever becomes of us
        until = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ConfigError(
                        f"another `spiked keys` has {folder} for {WAIT_S:g} s already; end it first"
                    ) from None
                time.sleep(0.02)
        entries = list(access.read_access(folder))
        yield entries
        new = folder / (ACCESS_FILE + ".new")
        _write(new, access.dump_access(tuple(entries)), folder)
        new.replace(folder / ACCESS_FILE)


def _write(path: Path, text: str, like: Path | None) -> None:
    """A file that only its owner can read; root makes it for the owner of the folder `like`, which is the daemon's."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as f:
        os.fchmod(f.fileno(), 0o600)
        if like is not None and os.geteuid() == 0:
            owner = like.stat()
            os.fchown(f.fileno(), owner.st_uid, owner.st_gid)
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))
