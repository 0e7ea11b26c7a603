"""Damaged files of our own: one line, the file as it was, and a daemon that starts nevertheless."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spiked import config
from spiked.bench.fuzz_files import session_file
from spiked.errors import RecordingError
from spiked.record import edit
from spiked.record.nwbfile import DATA, GAPS, POSITION
from spiked.record.recover import recover
from spiked.service import Service


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small session file."""
    folder = tmp_path_factory.mktemp("session")
    session_file(folder)
    return (folder / "s.nwb").read_bytes()


def _empty_column(f: Any) -> None:
    del f[GAPS]["start_sample"]
    f[GAPS]["start_sample"] = np.zeros(0, np.int64)


def _text_for_position(f: Any) -> None:
    del f[POSITION]
    f[POSITION] = "here"


def _samples_are_one_number(f: Any) -> None:
    del f[DATA]
    f[DATA] = 5


DAMAGE: dict[str, Callable[[Any], None]] = {
    "a column without rows": _empty_column,
    "text where numbers belong": _text_for_position,
    "one number in the place of the samples": _samples_are_one_number,
}


@pytest.mark.filterwarnings("ignore")  # pynwb's own
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_session_is_one_line_and_stays_as_it_was(tmp_path: Path, whole: bytes, how: str) -> None:
    path = tmp_path / "s.nwb"
    path.write_bytes(whole)
    with h5py.File(path, "r+") as f:
        DAMAGE[how](f)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RecordingError) as e:
        recover(path)
    assert "\n" not in str(e.value) and "s.nwb" in str(e.value)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_a_daemon_starts_beside_a_damaged_session_of_an_earlier_life(tmp_path: Path, whole: bytes) -> None:
    for name, damage in (("2026-01-01T00-00-00_rig", _empty_column), ("2026-01-02T00-00-00_rig", None)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "s.nwb").write_bytes(whole)
        (folder / "state.json").write_text(json.dumps({"state": "recording", "pid": 4_000_000}))
        if damage is not None:
            with h5py.File(folder / "s.nwb", "r+") as f:
                damage(f)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "state.json").write_text('{"state": [], "pid": 1e999}')
    service = Service(
        config.parse({"stream": [{"name": "s", "source": "maxwell"}], "rig": {"sessions": str(tmp_path)}})
    )
    told: list[tuple[str, str]] = []
    service.journal.note = lambda event, text, **_more: told.append((event, text))  # type: ignore[assignment, misc]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pynwb's own
        service._recover_left_behind()
    assert any("2026-01-01" in text and "damaged" in text for _, text in told)
    assert any(
        "2026-01-02" in text and text.startswith("recovered") for _, text in told
    )  # the one after it is seen to
    assert json.loads((tmp_path / "2026-01-02T00-00-00_rig" / "state.json").read_text())["state"] == "queued"


@pytest.mark.parametrize(
    ("page", "length", "size"), [(-1, 16, 4096), (7, 16, 4096), (0, 5000, 4096), (0, 16, 1 << 40)]
)
def test_a_redo_log_that_contradicts_itself_changes_nothing(
    tmp_path: Path, page: int, length: int, size: int
) -> None:
    import struct
    import zlib

    path = tmp_path / "x.nwb"
    path.write_bytes(bytes(range(256)) * 16)
    log = (
        edit.HEAD.pack(edit.MAGIC, 4096, size, 1)
        + struct.pack("<qi", page, length)
        + bytes(min(length, 5000))
    )
    edit.redo_path(path).write_bytes(log + struct.pack("<I", zlib.crc32(log)))
    with pytest.raises(RecordingError, match="does not fit"):
        edit.replay(path)
    assert path.read_bytes() == bytes(range(256)) * 16 and edit.redo_path(path).exists()
