"""Who may do what: roles, what each may ask for, and the two files that say so.

| role      | may                                                                                            |
|-----------|------------------------------------------------------------------------------------------------|
| watch     | see all that is published, ask for status, and pull the emergency stop                         |
| control   | also start and stop sessions, calibrate, mark stimuli, disarm, run jobs, end the daemon        |
| stimulate | also arm, stimulate, change rules and limits, lift the emergency stop                          |

Each role may do what those above it may. On the rig, in the keys folder (`spiked keys init`):

    server.key    the daemon's own key pair
    local.key     a client's key for the daemon's own user: its web page, and commands on this computer
    access.toml   who else may: one [[client]] with name, role, and either key (a CURVE public key, Z85) or
                  token_sha256 (for the web page); tokens are 256 random bits and stored as that hash only

On the client's side a key file (`spiked keys add NAME` writes it): name, role, server (the daemon's public key),
public, secret. Files with a secret are 0600, and refused where others can read them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import sys
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiked_client.errors import AccessError

ROLES = ("watch", "control", "stimulate")
# The least role for each operation of the control port. Operations that are not here need the highest.
OPERATIONS = {
    "status": "watch", "endpoints": "watch", "triggers": "watch", "stop_stimulation": "watch",
    "describe": "watch", "template": "watch", "snippets": "watch", "jobs": "watch", "clocks": "watch",
    "start_session": "control", "stop_session": "control", "calibrate": "control", "cancel_calibration": "control",
    "mark_stim": "control", "disarm": "control", "shutdown": "control", "cancel_job": "control", "retry_job": "control",
    "arm": "stimulate", "renew": "stimulate", "stimulate": "stimulate", "set_trigger": "stimulate", "remove_trigger": "stimulate",
    "set_limits": "stimulate", "clear_stop": "stimulate",
}  # fmt: skip
ENVIRONMENT = "SPIKED_KEYS"  # a client's key file, where none is given
ACCESS_FILE, SERVER_FILE, LOCAL_FILE = "access.toml", "server.key", "local.key"
NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # Z85 of 32 bytes
HASH = re.compile(r"[0-9a-f]{64}")
TOKEN_BYTES = 32
MAX_FILE_BYTES = 1 << 20


def allowed(role: str | None, op: str) -> bool:
    """Whether this role may ask for this operation of the control port; None: nobody we know."""
    return role in ROLES and ROLES.index(role) >= ROLES.index(needed(op))


def needed(op: str) -> str:
    """The least role that may ask for this operation."""
    return OPERATIONS.get(op, ROLES[-1])


def new_token() -> str:
    """256 random bits as text that fits into an URL."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def hash_token(token: str) -> str:
    """What access.toml keeps of a token. It is random enough for a plain SHA-256."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One client that may: `key` (its CURVE public key) or `token_sha256`, the other is empty."""

    name: str
    role: str
    key: str = ""
    token_sha256: str = ""


@dataclass(frozen=True)
class ClientKey:
    """A client's key file. `server` is the daemon's public key: without it nobody could tell an impostor."""

    name: str
    role: str
    server: str
    public: str
    secret: str

    def dump(self) -> str:
        """The file's text."""
        head = f"# Key of {self.name} for a spiked rig. Whoever has this file may {self.role} there: keep it to yourself.\n"
        rows = ((k, getattr(self, k)) for k in ("name", "role", "server", "public", "secret"))
        return head + "".join(f'{k} = "{v}"\n' for k, v in rows)

    def secure(self, socket: Any) -> None:
        """Encrypt a ZeroMQ socket that is not connected yet, and show this key."""
        socket.curve_serverkey = self.server.encode()
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret.encode()


def load_key(path: Path | str | None = None) -> ClientKey | None:
    """The key file at `path`, else the one SPIKED_KEYS names, else None. Raises AccessError."""
    where = path or os.environ.get(ENVIRONMENT)
    if not where:
        return None
    file = Path(os.path.expanduser(where))  # Path's own raises where nobody has that home
    data = _toml(file, secret=True)
    unknown = sorted(set(data) - {"name", "role", "server", "public", "secret"})
    if unknown:
        raise AccessError(
            f"{file}: unknown key {unknown[0][:40]!r}; take the file that `spiked keys add` wrote"
        )
    name, role = _name_and_role(data, str(file))
    keys = []
    for field in ("server", "public", "secret"):
        value = data.get(field)
        if not isinstance(value, str) or not KEY.fullmatch(value):
            raise AccessError(f"{file}: {field} is not a key; take the file that `spiked keys add` wrote")
        keys.append(value)
    return ClientKey(name, role, *keys)


def read_server(folder: Path) -> tuple[str, str]:
    """(public, secret) of the daemon, from FOLDER/server.key. Raises AccessError."""
    file = folder / SERVER_FILE
    data = _toml(file, secret=True)
    public, secret = (data.get(k) for k in ("public", "secret"))
    if not all(isinstance(k, str) and KEY.fullmatch(k) for k in (public, secret)):
        raise AccessError(
            f"{file}: public and secret are not keys; take the file that `spiked keys init` wrote"
        )
    return str(public), str(secret)


def read_access(folder: Path) -> tuple[Entry, ...]:
    """Who may, from FOLDER/access.toml. Raises AccessError naming what is wrong."""
    file = folder / ACCESS_FILE
    return parse_access(_toml(file, secret=True), str(file))


def parse_access(data: dict[str, Any], where: str) -> tuple[Entry, ...]:
    """The entries of an access list that was read from `where`. Raises AccessError."""
    clients = data.get("client", [])
    if set(data) - {"client"} or not isinstance(clients, list):
        raise AccessError(f"{where}: there is nothing but [[client]] sections in it; remove the rest")
    entries = tuple(_entry(c, f"{where}: client {i}") for i, c in enumerate(clients, 1))
    for what in ("name", "key", "token_sha256"):
        seen: set[str] = set()
        for value in (getattr(e, what) for e in entries):
            if value and value in seen:
                raise AccessError(f"{where}: two clients have the same {what}; remove one of them")
            seen.add(value)
    return entries


def _entry(data: Any, where: str) -> Entry:
    if not isinstance(data, dict):
        raise AccessError(f"{where} is not a section; write [[client]]")
    unknown = sorted(str(k) for k in set(data) - {"name", "role", "key", "token_sha256"})
    if unknown:
        raise AccessError(
            f"{where}: unknown key {unknown[0][:40]!r}; there are name, role, key and token_sha256"
        )
    name, role = _name_and_role(data, where)
    key, token = data.get("key", ""), data.get("token_sha256", "")
    if bool(key) == bool(token):
        raise AccessError(f"{where} ({name}) needs either key or token_sha256")
    if key and not (isinstance(key, str) and KEY.fullmatch(key)):
        raise AccessError(
            f"{where} ({name}): key is not a CURVE public key of 40 characters; use `spiked keys add`"
        )
    if token and not (isinstance(token, str) and HASH.fullmatch(token)):
        raise AccessError(
            f"{where} ({name}): token_sha256 is not 64 hexadecimal digits; use `spiked keys add`"
        )
    return Entry(name, role, str(key), str(token))


def _name_and_role(data: dict[str, Any], where: str) -> tuple[str, str]:
    name, role = data.get("name"), data.get("role")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise AccessError(f"{where}: name must be 1 to 64 letters, digits or any of _ . @ -")
    if role not in ROLES:
        raise AccessError(f"{where} ({name}): role = {str(role)[:40]!r}; there are {', '.join(ROLES)}")
    return name, str(role)


def dump_access(entries: tuple[Entry, ...]) -> str:
    """The text of access.toml: `read_access` of it gives the same entries."""
    out = [
        "# Who may use this rig from elsewhere; see `spiked keys`. The daemon follows changes by itself.\n"
    ]
    for e in entries:
        what = f'key = "{e.key}"' if e.key else f'token_sha256 = "{e.token_sha256}"'
        out.append(f'\n[[client]]\nname = "{e.name}"\nrole = "{e.role}"\n{what}\n')
    return "".join(out)


def _toml(file: Path, secret: bool) -> dict[str, Any]:
    try:
        with file.open("rb") as f:
            status = os.fstat(f.fileno())
            if secret and sys.platform != "win32" and stat.S_IMODE(status.st_mode) & 0o077:
                raise AccessError(f"{file} can be read by others; chmod 600 {file}")
            data = f.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise AccessError(f"{file} is over {MAX_FILE_BYTES} bytes; it is no file of `spiked keys`")
        return tomllib.loads(data.decode("utf-8"))
    except OSError as e:
        raise AccessError(f"cannot read {file}: {e.strerror}; see `spiked keys`") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise AccessError(f"{file} is not TOML: {e}") from e


def why_silent(endpoint: str, key: ClientKey | None, patience_s: float = 1.0) -> str:
    """Why nobody answers at `endpoint`, as one line; empty when nobody is there at all. Waits `patience_s` for
    somebody, and five times as long for a word of theirs."""
    import zmq
    from zmq.utils.monitor import parse_monitor_message

    seen: dict[int, int] = {}
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.ipv6 = "[" in endpoint
    if key is not None:
        key.secure(socket)
    monitor = socket.get_monitor_socket()
    try:
        socket.connect(endpoint)
        end = time.monotonic() + patience_s
        decided = {
            zmq.EVENT_HANDSHAKE_FAILED_AUTH,
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
            zmq.EVENT_HANDSHAKE_SUCCEEDED,
        }
        while not decided & set(seen) and monitor.poll(max(round(1000 * (end - time.monotonic())), 0)):
            event = parse_monitor_message(monitor.recv_multipart())
            if event["event"] == zmq.EVENT_CONNECTED and zmq.EVENT_CONNECTED not in seen:
                end += 4 * patience_s
            seen[int(event["event"])] = int(event["value"])
    finally:
        socket.disable_monitor()
        monitor.close(0)
        socket.close(0)
        context.term()
    if zmq.EVENT_HANDSHAKE_FAILED_AUTH in seen:
        return f"the daemon on {endpoint} does not take this key; it was removed, or never added: `spiked keys add` on the rig"
    if zmq.EVENT_HANDSHAKE_SUCCEEDED in seen:
        return f"a daemon is on {endpoint}, but did not answer in time; try again, or see its log"
    if zmq.EVENT_CONNECTED not in seen:
        return ""
    if zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL in seen and key is None:
        return f"the daemon on {endpoint} asks for a key: give keys (--keys FILE, or {ENVIRONMENT}), made by `spiked keys add` on the rig"
    if zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL in seen:
        return f"the daemon on {endpoint} uses no keys; leave keys (--keys, {ENVIRONMENT}) out"
    full = "it has as many clients as it takes (publish.peers)"
    if key is None:
        return f"what listens on {endpoint} does not talk to this client: it is no spiked daemon, or {full}"
    return f"what listens on {endpoint} does not talk to this client: {key.name}'s key file is for another daemon, or {full}"


def local_key(folder: Path | None) -> Path | None:
    """The key file with which the daemon's own helpers reach its ports; None where it uses no keys."""
    if folder is None:
        return None
    file = Path(os.path.expanduser(folder)) / LOCAL_FILE
    return file if file.exists() else None


class AccessList:
    """access.toml of a keys folder, followed while it changes. Safe from several threads.

    `role_for(token)` and `role_of_key(public key)` look at the file's time first, so that what was removed is
    refused from the next question on. A file that is gone means nobody; one that turned into nonsense leaves the
    last good list in force, and `error` says so. Raises AccessError when it cannot be read at the start.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(os.path.expanduser(folder))
        self.error = ""
        self._reading = (
            threading.Lock()
        )  # else what one thread read before could be put in force after what another did
        self._seen: tuple[int, ...] = self._stamp()
        self._use(read_access(self.folder))

    def _use(self, entries: tuple[Entry, ...]) -> None:
        self.entries = entries
        self._keys = {e.key: e for e in entries if e.key}
        self._tokens = tuple((e.token_sha256, e) for e in entries if e.token_sha256)

    def _stamp(self) -> tuple[int, ...]:
        try:
            s = (self.folder / ACCESS_FILE).stat()
        except OSError:
            return ()
        return (s.st_mtime_ns, s.st_size, s.st_ino)

    def refresh(self) -> bool:
        """Read the file again where it changed; True when the entries did."""
        with self._reading:
            stamp = self._stamp()
            if stamp == self._seen:
                return False
            self._seen, before = stamp, self.entries
            try:
                self._use(read_access(self.folder) if stamp else ())
                self.error = ""
            except AccessError as e:
                self.error = f"{e}; until then the last list holds"
            return self.entries != before

    def client_of_key(self, key: str) -> Entry | None:
        """Whose CURVE public key (Z85) this is; None: nobody's, or no longer."""
        self.refresh()
        return self._keys.get(key)

    def role_of_key(self, key: str) -> str | None:
        """The role of a CURVE public key (Z85)."""
        found = self.client_of_key(key)
        return found.role if found else None

    def client_of_token(self, token: str) -> Entry | None:
        """Whose token this is. The time taken does not depend on how much of it is right."""
        self.refresh()
        hashed, found = hash_token(token), None
        for known, entry in self._tokens:
            if hmac.compare_digest(hashed, known):
                found = entry
        return found

    def role_for(self, token: str) -> str | None:
        """The role of a web token, or None: refuse."""
        found = self.client_of_token(token)
        return found.role if found else None
