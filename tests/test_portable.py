"""Saved units on a disk that fills up: one line, the old file stays, and the process lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import pytest

SAVE = """
import resource, sys
from pathlib import Path
import numpy as np
from spiked.errors import ConfigError
from spiked.portable import save

def fill(f):
    f.attrs["format"] = "x"
    for k in range(40):
        f.create_dataset(f"table {k}", data=np.arange(200.0))

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))  # as a full disk: a write fails
try:
    save(Path(sys.argv[1]), "templates", fill)
except ConfigError as e:
    sys.exit(str(e))
"""


@pytest.mark.parametrize("room", [0, 2_000, 20_000, 60_000])
def test_a_disk_that_fills_up(tmp_path: Path, room: int) -> None:
    path = tmp_path / "u.templates.h5"
    path.write_text("yesterday's")
    done = subprocess.run(
        [sys.executable, "-c", SAVE, str(path), str(room)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"cannot write templates to {path}: File too large")
    assert path.read_text() == "yesterday's" and list(tmp_path.iterdir()) == [path]


def test_with_room_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "u.templates.h5"
    assert subprocess.run([sys.executable, "-c", SAVE, str(path), "10000000"], check=True).returncode == 0
    with h5py.File(path) as f:
        assert len(f) == 40 and f.attrs["format"] == "x" and f["table 39"][7] == 7.0
    assert list(tmp_path.iterdir()) == [path]
