"""The tutorials, every line of them, as a reader would paste them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spiked.act import ledger
from spiked_client.protocol import OUTCOMES

ROOT = Path(__file__).parent.parent


def follow(page: str, folder: Path, timeout_s: float) -> None:
    """Run the page's shell blocks one after the other in one shell, then its Python."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    script = "set -euo pipefail\n" + "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "EXAMPLES": str(ROOT / "clients/examples"), "COLUMNS": "100"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, timeout=timeout_s, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=120, capture_output=True)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_first_session(tmp_path: Path) -> None:
    follow("first-session.md", tmp_path, 800)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["state"] == "done" and not summary["error"]
    assert (Path(summary["folder"]) / "report.html").is_file()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "recording"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_closed_loop(tmp_path: Path) -> None:
    follow("closed-loop.md", tmp_path, 500)
    (folder,) = (tmp_path / "loop-sessions").glob("2*")
    records = ledger.read(ledger.path_of(folder, "chip0"))
    sent = records[records["sent_ns"] > 0]
    with np.load(tmp_path / "stims.npz") as z:
        assert set(z["stims"]["number"]) == set(sent["number"]) and len(sent) >= 3
    told = json.loads((tmp_path / "responded.json").read_text())["outcomes"]["sent"]
    assert told == (records["outcome"] == OUTCOMES.index("sent")).sum()
