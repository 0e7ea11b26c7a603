"""The lab's criteria in place of Kilosort's good and mua: which units, why, and in the Phy files by cluster id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_rig import FS
from report_rig import NOISE, SPLIT, Known, recorded
from test_offline_parts import SHAPE

from spiked import config
from spiked.criteria import bounds
from spiked.errors import ConfigError
from spiked.offline import lab_labels, labels, phy, presets
from spiked.offline.command import _params
from spiked.offline.progress import Progress
from spiked.offline.session import open_session
from spiked.offline.task import Task

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


def unit(number: int, label: str = "good", ks: str = "good") -> labels.UnitLabel:
    return labels.UnitLabel(number, label, "ours", 300, 5.0, 1.0, 0, 0.0, None, ks, SHAPE)


VALUES: lab_labels.Values = {
    "firing_rate": {0: 5.0, 1: 0.01, 2: 5.0, 3: 5.0, 7: 5.0},
    "amplitude_cutoff": {0: 0.01, 1: 0.01, 2: None, 3: 0.4, 7: 0.01},
}
CRITERIA = bounds({"firing_rate": ">= 0.05", "amplitude_cutoff": "<= 10 %"})


@pytest.mark.parametrize(
    ("combine", "kilosort", "expected"),
    [
        ("replace", "good", {0: "good", 1: "mua", 2: "undetermined", 3: "mua"}),
        ("replace", "mua", {0: "good", 1: "mua", 2: "undetermined", 3: "mua"}),
        ("and", "good", {0: "good", 1: "mua", 2: "undetermined", 3: "mua"}),
        ("and", "mua", {0: "mua", 1: "mua", 2: "mua", 3: "mua"}),
        ("or", "good", {0: "good", 1: "good", 2: "good", 3: "good"}),
        ("or", "mua", {0: "good", 1: "mua", 2: "undetermined", 3: "mua"}),
        (
            "and",
            "",
            {0: "good", 1: "mua", 2: "undetermined", 3: "mua"},
        ),  # a merged unit: Kilosort has no word for it
    ],
)
def test_all_criteria_count_and_kilosorts_word_as_wished(
    combine: str, kilosort: str, expected: dict[int, str]
) -> None:
    """The notebook that labs copy loses its third criterion in numpy's `out` argument."""
    got = lab_labels.relabel([unit(k, ks=kilosort) for k in range(4)], VALUES, CRITERIA, combine)
    assert {u.unit: u.label for u in got} == expected
    assert all(u.reason and u.reason != "ours" for u in got)


def test_reasons_name_the_figure_that_decided() -> None:
    got = lab_labels.relabel([unit(k) for k in (0, 1, 2, 3)], VALUES, CRITERIA, "replace")
    assert "firing_rate 0.01, not >= 0.05" in got[1].reason and "cutoff" not in got[1].reason
    assert got[2].reason == "amplitude_cutoff needs more spikes"
    assert "amplitude_cutoff 0.4, not <= 10 %" in got[3].reason
    assert "firing_rate 5" in got[0].reason and got[0].as_dict()["criteria"]["firing_rate"] == 5.0


def test_noise_stays_noise_and_a_bound_of_the_labs_is_the_only_one_on_its_figure() -> None:
    noise = lab_labels.relabel([unit(0, "noise")], VALUES, CRITERIA, "replace")[0]
    assert (noise.label, noise.reason) == ("noise", "ours")
    relaxed = lab_labels.relaxed(bounds({"num_spikes": ">= 5", "snr": ">= 2"}))
    ours = labels.LabelRules()
    assert relaxed.min_spikes == 1 and relaxed.min_snr == 0 and relaxed.max_width_ms == ours.max_width_ms
    assert lab_labels.relaxed(CRITERIA) == ours


def phy_folder(folder: Path, ids: list[int]) -> Path:
    """What Kilosort leaves: cluster 4 of 8 has a template and no spikes, 6 neither."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    n = 40 * len(ids)
    np.save(folder / "spike_times.npy", np.sort(rng.integers(0, 100_000, n)))
    np.save(folder / "spike_clusters.npy", rng.permutation(np.repeat(ids, 40)))
    np.save(folder / "templates.npy", np.zeros((max(ids) + 1, 40, 4), np.float32))
    (folder / "params.py").write_text(
        f"dat_path = 'x.bin'\nn_channels_dat = 4\ndtype = 'int16'\nsample_rate = {FS}\n"
    )
    for name in phy.LABELS:
        rows = [f"{k}\t{'good' if k % 2 else 'mua'}" for k in range(max(ids) + 1)]
        (folder / name).write_text("\n".join(["cluster_id\tKSLabel", *rows]) + "\n")
    return folder


def test_labels_go_to_their_clusters_and_the_originals_stay(tmp_path: Path) -> None:
    from spikeinterface.extractors import read_kilosort, read_phy

    folder = phy_folder(tmp_path / "phy", [0, 1, 2, 3, 5, 7])  # with gaps: position is not id
    before = {name: (folder / name).read_bytes() for name in phy.LABELS}
    told = {0: "good", 1: "mua", 2: "undetermined", 3: "noise", 5: "good", 7: "mua"}
    assert phy.save_labels(folder, told) == list(phy.LABELS)
    assert phy.save_labels(folder, told | {0: "mua"}) == list(phy.LABELS)  # again, with other criteria
    saved = phy.column(folder / "cluster_KSLabel.tsv")
    assert list(saved) == list(range(8))  # SpikeInterface stops where a template has no row
    assert [saved[k] for k in (0, 1, 2, 3, 5, 7)] == ["mua", "mua", "mua", "noise", "good", "mua"]
    assert phy.column(folder / "cluster_group.tsv")[2] == "unsorted"
    for read in (read_phy, read_kilosort):
        sorting = read(folder)
        values = dict(zip(sorting.unit_ids.tolist(), sorting.get_property("KSLabel"), strict=True))
        assert values[5] == "good" and values[3] == "noise"
    for name in phy.LABELS:
        assert phy.original(folder / name).read_bytes() == before[name]
    phy.restore_labels(folder)
    assert {name: (folder / name).read_bytes() for name in phy.LABELS} == before


class Sorted(Known):
    """The sorter's folder is there, with Kilosort's own labels."""

    def sort(self) -> tuple[list[str], dict[str, Any]]:
        files, result = super().sort()
        samples, units = self.sorted()
        output = self.folder / "sorter" / "sorter_output"
        if not output.exists():
            phy_folder(output, np.unique(units).tolist())
        np.save(output / "spike_times.npy", samples)
        np.save(output / "spike_clusters.npy", units)
        return files, result

    slay = Known.__mro__[1].slay  # the real one


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    opened = open_session(folder)
    with Progress() as progress:
        wanted = presets.JobSettings(device="cpu", threads=1, library=False, **settings)
        return Sorted(opened, opened.stream(None), wanted, progress).run()


def test_a_job_with_the_labs_criteria_and_suggested_merges(tmp_path: Path) -> None:
    pytest.importorskip("spikeinterface")
    folder = recorded(tmp_path / "s", 20.0)
    lab = {
        "criteria": {"firing_rate": ">= 8", "snr": ">= 4", "kilosort_contamination": "<= 10 %"},
        "combine": "replace",
    }
    d = run(folder, labels=lab, slay={"apply": "suggest"})
    rows = {r["unit"]: r for r in d["labels"]["units"]}
    fast = {u for u, r in rows.items() if r["rate_hz"] >= 8 and r["label"] != "noise"}
    assert fast and {u for u, r in rows.items() if r["label"] == "good"} == fast
    slow = next(r for u, r in rows.items() if u not in fast and r["label"] == "mua")
    assert f"firing_rate {slow['rate_hz']:.3g}, not >= 8" in slow["reason"]
    assert rows[NOISE]["label"] == "noise"
    output = folder / "offline/kilosort4/sorter/sorter_output"
    saved = phy.column(output / "cluster_group.tsv")
    assert {u: saved[u] for u in rows} == {u: r["label"] for u, r in rows.items()}
    assert phy.column(phy.original(output / "cluster_group.tsv"))[1] == "good"
    md, html = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for text in (md, html.replace("&gt;", ">").replace("&lt;", "<").replace("&#x27;", "'")):
        assert (
            "Good by the lab's criteria: firing_rate >= 8, snr >= 4" in text
            and slow["reason"].split(";")[0] in text
        )

    # without criteria our own rules, and Kilosort's own labels; both halves of unit 0 stay, and are to be merged
    d = run(folder, slay={"apply": "suggest", "similarity": "l2"})
    assert (
        phy.column(output / "cluster_group.tsv")[1] == "good"
        and not phy.original(output / "cluster_group.tsv").exists()
    )
    assert d["merge"]["groups"] == [[0, SPLIT]] and d["merge"]["mapping"] == {}
    assert {0, SPLIT} < {u["unit"] for u in d["merge"]["units"]}
    md = (folder / "report.md").read_text()
    assert "1 merge suggested, none made" in md and "## Suggested merges" in md and f"| 0, {SPLIT} |" in md
    assert json.loads(Path(d["files"]["merges"]).read_text())["merges"] == [{"unit_ids": [0, SPLIT]}]
    assert f"0 + {SPLIT}" in phy.column(output / phy.MERGES)[SPLIT]

    d = run(folder, slay={"similarity": "l2"})  # the same, made
    assert list(d["merge"]["mapping"].values()) == [[0, SPLIT]]
    new = next(iter(d["merge"]["mapping"]))
    assert (
        "## Merges" in (folder / "report.md").read_text()
        and f"| {new} | 0, {SPLIT} |" in (folder / "report.md").read_text()
    )


def test_criteria_can_be_set_for_one_job(tmp_path: Path) -> None:
    task = Task((str(tmp_path / "x.nwb"),), str(tmp_path))
    got = _params(
        task,
        ["labels.criteria.snr=>= 4", "labels.combine=and", "slay.similarity=l2", "slay.k1=0.3", "nblocks=0"],
        None,
        None,
    )
    assert got["labels"] == {"criteria": {"snr": ">= 4"}, "combine": "and"}
    assert got["slay"] == {"similarity": "l2", "k1": 0.3} and got["sorter_params"] == {"nblocks": 0}
    with pytest.raises(ConfigError, match="combine"):
        _params(task, ["labels.combine=xor"], None, None)
    with pytest.raises(ConfigError, match="lets everything pass"):
        _params(task, ["labels.criteria.contamination=<= 10"], None, None)


def test_the_configuration_keeps_criteria(tmp_path: Path) -> None:
    text = """[[stream]]
name = "a"
source = "replay"
path = "x"
[offline.labels]
criteria = { contamination = "<= 0.1", firing_rate = ">= 0.05", presence_ratio = ">= 0.9", snr = ">= 4" }
combine = "and"
[offline.slay]
similarity = "autoencoder"
"""
    (tmp_path / "rig.toml").write_text(text)
    c = config.load(tmp_path / "rig.toml")
    (tmp_path / "again.toml").write_text(config.dump(c))
    assert config.load(tmp_path / "again.toml").offline == c.offline
    wanted = presets.JobSettings.of(presets.params_of(c.offline))
    assert wanted.labels["criteria"]["snr"] == ">= 4" and wanted.slay["similarity"] == "autoencoder"
