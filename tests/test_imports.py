"""What each process may load: the client and the acquiring process stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "h5py", "scipy", "pynwb", "spikeinterface", "numba"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("spiked_client", HEAVY),
        ("spiked_client.subscribe, spiked_client.control, spiked_client.watch", HEAVY),
        ("spiked_client.loop, spiked_client.stimulator", HEAVY),
        ("spiked.processes.acquire, spiked.sources.openephys, spiked.sources.maxwell", HEAVY),
        ("spiked.processes.record", {"torch", "spikeinterface", "numba"}),
        ("spiked.service, spiked.cli", {"torch", "spikeinterface", "numba"}),
    ],
)
def test_light_imports(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted(set(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not forbidden & set(out)
