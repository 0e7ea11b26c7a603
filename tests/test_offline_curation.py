"""Curation of any sorting: figures and verdicts for all units, batches, and a history that gives the same units again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation_rig import analyzer, scene, split
from offline_rig import FS, codes, neurons, session, stream

from spiked import cli, criteria
from spiked.errors import ConfigError, OfflineError

pytest.importorskip("spikeinterface")
import spikeinterface.core as si

from spiked.offline.curation import Curation, curate, history, replay, step_of
from spiked.offline.curation.steps import violations, without_close

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
SECONDS, NOISE, PIECE = 20.0, 90, 100
STEPS = (
    "num_spikes >= 30", "firing_rate >= 0.5", "isi_violations <= 2 %", "snr >= 5", "waveform_std <= 0.5", "merge_duplicates",
)  # fmt: skip


@pytest.fixture(scope="module")
def made() -> tuple[Any, np.ndarray, np.ndarray]:
    """(recording, samples, units): four neurons, one in two pieces, and 60 spikes that are noise."""
    rec, samples, units = scene(4, SECONDS)
    units = split(units, 0, PIECE)
    noise = np.random.default_rng(5).integers(1000, round(SECONDS * FS) - 1000, 60)
    samples, units = np.concatenate([samples, noise]), np.concatenate([units, np.full(60, NOISE)])
    order = np.argsort(samples, kind="stable")
    return rec, samples[order], units[order]


@pytest.fixture(scope="module")
def sorting(made: tuple[Any, ...]) -> Any:
    return si.NumpySorting.from_samples_and_labels([made[1]], [made[2]], FS)


@pytest.fixture(scope="module")
def result(made: tuple[Any, ...], sorting: Any) -> Curation:
    return curate(sorting, STEPS, made[0])


def trains(c: Curation) -> dict[Any, list[int]]:
    return {u: c.sorting.get_unit_spike_train(u).tolist() for u in c.sorting.unit_ids}


def test_every_step_gives_a_figure_and_a_verdict_for_all_units(
    result: Curation, made: tuple[Any, ...]
) -> None:
    _, samples, units = made
    everyone = np.unique(units).tolist()
    assert [s.step for s in result.steps] == list(STEPS)
    for step in result.steps[:-1]:
        assert list(step.metric) == list(step.mask) == everyone
    spikes, rate, isi, snr, std, merge = result.steps
    for u in everyone:
        t = np.sort(samples[units == u])
        assert spikes.metric[u] == len(t) and rate.metric[u] == pytest.approx(len(t) / SECONDS)
        assert isi.metric[u] == pytest.approx(float((np.diff(t) < 1.5 * FS / 1000).sum()) / len(t))
    assert snr.removed == [NOISE] and not snr.mask[NOISE] and snr.metric[NOISE] < 2 < 5 < snr.metric[1]
    assert std.metric[1] == pytest.approx(0.06, abs=0.04)  # the cells vary by 5 %, over noise of 5 uV
    assert std.metric[NOISE] > 1  # set aside before, and judged all the same
    assert merge.merged == {101: [0, PIECE]} and merge.metric[0] == merge.metric[PIECE] > 0.9
    assert merge.metric[1] is None  # there is nobody near enough
    assert result.kept == [1, 2, 3, 101] and result.merged == {101: [0, PIECE]}


def test_the_merge_is_the_neuron_again(result: Curation, made: tuple[Any, ...]) -> None:
    _, samples, units = made
    whole = np.sort(samples[np.isin(units, (0, PIECE))])
    assert trains(result)[101] == without_close(whole, 0.4 * FS / 1000).tolist()


def test_a_second_minimum_replaces_nothing(made: tuple[Any, ...], sorting: Any) -> None:
    twice = curate(sorting, ["num_spikes >= 30", "num_spikes >= 150"], made[0])
    assert len(twice.steps) == 2 and twice.steps[0].removed == []
    n = {u: int((made[2] == u).sum()) for u in np.unique(made[2]).tolist()}
    assert twice.steps[1].removed == [u for u in n if n[u] < 150]
    other_way = curate(sorting, ["num_spikes >= 150", "num_spikes >= 30"], made[0])
    assert other_way.kept == twice.kept


@pytest.mark.parametrize(
    "text",
    ["isi_violations <= 1.0", "isi_violations <= 1", "presence_ratio >= 0", "amplitude_cutoff <= 100 %"],
)
def test_a_share_that_nobody_could_miss_is_refused(text: str) -> None:
    """One percent is not 1.0; a filter that filters nothing is no filter."""
    with pytest.raises(ConfigError, match="lets everything pass"):
        step_of(text)
    assert step_of("isi_violations <= 1 %") == step_of("isi_violations <= 1 %")
    assert (
        criteria.parse("isi_violations <= 1 %").limit
        == pytest.approx(0.01)
        == criteria.parse("isi_violations <= 0.01").limit
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snrr >= 5", "'snrr' does not exist"), ("snr 5", "is no bound"), ("snr >= 5 %", "no share"), ("", "no criterion"),
        ("merge_duplicates distance=5", "no parameter 'distance'"), ("merge_duplicates min_similarity=90", "between 0 and 1"),
        ("merge_duplicates max_rise=one", "is no number"), ("merge_duplicates max_violations=1", "shares from 0 to 1"),
    ],
)  # fmt: skip
def test_what_is_no_step_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as e:
        step_of(text)
    assert "\n" not in str(e.value)


def test_our_names_of_metrics_are_spikeinterfaces() -> None:
    from spikeinterface.metrics.quality import ComputeQualityMetrics

    theirs = {column: m.metric_name for m in ComputeQualityMetrics.metric_list for column in m.metric_columns}
    assert theirs == {n: m.computed_by for n, m in criteria.METRICS.items() if n not in criteria.OURS}


def test_metrics_that_need_more_than_spike_times_can_be_had(made: tuple[Any, ...], sorting: Any) -> None:
    """Amplitudes, positions of spikes, principal components are computed when a step asks for them."""
    names = [
        "presence_ratio",
        "rp_contamination",
        "contamination",
        "amplitude_median",
        "drift_ptp",
        "sd_ratio",
        "d_prime",
        "nn_hit_rate",
    ]
    got = curate(
        sorting, [f"{n} >= {'0.0001 %' if criteria.METRICS[n].share else -1e9}" for n in names], made[0]
    )
    assert [s.step.split()[0] for s in got.steps] == names
    known = {s.step.split()[0] for s in got.steps if any(v is not None for v in s.metric.values())}
    assert set(names) - known <= {"drift_ptp"}  # needs more spikes than twenty seconds have
    assert all(s.mask[u] for s in got.steps for u in s.unknown)


def test_a_history_gives_the_same_units_without_the_recording(
    result: Curation, sorting: Any, tmp_path: Path
) -> None:
    result.save(tmp_path / "c")
    again = replay(tmp_path / "c/curation.json", sorting)
    assert trains(again) == trains(result) and again.kept == result.kept
    assert again.steps == result.steps
    with np.load(tmp_path / "c/units.npz") as z:
        assert {u: z["samples"][z["units"] == u].tolist() for u in np.unique(z["units"]).tolist()} == trains(
            result
        )


def test_what_cannot_be_replayed_says_so(result: Curation, made: tuple[Any, ...], tmp_path: Path) -> None:
    result.save(tmp_path)
    other = si.NumpySorting.from_samples_and_labels([made[1][:-1]], [made[2][:-1]], FS)
    with pytest.raises(OfflineError, match=r"is not the sorting of this history.*--steps-of"):
        replay(tmp_path / "curation.json", other)
    data = json.loads((tmp_path / "curation.json").read_text())
    data["steps"][-1]["censor_ms"] = 40.0
    (tmp_path / "curation.json").write_text(json.dumps(data))
    one = si.NumpySorting.from_samples_and_labels([made[1]], [made[2]], FS)
    with pytest.raises(OfflineError, match="other spikes now"):
        replay(tmp_path / "curation.json", one)
    with pytest.raises(ConfigError, match="no history of a curation"):
        history.load(tmp_path / "curation.spikeinterface.json")


def test_spikeinterface_applies_the_same_decisions(result: Curation, sorting: Any, tmp_path: Path) -> None:
    from spikeinterface.curation import apply_curation

    result.save(tmp_path)
    theirs = apply_curation(
        sorting, json.loads((tmp_path / "curation.spikeinterface.json").read_text()), censor_ms=0.4
    )
    assert sorted(theirs.get_unit_spike_train(u).tolist() for u in theirs.unit_ids) == sorted(
        trains(result).values()
    )


def test_two_neurons_that_look_alike_stay_two(tmp_path: Path) -> None:
    """Merging them would put their spikes inside each other's refractory period."""
    info = stream()
    x, samples, units = neurons(info, 20.0, 1, seed=2)
    shift = 37
    x += np.roll(
        x, shift, 0
    )  # a second cell with the very same waveform, 1.9 ms later; half a millisecond below 1.5 ms at times
    both = np.concatenate([samples, samples + 25])
    order = np.argsort(both, kind="stable")
    labels = np.concatenate([units, units + 1])[order]
    t = both[order]
    assert violations(t, FS) > 0.3
    from curation_rig import recording

    s = si.NumpySorting.from_samples_and_labels([t], [labels], FS)
    got = curate(s, ["merge_duplicates min_similarity=0.3"], recording(x, info.positions))
    assert got.kept == [0, 1] and not got.merged


# ---- any sorting, and the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(made: tuple[Any, ...], sorting: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same sorting in every form in which it may come, with its recording."""
    root = tmp_path_factory.mktemp("forms")
    rec, samples, units = made
    raw = rec.save(folder=root / "recording", n_jobs=1, progress_bar=False, verbose=False)
    plain = si.NumpySorting.from_samples_and_labels([samples], [units], FS)
    plain.register_recording(raw)
    plain.save(folder=root / "sorting")
    analyzer(raw, samples, units, root / "analyzer")
    phy = root / "phy"
    phy.mkdir()
    np.save(phy / "spike_times.npy", samples)
    np.save(phy / "spike_clusters.npy", units)
    (phy / "params.py").write_text(
        f"dat_path = '{root / 'recording'}'\nsample_rate = {FS}\nn_channels_dat = 16\ndtype = 'int16'\n"
    )
    return {
        "sorting": root / "sorting",
        "analyzer": root / "analyzer",
        "phy": phy,
        "recording": root / "recording",
    }


@pytest.mark.parametrize("form", ["phy", "analyzer", "sorting"])
def test_any_form_of_the_sorting_gives_the_same_units(
    folders: dict[str, Path], result: Curation, form: str, tmp_path: Path
) -> None:
    given = ["--recording", str(folders["recording"])] if form != "analyzer" else []
    steps = [x for s in STEPS for x in ("--step", s)]
    out = tmp_path / "out"
    before = sorted(p.name for p in folders["analyzer"].rglob("*"))
    assert (
        cli.main(
            [
                "curate",
                str(folders[form]),
                *given,
                *steps,
                "--out",
                str(out),
                "--json",
                str(tmp_path / "j.json"),
            ]
        )
        == 0
    )
    assert sorted(p.name for p in folders["analyzer"].rglob("*")) == before  # a saved analyzer stays as it is
    told = json.loads((tmp_path / "j.json").read_text())
    assert told["kept"] == result.kept
    place = Path(told["folder"])
    again = tmp_path / "again"
    assert (
        cli.main(
            ["curate", str(folders[form]), "--replay", str(place / "curation.json"), "--out", str(again)]
        )
        == 0
    )
    name = next(again.iterdir())
    with np.load(place / "units.npz") as a, np.load(name / "units.npz") as b:
        assert all(np.array_equal(a[k], b[k]) for k in a.files)
    with np.load(place / "units.npz") as a:
        assert {u: a["samples"][a["units"] == u].tolist() for u in np.unique(a["units"]).tolist()} == trains(
            result
        )


def test_a_phy_folder_names_its_plain_array_and_the_electrodes_that_were_sorted(
    made: tuple[Any, ...], folders: dict[str, Path], result: Curation, tmp_path: Path
) -> None:
    x = made[0].get_traces().copy()
    x[:, 5] = (
        np.random.default_rng(0).normal(0, 3000, len(x)).astype(np.int16)
    )  # a broken electrode, left out of the map
    x.tofile(tmp_path / "raw.bin")
    phy = tmp_path / "phy"
    phy.mkdir()
    for name in ("spike_times.npy", "spike_clusters.npy"):
        (phy / name).write_bytes((folders["phy"] / name).read_bytes())
    used = np.delete(np.arange(16), 5)
    np.save(phy / "channel_map.npy", used)
    np.save(phy / "channel_positions.npy", made[0].get_channel_locations()[used])
    text = f"dat_path = '../raw.bin'\nn_channels_dat = 16\ndtype = 'int16'\noffset = 0\nsample_rate = {FS}\n"
    (phy / "params.py").write_text(text)
    got = curate(phy, STEPS)
    assert got.kept == result.kept and "gain" in got.told[0]
    for u in (1, 2, 3):
        assert got.steps[3].metric[u] == pytest.approx(result.steps[3].metric[u], rel=0.5)
    (phy / "channel_map.npy").unlink()
    with pytest.raises(ConfigError, match=r"does not describe .*--recording"):
        curate(phy, STEPS)


def test_units_of_an_nwb_file(tmp_path: Path) -> None:
    import pynwb

    info = stream()
    data, samples, units = neurons(info, 10.0, 3)
    folder = session(tmp_path / "s", info, codes(info, data))
    nwb = folder / "mea.nwb"
    with pynwb.NWBHDF5IO(nwb, "r+") as io:
        f = io.read()
        for u in range(3):
            f.add_unit(
                spike_times=np.sort(samples[units == u]) / FS
                + f.acquisition["ElectricalSeries"].starting_time,
                id=u,
            )
        io.write(f)
    got = curate(nwb, ["num_spikes >= 30", "snr >= 5"])
    assert got.kept == [0, 1, 2] and all(v and v > 5 for v in got.steps[1].metric.values())


def test_text_ids_stay_what_they_are(made: tuple[Any, ...]) -> None:
    rec, samples, units = made
    named = si.NumpySorting.from_unit_dict(
        [{f"n{u}": samples[units == u] for u in np.unique(units).tolist()}], FS
    )
    got = curate(named, STEPS, rec)
    assert {"n1", "n2", "n3"} < set(got.kept) and len(got.kept) == 4
    assert next(iter(got.merged.values())) == ["n0", f"n{PIECE}"]
    assert replay(got.history, named).kept == got.kept


def test_without_a_recording_spike_times_are_judged_and_waveforms_are_asked_for(sorting: Any) -> None:
    assert NOISE in curate(sorting, ["num_spikes >= 30", "isi_violations <= 5 %"]).kept
    with pytest.raises(OfflineError, match="no recording to measure them in; give it with --recording"):
        curate(sorting, ["snr >= 5"])


def test_another_recording_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    short = si.load(folders["recording"]).frame_slice(0, 100_000)
    short.save(folder=tmp_path / "short", n_jobs=1, progress_bar=False, verbose=False)
    with pytest.raises(ConfigError, match=r"spikes .* lie outside .*give the recording that was sorted"):
        curate(folders["phy"], ["snr >= 5"], tmp_path / "short")


def test_a_batch_goes_on_after_one_that_fails(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    args = [
        "curate",
        str(empty),
        str(folders["phy"]),
        "--step",
        "num_spikes >= 100",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(args) == ConfigError.exit_code
    out = capsys.readouterr().out
    assert f"{empty} holds no units that are known" in out and "units stay" in out
    assert cli.main(args) == ConfigError.exit_code
    assert "holds a curation; give --force" in capsys.readouterr().err
    assert cli.main([*args[:1], *args[2:], "--force"]) == 0
