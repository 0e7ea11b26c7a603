"""The ledger in the session file and in the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from record_rig import FIRST, stream
from test_record_file import QUIET, live_results, problems, record

from spiked.act.report import distribution, intervals, lines, of_session
from spiked.cli import main
from spiked.record.finalize import finalize
from spiked_client.protocol import LEDGER, OUTCOMES, REASONS, newest

MS = 1_000_000


def ledger(n: int = 6) -> np.ndarray:
    """Decisions 1 to n: every second one sent, the rest refused; each told twice."""
    out = np.zeros(n, LEDGER)
    out["number"], out["rule"], out["pattern"] = np.arange(1, n + 1), b"burst", b"p"
    out["sample"] = FIRST + 1000 * np.arange(n)
    out["trigger_ns"] = 10_000 * MS + 50 * MS * np.arange(n)
    out["decided_ns"] = out["trigger_ns"] + 2 * MS
    out["outcome"], out["reason"] = OUTCOMES.index("refused"), REASONS.index("lockout")
    out["sent_sample"] = out["artifact_sample"] = -1
    out["amplitude_ua"] = np.nan
    sent = np.arange(n) % 2 == 0
    out["outcome"][sent], out["reason"][sent] = OUTCOMES.index("sent"), 0
    out["sent_ns"][sent] = out["decided_ns"][sent] + 100_000
    out["ack_ns"][sent] = out["sent_ns"][sent] + MS
    out["sent_sample"][sent] = out["sample"][sent] + 42
    out["artifact_sample"][sent] = out["sample"][sent] + 60
    out["artifact_ns"][sent] = out["sent_ns"][sent] + 3 * MS
    out["n_triggers"] = np.arange(n) % 3 + 1
    out["trigger_unit"], out["trigger_sample"] = 7, out["sample"][:, None]
    early = out.copy()
    early["outcome"] = OUTCOMES.index("held")
    return np.concatenate([early, out])


def test_the_last_record_of_a_number_counts() -> None:
    told = ledger()
    rng = np.random.default_rng(0)
    mixed = np.concatenate([rng.permutation(told[:6]), rng.permutation(told[6:])])
    assert newest(mixed).tobytes() == told[6:].tobytes()  # not a number is not equal to itself
    assert len(newest(told[:0])) == 0


@QUIET
@pytest.mark.parametrize("busy", [False, True])
def test_the_ledger_is_in_the_file_and_the_file_is_valid(tmp_path: Path, busy: bool) -> None:
    from pynwb import NWBHDF5IO

    info = stream()
    path = record(tmp_path, info, busy)
    if busy:
        live_results(tmp_path, info.n_channels)
    (tmp_path / "probe.ledger.bin").write_bytes(ledger().tobytes() + b"torn")
    assert finalize(path) is True
    assert problems(path) == []
    with NWBHDF5IO(path, "r") as io:
        table = io.read().stimulus["stimuli"].to_dataframe()
    assert table.index.tolist() == [1, 2, 3, 4, 5, 6]
    assert table["outcome"].tolist() == ["sent", "refused"] * 3
    assert table["reason"].tolist() == ["", "lockout"] * 3
    assert table["rule"].tolist() == ["burst"] * 6
    np.testing.assert_allclose(table["timestamp"], np.arange(6) * 0.05)
    assert [len(u) for u in table["trigger_unit"]] == [1, 2, 3, 1, 2, 3]
    assert table["artifact_sample"].tolist() == [FIRST + 60, -1, FIRST + 2060, -1, FIRST + 4060, -1]
    assert finalize(path) is False


def test_the_distribution_of_each_interval() -> None:
    d = intervals(newest(ledger()), 20_000.0)
    assert d["trigger spike to decision"] == {
        "n": 6,
        **dict.fromkeys(("mean", "least", "p5", "median", "p95", "p99", "most"), 2.0),
    }
    assert (d["decision to command sent"]["n"], d["decision to command sent"]["median"]) == (3, 0.1)
    assert d["command sent to acknowledged"]["most"] == 1.0
    assert d["command sent to artifact"]["mean"] == 0.9
    assert d["trigger spike to artifact"]["mean"] == 3.0
    assert distribution(np.arange(101.0))["p95"] == 95.0
    assert "trigger spike to artifact" not in intervals(ledger(), None)


@QUIET
def test_spiked_report_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, stream())
    (tmp_path / "probe.ledger.bin").write_bytes(ledger().tobytes())
    assert main(["report", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert "probe: 6 decisions to stimulate" in text
    assert "burst: 3 refused, 3 sent (3 lockout); seen in the samples: 3" in text
    assert json.loads((tmp_path / "out.json").read_text())["probe"]["rules"]["burst"]["outcomes"]["sent"] == 3
    assert lines({}) == ["no decision to stimulate was taken in this session"]


def test_a_folder_that_is_no_session_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a session folder" in capsys.readouterr().err
    (tmp_path / "session.toml").touch()
    assert of_session(tmp_path) == {}
