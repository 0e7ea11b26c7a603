"""Roles, key files, the access list and the command that changes them."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from spiked.cli import main
from spiked.config import load, parse
from spiked.errors import ConfigError
from spiked.service import Service
from spiked_client import access
from spiked_client.access import OPERATIONS, ROLES, AccessList, Entry
from spiked_client.control import SyncControl
from spiked_client.errors import AccessError


def keys(*words: str | Path) -> int:
    return main(["keys", *(str(w) for w in words)])


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert keys("init", "--folder", tmp_path / "keys") == 0
    assert f'keys = "{tmp_path / "keys"}"' in capsys.readouterr().out  # as the rig's TOML wants it
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# ---- roles -----------------------------------------------------------------------------------------------------


def test_every_operation_of_the_daemon_has_a_role_and_no_other_is_listed() -> None:
    service = Service(parse({"stream": [{"name": "a", "source": "maxwell"}]}))
    assert set(service._handlers()) == set(OPERATIONS)


def test_a_role_may_what_lower_roles_may_and_nothing_that_is_not_listed() -> None:
    for op, least in OPERATIONS.items():
        assert [access.allowed(r, op) for r in ROLES] == [ROLES.index(r) >= ROLES.index(least) for r in ROLES]
        assert not access.allowed(None, op) and not access.allowed("admin", op)
    assert [access.allowed(r, "format_disk") for r in ROLES] == [
        False,
        False,
        True,
    ]  # the daemon knows none either


def test_what_reaches_tissue_needs_stimulate_and_the_emergency_stop_needs_only_to_be_known() -> None:
    reaching = {"arm", "renew", "stimulate", "set_trigger", "remove_trigger", "set_limits", "clear_stop"}
    assert {op for op, least in OPERATIONS.items() if least == "stimulate"} == reaching
    assert OPERATIONS["stop_stimulation"] == "watch"


# ---- the command -----------------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_removed(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert keys("list", "--folder", folder) == 0
    assert capsys.readouterr().out.split()[:2] == ["local", "stimulate"]  # the daemon's own user
    assert keys("add", "anna", "--role", "control", "--folder", folder, "--out", tmp_path / "anna.key") == 0
    assert keys("add", "wall-screen", "--token", "--folder", folder) == 0
    token = capsys.readouterr().out.strip().splitlines()[-1]
    assert keys("list", "--folder", folder) == 0
    _, anna, screen = capsys.readouterr().out.splitlines()
    assert anna.split()[:3] == ["anna", "control", "key"] and screen.split() == [
        "wall-screen",
        "watch",
        "token",
    ]
    own = access.load_key(access.local_key(folder))
    known, key = AccessList(folder), access.load_key(tmp_path / "anna.key")
    assert own is not None and known.role_of_key(own.public) == "stimulate" and access.local_key(None) is None
    assert key is not None and key.name == "anna" and key.server == access.read_server(folder)[0]
    assert zmq.curve_public(key.secret.encode()).decode() == key.public
    assert (known.role_of_key(key.public), known.role_for(token)) == ("control", "watch")
    assert len(token) >= 43 and token not in (folder / "access.toml").read_text()
    assert [mode(p) for p in (folder / "server.key", folder / "access.toml", tmp_path / "anna.key")] == [
        0o600
    ] * 3
    assert mode(folder) == 0o700
    for name in ("anna", "local"):
        assert keys("remove", name, "--folder", folder) == 0
    assert known.role_of_key(key.public) is None  # at the next question
    assert known.role_for(token) == "watch"


def test_what_the_command_cannot_do_is_one_line_and_changes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys("add", "anna", "--folder", folder, "--out", tmp_path / "anna.key") == 0
    before = [(folder / n).read_bytes() for n in ("server.key", "access.toml")]
    capsys.readouterr()
    for words, says in (
        (("init", "--folder", folder), "server.key exists"),
        (("add", "anna", "--folder", folder, "--out", tmp_path / "b.key"), "anna is in the list already"),
        (("add", "ben", "--folder", folder, "--out", tmp_path / "anna.key"), "anna.key exists"),
        (("add", "a b", "--folder", folder), "cannot be a name"),
        (("add", "ben", "--folder", tmp_path / "no"), "make it with `spiked keys init`"),
        (("add", "ben", "--folder", folder, "--out", tmp_path / "no" / "b.key"), "cannot write"),
        (("remove", "ben", "--folder", folder), "ben is not in"),
        (("list", "--folder", tmp_path / "no"), "cannot read"),
    ):
        assert keys(*words) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert [(folder / n).read_bytes() for n in ("server.key", "access.toml")] == before
    assert not (tmp_path / "b.key").exists() and not (folder / "access.toml.new").exists()


def test_changes_at_the_same_time_all_happen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spiked.keys.WAIT_S", 120.0)  # a busy computer may hold up the one that has the lock
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i: codes.append(keys("add", f"n{i}", "--token", "--folder", folder)))  # type: ignore[misc]
        for i in range(12)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert codes == [0] * 12
    assert {e.name for e in access.read_access(folder)} == {"local", *(f"n{i}" for i in range(12))}


# ---- the files -------------------------------------------------------------------------------------------------

KEY = zmq.curve_keypair()[0].decode()
HASH = "0" * 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("client = 3", "nothing but [[client]]"),
        ("[clients]\n", "nothing but [[client]]"),
        ('client = ["a"]', "client 1 is not a section"),
        (f'[[client]]\nname = "a b"\nrole = "watch"\nkey = "{KEY}"', "client 1: name must be"),
        (f'[[client]]\nname = "a"\nrole = "root"\nkey = "{KEY}"', "role = 'root'; there are watch, control"),
        (f'[[client]]\nname = "a"\nkey = "{KEY}"', "role = 'None'"),
        ('[[client]]\nname = "a"\nrole = "watch"', "either key or token_sha256"),
        (
            f'[[client]]\nname = "a"\nrole = "watch"\nkey = "{KEY}"\ntoken_sha256 = "{HASH}"',
            "either key or token",
        ),
        ('[[client]]\nname = "a"\nrole = "watch"\nkey = "short"', "not a CURVE public key"),
        ('[[client]]\nname = "a"\nrole = "watch"\nkey = 7', "not a CURVE public key"),
        ('[[client]]\nname = "a"\nrole = "watch"\ntoken_sha256 = "secret"', "not 64 hexadecimal digits"),
        (f'[[client]]\nname = "a"\nrole = "watch"\nkey = "{KEY}"\nip = "::1"', "unknown key 'ip'"),
        (f'[[client]]\nname = "a"\nrole = "watch"\nkey = "{KEY}"\n' * 2, "two clients have the same name"),
        ("\x00", "is not TOML"),
        ("\ud800", "is not TOML"),
        ("a = " + "[" * 100_000, "is not TOML"),
    ],
)
def test_a_wrong_access_list_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "access.toml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    file.chmod(0o600)
    with pytest.raises(AccessError) as e:
        access.read_access(tmp_path)
    assert says in str(e.value) and "\n" not in str(e.value) and "access.toml" in str(e.value)


def test_a_secret_that_others_can_read_is_refused(folder: Path, tmp_path: Path) -> None:
    assert keys("add", "anna", "--folder", folder, "--out", tmp_path / "anna.key") == 0
    for file, read in (
        (tmp_path / "anna.key", lambda: access.load_key(tmp_path / "anna.key")),
        (folder / "server.key", lambda: access.read_server(folder)),
        (folder / "access.toml", lambda: access.read_access(folder)),
    ):
        file.chmod(0o640)
        with pytest.raises(AccessError, match=f"can be read by others; chmod 600 {file}"):
            read()


def test_the_key_file_comes_from_the_argument_or_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("anna", "ben"):
        assert keys("add", name, "--folder", folder, "--out", tmp_path / f"{name}.key") == 0
    monkeypatch.delenv("SPIKED_KEYS", raising=False)
    assert SyncControl().key is None
    monkeypatch.setenv("SPIKED_KEYS", str(tmp_path / "anna.key"))
    found = SyncControl().key
    assert found is not None and found.name == "anna"
    other = SyncControl(keys=tmp_path / "ben.key").key
    assert other is not None and other.name == "ben"
    monkeypatch.setenv("SPIKED_KEYS", str(tmp_path / "none.key"))
    with pytest.raises(AccessError, match="cannot read"):
        SyncControl()


def test_the_list_is_followed_and_survives_an_editors_half_written_file(folder: Path) -> None:
    file = folder / "access.toml"
    entry = Entry("anna", "watch", token_sha256=access.hash_token("t"))

    def write(text: str) -> None:
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))  # clocks of file systems are coarse

    write(access.dump_access((entry,)))
    known = AccessList(folder)
    assert known.role_for("t") == "watch" and known.role_for("T") is None and known.role_for("") is None
    write("[[clie")
    assert (
        known.role_for("t") == "watch" and "is not TOML" in known.error and "last list holds" in known.error
    )
    write(access.dump_access((Entry("anna", "control", token_sha256=entry.token_sha256),)))
    assert known.role_for("t") == "control" and not known.error
    file.unlink()
    assert known.role_for("t") is None
    with pytest.raises(AccessError, match="cannot read"):
        AccessList(folder)


def test_the_rigs_file_names_the_folder_and_opens_nothing_without_it(tmp_path: Path) -> None:
    file = tmp_path / "rig.toml"
    rig = '[[stream]]\nname = "a"\nsource = "maxwell"\n[publish]\n'
    file.write_text(rig + 'host = "0.0.0.0"\nkeys = "keys"\n')
    publish = load(file).publish
    assert (publish.host, publish.keys, publish.peers) == ("0.0.0.0", tmp_path / "keys", 128)
    file.write_text(rig + 'keys = "keys"\n')
    assert load(file).publish.host == "127.0.0.1"  # encrypted on loopback too
    for wrong, says in (
        (
            'host = "0.0.0.0"',
            "publish.host = '0.0.0.0': reaches beyond this computer and needs keys; run `spiked keys init`",
        ),
        ('host = "::"', "needs keys"),
        ('host = "192.168.1.7"', "needs keys"),
        ('host = "rig.lab"\nkeys = "k"', "is no address"),
        ('host = "*"\nkeys = "k"', "is no address"),
        ("hwm = 1000000", "publish.hwm"),
        ("peers = 0", "publish.peers"),
        ('keys = "~nobody-of-this-name/keys"', "home folder"),
    ):
        file.write_text(rig + wrong + "\n")
        with pytest.raises(ConfigError) as e:
            load(file)
        assert says in str(e.value) and "\n" not in str(e.value)


entries = st.builds(
    Entry,
    st.from_regex(access.NAME, fullmatch=True),
    st.sampled_from(ROLES),
    st.from_regex(access.KEY, fullmatch=True),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(entries, max_size=5, unique_by=(lambda e: e.name, lambda e: e.key)))
def test_the_list_is_read_as_it_was_written(these: list[Entry]) -> None:
    import tomllib

    assert access.parse_access(tomllib.loads(access.dump_access(tuple(these))), "here") == tuple(these)


anything: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=70) | st.sampled_from([KEY, HASH, *ROLES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["client", "name", "role", "key", "token_sha256", "x"]), inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["client", "x"]), anything))
def test_nonsense_in_the_list_is_an_access_error(data: dict[str, Any]) -> None:
    try:
        found = access.parse_access(data, "here")
    except AccessError:
        return
    assert all(e.role in ROLES and bool(e.key) != bool(e.token_sha256) for e in found)
