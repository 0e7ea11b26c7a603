"""Merges: SLAy's scores are the package's, its traps do not reach the user, suggestions are read by SpikeInterface and Phy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation_rig import SECONDS, analyzer, scene, split
from offline_rig import FS

from spiked import config
from spiked.config import Slay
from spiked.errors import ConfigError
from spiked.offline import merges, phy, slay, suggestions

pytest.importorskip("spikeinterface")
pytest.importorskip("slay")
from spiked.offline import slay_network

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
L2 = Slay(similarity="l2", parameters="manual")
AE = Slay(similarity="autoencoder", parameters="manual")
SAID: list[tuple[float, str]] = []


def say(fraction: float, text: str) -> None:
    SAID.append((fraction, text))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """(analyzer of 5 neurons at 20 kHz, two of them in two pieces; recording, samples, units)."""
    rec, samples, units = scene()
    units = split(split(units, 0, 100), 3, 103)
    return analyzer(rec, samples, units, tmp_path_factory.mktemp("merges") / "analyzer"), rec, samples, units


def propose(a: Any, wish: Slay, folder: Path, animal: str = "m1") -> dict[str, Any]:
    store = slay_network.Store(folder / "networks", animal, "yesterday")
    return merges.propose(a, wish, SECONDS, store, "cpu", say)


def package(a: Any, **options: Any) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """compute_slay_merges itself, in this process."""
    import joblib
    from slay import compute_slay_merges

    with joblib.parallel_config(backend="sequential"):
        groups, _, metrics = compute_slay_merges(a.copy(), merge_parameters=None, **options)
    return groups, metrics


def test_scores_and_groups_are_the_packages(made: tuple[Any, ...], tmp_path: Path) -> None:
    groups, metrics = package(made[0], similarity_type="l2")
    ours = propose(made[0], L2, tmp_path)
    assert ours["method"] == "slay_l2" and ours["groups"] == [[0, 100], [3, 103]]
    assert sorted(map(sorted, groups)) == ours["groups"]
    ids = made[0].unit_ids.tolist()
    for p in ours["pairs"]:
        i, j = ids.index(p["a"]), ids.index(p["b"])
        for key in ("similarity", "ccg_metric", "refractory_penalty", "final_metric"):
            assert p[key] == pytest.approx(metrics[key][i, j], abs=1e-3), (key, p)
    assert {(p["a"], p["b"]) for p in ours["pairs"] if p["merged"]} == {(0, 100), (3, 103)}


def test_pieces_of_a_slow_cell_are_merged_where_the_package_sees_too_little(
    made: tuple[Any, ...], tmp_path: Path
) -> None:
    _, rec, samples, units = made
    keep = ~np.isin(units, (0, 100)) | (np.arange(len(units)) % 2 == 0)
    a = analyzer(rec, samples[keep], units[keep], tmp_path / "a")
    groups, _ = package(a, similarity_type="l2")
    assert [0, 100] not in sorted(map(sorted, groups))
    assert [0, 100] in propose(a, Slay(), tmp_path)["groups"]
    apart = a.select_units([u for u in a.unit_ids if u not in (100, 103)])
    assert propose(apart, Slay(), tmp_path)["groups"] == []


def test_units_keep_their_own_waveforms_in_a_part_of_an_analyzer(made: tuple[Any, ...]) -> None:
    """Second detections stand after the kept units in a job's list; SpikeInterface then gave each unit another one's templates."""
    from spiked.offline import analyze

    whole = made[0]
    part = analyze.only(whole, [103, 3, 1, 0])
    assert part.unit_ids.tolist() == [0, 1, 3, 103]
    rows = [whole.unit_ids.tolist().index(u) for u in part.unit_ids.tolist()]
    for name in ("average", "std"):
        mine, theirs = (x.get_extension("templates").get_templates(operator=name) for x in (part, whole))
        assert np.array_equal(mine, theirs[rows])
    assert np.array_equal(slay.l2(part), slay.l2(whole)[np.ix_(rows, rows)])
    assert np.array_equal(slay.correlograms(part, L2), slay.correlograms(whole, L2)[np.ix_(rows, rows)])
    for u in part.unit_ids:
        one, same = (x.get_extension("waveforms").get_waveforms_one_unit(u) for x in (part, whole))
        assert np.array_equal(one, same)


def test_spikes_within_the_refractory_period_are_counted_and_second_detections_are_not(
    made: tuple[Any, ...],
) -> None:
    import spikeinterface.core as si

    _, rec, samples, units = made
    a, b = samples[units == 1], samples[units == 2]
    both = np.concatenate([b, a[:60] + 4])  # 0.2 ms: the same spikes once more
    s, u = np.concatenate([a, both]), np.repeat([1, 2], [len(a), len(both)])
    order = np.argsort(s, kind="stable")
    sorting = si.NumpySorting.from_samples_and_labels([s[order]], [u[order]], FS)
    pair = si.create_sorting_analyzer(sorting, rec, sparse=False, n_jobs=1, progress_bar=False)
    seen, expected = slay.refractory_pairs(pair, 0, 1)
    ms = np.abs(a[:, None] - both[None]) / FS * 1000
    assert seen == int(((ms > 0.5) & (ms <= 1.5)).sum())
    assert expected == pytest.approx(((ms > 5) & (ms <= 50)).sum() / 45)
    assert expected == pytest.approx(len(a) * len(both) * 0.002 / SECONDS, rel=0.3)


@pytest.mark.parametrize(
    ("pair", "alike", "merged"),
    [
        ((0, 100), 0.9, True),  # pieces of one cell, too few spikes to tell: their waveforms count
        ((0, 100), 0.6, False),  # the same spikes, but they do not look the same: nobody can know
        ((1, 2), 0.6, False),  # two cells, that the package's penalty does not keep apart
        ((1, 2), 0.95, False),  # they look the same, and fire within each other's refractory period
    ],
)
def test_few_spikes_say_what_they_can(
    made: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    pair: tuple[int, int],
    alike: float,
    merged: bool,
) -> None:
    a = made[0]
    i, j = (a.unit_ids.tolist().index(u) for u in pair)
    n = len(a.unit_ids)
    monkeypatch.setattr(slay, "peak_distances", lambda _a: np.zeros((n, n)))
    similarity = np.zeros((n, n))
    similarity[i, j] = similarity[j, i] = alike
    package_says = slay.Scores(similarity, np.full((n, n), 0.2), np.zeros((n, n)))  # nothing against it
    score = slay.weighed(a, package_says, Slay()).final(0.25, 1.0)
    assert (score[i, j] > 0.5) == merged and score[i, j] == score[j, i]


def test_many_spikes_are_enough_where_waveforms_differ(
    made: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kilosort's own pieces peak on different electrodes; that they never fire together is then what tells."""
    rec = made[1]
    rng = np.random.default_rng(0)
    cell = np.cumsum(rng.integers(60, 600, 1200))
    s, u = cell[cell < 399_000], np.arange(len(cell))[cell < 399_000] % 2
    a = analyzer(rec, s, u, tmp_path / "a")
    monkeypatch.setattr(slay, "peak_distances", lambda _a: np.full((2, 2), 30.0))
    similarity = np.array([[0, 0.55], [0.55, 0]])
    found = slay.weighed(a, slay.Scores(similarity, np.zeros((2, 2)), np.zeros((2, 2))), Slay())
    assert found.final(0.25, 1.0)[0, 1] > 0.5


def test_groups_are_those_of_the_package_on_any_scores() -> None:
    from slay.algorithm import find_merges

    class Places:  # what find_merges asks of an analyzer: units side by side
        unit_ids = np.arange(9)

        def get_extension(self, _name: str) -> Places:
            return self

        def get_templates(self) -> np.ndarray:
            return np.eye(9)[:, None] * np.array([1.0, -1.0])[:, None]

        def get_channel_locations(self) -> np.ndarray:
            return np.column_stack([np.arange(9) * 20.0, np.zeros(9)])

    x = np.arange(9) * 20.0
    near = np.abs(x[:, None] - x) < 100
    rng = np.random.default_rng(0)
    for _ in range(200):
        score = rng.normal(0.3, 0.3, (9, 9))
        score = np.minimum(score, score.T)
        np.fill_diagonal(score, 0)
        theirs = find_merges(Places(), score, 0.5)
        assert slay.grouped(score, near, 0.5) == sorted(map(sorted, theirs))


def test_pairs_of_equal_score_are_all_merged() -> None:
    """The package looks at every second entry of the sorted matrix, and loses pairs where scores are equal."""
    score = np.zeros((6, 6))
    for a, b in ((0, 1), (2, 3), (4, 5)):
        score[a, b] = score[b, a] = 0.75
    assert slay.grouped(score, np.ones((6, 6), bool), 0.5) == [[0, 1], [2, 3], [4, 5]]


def test_no_process_is_started_and_nothing_is_drawn(
    made: tuple[Any, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from joblib.externals.loky import reusable_executor

    propose(made[0], L2, tmp_path)
    assert reusable_executor._executor is None  # the package asks joblib for a process per core
    out, err = capfd.readouterr()
    assert out == "" and "it/s" not in err and "%|" not in err


def test_the_autoencoder_works_at_20_khz_is_kept_and_is_used_again(
    made: tuple[Any, ...], tmp_path: Path
) -> None:
    SAID.clear()
    first = propose(made[0], AE, tmp_path)
    assert first["method"] == "slay_autoencoder" and first["groups"] == [[0, 100], [3, 103]]
    rounds = [f for f, text in SAID if "round" in text]
    assert len(rounds) == slay_network.EPOCHS and rounds == sorted(rounds)
    again = propose(made[0], AE, tmp_path)
    assert "network of yesterday" in again["why"]
    assert again["pairs"] == first["pairs"]  # trained or loaded, the scores are the same


def test_a_network_that_does_not_fit_is_trained_anew(
    made: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slay_network, "EPOCHS", 2)
    first = propose(made[0], AE, tmp_path)
    card, file = (next((tmp_path / "networks").glob(kind)) for kind in ("*.json", "*.pt"))
    propose(made[0], AE, tmp_path, animal="m2")
    assert len(list((tmp_path / "networks").glob("*.pt"))) == 2  # another animal, another network
    file.write_bytes(b"broken")
    broken = propose(made[0], AE, tmp_path)
    assert "cannot be read" in broken["why"] and broken["pairs"] == first["pairs"]
    told = json.loads(card.read_text())
    card.write_text(json.dumps({**told, "explained": told["explained"] + 2 * slay_network.WORSE}))
    assert "explains" in propose(made[0], AE, tmp_path)["why"]


def test_our_autoencoder_similarity_is_the_packages(made: tuple[Any, ...], tmp_path: Path) -> None:
    import torch
    from slay import autoencoder

    a = made[0]
    x, rows = slay_network.snippets(a, 8)
    torch.manual_seed(3)
    network = autoencoder.AE(num_chan=8, num_samp=x.shape[1] // 8)
    data = autoencoder.SpikeDataset(torch.from_numpy(x), rows.astype("int32"))
    theirs = autoencoder.compute_autoencoder_similarity(a, network, {"num_chan": 8}, data)
    ours = slay_network.similarity(a, network, 8)
    assert np.allclose(ours, np.minimum(theirs, theirs.T), atol=1e-4)


def test_a_sparse_analyzer_gives_symmetric_scores(made: tuple[Any, ...], tmp_path: Path) -> None:
    """Where a template is zero on the other's peak electrode the package changes one half of its matrix only."""
    import spikeinterface.core as si

    sparse = si.create_sorting_analyzer(
        made[0].sorting,
        made[0].recording,
        sparse=True,
        method="radius",
        radius_um=25,
        n_jobs=1,
        progress_bar=False,
    )
    sparse.compute(
        {"random_spikes": {}, "waveforms": {"ms_before": 1.0, "ms_after": 2.0}, "templates": {}},
        n_jobs=1,
        progress_bar=False,
    )
    network, _ = slay_network.network_for(sparse, AE, slay_network.Store(tmp_path), "cpu", say)
    alike = slay_network.similarity(sparse, network, 8)
    assert np.array_equal(alike, alike.T)
    found = slay.scores(
        sparse, np.triu(alike) + 0.5 * np.tril(alike), AE
    )  # as the package would have left it
    score = found.final(0.25, 1.0)
    assert np.array_equal(score, score.T) and np.allclose(found.similarity, 0.5 * alike)


@pytest.mark.parametrize("units", [(), (0,), (0, 100)])
@pytest.mark.parametrize("wish", [L2, AE, Slay(similarity="l2"), Slay(similarity="autoencoder"), Slay()])
def test_few_units_are_no_failure(
    made: tuple[Any, ...], tmp_path: Path, units: tuple[int, ...], wish: Slay
) -> None:
    if not units:
        assert merges.choose(wish.similarity, 0, SECONDS, 16)[0] == "none"
        return
    found = propose(made[0].select_units(list(units)), wish.model_copy(update={"retrain": False}), tmp_path)
    assert found["groups"] == ([[0, 100]] if len(units) == 2 else [])
    assert found["method"].startswith("slay" if len(units) == 2 else "none"), found["why"]


def test_a_unit_of_one_spike_and_fewer_electrodes_than_the_network_sees(
    made: tuple[Any, ...], tmp_path: Path
) -> None:
    _, rec, samples, units = made
    few = rec.select_channels(rec.channel_ids[:6])
    order = np.argsort(np.append(samples, 123_456), kind="stable")
    s, u = np.append(samples, 123_456)[order], np.append(units, 50)[order]
    a = analyzer(few, s, u, tmp_path / "a")
    found = propose(a, AE, tmp_path)
    assert found["method"] == "slay_autoencoder", found["why"]
    assert not any(50 in g for g in found["groups"])


def test_text_ids(made: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spikeinterface.core as si

    monkeypatch.setattr(slay_network, "EPOCHS", 5)
    a, rec, samples, units = made
    names = {u: f"n{u}" for u in np.unique(units).tolist()}
    sorting = si.NumpySorting.from_unit_dict([{names[u]: samples[units == u] for u in names}], FS)
    b = si.create_sorting_analyzer(sorting, rec, sparse=False, n_jobs=1, progress_bar=False)
    b.compute(["random_spikes", "waveforms", "templates", "noise_levels"], n_jobs=1, progress_bar=False)
    for wish in (L2, AE, Slay(similarity="spikeinterface"), Slay(similarity="l2")):
        assert propose(b, wish, tmp_path)["groups"] == [["n0", "n100"], ["n103", "n3"]], wish
    assert a.unit_ids.dtype.kind == "i"


def test_where_slay_cannot_run_spikeinterfaces_preset_does(
    made: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "slay.metrics", None)  # what an import of it then finds
    failed = propose(made[0], L2, tmp_path)
    assert failed["method"] == "spikeinterface" and "SLAy failed" in failed["why"]
    assert failed["groups"] == [[0, 100], [3, 103]]
    assert all(p["merged"] and p["final_metric"] > 0.5 for p in failed["pairs"][:2])
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "Python 3.11 only" in propose(made[0], L2, tmp_path)["why"]


def test_too_few_splits_on_purpose_choose_no_parameters(made: tuple[Any, ...], tmp_path: Path) -> None:
    found = propose(made[0], Slay(similarity="l2", k1=0.3, threshold=0.45), tmp_path)
    assert (found["parameters"]["k1"], found["parameters"]["merge_threshold"]) == (0.3, 0.45)
    assert "fixed parameters" in found["why"] and "of 10 units that are needed" in found["why"]


def test_a_second_detection_is_a_witness_and_no_part(made: tuple[Any, ...], tmp_path: Path) -> None:
    """Unit 100 repeats nobody here, but is told to: it keeps its group and leaves it at the end."""
    store = slay_network.Store(tmp_path)
    found = merges.propose(made[0], L2, SECONDS, store, "cpu", say, [100])
    assert found["groups"] == [[3, 103]] and not any(100 in (p["a"], p["b"]) for p in found["pairs"])
    alone = merges.propose(made[0].select_units([0, 100]), L2, SECONDS, store, "cpu", say, [100])
    assert alone["method"] == "none" and "1 unit left" in alone["why"]


def test_duplicates_go_with_the_merge(made: tuple[Any, ...], tmp_path: Path) -> None:
    _, rec, samples, units = made
    twice = samples[units == 100][:40] + 3  # 0.15 ms later, in the other piece
    s, u = np.append(samples, twice), np.append(units, np.zeros(40, units.dtype))
    order = np.argsort(s, kind="stable")
    a = analyzer(rec, s[order], u[order], tmp_path / "a")
    whole, mapping, lost = merges.merged_analyzer(a, [[0, 100]], tmp_path / "merged", 0.3, 777)
    assert mapping == {777: [0, 100]} and lost == {777: 40}
    before = int(np.isin(units, (0, 100)).sum())
    assert len(whole.sorting.get_unit_spike_train(777)) == before


def test_suggestions_are_read_by_spikeinterface_and_phy(made: tuple[Any, ...], tmp_path: Path) -> None:
    from spikeinterface.curation import apply_curation
    from spikeinterface.extractors import read_phy

    a, _, samples, units = made
    found = propose(a, L2, tmp_path)
    output = tmp_path / "sorter" / "sorter_output"
    output.mkdir(parents=True)
    np.save(output / "spike_times.npy", samples)
    np.save(output / "spike_clusters.npy", units)
    (output / "params.py").write_text(
        f"dat_path = 'x.dat'\nsample_rate = {FS}\nn_channels_dat = 16\ndtype = 'int16'\n"
    )
    rows = [{"unit": int(u), "label": "mua" if u == 1 else "good"} for u in a.unit_ids]
    suggestions.write(a.unit_ids, rows, found, tmp_path)
    data = json.loads((tmp_path / suggestions.FILE).read_text())
    merged = apply_curation(a, data)
    assert len(merged.unit_ids) == len(a.unit_ids) - 2
    assert (
        dict(zip(merged.unit_ids.tolist(), merged.get_sorting_property("quality"), strict=True))[1] == "mua"
    )
    told = phy.column(output / phy.MERGES)
    assert told[0] == told[100] and told[0].startswith("1: 0 + 100") and told[1] == ""
    told_by_phy = read_phy(output)
    values = dict(zip(told_by_phy.unit_ids.tolist(), told_by_phy.get_property("slay"), strict=True))
    assert values[3] == values[103] and "3 + 103" in values[3]


@pytest.mark.parametrize(
    ("key", "value"),
    [("bin_ms", 2.0), ("similarity", "cosine"), ("threshold", "high"), ("split_share", 0), ("treshold", 0.4)],
)
def test_wrong_options_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"offline\.slay.*{key}"):
        config.parse(
            {"stream": [{"name": "a", "source": "replay", "path": "x"}], "offline": {"slay": {key: value}}}
        )


def test_groups_have_no_unit_twice(made: tuple[Any, ...]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        score = rng.random((12, 12))
        score = np.minimum(score, score.T)
        found = slay.grouped(score, np.ones((12, 12), bool), 0.4)
        members = list(itertools.chain.from_iterable(found))
        assert len(members) == len(set(members)) and all(len(g) > 1 for g in found)
        assert all(score[a, b] >= 0.4 for g in found for a, b in itertools.combinations(g, 2))
