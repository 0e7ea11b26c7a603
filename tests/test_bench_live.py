"""`spiked bench live` and `calibrate`: the arithmetic on known times, and the real thing once, small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_cli import refused, spiked

from spiked.bench import scene
from spiked.bench.figures import agreement
from spiked.bench.latency import RECEIPT, Played, delays, matched, unrolled
from spiked.sources.recordings import GroundTruth, open_recording

FS = 20_000.0


def device(late_ms: float = 0.0) -> Played:
    """100 bursts of 20 samples from device sample 1000, each sent `late_ms` after its last sample existed."""
    last = 20 * np.arange(1, 101)
    return Played(FS, 1000, 5_000_000, np.stack([last, 5_000_000 + last * 50_000 + round(late_ms * 1e6)], 1))


def test_latency_counts_from_the_samples_own_time() -> None:
    trough = np.array([1000, 1019, 1020])
    got = np.zeros(3, RECEIPT)
    got["received"] = 5_000_000 + (trough - 1000) * 50_000 + 4_000_000
    got["arrival"], got["published"] = got["received"] - 1_500_000, got["received"] - 500_000
    ms = delays(device(0.25), trough, got)
    assert ms["trough_to_receipt"]["mean"] == 4.0 and ms["trough_to_receipt"]["max"] == 4.0
    assert ms["trough_to_arrival"]["p50"] == 2.5 and ms["arrival_to_published"]["p99"] == 1.0
    assert ms["published_to_receipt"]["mean"] == 0.5
    # the first sample of a burst waits 1 ms for the burst to be whole, its last one 0.05 ms; then 0.25 ms
    assert ms["trough_until_sent"]["max"] == 1.25 and ms["trough_until_sent"]["mean"] == pytest.approx(
        (1.25 + 0.3 + 1.25) / 3, abs=1e-3
    )


def test_a_late_sender_is_told() -> None:
    assert np.allclose(device(0.25).late_ms(1000, 3000), 0.25)
    assert len(device().late_ms(1000, 3000)) == 100 and len(device().late_ms(1000, 1040)) == 2


def test_true_spikes_of_a_recording_that_repeats() -> None:
    truth = GroundTruth(np.array([5, 90]), np.array([0, 1]), np.arange(2), np.ones(2), np.zeros(2, int))
    samples, units = unrolled(truth, 100, 1000, 1080, 1310)
    assert samples.tolist() == [1090, 1105, 1190, 1205, 1290, 1305] and units.tolist() == [1, 0, 1, 0, 1, 0]


def test_each_true_spike_takes_one_sorted_spike_of_its_own_unit() -> None:
    true = np.arange(1000, 41_000, 400)
    units = np.arange(100) % 2
    keep = np.arange(100) % 10 != 0  # a tenth is missed
    got = np.zeros(keep.sum() + 3, RECEIPT)
    got["sample"][:-3], got["unit"][:-3] = true[keep] + 2, 7 + units[keep]
    got["sample"][-3:], got["unit"][-3:] = [true[1] + 2, true[1] + 200, true[10]], [8, 8, 8]
    got = got[np.argsort(got["sample"], kind="stable")]
    per_unit = agreement(true, units, got["sample"], got["unit"], FS)["per_unit"]
    a, b = matched(true, units, got, per_unit, FS)
    assert sorted(a.tolist()) == np.flatnonzero(keep).tolist() and len(set(b.tolist())) == len(b)
    assert (got["unit"][b] == 7 + units[a]).all() and (got["sample"][b] == true[a] + 2).all()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scene.write(tmp_path_factory.mktemp("bench") / "rec", scene.grid("4x4"), 30.0, 3, seed=5)


@pytest.fixture(scope="module")
def sequences(recording: Path) -> Path:
    """The units of the recording, by `bench calibrate`."""
    out, kept = recording.parent / "calibrate.json", recording.parent / "units.h5"
    arguments = ("bench", "calibrate", str(recording), "--seconds", "30", "--network", "rtsort-20k-lite")
    done = spiked(*arguments, "--sequences", str(kept), "--json", str(out), "--table", timeout=800)
    assert done.returncode == 0, done.stderr
    r = json.loads(out.read_text())
    assert r["units"] >= 2 and r["seconds"] == 30 and r["network"] == "rtsort-20k-lite"
    assert r["total_s"] == pytest.approx(r["pass_s"] + r["calibration_s"], abs=0.011) and r["pass_s"] > 0
    assert r["peak_rss_gb"] > 0.05 and r["machine"]["cores"]
    assert f"| 16 el., 20 kHz | rtsort-20k-lite | 30 s | {r['pass_s']} s |" in done.stdout
    return kept


def test_synthetic_recording_is_read_back(recording: Path) -> None:
    with open_recording(recording) as rec:
        assert rec.n_samples == 600_000 and rec.info.n_channels == 16 and rec.ground_truth is not None
        assert rec.info.zero_code == 512 and set(rec.ground_truth.units) == {0, 1, 2}
        first = rec.ground_truth.samples[rec.ground_truth.snr[rec.ground_truth.units] > 8][0]
        x = (rec.read(first, first + 1)[0].astype(float) - 512) * rec.info.gain_uv[0]
        assert x.min() < -30


@pytest.mark.slow
@pytest.mark.timeout(1800)  # with what it takes to make the recording and find its units
def test_live_over_real_sockets(recording: Path, sequences: Path, tmp_path: Path) -> None:
    out = tmp_path / "live.json"
    arguments = (
        "bench",
        "live",
        "--recording",
        str(recording),
        "--sequences",
        str(sequences),
        "--seconds",
        "4",
    )
    for _ in range(4):  # again where the machine did not keep up
        done = spiked(
            *arguments,
            "--folder",
            str(tmp_path / "live"),
            "--json",
            str(out),
            "--table",
            "--columns",
            "64",
            timeout=600,
        )
        if done.returncode != 0:
            assert "does not keep up" in done.stderr or "not abreast" in done.stderr, done.stderr
            continue
        r = json.loads(out.read_text())
        if not (r["gap_samples"] or r["skipped_samples"] or r["client_missed_messages"]):
            break
    assert done.returncode == 0, done.stderr
    ms = r["latency_ms"]
    assert r["wire"] == "maxwell" and r["channels"] == 16 and r["network"] == "lite-20k"
    assert ms["trough_to_receipt"]["n"] == r["spikes_matched"] > 0
    assert r["spikes_matched"] <= min(r["spikes_received"], r["true_spikes"])
    assert ms["trough_to_receipt"]["p50"] > 2.0  # nothing is known before the network's lookahead has passed
    parts = sum(ms[k]["mean"] for k in ("trough_to_arrival", "arrival_to_published", "published_to_receipt"))
    assert ms["trough_to_receipt"]["mean"] == pytest.approx(parts, abs=0.01)
    assert ms["trough_to_receipt"]["mean"] <= ms["trough_to_receipt"]["max"]
    assert r["sender"]["burst_samples"] == 20 and r["sender"]["burst_late_ms"]["n"] == 4000
    assert set(r["cpu_share_of_a_core"]) >= {"acquire", "record", "live", "supervisor", "simulator", "client"}
    assert r["gap_samples"] == 0 and r["client_missed_messages"] == 0
    assert f"| 16 x 20 kHz, maxwell | lite-20k | 1 ms | {r['spikes_matched']} |" in done.stdout


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_live_finds_its_units_first(tmp_path: Path) -> None:
    recording = scene.write(tmp_path / "rec", scene.grid("4x4"), 16.0, 3, seed=5)
    out = tmp_path / "live.json"
    arguments = ("bench", "live", "--recording", str(recording), "--calibrate-s", "12", "--seconds", "3")
    done = spiked(
        *arguments, "--folder", str(tmp_path / "live"), "--json", str(out), "--columns", "64", timeout=800
    )
    assert done.returncode == 0, done.stderr
    r = json.loads(out.read_text())
    assert r["units"] >= 1 and r["calibrate_s"] == 12 and r["latency_ms"]["trough_to_receipt"]["n"] > 0
    assert r["sender"]["recording_repeated"]  # 12 s to calibrate on, and what that took


def test_bad_arguments(tmp_path: Path, recording: Path) -> None:
    assert "must look like 8x8" in refused("bench", "live", "--electrodes", "64", "--folder", str(tmp_path))
    assert "--seconds 31" in refused("bench", "calibrate", str(recording), "--seconds", "31")
    blind = shutil.copytree(recording, tmp_path / "rec", ignore=shutil.ignore_patterns("ground_truth.npz"))
    line = refused("bench", "live", "--recording", str(blind), "--folder", str(tmp_path / "live"))
    assert "no known spikes" in line
