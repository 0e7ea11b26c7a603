"""A whole daemon with its ports open to the network: who gets what, and what it leaves on the disk."""

from __future__ import annotations

import socket
import stat
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from session_rig import rehearsal

from spiked.keys import add, init, remove
from spiked.rehearsal import Rehearsal
from spiked_client import protocol
from spiked_client.access import ClientKey, load_key
from spiked_client.control import SyncControl, dealer
from spiked_client.errors import AccessError, DaemonAbsent, Refused
from spiked_client.subscribe import SyncClient


def listening(r: Rehearsal) -> set[str]:
    """Addresses on which the daemon and its processes listen."""
    assert r.daemon is not None
    top = psutil.Process(r.daemon.pid)
    found = set()
    for process in (top, *top.children(recursive=True)):
        found |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return found


def own_address() -> str:
    """One of this computer's addresses that is not loopback, where it has one."""
    found = (a for those in psutil.net_if_addrs().values() for a in those if a.family == socket.AF_INET)
    return next((a.address for a in found if not a.address.startswith("127.")), "127.0.0.2")


def received(r: Rehearsal) -> int:
    return int(r.status()["streams"]["sim"]["samples"])


def test_without_keys_nothing_beyond_loopback_listens(tmp_path: Path) -> None:
    with rehearsal(tmp_path, seconds=300.0) as r:
        r.wait_state(("recording",), 120)
        assert listening(r) == {"127.0.0.1"}
        port = r.config.publish.control_port
        here = own_address()
        with pytest.raises(OSError):
            socket.create_connection((here, port), 1.0)
        r.stop()


@pytest.mark.slow
def test_a_session_on_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "keys"
    init(folder, lambda _t: None)
    keys: dict[str, ClientKey] = {}
    for role in ("watch", "control", "stimulate"):
        add(folder, role, role, lambda _t: None, out=tmp_path / f"{role}.key")
        keys[role] = load_key(tmp_path / f"{role}.key")  # type: ignore[assignment]
    monkeypatch.setenv("SPIKED_KEYS", str(tmp_path / "stimulate.key"))  # what the rehearsal itself asks with
    live = {"enabled": True, "sorter": "none"}
    with rehearsal(tmp_path, seconds=900.0, live=live, publish={"host": "0.0.0.0", "keys": str(folder)}) as r:
        r.wait_state(("recording",), 120)
        port, here = r.config.publish.control_port, own_address()
        wait_live(r)
        with SyncClient(here, port, keys=keys["watch"]) as client, client.spikes(timeout=60) as spikes:
            first = next(spikes)
            assert next(spikes).first == first.stop
            monkeypatch.delenv("SPIKED_KEYS")
            says, gone_at = "", time.monotonic()
            with SyncControl(here, port, timeout=1.0) as nobody:
                while "asks for a key" not in says:  # on a busy computer it looks more than once
                    assert time.monotonic() < gone_at + 60, says
                    with pytest.raises((AccessError, DaemonAbsent)) as told_nobody:
                        nobody.status()
                    says = str(told_nobody.value)
            told = pytest.raises(Refused, match="stop_session needs the role control, watch has watch")
            with SyncControl(here, port, keys=keys["watch"]) as watch, told:
                watch.stop_session()
            hostile_requests(here, port, keys["control"])
            monkeypatch.setenv("SPIKED_KEYS", str(tmp_path / "stimulate.key"))
            status, asked_at = r.status(), time.monotonic()
            while not told_all(status["ports"]["control"]) and time.monotonic() < asked_at + 60:
                status = r.status()
            assert told_all(status["ports"]["control"]), status["ports"]
            assert status["ports"]["control"].get("failed", 0) == 0
            assert status["streams"]["sim"]["lives"] == {"acquire": 0, "record": 0, "live": 0}
            before = received(r)
            remove(folder, "watch", lambda _t: None)
            gone_at = time.monotonic()
            counters: dict[str, int] = {}
            while not counters.get("refused_keys"):  # it tried to come back
                assert time.monotonic() < gone_at + 120, counters
                spikes.get(0.5)
                counters = r.status()["streams"]["sim"]["processes"]["live"]["counters"]
            while spikes.get(1.0) is not None:  # what had come before: it hears nothing any more
                assert time.monotonic() < gone_at + 120
            assert spikes.get(0.5) is None
        assert r.wait_received(before + 20_000)
        assert counters["revoked"] == 1
        summary = r.stop()
    assert summary["exit_code"] == 0
    files_for_the_service_only(Path(summary["folder"]))


def wait_live(r: Rehearsal) -> None:
    until = time.monotonic() + 120
    while not r.control("endpoints")["streams"]:
        assert time.monotonic() < until
        time.sleep(0.1)


def told_all(counters: dict[str, int]) -> bool:
    """Whether the control port has counted everybody who was turned away."""
    return all(
        counters.get(k, 0) >= n
        for k, n in (("refused_roles", 1), ("refused_handshakes", 1), ("malformed", 5))
    )


def hostile_requests(host: str, port: int, key: ClientKey) -> None:
    """From somebody who may control: nothing of it may cost a process."""
    import zmq

    marks: list[dict[str, Any]] = [
        {"sample": "x"}, {"sample": -5}, {"sample": 1 << 60}, {"line": 1 << 40}, {"line": "a"}, {"value": "high"}, {"text": 5}, {"text": "p", "line": -1},
    ]  # fmt: skip
    with SyncControl(host, port, keys=key) as c:
        for fields in marks:
            with pytest.raises(Refused):
                c.request("mark_stim", **fields)
        with pytest.raises(Refused, match="a request holds plain values only"):
            c.request("mark_stim", value=float("nan"))
        with pytest.raises(Refused, match="stream is the name of one"):
            c.request("calibrate", stream=["sim"])
        c.mark_stim(pattern="by hand")
    with zmq.Context() as context, dealer(context, f"tcp://{host}:{port}", key) as d:
        assert d.poll(60_000, zmq.POLLOUT)
        for data in (b"", b"\xff" * 100, protocol.encode_request(1), b"x" * ((1 << 20) + 5)):
            d.send(data)
            assert d.poll(60_000)
            d.recv_multipart()


def files_for_the_service_only(session: Path) -> None:
    """Files 0640 and folders 0750, or less."""
    there = [session, *session.rglob("*")]
    assert len(there) > 5
    for path in there:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert not mode & 0o027, f"{path.name} is {mode:o}"
        assert mode & 0o600 == 0o600
