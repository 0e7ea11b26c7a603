"""The offline room's modules load without the sorters: they are imported where they are used."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "kilosort", "spikeinterface", "slay", "h5py", "pynwb", "matplotlib", "sklearn")


def test_the_job_module_is_light() -> None:
    code = f"import sys, spiked.offline.job; print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
