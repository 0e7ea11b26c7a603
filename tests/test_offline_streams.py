"""The offline job of a session with several streams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import offline_rig

from spiked import config as configuration
from spiked.offline import job, show
from spiked.offline.session import open_session
from spiked.record.sync import lines


def several(folder: Path) -> Path:
    """Three streams: two too short to be sorted, one without spikes by configuration."""
    info = offline_rig.stream()
    x, _, _ = offline_rig.neurons(info, 1.0, 2)
    session = offline_rig.session(folder / "session", info, offline_rig.codes(info, x))
    for name in ("second", "analog"):
        shutil.copy2(session / f"{info.name}.nwb", session / f"{name}.nwb")
    data = configuration.load(session / "session.toml").model_dump(mode="json")
    stream = {"source": "replay", "path": "x", "name": info.name}
    data["stream"] = [stream, {**stream, "name": "second"}, {**stream, "name": "analog", "spikes": False}]
    text = configuration.dump(configuration.parse(data))
    (session / "session.toml").write_text(text, encoding="utf-8")
    return session


def test_one_stream_that_cannot_be_sorted_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    session = several(tmp_path)
    assert [s.name for s in open_session(session).to_sort()] == ["mea", "second"]
    assert job.main([str(session), "--params", json.dumps({"device": "cpu"})]) == 6
    told = [json.loads(p.read_text())["stream"] for p in sorted(session.glob("report.*.json"))]
    assert sorted(told) == ["mea", "second"]  # both were tried, and each says why not
    assert len(show.failures(session)) == 2


def test_clocks_are_in_the_report_of_a_session(tmp_path: Path) -> None:
    row = [1000, 667.2, 2 / 3, 0.02, "pulses", 0]
    streams = {
        "a": {"steps": [], "computer_ppm": 3.1, "table": []},
        "b": {
            "steps": [{"sample": 900, "ms": 20.5, "method": "arrival"}],
            "computer_ppm": -17.0,
            "ppm": 20.1,
            "table": [row],
        },
    }
    columns = ["sample", "reference_sample", "ratio", "error_ms", "method", "segment"]
    told = {"version": 1, "reference": "a", "columns": columns, "streams": streams}
    (tmp_path / "clocks.json").write_text(json.dumps(told))
    assert lines(tmp_path) == [
        "clock of a: the reference, +3.10 ppm against the computer",
        "clock of b: +20.10 ppm against a by sync pulses, known to 0.02 ms (at worst 0.02 ms); JUMPED by +20.5 ms near sample 900",
    ]
    (tmp_path / "clocks.json").write_text("torn {")
    assert lines(tmp_path) == []
