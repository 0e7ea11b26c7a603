"""`spiked doctor`, with what it looks for really provoked: taken ports, a full disk, low limits, a broker that is away."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import zmq
from source_rig import blocks_of, opened

from spiked import config as configuration
from spiked.rehearsal import free_ports
from spiked.rig import install, units
from spiked.rig.discover import discover
from spiked.rig.doctor import CHECKS, examine
from spiked.rig.findings import Finding
from spiked.sources.presence import absent, reach
from spiked.sources.simulate import LOOK_S

MAP = ";".join(f"{i}({i}){17.5 * (i % 4)}/{17.5 * (i // 4)}" for i in range(16)) + ";"


@pytest.fixture
def rig(tmp_path: Path) -> Callable[..., Path]:
    """Writes a rig's file, with sections replaced."""

    def write(**sections: Any) -> Path:
        ports = free_ports(4)
        (tmp_path / "map.cfg").write_text(MAP)
        (tmp_path / "sessions").mkdir(exist_ok=True)
        stream = {
            "name": "chip0",
            "source": "maxwell",
            "electrode_map": "map.cfg",
            "address": "tcp://127.0.0.1:1",
        }
        data: dict[str, Any] = {
            "rig": {"name": "rigA", "sessions": str(tmp_path / "sessions")},
            "stream": [stream],
            "publish": dict(
                zip(("live_port", "replay_port", "control_port", "health_port"), ports, strict=True)
            ),
            **{k: v for k, v in sections.items() if k != "stream"},
        }
        data["stream"][0] |= sections.get("stream", {})
        rows = []
        for name, body in data.items():
            several = isinstance(body, list)
            for part in body if several else [body]:
                rows.append(f"[[{name}]]" if several else f"[{name}]")
                rows += [f"{k} = {configuration.toml_value(v)}" for k, v in part.items()]
        path = tmp_path / "rig.toml"
        path.write_text("\n".join(rows))
        return path

    return write


def found(path: Path, check: str, **options: Any) -> list[Finding]:
    only = {"space": "disk", "shm": "memory", "memlock": "memory"}.get(check, check)
    return [f for f in examine(path, quick=True, only=(only,), **options) if f.check == check]


def one(path: Path, check: str, level: str) -> Finding:
    (finding,) = [f for f in found(path, check) if f.level == level]
    return finding


def test_a_sound_rig(rig: Callable[..., Path], tmp_path: Path) -> None:
    path = rig()
    done = subprocess.run([sys.executable, "-m", "spiked.cli", "doctor", str(path), "--json"], capture_output=True, text=True, check=False)  # fmt: skip
    told = json.loads(done.stdout)
    by_check = {f["check"]: f for f in told["findings"]}
    assert by_check["config"]["level"] == by_check["ports"]["level"] == by_check["shm"]["level"] == "ok"
    assert by_check["probe"]["text"].startswith("chip0: 16 electrodes")
    assert "times what the streams bring (0.6 MB/s)" in by_check["disk"]["text"]  # 16 x 20 kHz x 2 bytes
    assert by_check["peers"]["level"] == "warn" and "MaxLab" in by_check["peers"]["fix"]
    assert all(f["fix"] for f in told["findings"] if f["level"] != "ok")
    assert told["ok"] == (done.returncode == 0) == (not [f for f in told["findings"] if f["level"] == "fail"])
    assert not list((tmp_path / "sessions").iterdir())  # nothing stays of the speed test


def test_a_wrong_configuration_is_a_finding_and_hides_no_other(rig: Callable[..., Path]) -> None:
    path = rig(live={"sorter": "best"})
    findings = examine(path, quick=True, only=("rtprio", "clock"))
    assert findings[0].level == "fail" and "live.sorter" in findings[0].text
    assert {f.check for f in findings} == {"config", "rtprio", "clock"}


def test_who_has_our_port(rig: Callable[..., Path]) -> None:
    path = rig()
    port = configuration.load(path).publish.health_port
    assert one(path, "ports", "ok").text.startswith("free: ")
    with socket.socket() as s:
        s.bind(("127.0.0.1", port))
        s.listen()
        finding = one(path, "ports", "fail")
        assert (
            f"publish.health_port: {port} is taken by" in finding.text
            and f"pid {os.getpid()}" in finding.text
        )
        assert f"kill {os.getpid()}" in finding.fix
    a, b, c = free_ports(3)
    twice = rig(publish={"live_port": a, "health_port": a, "control_port": b, "replay_port": c})
    assert f"are both {a}" in one(twice, "ports", "fail").text


def test_probes_and_maps(rig: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"probes": [{"contacts": 3}]}')
    assert "is not probeinterface JSON" in one(rig(stream={"source": "openephys", "probe": "bad.json"}), "probe", "fail").text  # fmt: skip
    assert "no electrode map" in one(rig(stream={"electrode_map": "nowhere.cfg"}), "probe", "fail").text
    assert "made-up line" in one(rig(stream={"source": "openephys"}), "probe", "warn").text


def test_files_that_are_missing_or_open_to_all(rig: Callable[..., Path], tmp_path: Path) -> None:
    path = rig(mqtt={"password_file": "secret"}, live={"templates": "nowhere.templates.h5"})
    assert {f.text.split(":")[0] for f in found(path, "files")} == {"mqtt.password_file", "live.templates"}
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o644)
    finding = one(rig(mqtt={"password_file": "secret"}), "files", "warn")
    assert finding.fix == f"chmod o-r {tmp_path / 'secret'}"


def test_a_peer_that_sends_and_one_that_only_listens(rig: Callable[..., Path]) -> None:
    over = threading.Event()
    with zmq.Context() as context, context.socket(zmq.PUB) as device:
        device.linger = 0
        port = device.bind_to_random_port("tcp://127.0.0.1")
        path = rig(stream={"address": f"tcp://127.0.0.1:{port}"})
        assert "sent nothing" in one(path, "peers", "warn").text

        def send() -> None:
            while not over.wait(0.02):
                device.send(b"frame")

        sender = threading.Thread(target=send)
        sender.start()
        try:
            until = time.monotonic() + 60
            while (told := found(path, "peers"))[0].level != "ok":  # it listens for two seconds
                assert time.monotonic() < until
            (finding,) = told
            assert finding.text.endswith("sends")
        finally:
            over.set()
            sender.join()


@pytest.mark.parametrize("wire", ["maxwell", "openephys"])
def test_who_only_looks_does_not_begin_the_simulation(wire: str, tmp_path: Path) -> None:
    """It sends while it is looked at and then waits again; the reader that stays gets it from the first sample on."""
    address, path = f"tcp://127.0.0.1:{free_ports(1)[0]}", tmp_path / "sent.raw"
    stream = configuration.Stream(name="chip0", source=wire, address=address)
    words = ["--wire", wire, "--address", address, "--electrodes", "4x4", "--columns", "16", "--cycle", "--duration-s", "3", "--first-sample", "7000"]  # fmt: skip
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "spiked.cli", "simulate", *words, "--wait-s", "120", "--ttl-hz", "4", "--sent", str(path)],
        stdout=subprocess.PIPE, text=True,
    ) as simulator:  # fmt: skip
        assert simulator.stdout is not None
        reading = threading.Thread(target=lambda: [said.append(line) for line in simulator.stdout or ()])
        reading.start()

        def looked() -> int:
            return sum("somebody looked" in line for line in said)

        def seen(look: Callable[[], Any]) -> Any:
            """What a look finds, once the simulator has noticed that it is over."""
            n, began = looked(), time.monotonic()
            found = look()
            took, until = time.monotonic() - began, time.monotonic() + 30
            while looked() == n and time.monotonic() < until:
                time.sleep(0.02)
            if (looked() == n or "nothing" in str(found)) and took > LOOK_S - 0.5:
                pytest.skip(f"who looks and leaves has {LOOK_S:g} s for it; busy as it is, this computer took {took:.1f}")  # fmt: skip
            return found

        try:
            until = time.monotonic() + 120
            where = urlsplit(address)
            while reach(where.hostname or "", where.port or 0) and time.monotonic() < until:
                time.sleep(0.1)
            assert [seen(lambda: absent(stream)) for _ in range(2)] == ["", ""]
            (told,) = seen(lambda: discover(addresses={wire: address}, only=wire))
            assert "16 c" in told.text
            with opened(wire, address) as (source, _):
                items = []
                while (got := source.read(0.3)) or simulator.poll() is None:
                    items += got
        finally:
            simulator.kill()
            reading.join(60)
    assert (simulator.returncode, looked()) == (0, 3), said
    blocks, codes = blocks_of(items), np.fromfile(path, "uint16" if wire == "maxwell" else "int16")
    assert blocks[0].first_sample == 7000 and len(codes) == 16 * 60_000
    assert np.array_equal(np.concatenate([b.data for b in blocks]), codes.reshape(-1, 16))


@contextmanager
def mosquitto(folder: Path, *rows: str) -> Iterator[int]:
    (port,) = free_ports(1)
    binary = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    if not Path(binary).exists():
        pytest.skip("mosquitto is not installed")
    config = folder / "mosquitto.conf"
    config.write_text("\n".join([f"listener {port} 127.0.0.1", "user root", *rows]) + "\n")
    with subprocess.Popen([binary, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as broker:  # fmt: skip
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield port
        finally:
            broker.kill()


def test_the_broker(rig: Callable[..., Path], tmp_path: Path) -> None:
    (away,) = free_ports(1)
    assert "Connection refused" in one(rig(mqtt={"enabled": True, "port": away}), "broker", "fail").text
    (tmp_path / "passwords").touch(0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(tmp_path / "passwords"), "rigA", "right"], check=False, capture_output=True)  # fmt: skip
    with mosquitto(tmp_path, f"password_file {tmp_path / 'passwords'}") as port:
        (tmp_path / "pw").write_text("wrong\n")
        mqtt = {"enabled": True, "port": port, "username": "rigA", "password_file": "pw"}
        assert "let us in" in one(rig(mqtt=mqtt), "broker", "fail").text
        if (tmp_path / "passwords").stat().st_size:
            (tmp_path / "pw").write_text("right\n")
            assert "lets us in" in one(rig(mqtt=mqtt), "broker", "ok").text
    with socket.socket() as other:  # something else entirely
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer() -> None:
            with other.accept()[0] as s:
                s.sendall(b"HTTP/1.1 400\r\n")

        answering = threading.Thread(target=answer)
        answering.start()
        mqtt = {"enabled": True, "port": other.getsockname()[1]}
        assert "no MQTT broker" in one(rig(mqtt=mqtt), "broker", "fail").text
        answering.join()


def test_a_small_disk_and_small_shared_memory(rig: Callable[..., Path], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20M", "tmpfs", small], check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        wide = {"source": "openephys", "electrode_map": ""}  # 384 x 30 kHz: 460 MB of ring
        path = rig(rig={"name": "a", "sessions": str(small / "sessions"), "runtime": str(small)}, stream=wide, record={"min_free_gb": 0})  # fmt: skip
        assert "0.0 hours" in one(path, "space", "fail").text
        finding = one(path, "shm", "fail")
        assert "the rings need 5" in finding.text and f"remount,size=2G {small}" in finding.fix
        told = [f.text for f in examine(path, only=("disk",)) if f.check == "disk"]
        assert any("in memory (tmpfs)" in text for text in told) and any(
            "with fsync" in text for text in told
        )
        assert "min_free_gb" in one(rig(rig={"name": "a", "sessions": str(small)}), "space", "fail").text
    finally:
        subprocess.run(["umount", small], check=True)


LIMITED = """
import sys
from pathlib import Path
from spiked.rig.doctor import examine
for f in examine(Path(sys.argv[1]), quick=True, only=("rtprio", "memory", "limits", "disk")):
    print(f.level, f.check, f.text)
"""


def test_low_limits_of_an_ordinary_user(rig: Callable[..., Path], tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("giving up rights needs root and setpriv")
    path = rig()

    def limits() -> None:
        for what, soft in ((resource.RLIMIT_RTPRIO, 0), (resource.RLIMIT_MEMLOCK, 65536), (resource.RLIMIT_NOFILE, 200)):  # fmt: skip
            resource.setrlimit(what, (soft, soft))

    everybody = tmp_path
    while everybody != everybody.parent and everybody != Path("/tmp"):
        everybody.chmod(0o755)
        everybody = everybody.parent
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    words = [*nobody, sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limits, check=False, cwd="/")
    if "Permission denied" in done.stderr or "No module named" in done.stderr:
        pytest.skip("this checkout is not readable for other users")
    assert "warn rtprio no real-time priority" in done.stdout, done.stderr
    assert "memlock only 0 MB may be locked" in done.stdout
    assert "warn nofile only 200 files" in done.stdout
    assert f"fail disk {tmp_path / 'sessions'} cannot be written by you" in done.stdout


def test_a_service_for_another_configuration(
    rig: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed drop-in lets only the old address through; the daemon itself could not tell why nothing comes."""
    path = rig(stream={"address": "tcp://192.0.2.1:7204"})
    monkeypatch.setattr(units.Layout, "at", lambda _self, to: tmp_path / "root" / to.lstrip("/"))
    layout = units.Layout(path)
    wanted = units.files(layout, install.adapt.drop_in(configuration.load(path), layout))
    for to, text in wanted.items():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)
    assert one(path, "service", "ok").text == "spiked.service is installed for this configuration"
    path.write_text(path.read_text().replace("192.0.2.1", "192.0.2.2"))
    finding = one(path, "service", "fail")
    assert "10-rig.conf" in finding.text and f"install-service --config {path}" in finding.fix


def test_a_check_that_breaks_is_told(rig: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_scene: Any) -> list[Finding]:
        raise RuntimeError("unexpected")

    from spiked.rig import doctor

    checks = tuple((n, broken if n == "clock" else c) for n, c in CHECKS)
    monkeypatch.setattr(doctor, "CHECKS", checks)
    (finding,) = [f for f in examine(rig(), only=("clock",)) if f.check == "clock"]
    assert finding.level == "warn" and "RuntimeError: unexpected" in finding.text
