"""Labels, live against offline, failures, presets, manifest, progress, report: the parts without a sorter."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spiked.errors import ConfigError, OfflineError
from spiked.offline import compare, failures, labels, merges, presets, sort
from spiked.offline.manifest import Manifest, digest, write_json
from spiked.offline.progress import PHASES, STAGES, Progress, Step, bar, phases, sort_fraction
from spiked.offline.truth import Trains
from spiked.templates import find

FS = 20_000.0
N = 60 * 20_000
SHAPE = {
    "peak_uv": -80.0,
    "snr": 12.0,
    "channel": 3,
    "x_um": 0,
    "y_um": 0,
    "footprint": 0.1,
    "edge": 0.0,
    "width_ms": 0.5,
}


def train(rng: np.random.Generator, rate_hz: float, refractory_ms: float = 3.0, stop: int = N) -> np.ndarray:
    gaps = refractory_ms * FS / 1000 + rng.exponential(FS / rate_hz, int(3 * rate_hz * stop / FS) + 10)
    t = np.cumsum(gaps).astype(np.int64)
    return t[t < stop]


def label(
    trains: list[np.ndarray], shapes: dict[int, dict] | None = None, **more: dict
) -> dict[int, labels.UnitLabel]:
    samples = np.concatenate(trains)
    units = np.repeat(np.arange(len(trains)), [len(t) for t in trains])
    order = np.argsort(samples, kind="stable")
    shapes = {k: SHAPE | (shapes or {}).get(k, {}) for k in range(len(trains))}
    rows = labels.label_units(
        samples[order], units[order], shapes, more.get("ks", {}), more.get("contamination", {}), N, FS, 32
    )
    return {r.unit: r for r in rows}


def test_a_clean_neuron_is_good_and_two_neurons_in_one_are_mua() -> None:
    rng = np.random.default_rng(0)
    mixed = np.sort(np.concatenate([train(rng, 25), train(rng, 25)]))
    got = label([train(rng, 15), mixed])
    assert got[0].label == "good" and got[0].violations == 0
    assert got[1].label == "mua" and got[1].contamination > 0.2
    assert "violations" in got[1].reason


def test_too_few_spikes_to_tell_is_its_own_answer_and_is_kept() -> None:
    rng = np.random.default_rng(1)
    got = label([train(rng, 2)], ks={0: "mua"}, contamination={0: 0.9})
    assert got[0].label == "undetermined" and "too few" in got[0].reason
    assert got[0].label in labels.KEPT


def test_kilosorts_verdict_counts_against_good_and_with_violations() -> None:
    rng = np.random.default_rng(2)
    clean = train(rng, 15)
    assert label([clean], ks={0: "mua"}, contamination={0: 0.9})[0].label == "undetermined"
    assert label([clean], ks={0: "mua"}, contamination={0: 0.3})[0].label == "good"
    doubtful = np.sort(np.concatenate([train(rng, 3), train(rng, 3)]))
    doubtful = np.sort(np.concatenate([doubtful, doubtful[:3] + 20]))
    assert label([doubtful], ks={0: "mua"}, contamination={0: 0.9})[0].label == "mua"


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"snr": 2.0}, "times the noise"),
        ({"edge": 1.0}, "edge of the window"),
        ({"footprint": 0.9}, "of the channels"),
        ({"width_ms": 1.95}, "ms wide"),
    ],
)
def test_bad_waveforms_are_noise_with_the_reason(shape: dict[str, float], reason: str) -> None:
    got = label([train(np.random.default_rng(3), 15)], {0: shape})[0]
    assert got.label == "noise" and reason in got.reason


def test_few_spikes_are_noise_and_every_unit_gets_a_row() -> None:
    rng = np.random.default_rng(4)
    got = label([train(rng, 15), train(rng, 15)[:10], train(rng, 3)])
    assert set(got) == {0, 1, 2}
    assert got[1].label == "noise" and "10 spikes" in got[1].reason
    assert all(r.reason for r in got.values())


def test_a_second_detection_of_the_same_spikes_is_a_duplicate() -> None:
    rng = np.random.default_rng(5)
    a = train(rng, 12)
    echo = np.delete(a, np.arange(0, len(a), 9)) + 14  # 0.7 ms later, a ninth missing
    third = train(rng, 12)
    got = label([echo, a, third])
    assert got[0].label == "noise" and "unit 1" in got[0].reason
    small = {"peak_uv": -20.0}
    assert label([echo, a, third], {1: small})[0].label == "good"  # a small unit does not cast a large echo
    assert label([echo, a, third], {0: small})[0].label == "noise"
    assert got[1].label == "good" and got[2].label == "good"


def test_of_two_units_of_one_neuron_the_cleaner_stays_though_the_other_has_more_spikes() -> None:
    """A neighbour's spikes make the second unit the larger one, and its average waveform the smaller."""
    rng = np.random.default_rng(11)
    neuron, neighbour = train(rng, 12), train(rng, 3)
    mixed = np.sort(np.concatenate([np.delete(neuron, np.arange(0, len(neuron), 9)), neighbour]))
    assert len(mixed) > len(neuron)
    got = label([neuron, mixed], {0: {"peak_uv": -90.0}, 1: {"peak_uv": -75.0}})
    assert got[0].label == "good" and (got[1].label, got[1].duplicate_of) == ("noise", 0)
    got = label([neuron[::3], neuron], {0: {"peak_uv": -100.0}, 1: {"peak_uv": -90.0}})
    assert got[0].duplicate_of == 1 and got[1].label == "good"  # a third of them, though they look better


def test_a_unit_is_rubbish_when_more_than_half_of_it_is_anothers() -> None:
    rng = np.random.default_rng(12)
    neuron = train(rng, 12)
    for share, gone in ((0.6, True), (0.3, False)):
        own = np.sort(rng.choice(neuron, round(share * 200), replace=False)) + 5
        rest = np.sort(rng.integers(100, N - 100, 200 - len(own)))
        got = label([neuron, np.sort(np.concatenate([own, rest]))], {1: {"peak_uv": -40.0}})
        assert (got[1].duplicate_of == 0) == gone and got[0].duplicate_of is None


def test_a_small_clean_unit_is_no_duplicate_of_rubbish() -> None:
    rng = np.random.default_rng(10)
    clean = train(rng, 12)
    rubbish = np.sort(np.concatenate([clean + 10, clean + 30, train(rng, 5)]))
    got = label([clean, rubbish])
    assert got[0].label == "good" and got[1].label == "mua"


def test_contamination_estimate_is_near_the_true_share() -> None:
    rng = np.random.default_rng(6)
    rules = labels.LabelRules()
    estimates = []
    for _ in range(20):
        mixed = np.sort(np.concatenate([train(rng, 27), np.sort(rng.integers(0, N, 3 * 60))]))
        estimates.append(labels.contamination(*labels.refractory(mixed, FS, 60.0, rules)))
    assert np.mean(estimates) == pytest.approx(0.1, abs=0.05)


def test_agreement_finds_pairs_lags_missed_and_invented() -> None:
    rng = np.random.default_rng(7)
    a, b, c, d = (train(rng, 8) for _ in range(4))
    offline = Trains.of(np.concatenate([a, b, c]), np.repeat([0, 1, 2], [len(a), len(b), len(c)]))
    half = b[::2] - 30
    live = Trains.of(np.concatenate([a + 9, half, d]), np.repeat([10, 11, 12], [len(a), len(half), len(d)]))
    got = compare.agreement(live, offline, FS)
    pairs = {(p["offline"], p["live"]): p for p in got["pairs"]}
    assert pairs[0, 10]["agreement"] == 1.0 and pairs[0, 10]["lag_ms"] == pytest.approx(0.45)
    assert pairs[1, 11]["agreement"] == pytest.approx(0.5, abs=0.02)
    assert pairs[1, 11]["lag_ms"] == pytest.approx(-1.5)
    assert got["missed"] == [2] and got["invented"] == [12]
    assert np.array(got["matrix"]).shape == (3, 3)


def test_live_is_judged_only_from_its_first_sorted_spike_on() -> None:
    rng = np.random.default_rng(8)
    t = train(rng, 10)
    zeros = np.zeros(len(t), int)
    live_units = np.where(t < N // 2, -1, 4)  # calibrating in the first half
    got = compare.compare((t, zeros), (t, live_units), (t, zeros), (t, zeros), N, FS)
    assert got["span_s"][0] == pytest.approx(30.0, abs=0.5)
    assert got["truth"]["live"]["units"]["0"]["accuracy"] == 1.0
    assert got["live_unsorted"] == int((live_units < 0).sum())
    assert got["agreement"]["pairs"][0]["agreement"] == 1.0


def test_without_live_spikes_there_is_no_agreement_but_a_truth_table() -> None:
    t = train(np.random.default_rng(9), 10)
    none = np.zeros(0, np.int64)
    got = compare.compare((t, 0 * t), (none, none), (t, 0 * t), (t, 0 * t), N, FS)
    assert got["agreement"] is None and got["live_units"] == 0
    assert got["truth"]["live"]["summary"]["accuracy"] == 0.0
    assert got["truth"]["offline"]["summary"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("ValueError: Found array with 0 sample(s) (shape=(0, 61)) ... required by TruncatedSVD.", "biology"),
        ("ValueError: No spikes detected, cannot continue sorting.", "biology"),
        ("torch._C._LinAlgError: linalg.svd: The algorithm failed to converge", "biology"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "resource"),
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", "resource"),
        ("OSError: [Errno 28] No space left on device", "resource"),
        ("AssertionError: Torch not compiled with CUDA enabled", "environment"),
        ("ValueError: Unrecognized settings: ['Th_univ']", "environment"),
        ("something nobody has seen", "environment"),
    ],
)
def test_failures_are_classified_by_their_text(text: str, kind: str, tmp_path: Path) -> None:
    write_json(tmp_path / "spikeinterface_log.json", {"error": True, "error_trace": [text]})
    error = failures.sorting_error("kilosort4", 1, tmp_path, "")
    assert error.kind == kind and error.stage == "sort"
    assert "\n" not in str(error)


def test_a_killed_sorter_ran_out_of_memory_and_a_crashed_one_did_not(tmp_path: Path) -> None:
    assert failures.sorting_error("kilosort4", -9, tmp_path, "").kind == "resource"
    crash = failures.sorting_error("kilosort4", -11, tmp_path, "")
    assert crash.kind == "environment" and "SIGSEGV" in str(crash)


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="sort_er"):
        presets.JobSettings.of({"sort_er": 1})
    with pytest.raises(ConfigError, match="similarity"):
        presets.JobSettings.of({"slay": {"similarity": "magic"}})
    with pytest.raises(ConfigError, match="kilosort4"):
        presets.JobSettings.of({"sorter": "kilosort3"})


def test_the_autoencoder_is_for_long_sessions_with_many_units() -> None:
    assert merges.choose("auto", 1, 3600, 64)[0] == "none"
    assert merges.choose("none", 50, 3600, 64)[0] == "none"
    assert merges.choose("auto", 12, 90, 64)[0] in ("slay_l2", "spikeinterface")
    long = merges.choose("auto", 60, 3600, 64)[0]
    assert long in ("slay_autoencoder", "spikeinterface")
    assert merges.choose("spikeinterface", 12, 90, 64)[0] == "spikeinterface"


def test_manifest_resumes_only_with_the_same_inputs_and_files(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"1")
    began = time.time() - 2
    Manifest(tmp_path).finish("sort", began, ["x.npz"], {"units": 3}, digest("a", 1))
    took = time.time() - began
    again = Manifest(tmp_path)
    assert again.finished("sort", digest("a", 1)) and again.stages["sort"]["result"] == {"units": 3}
    assert 1.5 < again.seconds()["sort"] < took + 0.5
    assert not again.finished("sort", digest("a", 2)) and not again.finished("merge", digest("a", 1))
    (tmp_path / "x.npz").unlink()
    assert not again.finished("sort", digest("a", 1))
    (tmp_path / "stages.json").write_text("{ not json")
    assert Manifest(tmp_path).stages == {}


def test_progress_is_repeated_while_nothing_new_comes() -> None:
    steps: list[Step] = []
    with Progress(steps.append, beat_s=0.1) as p:
        p.say("sort", 0.5, "Kilosort detection, 3 of 6 batches")
        until = time.monotonic() + 60
        while len(steps) < 3 and time.monotonic() < until:
            time.sleep(0.05)
    assert len(steps) >= 3
    assert steps[0].text == "Kilosort detection, 3 of 6 batches"
    assert all(s.text.startswith(steps[0].text) and s.fraction == 0.5 for s in steps)
    assert json.loads(json.dumps(steps[0].as_event()))["event"] == "progress"


def test_overall_progress_never_goes_back() -> None:
    steps: list[Step] = []
    with Progress(steps.append) as p:
        for stage in STAGES:
            for fraction in (0.0, 0.5, 1.0):
                p.say(stage, fraction, f"{stage} {fraction}")
    overall = [s.overall for s in steps]
    assert overall == sorted(overall) and overall[-1] == pytest.approx(1.0)


def test_kilosorts_own_progress_is_read() -> None:
    assert bar(" 56%|█████▌    | 14/25 [00:54<00:40,  3.64s/it]") == (14, 25)
    assert bar("no bar here") is None
    log = "... Computing preprocessing variables\n ... Extracting spikes using templates\n"
    assert [PHASES[k][1] for k in phases(log)] == ["whitening", "detection"] and phases("") == []
    fractions = [sort_fraction(at, w) for at in range(len(PHASES)) for w in (0.0, 1.0)]
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1.0)


def test_a_look_that_comes_late_tells_what_was_passed(tmp_path: Path) -> None:
    def begun(shank: int, last: int) -> None:
        log = tmp_path / f"sorter_output/shank_{shank}/kilosort4.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("N batches: 6\n" + "\n".join(header for header, _, _ in PHASES[: last + 1]))

    job = {"sorter": "kilosort4", "folder": str(tmp_path), "params": {"shank_idx": [0, 1]}}
    with open("/dev/null", "rb") as nothing:
        reader, doing = sort._Stderr(nothing), sort._progress_of(job)
        assert doing(reader) == []
        begun(0, 2)
        assert [text for _, text in doing(reader)] == [f"Kilosort {p}, shank 1 of 2" for p in ("whitening", "drift", "detection")]  # fmt: skip
        reader.bar, reader.bars = (2, 6), 3
        assert [t for _, t in doing(reader)] == ["Kilosort detection, 2 of 6 batches, shank 1 of 2"]
        begun(0, len(PHASES) - 1)
        begun(1, 3)
        said = doing(reader)
        texts = [t for _, t in said]
        assert texts[0] == "Kilosort detection, 6 of 6 batches, shank 1 of 2"
        assert texts[2] == "Kilosort extraction, 6 of 6 batches, shank 1 of 2"
        assert texts[-2:] == ["Kilosort detection, 6 of 6 batches, shank 2 of 2", "Kilosort first clustering, shank 2 of 2"]  # fmt: skip
        assert [f for f, _ in said] == sorted(f for f, _ in said)
        reader, doing = sort._Stderr(nothing), sort._progress_of({**job, "sorter": "templates"})
        for fraction, text in ((0.1, "calibrating, 3 s"), (0.2, "calibrating, 6 s"), (0.5, "sorting, 0 s")):
            reader._hear(fraction, text)
        assert doing(reader) == [(0.2, "calibrating, 6 s"), (0.5, "sorting, 0 s")]
        assert doing(reader) == [(0.5, "sorting, 0 s")]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_sorter_prints_is_read_to_the_end() -> None:
    """A reader that stopped at a line like ours would leave the sorter waiting for its full pipe for ever."""
    said = r"import os; os.write(2, b'progress ... 10 %\nprogress 0.5 half\n\xff\xfe' + b'progress 1.2.3 x' * 20_000 + b'\nthe end\n')"
    with subprocess.Popen([sys.executable, "-c", said], stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        reader = sort._Stderr(child.stderr)
        reader.start()
        assert child.wait(120) == 0
        reader.join(120)
    assert list(reader.told) == [(0.5, "half")] and reader.tail[-1] == "the end"
    assert find.said("progress ... 10 %") is None


def test_offline_errors_say_what_to_do() -> None:
    error = OfflineError("x", "biology", "sort")
    assert (error.kind, error.stage, error.exit_code) == ("biology", "sort", 6)


def test_spikes_found_twice_are_one() -> None:
    fs = 20_000
    samples = np.array([1000, 1009, 1011, 1400, 5000, 5010, 5021, 9000])
    units = np.array([1, 1, 2, 1, 2, 2, 2, 1])
    keep = labels.without_echoes(samples, units, fs)
    # 9 samples apart in one unit is an echo, in two units it is not; 10 samples are half a millisecond
    assert samples[~keep].tolist() == [1009, 5010]
    order = np.random.default_rng(0).permutation(8)
    assert np.array_equal(labels.without_echoes(samples[order], units[order], fs), keep[order])
