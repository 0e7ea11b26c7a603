"""The clock's table in the session file: valid NWB, read back by pynwb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from record_rig import FIRST, stream
from test_record_file import QUIET, problems, record

from spiked.clocks.aligned import COLUMNS
from spiked.record.finalize import finalize
from spiked.record.sync import TEXTS


@QUIET
def test_the_clock_is_a_table_of_the_file_and_valid(tmp_path: Path) -> None:
    assert set(TEXTS) == set(COLUMNS)
    path = record(tmp_path, stream(8), busy=False)
    rows = [[FIRST + 1000 * k, 50.5 + 1500 * k, 1.5, 0.02, "pulses", k // 5] for k in range(10)]
    streams = {"probe": {"table": rows}, "other": {"table": []}}
    told = {"version": 1, "reference": "other", "columns": list(COLUMNS), "streams": streams}
    (tmp_path / "clocks.json").write_text(json.dumps(told))
    assert finalize(path) and not finalize(path)  # once is enough
    from pynwb import NWBHDF5IO

    with NWBHDF5IO(path, "r") as io:
        table = io.read().processing["sync"]["clock"]
        assert "stream other" in table.description
        assert [[table[c][k] for c in COLUMNS] for k in range(10)] == rows
        assert table["timestamp"][:] == pytest.approx([0.05 * k for k in range(10)])
    assert problems(path) == []


@QUIET
def test_torn_or_missing_clocks_do_not_keep_a_file_from_being_finalized(tmp_path: Path) -> None:
    path = record(tmp_path, stream(8), busy=False)
    (tmp_path / "clocks.json").write_text('{"reference": "other", "streams": {"probe": {"table": [[1, 2')
    assert finalize(path)
