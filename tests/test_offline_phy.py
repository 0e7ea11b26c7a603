"""The curated Phy folder: what SpikeInterface, phylib and Phy's own writer make of it, and that a person's work in Phy stays."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation_rig import scene, split
from offline_rig import FS, codes, neurons, stream
from report_rig import SPLIT, recorded
from test_offline_labels import Sorted

from spiked import cli
from spiked.errors import OfflineError
from spiked.offline import labels, phy, phy_curated, phy_job, presets, sort
from spiked.offline.progress import Progress
from spiked.offline.session import open_session
from spiked.offline.sorters import phy as sorters_phy

pytest.importorskip("spikeinterface")
pytest.importorskip("phylib")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore::UserWarning",
        "ignore::numba.core.errors.NumbaWarning",
    ),
]
PIECE, ASIDE = 8, 6  # unit 0 is in two pieces; between their ids lies a unit that is set aside


def of_folder(folder: Path) -> dict[str, str]:
    """Every file of a folder, by what is in it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def model_of(folder: Path) -> Any:
    from phylib.io.model import load_model

    return load_model(folder / "params.py")


def save_in_phy(folder: Path, clusters: np.ndarray, groups: dict[int, str]) -> None:
    """What Phy does when a person saves: its own functions write."""
    model = model_of(folder)
    model.save_spike_clusters(clusters)
    model.save_metadata("group", groups)
    model.close()


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, phy_job.Spikes, phy_job.Spikes, phy_job.Spikes, dict[int, Any]]:
    """(sorter's folder, what it found, without second detections, curated, the units' rows): 0 and PIECE are merged into 9."""
    info = stream()
    x, samples, units = neurons(info, 6.0, 4)
    units = split(units, 0, PIECE)
    noise = np.arange(500, 100_000, 2_500)
    echoes = samples[units == 1][:30] + 6
    samples = np.concatenate([samples, noise, echoes])
    units = np.concatenate([units, np.full(len(noise), ASIDE), np.full(30, 1)])
    order = np.argsort(samples, kind="stable")
    samples, units = samples[order], units[order]
    ids = np.array([0, 1, 2, 3, ASIDE, PIECE])
    output = tmp_path / "sorter/sorter_output"
    ks = {"KSLabel": ["good"] * 5 + ["mua"], "ContamPct": [1.0, 2.0, 3.0, 4.0, 90.0, 5.0]}
    sorters_phy.write(output, samples, units, codes(info, x).astype(np.int16), info.positions, FS, columns=ks)
    np.save(output / "spike_clusters.npy", units.astype(np.int32))  # ids with gaps, as after a person's work
    for name, values in {**ks, "group": ["unsorted"] * 6}.items():
        phy.write_column(output / f"cluster_{name}.tsv", name, dict(zip(ids.tolist(), values, strict=True)))
    whole = labels.without_echoes(samples, units, FS)
    cleaned = samples[whole], units[whole]
    keep = cleaned[1] != ASIDE
    curated = cleaned[0][keep], np.where(np.isin(cleaned[1][keep], (0, PIECE)), 9, cleaned[1][keep])
    twice = np.flatnonzero(curated[1] == 9)[5]  # a merge takes one of two close spikes out
    curated = np.delete(curated[0], twice), np.delete(curated[1], twice)
    said = {0: "good", 1: "good", 2: "undetermined", 3: "mua", ASIDE: "noise", PIECE: "good", 9: "good"}
    rows = {u: {"label": v, "reason": f"because {u}", "snr": 8.0, "contamination": 0.015} for u, v in said.items()}  # fmt: skip
    return output, (samples, units), cleaned, curated, rows


def written(made: tuple[Any, ...], place: Path) -> dict[str, Any]:
    output, found, cleaned, curated, rows = made
    told = phy_job.found(
        output,
        found,
        cleaned,
        curated,
        {9: [0, PIECE]},
        rows,
        {0: "1: 0 + 8 (0.91)", PIECE: "1: 0 + 8 (0.91)"},
    )
    return phy_curated.write(output, place, told, {"labels": {"combine": "replace"}})


def test_real_readers_see_the_curated_units(made: tuple[Any, ...], tmp_path: Path) -> None:
    from spikeinterface.extractors import read_phy

    from spiked.offline.curated import read

    output, _, _, curated, _ = made
    before = of_folder(output)
    place = tmp_path / "phy"
    assert written(made, place) == {"folder": str(place), "clusters": 6, "by_hand": ""}
    trains = {u: curated[0][curated[1] == u].tolist() for u in np.unique(curated[1]).tolist()}

    theirs = read_phy(place, exclude_cluster_groups=["noise"])
    assert {int(u): theirs.get_unit_spike_train(u).tolist() for u in theirs.unit_ids} == trains
    quality = dict(zip(theirs.unit_ids.tolist(), theirs.get_property("quality").tolist(), strict=True))
    assert quality == {1: "good", 2: "unsorted", 3: "mua", 9: "good"}
    everything = read_phy(place)
    assert set(everything.unit_ids.tolist()) == {1, 2, 3, 9, ASIDE, 10}  # 10: spikes found twice, in no unit

    model = model_of(place)
    assert model.n_spikes == len(made[1][0]) and model.amplitudes.shape == (model.n_spikes,)
    for unit, train in trains.items():
        assert model.spike_samples[model.spike_clusters == unit].tolist() == train
    metadata = model.metadata
    assert metadata["group"] == {1: "good", 2: "unsorted", 3: "mua", 9: "good", ASIDE: "noise", 10: "noise"}
    assert metadata["merged_from"] == {9: f"0 + {PIECE}"} and metadata["contamination_pct"][1] == 1.5
    assert (metadata["KSLabel"][9], metadata["KSLabel"][1]) == ("mua", "good")  # of its parts one was
    assert metadata["slay"] == {9: "1: 0 + 8 (0.91)"}
    assert metadata["reason"][3] == "because 3" and metadata["ContamPct"][3] == 4.0
    model.close()

    card = json.loads((place / "curation.json").read_text())
    assert card["merges"] == [{"cluster": 9, "of": [0, PIECE]}] and card["left_out"] == 10
    assert (place / card["sorter"]).resolve() == output.resolve()
    mine = read(place)  # and our own reader, for `spiked templates` and `spiked curate`
    assert mine.labels[9] == "good" and mine.labels[ASIDE] == "noise"

    assert of_folder(output) == before
    assert (place / "templates.npy").stat().st_ino == (
        output / "templates.npy"
    ).stat().st_ino  # no second copy


def test_the_same_decisions_give_the_same_files(made: tuple[Any, ...], tmp_path: Path) -> None:
    written(made, tmp_path / "phy")
    first = of_folder(tmp_path / "phy")
    output, found = made[0], made[1]
    (tmp_path / "phy/.phy").mkdir()  # Phy's cache, of other clusters
    save_in_phy(output, np.zeros(len(found[0]), np.int32), {0: "good"})  # somebody looked at the sorter's own
    written(made, tmp_path / "phy")
    assert of_folder(tmp_path / "phy") == first and not (tmp_path / "phy/.phy").exists()


def test_a_persons_work_is_never_overwritten(made: tuple[Any, ...], tmp_path: Path) -> None:
    place = tmp_path / "phy"
    written(made, place)
    model = model_of(place)
    clusters, groups = model.spike_clusters.copy(), dict(model.metadata["group"])
    model.close()
    save_in_phy(place, clusters, groups)  # opened, looked at, saved as it was
    assert not phy_curated.saved_by_hand(place) and written(made, place)["by_hand"] == ""

    for change in ({"groups": {**groups, 3: "good"}}, {"clusters": np.where(clusters == 2, 3, clusters)}):
        save_in_phy(place, change.get("clusters", clusters), change.get("groups", groups))
        assert phy_curated.saved_by_hand(place)
        theirs = of_folder(place)
        told = written(made, place)
        assert told["by_hand"] == str(place) and told["folder"] == str(tmp_path / "phy-2")
        assert of_folder(place) == theirs
        assert written(made, place)["folder"] == str(tmp_path / "phy-2")  # ours is replaced by ours
        assert phy_curated.by_hand(tmp_path) == [str(place)]
        save_in_phy(place, clusters, groups)
    save_in_phy(place, clusters, {**groups, 3: "good"})
    save_in_phy(tmp_path / "phy-2", clusters, {**groups, 2: "mua"})
    assert written(made, place)["folder"] == str(tmp_path / "phy-3")
    (place / "curation.json").write_text("{")  # nobody can tell what was changed
    assert phy_curated.saved_by_hand(place)


def test_traces_are_shown_where_they_are(made: tuple[Any, ...], tmp_path: Path) -> None:
    """A preprocessed copy beside the sorter's results is not copied, and found from the new folder."""
    output = made[0]
    np.zeros((120_000, 16), np.int16).tofile(output / "temp_wh.dat")
    text = (output / "params.py").read_text().replace("no_path.bin", "temp_wh.dat")
    (output / "params.py").write_text(text.replace("hp_filtered = False", "hp_filtered = True"))
    written(made, tmp_path / "phy")
    assert not (tmp_path / "phy/temp_wh.dat").exists()
    there = os.getcwd()
    os.chdir(tmp_path / "phy")
    try:
        model = model_of(tmp_path / "phy")
        assert model.traces.shape == (120_000, 16)
        model.close()
    finally:
        os.chdir(there)


def test_another_sorters_folder_is_refused(made: tuple[Any, ...], tmp_path: Path) -> None:
    output = made[0]
    np.save(output / "spike_times.npy", np.load(output / "spike_times.npy") + 1)
    with pytest.raises(OfflineError, match=r"is not what was sorted any more.*--recompute sort"):
        written(made, tmp_path / "phy")
    assert not list(tmp_path.glob("phy*"))


# ---- in a job ---------------------------------------------------------------------------------------------------------


class ForPhy(Sorted):
    """The sorter's folder is whole, so that Phy's own reader opens it."""

    def sort(self) -> tuple[list[str], dict[str, Any]]:
        files, result = super().sort()
        samples, units = self.sorted()
        output = self._output()
        if not (output / "amplitudes.npy").exists():
            nothing = np.zeros((self.stream.n_samples, 16), np.int16)
            place = self.stream.positions_um
            sorters_phy.write(output, samples, units, nothing, place, self.stream.fs_hz)
            np.save(output / "spike_clusters.npy", units.astype(np.int32))
        return files, result


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    opened = open_session(folder)
    with Progress() as progress:
        wanted = presets.JobSettings(device="cpu", threads=1, library=False, **settings)
        return ForPhy(opened, opened.stream(None), wanted, progress).run()


def test_a_job_leaves_it_resumes_with_it_and_spares_a_person(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "s", 20.0)
    d = run(folder, slay={"similarity": "l2"})
    place = Path(d["files"]["phy_curated"])
    assert place == folder / "offline/kilosort4/phy" and d["phy"]["why"] == "" and d["by_hand"] == []
    ((new, parts),) = d["merge"]["mapping"].items()
    assert parts == [0, SPLIT] and int(new) not in {u["unit"] for u in d["labels"]["units"]}
    model = model_of(place)
    with np.load(d["files"]["units"]) as z:
        samples, units = z["samples"] - int(z["first_sample"]), z["units"]
    for unit in np.unique(units).tolist():
        assert model.spike_samples[model.spike_clusters == unit].tolist() == samples[units == unit].tolist()
    kept = {u["unit"]: u["label"] for u in d["merge"]["units"]}
    group = {u: model.metadata["group"][u] for u in kept}
    assert group == {u: "unsorted" if v == "undetermined" else v for u, v in kept.items()}
    clusters, before = model.spike_clusters.copy(), of_folder(place)
    model.close()
    for text in ((folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert f"phy template-gui {place}/params.py" in text

    seconds = run(folder, slay={"similarity": "l2"})["seconds"]
    assert {k: v for k, v in seconds.items() if k not in ("compare", "report")} == {k: v for k, v in d["seconds"].items() if k not in ("compare", "report")}  # fmt: skip
    for file in place.iterdir():
        file.unlink()
    place.rmdir()
    again = run(folder, slay={"similarity": "l2"})
    assert (
        of_folder(place) == before and again["seconds"]["merge"] == d["seconds"]["merge"]
    )  # only this stage ran
    moved = folder.rename(folder.with_name("moved"))
    d = run(moved, slay={"similarity": "l2"})
    assert d["seconds"]["phy"] == again["seconds"]["phy"] and d["phy"]["folder"].startswith(f"{moved}/")
    for text in ((moved / f"report.{kind}").read_text() for kind in ("md", "html", "json")):
        assert f"{moved}/offline/kilosort4/phy" in text and f"{folder}/" not in text
    moved.rename(folder)

    save_in_phy(place, np.where(clusters == 1, int(new), clusters), {int(new): "good"})
    theirs = of_folder(place)
    d = run(folder, slay={"similarity": "l2", "apply": "suggest"})
    assert of_folder(place) == theirs and d["by_hand"] == [str(place)]
    second = folder / "offline/kilosort4/phy-2"
    assert Path(d["files"]["phy_curated"]) == second
    model = model_of(second)
    assert {0, SPLIT} < set(model.spike_clusters.tolist()) and f"0 + {SPLIT}" in model.metadata["slay"][0]
    model.close()
    assert str(place) in (folder / "report.md").read_text()
    d = run(folder, slay={"similarity": "l2", "apply": "suggest"}, phy=False)
    assert d["files"]["phy_curated"] == "" and d["phy"]["why"] == "switched off"
    assert of_folder(place) == theirs and second.is_dir()

    # what a person saved in the sorter's own folder is not relabelled, and goes before the recording is sorted again
    output = Path(d["files"]["phy"])
    save_in_phy(output, np.load(output / "spike_clusters.npy"), {1: "mua"})
    theirs = of_folder(output)
    d = run(folder, phy=False, labels={"criteria": {"firing_rate": ">= 1"}})
    assert of_folder(output) == theirs and str(output) in d["by_hand"]
    said: list[str] = []
    with pytest.raises(OfflineError):
        sort.run({"folder": str(output.parent), "sorter": "no sorter", "params": {}, "threads": 1, "parent": os.getpid(), "memory_gb": 0}, "cpu", 60.0, lambda _f, text: said.append(text))  # fmt: skip
    kept_there = folder / "offline/kilosort4/sorter.by-hand-1/sorter_output"
    assert of_folder(kept_there) == theirs and "saved by hand in Phy" in said[0]
    assert not (output / "params.py").exists()


# ---- any Phy folder, step by step -----------------------------------------------------------------------------------------


def test_the_steps_of_a_curation_for_phy(tmp_path: Path) -> None:
    from spikeinterface.extractors import read_phy

    rec, samples, units = scene(4, 10.0)
    units = split(units, 0, PIECE)
    few = np.arange(1_000, 190_000, 20_000)
    order = np.argsort(np.concatenate([samples, few]), kind="stable")
    samples = np.concatenate([samples, few])[order]
    units = np.concatenate([units, np.full(len(few), ASIDE)])[order]
    folder = tmp_path / "yesterday"
    sorters_phy.write(folder, samples, units, rec.get_traces(), rec.get_channel_locations(), FS)
    np.save(folder / "spike_clusters.npy", units.astype(np.int32))
    save_in_phy(folder, units.astype(np.int32), {1: "good", 2: "mua"})  # somebody began
    raw = rec.save(folder=tmp_path / "recording", n_jobs=1, progress_bar=False, verbose=False)
    assert raw.get_num_samples() == 200_000
    theirs = of_folder(folder)
    steps = ["--step", "num_spikes >= 30", "--step", "merge_duplicates"]
    args = ["curate", str(folder), "--recording", str(tmp_path / "recording"), *steps]
    assert cli.main(args) == 0
    place = tmp_path / "yesterday.curated/phy"
    got = read_phy(place, exclude_cluster_groups=["noise"])
    with np.load(tmp_path / "yesterday.curated/units.npz") as z:
        for u in got.unit_ids.tolist():
            assert got.get_unit_spike_train(u).tolist() == z["samples"][z["units"] == u].tolist()
        assert set(got.unit_ids.tolist()) == set(np.unique(z["units"]).tolist()) == {1, 2, 3, 9}
    metadata = model_of(place).metadata
    assert {u: metadata["group"][u] for u in (1, 2, 3, 9, ASIDE)} == {1: "good", 2: "mua", 3: "good", 9: "good", ASIDE: "noise"}  # fmt: skip
    assert metadata["merged_from"] == {9: f"0 + {PIECE}"}
    assert metadata["set_aside_by"] == {ASIDE: "not num_spikes >= 30"}
    assert of_folder(folder) == theirs

    replay = ["curate", str(folder), "--replay", str(tmp_path / "yesterday.curated/curation.json")]
    assert cli.main([*replay, "--out", str(tmp_path / "again")]) == 0
    same = of_folder(tmp_path / "again/yesterday/phy")
    first = of_folder(place)
    assert {k: v for k, v in same.items() if k != "curation.json"} == {k: v for k, v in first.items() if k != "curation.json"}  # fmt: skip
    assert cli.main([*args, "--out", str(tmp_path / "without"), "--no-phy"]) == 0
    assert not (tmp_path / "without/yesterday/phy").exists()
