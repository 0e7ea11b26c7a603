"""Curated units of a session become live ones under the ids they have, whoever saved them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from offline_rig import FIRST, FS, codes, neurons, session, stream

from spiked.cli import main
from spiked.config import Live
from spiked.errors import ConfigError
from spiked.live.pipeline import LivePipeline
from spiked.offline.analyze import filtered
from spiked.offline.curated import read
from spiked.offline.reading import source_of
from spiked.offline.session import open_session
from spiked.offline.truth import score
from spiked.sources.formats.recording import Choice
from spiked.stream import Chunk
from spiked.templates.library import Templates
from spiked_models import networks

SECONDS, MORE, UNITS = 20.0, 8.0, 4  # the first is yesterday, the rest today
IDS = np.array([7, 31, 12, 200])  # what the curator called them


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """(session folder, spike positions, ids)."""
    info, n = stream(), round(SECONDS * FS)
    x, sample, unit = neurons(info, SECONDS + MORE, UNITS)
    folder = session(tmp_path_factory.mktemp("carry") / "s", info, codes(info, x[:n]))
    return folder, sample[sample < n], IDS[unit[sample < n]]


def phy(folder: Path, sample: np.ndarray, unit: np.ndarray, nwb: Path | None) -> Path:
    """What Phy leaves behind: spikes, what was sorted, and what a person said of units 31 and 12."""
    folder.mkdir()
    np.save(folder / "spike_times.npy", sample[:, None])
    np.save(folder / "spike_clusters.npy", unit.astype(np.int32))
    lines = [f"sample_rate = {FS}", "hp_filtered = False", "raise SystemExit('a params.py is not run')"]
    (folder / "params.py").write_text("\n".join([f"dat_path = {str(nwb)!r}" if nwb else "", *lines]))
    (folder / "cluster_KSLabel.tsv").write_text(
        "cluster_id\tKSLabel\n7\tgood\n31\tgood\n12\tgood\n200\tmua\n"
    )
    (folder / "cluster_group.tsv").write_text("cluster_id\tgroup\n31\tgood\n12\tnoise\n")
    return folder


def today(path: Path) -> Iterator[Any]:
    """(true id, score against the id that fits it best) in samples of the same cells that come later."""
    info, n = stream(), round(SECONDS * FS)
    x, sample, unit = neurons(info, SECONDS + MORE, UNITS)
    sample, unit = sample[sample >= n] - n, unit[sample >= n]
    t = Templates.load(path)
    t.check(info)
    pipeline = LivePipeline(info, networks.load("rtsort-20k-lite"), Live(), t, scaling=1.0)
    data = codes(info, x[n:])
    spikes = [
        pipeline.process(Chunk(a, data[a : a + 400], 0)).spikes.copy() for a in range(0, len(data), 400)
    ]
    found = np.concatenate([*spikes, pipeline.flush()])
    return iter(score(sample, IDS[unit], found["sample"], found["unit"], FS, 0.4).items())


def test_a_phy_folder_live_under_its_ids(
    tmp_path: Path, yesterday: tuple[Path, np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sample, unit = yesterday
    source = phy(tmp_path / "phy", sample, unit, folder / "mea.nwb")
    out, told = tmp_path / "y.templates.h5", tmp_path / "y.json"
    assert main(["templates", str(source), "--out", str(out), "--json", str(told), "--last-s", "15"]) == 0
    t = Templates.load(out)
    assert sorted(t.unit_ids.tolist()) == [7, 31]  # 12 was called noise by a person, 200 is multi-unit
    assert t.next_unit_id == 201 and (t.id_confidence == 1).all()
    assert json.loads(told.read_text())["units"] == t.unit_ids.tolist()
    assert "2 of 4 units, learned from the last 15 s" in capsys.readouterr().out

    assert main(["templates", str(source), "--out", str(out), "--units", "7,12,31,200"]) == 0
    for true, v in today(out):
        assert v["unit"] == int(true) and v["accuracy"] > 0.9, (true, v)


def test_an_analyzer_folder_live_under_its_ids(
    tmp_path: Path, yesterday: tuple[Path, np.ndarray, np.ndarray]
) -> None:
    si = pytest.importorskip("spikeinterface.core")
    se = pytest.importorskip("spikeinterface.extractors")
    folder, sample, unit = yesterday
    recording = se.read_nwb(folder / "mea.nwb", electrical_series_path="acquisition/ElectricalSeries")
    recording.set_dummy_probe_from_locations(stream().positions)
    sorting = si.NumpySorting.from_samples_and_labels([sample], [unit], FS)
    sorting.set_property("quality", ["good", "good", "mua", "good"])
    si.create_sorting_analyzer(
        sorting, recording, format="binary_folder", folder=tmp_path / "a", sparse=False
    )
    out = tmp_path / "a.templates.h5"
    assert main(["templates", str(tmp_path / "a"), "--out", str(out)]) == 0
    kept = sorted(u for u, q in zip(sorted(IDS), ["good", "good", "mua", "good"], strict=True) if q == "good")
    assert sorted(Templates.load(out).unit_ids.tolist()) == kept


def test_the_analyzer_of_our_own_jobs_knows_its_recording(
    tmp_path: Path, yesterday: tuple[Path, np.ndarray, np.ndarray]
) -> None:
    """Its recording is one that only we can read: names and places of the electrodes come from there."""
    si = pytest.importorskip("spikeinterface.core")
    from spiked.offline.si_recording import recording_of

    folder, sample, unit = yesterday
    stored = open_session(folder).stream(None)
    job = {
        "source": source_of(stored),
        "gain_uv": stored.gain_uv.tolist(),
        "positions_um": stored.positions_um,
    }
    sorting = si.NumpySorting.from_samples_and_labels([sample], [unit], FS)
    for name, recording in (("a", recording_of(job)), ("b", filtered(recording_of(job)))):
        si.create_sorting_analyzer(
            sorting, recording, format="binary_folder", folder=tmp_path / name, sparse=False
        )
        found = read(tmp_path / name)
        assert found.open_own is not None
        with found.open_own(Choice()) as opened:
            assert opened.info.channel_ids == stream().channel_ids and opened.info.geometry_known
            assert np.array_equal(opened.info.positions, stream().positions)
    # as Kilosort leaves it for Phy where there is no plain file of samples
    (tmp_path / "job/sorter").mkdir(parents=True)
    source = phy(tmp_path / "job/sorter/sorter_output", sample, unit, Path("no_path.bin"))
    with pytest.raises(ConfigError, match=r"sorted from no_path.bin, which is not there"):
        read(source).open_own(Choice())
    (tmp_path / "a").rename(tmp_path / "job/analyzer")
    (tmp_path / "job/stages.json").touch()
    with read(source).open_own(Choice()) as opened:
        assert opened.info.channel_ids == stream().channel_ids


def test_units_of_an_nwb_file(tmp_path: Path, yesterday: tuple[Path, np.ndarray, np.ndarray]) -> None:
    import shutil

    folder, sample, unit = yesterday
    path = tmp_path / "with units.nwb"
    shutil.copy2(folder / "mea.nwb", path)
    with h5py.File(path, "r+") as f:
        if "units" in f:
            del f["units"]
        series = f["acquisition/ElectricalSeries"]
        start = float(series["starting_time"][()]) if "starting_time" in series else 0.0
        rate = float(series["starting_time"].attrs["rate"]) if "starting_time" in series else FS
        order = np.argsort(unit, kind="stable")
        ids, counts = np.unique(unit, return_counts=True)
        f["units/spike_times"] = start + sample[order] / rate
        f["units/spike_times_index"] = np.cumsum(counts)
        f["units/id"] = ids
    found = read(path)
    np.testing.assert_array_equal(np.sort(found.samples), sample)
    assert sorted(found.ids.tolist()) == sorted(IDS.tolist())
    assert FIRST > 0
    assert main(["templates", str(path), "--out", str(tmp_path / "n.templates.h5")]) == 0
    for true, v in today(tmp_path / "n.templates.h5"):
        assert v["unit"] == int(true) and v["accuracy"] > 0.9, (true, v)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        ("nothing", "there is nothing at"),
        ("empty", "holds no units that are known"),
        ("no dat", "does not say which recording its units are from; give it with --recording"),
        ("lengths", "spike times but"),
        ("beyond", "give the recording that they were found in"),
        ("unit", "there is no unit 9"),
        ("label", "no unit is labelled excellent; labels are: good, mua, noise"),
        ("few", "no unit is labelled|spikes in the last"),
        ("endless", "is not a number of seconds above 0"),
        ("no filter", "must be above 0 and below half the rate, 10000 Hz"),
        ("too high", "must be above 0 and below half the rate, 10000 Hz"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, yesterday: tuple[Path, np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str],
    spoil: str, line: str,
) -> None:  # fmt: skip
    import re

    folder, sample, unit = yesterday
    more: list[str] = []
    source = tmp_path / "phy"
    if spoil == "empty":
        source.mkdir()
    elif spoil != "nothing":
        far = sample + 10_000_000 if spoil == "beyond" else sample
        phy(
            source,
            far,
            unit[:-3] if spoil == "lengths" else unit,
            None if spoil == "no dat" else folder / "mea.nwb",
        )
    more += {
        "unit": ["--units", "9"],
        "label": ["--label", "excellent"],
        "few": ["--last-s", "0.05"],
        "endless": ["--last-s", "nan"],
        "no filter": ["--highpass-hz", "nan"],
        "too high": ["--highpass-hz", "10000"],
    }.get(spoil, [])
    out = tmp_path / "o.templates.h5"
    assert main(["templates", str(source), "--out", str(out), *more]) != 0
    error = capsys.readouterr().err.strip()
    assert re.search(line, error) and "\n" not in error.split("error:")[-1].strip(), error
    assert not out.exists()
