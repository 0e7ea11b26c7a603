"""Curated units in the session file, and in the rig's library from one session to the next."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from offline_rig import FIRST, FS, stream
from report_rig import GAP, UNITS, recorded, sort_offline
from test_record_file import problems

from spiked import config
from spiked.live.process import Live
from spiked.offline.nwb_units import TABLE, read_units
from spiked.offline.session import open_session
from spiked.templates.library import Templates, library_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def begun(folder: Path, days: int) -> None:
    """Let a session have begun so many days after the first."""
    with h5py.File(folder / "mea.nwb", "r+") as f:
        when = (datetime(2026, 1, 2, tzinfo=UTC) + timedelta(days=days)).isoformat()
        for name in ("session_start_time", "timestamps_reference_time"):
            f[name][()] = when


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(the rig's sessions, report of the first one)."""
    pytest.importorskip("spikeinterface")
    pytest.importorskip("kilosort")
    root = tmp_path_factory.mktemp("rig")
    return root, sort_offline(recorded(root / "first"))


def test_units_are_in_the_session_file(rig: tuple[Path, dict[str, Any]]) -> None:
    root, report = rig
    path = root / "first" / "mea.nwb"
    assert report["nwb"] == {"units": UNITS, "table": "processing/ecephys/curated", "why": ""}
    with np.load(root / "first/offline/kilosort4/units.npz") as z:
        samples, units = z["samples"] - FIRST, z["units"]
    found = read_units(path)
    assert set(found) == set(np.unique(units).tolist())
    for unit, times in found.items():
        assert np.array_equal(np.rint(times * FS), np.unique(samples[units == unit]))
        assert not ((times > (GAP[0] + 60) / FS) & (times < (GAP[1] - 60) / FS)).any()
    assert problems(path) == []
    from pynwb import NWBHDF5IO

    with NWBHDF5IO(path, "r") as io:
        nwb = io.read()
        curated, live = nwb.processing["ecephys"][TABLE].to_dataframe(), nwb.units.to_dataframe()
    assert set(live["label"]) == {"live"} and len(live) == UNITS
    rows = {u["unit"]: u for u in report["merge"]["units"]}
    assert {u: r["label"] for u, r in rows.items()} == curated["label"].to_dict()
    assert curated["electrodes"].map(lambda e: int(e.index[0])).to_dict() == {
        u: r["channel"] for u, r in rows.items()
    }


def test_a_table_in_the_file_sorts_nothing_again(rig: tuple[Path, dict[str, Any]]) -> None:
    root, report = rig
    before = {k: v for k, v in report["seconds"].items() if k not in ("compare", "report")}
    again = sort_offline(root / "first")
    assert {k: v for k, v in again["seconds"].items() if k not in ("compare", "report")} == before
    assert problems(root / "first" / "mea.nwb") == []


def test_cells_keep_their_ids_from_session_to_session(rig: tuple[Path, dict[str, Any]]) -> None:
    root, report = rig
    path = library_path(root / "first", "mea")
    assert report["library"]["file"] == str(path) and path.parent == root / "library"
    first = Templates.load(path)
    assert sorted(report["library"]["units"].values()) == sorted(first.unit_ids.tolist())
    assert len(first) == UNITS and first.source["session"] == "first" and path.stat().st_size < 200_000
    recorded(root / "second", another_day=True)
    begun(root / "second", 1)
    second = sort_offline(root / "second")["library"]
    assert second["file"] == str(path) and len(second["known"]) == UNITS
    assert set(second["known"]) == set(first.unit_ids.tolist())
    merged, again = (max(r["library"]["units"], key=int) for r in (report, {"library": second}))
    before = {**report["library"]["units"], "0": report["library"]["units"][merged]}  # the cells' own numbers
    after = {**second["units"], "0": second["units"][again]}
    assert {u: before[str(u)] for u in range(UNITS)} == {u: after[str(UNITS - 1 - u)] for u in range(UNITS)}
    assert Templates.load(path).source["session"] == "second"
    recorded(root / "earlier", seconds=32.0)
    begun(root / "earlier", -1)
    earlier = sort_offline(root / "earlier")["library"]
    assert earlier["file"] == "" and "later session" in earlier["why"]
    assert Templates.load(path).source["session"] == "second"
    off = sort_offline(root / "second", library=False)["library"]
    assert off["why"] == "switched off"


def opening(session: Path, info: Any) -> tuple[Templates | None, list[str]]:
    """What a live process that is told templates = "library" starts with, and what it says."""
    said: list[str] = []
    cfg = config.parse(
        {"stream": [{"name": "mea", "source": "replay", "path": "x"}], "live": {"templates": "library"}}
    ).live
    link = SimpleNamespace(tell=lambda event, **fields: said.append(fields["text"]))
    me = SimpleNamespace(
        cfg=cfg, session=session, info=info, link=link, units_path=session / f"{info.name}.templates.h5"
    )
    me._library_units = lambda: Live._library_units(me)  # type: ignore[arg-type]
    return Live._known_units(me), said  # type: ignore[arg-type, return-value]


def test_the_next_session_starts_with_them(rig: tuple[Path, dict[str, Any]]) -> None:
    root, _ = rig
    third = root / "third"
    third.mkdir()
    units, said = opening(third, stream())
    assert units is not None and len(units) == UNITS and (third / "mea.templates.h5").is_file()
    assert len(said) == 1 and f"{UNITS} units of the rig's library" in said[0]
    units, said = opening(root / "fourth", stream(side=5))
    assert units is None and len(said) == 1 and "calibrating instead" in said[0] and "\n" not in said[0]
    units, said = opening(root.parent / "elsewhere" / "s", stream())
    assert units is None and "does not exist yet" in said[0]


def test_what_cannot_be_edited_is_said_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spiked.offline import nwb_units, rig_library

    folder = recorded(tmp_path / "s", seconds=20.0)
    session = open_session(folder)
    with h5py.File(folder / "mea.nwb", "r+") as f:
        del f["scratch/stream"]
    told = nwb_units.write_units(session.stream(None), np.zeros(0, int), np.zeros(0, int), [], "kilosort4")
    assert told["units"] == 0 and "not recorded by spiked" in told["why"]
    kept = rig_library.keep_units(session, session.stream(None), lambda f, t: None)
    assert kept["file"] == "" and "no offline units" in kept["why"]


def test_the_configuration_knows_the_word(tmp_path: Path) -> None:
    rig = {"rig": {"sessions": "s"}, "stream": [{"name": "a", "source": "replay", "path": "x"}]}
    path = tmp_path / "rig.toml"
    for value, expected in (("library", "library"), ("mine.h5", tmp_path / "mine.h5")):
        path.write_text(config.dump(config.parse({**rig, "live": {"templates": value}})))
        assert config.load(path).live.templates == expected
    assert config.load(path).offline.library is True
