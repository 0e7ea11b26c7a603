"""The metrics port: what it answers, whom it refuses, what it bears; and a whole session scraped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import ssl
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mqtt_rig import authority, certificate
from prometheus_client.parser import text_string_to_metric_families
from session_rig import rehearsal
from status_rig import status

from spiked import config as configuration
from spiked.config import Metrics
from spiked.errors import ConfigError
from spiked.publish.metrics import MetricsServer
from spiked.rehearsal import free_ports


async def ask(port: int, request: bytes, **connection: Any) -> tuple[str, bytes]:
    """(status line, body)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **connection)
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), body


async def serving(**settings: Any) -> MetricsServer:
    server = MetricsServer(Metrics(enabled=True, port=0, **settings))
    await server.start()
    server.see(status())
    return server


async def test_it_answers_scrapes_and_refuses_the_rest() -> None:
    server = await serving()
    line, body = await ask(server.port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert line == "HTTP/1.1 200 OK"
    names = {f.name for f in text_string_to_metric_families(body.decode())}
    assert {"spiked_samples", "spiked_live_chunk_ms", "spiked_ring_fill_ratio"} <= names
    openmetrics = b"GET /metrics?x=1 HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n"
    assert (await ask(server.port, openmetrics))[1].endswith(b"# EOF\n")
    for request, expected in (
        (b"GET / HTTP/1.1\r\n\r\n", "404"), (b"POST /metrics HTTP/1.1\r\n\r\n", "404"), (b"\x16\x03\x01nonsense\r\n\r\n", "400"), (b"HEAD /metrics HTTP/1.1\r\n\r\n", "200"),
    ):  # fmt: skip
        assert expected in (await ask(server.port, request))[0]
    assert (await ask(server.port, b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n"))[0] == ""
    assert {k: server.counters[k] for k in ("scrapes", "refused", "malformed")} == {
        "scrapes": 3,
        "refused": 2,
        "malformed": 2,
    }
    await server.close()


async def test_those_who_say_nothing_are_few_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spiked.publish.metrics.PATIENCE_S", 8.0)  # all of them come before the first leaves
    server = await serving()
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(40)]
    async with asyncio.timeout(60):
        while server.counters["busy"] + server._open < 40:  # noqa: ASYNC110 - a counter tells nobody
            await asyncio.sleep(0.01)
    assert server.counters["busy"] == 24 and server._open == 16
    async with asyncio.timeout(60):
        while server._open:  # noqa: ASYNC110 - time passes there
            await asyncio.sleep(0.05)
    assert (await ask(server.port, b"GET /metrics HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 200 OK"
    for _, writer in silent:
        writer.close()
    await server.close()


async def test_beyond_this_computer_it_wants_tls_and_a_token(tmp_path: Path) -> None:
    rig = {"stream": [{"name": "a", "source": "maxwell"}]}
    with pytest.raises(ConfigError, match=r"beyond this computer: give cert_file, key_file and token_file"):
        configuration.parse({**rig, "metrics": {"enabled": True, "host": "0.0.0.0"}})
    await asyncio.to_thread(authority, tmp_path)
    await asyncio.to_thread(certificate, tmp_path, "rig")
    token = tmp_path / "token"
    token.write_text("short")
    files = {"cert_file": tmp_path / "rig.crt", "key_file": tmp_path / "rig.key", "token_file": token}
    with pytest.raises(ConfigError, match="less than 16 characters"):
        MetricsServer(Metrics(**files))
    token.write_text("0123456789abcdef0123456789abcdef\n")
    server = await serving(host="0.0.0.0", **files)
    context = ssl.create_default_context(cafile=tmp_path / "ca.crt")
    for header, expected in (
        (b"", "401"), (b"Authorization: Bearer wrong\r\n", "401"), (b"Authorization: Bearer 0123456789abcdef0123456789abcdef\r\n", "200"),
    ):  # fmt: skip
        line, body = await ask(server.port, b"GET /metrics HTTP/1.1\r\n" + header + b"\r\n", ssl=context)
        assert expected in line and (b"spiked_info" in body) == (expected == "200")
    assert server.counters["refused"] == 2
    with pytest.raises(ConfigError, match=r"metrics cannot listen on 127\.0\.0\.1:\d+: .*choose another"):
        await MetricsServer(Metrics(port=server.port)).start()
    await server.close()


def scrape(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            found.setdefault(s.name, []).append((s.labels, s.value))
    return found


def blind(found: dict[str, list[tuple[dict[str, str], float]]], reason: str) -> float:
    told = found.get("spiked_blind_samples_total", [])
    return next((v for labels, v in told if labels["reason"] == reason), 0.0)


STAGES = (
    "acquire",
    "record",
    "live_wait",
    "live_clean",
    "live_detect",
    "live_sort",
    "live_act",
    "live_publish",
    "live_chunk",
)


def whole(found: dict[str, list[tuple[dict[str, str], float]]]) -> bool:
    """Whether every process has told enough of itself: none waits for the others."""

    def first(name: str) -> float:
        return found.get(f"spiked_{name}", [({}, 0.0)])[0][1]

    return (
        first("live_chunk_ms_count") > 500
        and all(first(f"{name}_ms_count") > 10 for name in STAGES)
        and bool(first("gaps_total") and first("source_malformed_total") and first("disk_hours_left"))
        and "spiked_clock_ppm" in found
        and abs(first("sample_rate_hz") - 20_000) < 400
        and blind(found, "gap") >= 1000
        and blind(found, "uncalibrated") > 10_000
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_session_is_told_in_metrics(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    metrics = {"enabled": True, "port": port}
    drops = ("--drop", "40000:41000", "--garbage-every", "5000")
    with rehearsal(tmp_path, seconds=900.0, simulate=drops, live={"enabled": True}, metrics=metrics) as r:
        r.wait_state(("recording",), 120)
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        alarms: list[str] = []  # it stands for little more than a minute
        until = time.monotonic() + 150
        while time.monotonic() < until:
            found = scrape(port)
            alarms = alarms or [a["figure"] for a in r.status()["alarms"] if a["figure"] == "gaps"]
            if alarms and whole(found):
                break
            time.sleep(0.5)
        assert alarms == ["gaps"]
        for name in STAGES:
            counts = [v for labels, v in found[f"spiked_{name}_ms_bucket"] if labels["le"] == "+Inf"]
            assert counts[0] > 10, name
        one = {name: values[0][1] for name, values in found.items()}
        assert one["spiked_gaps_total"] == 1 and one["spiked_gap_samples_total"] == 1000
        assert one["spiked_source_malformed_total"] > 0
        assert abs(one["spiked_sample_rate_hz"] - 20_000) < 400 and one["spiked_channels"] == 16
        assert (
            0 <= one["spiked_ring_fill_ratio"] < 1
            and one["spiked_disk_free_gb"] > 0
            and one["spiked_disk_hours_left"] > 0
        )
        assert blind(found, "gap") >= 1000 and blind(found, "uncalibrated") > 10_000
        states = {labels["state"]: v for labels, v in found["spiked_session_state"]}
        assert states["recording"] == 1 and sum(states.values()) == 1
        summary = r.stop()
    log = (Path(summary["folder"]) / "log.jsonl").read_text()
    assert '"event": "alarm"' in log and "Look at cables" in log


PROMETHEUS = shutil.which("prometheus", path=f"{os.environ.get('PATH', '')}:/usr/local/bin")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)")
async def test_prometheus_scrapes_and_its_rules_fire(tmp_path: Path) -> None:
    server = await serving()
    server.see(status(disk_free_gb=1.0))
    rules = Path(__file__).parent.parent / "monitoring" / "alerts.yml"
    (port,) = free_ports(1)
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 2s, evaluation_interval: 500ms}\n"
        f"rule_files: [{rules}]\n"
        f"scrape_configs: [{{job_name: spiked, static_configs: [{{targets: ['127.0.0.1:{server.port}']}}]}}]\n"
    )
    process = await asyncio.create_subprocess_exec(
        str(PROMETHEUS), f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip

    async def query(expr: str) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expr)}"
        try:
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=30).read())
        except OSError:
            return []
        return list(json.loads(text)["data"]["result"])

    async def found(expr: str, n: int) -> list[dict[str, Any]]:
        """Until there are so many: a scrape that took too long leaves nothing for a moment."""
        async with asyncio.timeout(120):
            while len(got := await query(expr)) != n:  # noqa: ASYNC110 - another program
                await asyncio.sleep(0.5)
        return got

    try:
        firing = await found('ALERTS{alertname="SpikedDiskFreeGbBad", alertstate="firing"}', 1)
        assert firing[0]["metric"]["severity"] == "bad"
        await found("up == 1", 1)
        assert not await query('ALERTS{alertname="SpikedGpuCelsiusBad"}')
        await found("spiked_unit_rate_hz", 5)
        await found('spiked_live_chunk_ms_bucket{stream="A"}', 23)
    finally:
        process.terminate()
        await process.wait()
        await server.close()
