"""`spiked discover`: what real (simulated) programs offer, as TOML that the daemon takes."""

from __future__ import annotations

import http.server
import json
import threading
import tomllib
from pathlib import Path

import pytest
from source_rig import noise_codes, serving, some_info

from spiked import cli
from spiked.config import parse
from spiked.rig import discover as looking
from spiked.sources.simulate import Cycle, make_wire
from spiked.sources.simulate_spikeglx import SimProbe, SpikeGlxServer
from spiked.sources.wire_maxwell import frame_head


def cycle(channels: int = 4, fs_hz: float = 30_000.0) -> Cycle:
    return Cycle(some_info(channels, fs_hz), noise_codes(3_000, channels))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there on a busy computer may take a while to say so."""
    monkeypatch.setattr(looking, "LISTEN_S", 6.0)
    monkeypatch.setattr(looking, "ASK_S", 60.0)


def nowhere(*sources: str) -> list[str]:
    return [x for s in sources for x in ("--address", f"{s}=tcp://127.0.0.1:9")]


def test_every_stream_of_spikeglx_with_nothing_left_to_configure(capsys: pytest.CaptureFixture[str]) -> None:
    probes = [
        SimProbe(cycle()),
        SimProbe(cycle(6), part="NP2014", type=24),
        SimProbe(cycle(2), device="nidq"),
    ]
    with SpikeGlxServer(probes, running=False) as server:
        arguments = ["discover", "--address", f"spikeglx={server.address}", *nowhere("openephys", "maxwell")]
        assert cli.main(arguments) == 0
        text = capsys.readouterr().out
        config = parse(tomllib.loads(text))
        server.never_set_up()
        assert cli.main(arguments) == 0 and "no run was set up yet" in capsys.readouterr().out
        assert server.requests and not server.awaited  # `spiked simulate` goes on waiting
    assert [(s.name, s.device, s.probe_index, s.spikes) for s in config.stream] == [
        ("imec0", "imec", 0, True), ("imec1", "imec", 1, True), ("nidq0", "nidq", 0, False),
    ]  # fmt: skip
    assert all(s.address == server.address for s in config.stream)
    assert "# SpikeGLX: imec 1, 6 channels at 30000 Hz (NP2014" in text


def test_open_ephys_tells_its_other_ports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gui(http.server.BaseHTTPRequestHandler):
        told: dict[str, object] = {}  # noqa: RUF012 - one for the test

        def do_GET(self) -> None:
            body = json.dumps(self.told if self.path.endswith("processors") else {"mode": "ACQUIRE"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    gui = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gui)
    threading.Thread(target=gui.serve_forever, daemon=True).start()
    monkeypatch.setattr(looking, "OE_HTTP", gui.server_port)
    first, second = cycle(), cycle(8)
    try:
        with (
            serving(first, make_wire("openephys", first), block_samples=600) as (a, _),
            serving(second, make_wire("openephys", second), block_samples=600) as (b, _),
        ):
            port = b.rpartition(":")[2]
            Gui.told = {
                "processors": [
                    {"name": "ZMQ Interface", "parameters": [{"name": "data_port", "value": port}]},
                    {"name": "x"},
                ]
            }
            assert cli.main(["discover", "--address", f"openephys={a}", *nowhere("spikeglx", "maxwell")]) == 0
            text = capsys.readouterr().out
    finally:
        gui.shutdown()
        gui.server_close()
    config = parse(tomllib.loads(text))
    assert [(s.name, s.address) for s in config.stream] == [("probe", a), ("probe-2", b)]
    assert (
        "4 channels at 30000 Hz" in text
        and "8 channels at 30000 Hz" in text
        and '# probe = "probe.json"' in text
    )


def test_wells_of_a_maxtwo_are_streams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal = cycle(4, 10_000.0)
    with serving(signal, make_wire("maxwell", signal, n_columns=8)) as (address, _):
        monkeypatch.setattr(
            looking, "_messages", lambda _: [[frame_head(k, k % 2), bytes(32), b""] for k in range(9)]
        )
        assert (
            cli.main(["discover", "--address", f"maxwell={address}", *nowhere("spikeglx", "openephys")]) == 0
        )
    config = parse(tomllib.loads(capsys.readouterr().out))
    assert [(s.name, s.well) for s in config.stream] == [("well0", 0), ("well1", 1)]


def test_nothing_there_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["discover", *nowhere("openephys", "maxwell", "spikeglx")]) == 3
    assert "no acquisition program answers" in capsys.readouterr().err
    assert cli.main(["discover", "--address", "tcp://here"]) == 2
    assert "must look like" in capsys.readouterr().err
