"""The metrics port and those who connect and say nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from mqtt_rig import authority, certificate

from spiked.config import Metrics
from spiked.publish import metrics
from spiked.publish.metrics import MetricsServer


async def test_who_begins_no_handshake_is_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each keeps a file of the supervisor for a minute, which needs them to restart processes."""
    monkeypatch.setattr(metrics, "PATIENCE_S", 0.5)
    await asyncio.to_thread(authority, tmp_path)
    await asyncio.to_thread(certificate, tmp_path, "rig")
    files = {"cert_file": tmp_path / "rig.crt", "key_file": tmp_path / "rig.key"}
    server = MetricsServer(Metrics(enabled=True, port=0, **files))
    await server.start()
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(5)]
    async with asyncio.timeout(60):
        assert [await reader.read() for reader, _ in silent] == [b""] * 5
    for _, writer in silent:
        writer.close()
    await server.close()
