"""Checks of sockets: who has our ports, and whether those that the daemon speaks to are there."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from spiked.config import Config, Mqtt, Output, Stream
from spiked.rig.findings import FAIL, OK, WARN, Finding, Scene
from spiked.sources.presence import WAIT_S, absent, address_of, reach
from spiked_client import protocol

ANSWER_S = 10.0  # for the answer of a broker that took the connection
START = {
    "openephys": "start the Open Ephys GUI with the ZMQ Interface plugin, and press play",
    "maxwell": "start MaxLab Live and power the array up",
    "spikeglx": "start SpikeGLX, switch its command server on (Options), and run",
}


def listened(config: Config) -> list[tuple[str, str, int]]:
    """(what, host, port) of every port that the daemon opens; those with port 0 take any."""
    p = config.publish
    out = [("publish.control_port", p.host, p.control_port), ("publish.health_port", p.host, p.health_port)]
    for i, stream in enumerate(config.stream):
        for key, port in zip(("publish.live_port", "publish.replay_port"), p.of_stream(i), strict=True):
            out.append((f"{key} of {stream.name}", p.host, port))
    for name in ("web", "metrics"):
        section = getattr(config, name, None)
        if section is not None and getattr(section, "enabled", False):
            out.append((f"{name}.port", str(section.host), int(section.port)))
    for output in config.output:
        if output.kind == "zmq":
            where = urlsplit(output.address or "tcp://127.0.0.1:5580")
            if where.scheme == "tcp" and where.hostname and where.port:
                out.append((f"output {output.name}", where.hostname, where.port))
    return [row for row in out if row[2]]


def ports(scene: Scene) -> Iterator[Finding]:
    """Each port is free, or has this rig's own daemon behind it."""
    if scene.config is None:
        return
    wanted = listened(scene.config)
    seen: dict[int, str] = {}
    for what, _host, port in wanted:
        if port in seen:
            yield Finding("ports", FAIL, f"{what} and {seen[port]} are both {port}", f"give them different ports in {scene.rig}")  # fmt: skip
        seen[port] = what
    taken = [(what, host, port, error) for what, host, port in wanted if (error := _cannot_bind(host, port))]
    running = _daemon(scene.config) if taken else None
    if running is not None and running.get("rig") == scene.config.rig.name:
        yield Finding("ports", OK, f"this rig's daemon runs (pid {running.get('pid')}) and has its ports")
        ours = {running.get("pid"), *_children(running.get("pid"))}
        taken = [row for row in taken if _owner(row[2])[0] not in ours]
    for what, host, port, error in taken:
        pid, who = _owner(port)
        if error != errno.EADDRINUSE:
            yield Finding("ports", FAIL, f"{what}: cannot listen on {host}:{port}: {os.strerror(error)}", f"correct it in {scene.rig}")  # fmt: skip
            continue
        stop = f"kill {pid}" if pid else f"ss -ltnp 'sport = :{port}'"
        yield Finding(
            "ports", FAIL, f"{what}: {port} is taken by {who}", f"{stop}; or another port in {scene.rig}"
        )
    if not taken and running is None:
        numbers = ", ".join(str(p) for p in sorted(seen))
        yield Finding("ports", OK, f"free: {numbers}")


def _cannot_bind(host: str, port: int) -> int:
    """0, or the errno."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is left of closed ones is no owner
            s.bind(address)
            s.listen(1)
    except OSError as e:
        return e.errno or errno.EINVAL
    return 0


def _owner(port: int) -> tuple[int | None, str]:
    """Who listens on a port, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(c.pid)
                    return c.pid, f"{process.name()} (pid {c.pid}): {' '.join(process.cmdline())[:80]}"
                return c.pid, f"process {c.pid}"
    return None, "another user's process"


def _children(pid: Any) -> list[int]:
    with contextlib.suppress(psutil.Error, TypeError):
        return [c.pid for c in psutil.Process(pid).children(recursive=True)]
    return []


def _daemon(config: Config) -> dict[str, Any] | None:
    """The status of a daemon at our control port; None where nobody answers."""
    import zmq

    if config.publish.keys is not None:  # it would ask for ours
        pid, who = _owner(config.publish.control_port)
        return {"rig": config.rig.name, "pid": pid} if pid and "spiked" in who and " run " in who else None
    host = "127.0.0.1" if config.publish.host in ("0.0.0.0", "::") else config.publish.host
    with zmq.Context() as context, context.socket(zmq.DEALER) as s:
        s.linger = 0
        s.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{config.publish.control_port}")
        s.send(protocol.encode_request(1, op="status"))
        if not s.poll(int(WAIT_S * 1000)):
            return None
        try:
            return dict(protocol.unpack(s.recv_multipart()[-1]))
        except protocol.ProtocolError:
            return None


# ---- whom the daemon speaks to ---------------------------------------------------------------------------------


def peers(scene: Scene) -> Iterator[Finding]:
    """Each source's program listens; and sends, where it publishes."""
    for stream in scene.config.stream if scene.config else ():
        if stream.source != "replay":
            yield _peer(stream)


def _peer(stream: Stream) -> Finding:
    address = address_of(stream)
    if why := absent(stream):
        return Finding("peers", WARN, f"{stream.name}: {why}", START[stream.source])
    return Finding(
        "peers", OK, f"{stream.name}: {address} {'is there' if stream.source == 'spikeglx' else 'sends'}"
    )


def outputs(scene: Scene) -> Iterator[Finding]:
    """Stimulators that are spoken to; one that connects to us is not looked for."""
    for output in scene.config.output if scene.config else ():
        if output.kind == "serial":
            yield _serial(output)
        elif output.kind != "zmq" and output.address:
            where = urlsplit(output.address)
            error = reach(where.hostname or "", where.port or 0)
            text = f"{output.name}: {output.address} {f'does not answer ({error})' if error else 'is there'}"
            yield Finding("outputs", WARN if error else OK, text, f"start the stimulator's program, or correct output.address in {scene.rig}" if error else "")  # fmt: skip


def _serial(output: Output) -> Finding:
    path = Path(output.address)
    if not path.exists():
        return Finding(
            "outputs", FAIL, f"{output.name}: there is no {path}", "plug it in; ls /dev/tty* shows its name"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding("outputs", FAIL, f"{output.name}: {path} may not be opened by you", 'sudo usermod -aG dialout "$USER", then log in again')  # fmt: skip
    return Finding("outputs", OK, f"{output.name}: {path} is there")


def broker(scene: Scene) -> Iterator[Finding]:
    """The MQTT broker takes our name and password."""
    if scene.config is None or not scene.config.mqtt.enabled:
        return
    mqtt = scene.config.mqtt
    at = f"{mqtt.host}:{mqtt.port}"
    try:
        code = _mqtt_connect(mqtt)
    except OSError as e:
        why = e.strerror or str(e)
        fix = f"sudo systemctl start mosquitto (on {mqtt.host}), or correct [mqtt] in {scene.rig}"
        yield Finding("broker", FAIL, f"no MQTT broker at {at}: {why}", fix)
        return
    if code:
        reasons = {2: "refuses our client id", 4: "refuses our name and password", 5: "does not let us in"}
        yield Finding("broker", FAIL, f"the MQTT broker at {at} {reasons.get(code, f'answers with code {code}')}", f"correct mqtt.username and mqtt.password_file in {scene.rig}")  # fmt: skip
        return
    yield Finding("broker", OK, f"the MQTT broker at {at} lets us in")


def _mqtt_connect(mqtt: Mqtt) -> int:
    """The return code of a CONNECT (MQTT 3.1.1, 3.2.2.3). OSError where there is no broker."""

    def text(s: str) -> bytes:
        raw = s.encode()
        return struct.pack(">H", len(raw)) + raw

    password = mqtt.password_file.read_text(encoding="utf-8").strip() if mqtt.password_file else None
    flags = 0x02 | (0x80 if mqtt.username else 0) | (0x40 if mqtt.username and password else 0)
    body = text("MQTT") + bytes([4, flags, 0, 10]) + text(f"spiked-doctor-{os.getpid()}")
    if mqtt.username:
        body += text(mqtt.username) + (text(password) if password else b"")
    length, encoded = len(body), b""
    while True:
        length, digit = divmod(length, 128)
        encoded += bytes([digit | (0x80 if length else 0)])
        if not length:
            break
    with _mqtt_socket(mqtt) as s:
        s.settimeout(ANSWER_S)
        s.sendall(b"\x10" + encoded + body)
        answer = s.recv(4)
        if len(answer) < 4 or answer[0] != 0x20:
            raise OSError(errno.EPROTO, "what answers is no MQTT broker, or wants TLS (mqtt.tls)")
        s.sendall(b"\xe0\x00")
        return answer[3]


def _mqtt_socket(mqtt: Mqtt) -> socket.socket:
    s = socket.create_connection((mqtt.host, mqtt.port), WAIT_S)
    if not mqtt.tls:
        return s
    context = ssl.create_default_context(cafile=str(mqtt.ca_file) if mqtt.ca_file else None)
    if mqtt.cert_file and mqtt.key_file:
        context.load_cert_chain(mqtt.cert_file, mqtt.key_file)
    return context.wrap_socket(s, server_hostname=mqtt.host)
