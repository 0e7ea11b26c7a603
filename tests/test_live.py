"""The live pipeline: the same result for every cut of the stream, blindness told exactly, units that are true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_rig import CALIBRATE_S, FS, Rec, recording, run
from sort_scene import cuts

from spiked.live.latency import Latency
from spiked.live.pipeline import LiveResult
from spiked.offline.truth import score
from spiked.stream import Chunk, Flag, StreamInfo
from spiked_client.protocol import BLIND_REASONS


@pytest.fixture(scope="module")
def rec() -> Rec:
    return recording()


def joined(results: list[LiveResult], name: str) -> np.ndarray:
    a = np.concatenate([getattr(r, name) for r in results])
    return a[np.lexsort((a["unit"], a["channel"], a["sample"]))]


def covered(results: list[LiveResult], info: StreamInfo, n: int) -> np.ndarray:
    """(channels, samples) bool of what was told to be blind."""
    out = np.zeros((info.n_channels, n), bool)
    for r in results:
        for row in r.blind:
            where = slice(None) if row["channel"] < 0 else int(row["channel"])
            out[where, row["start"] : row["stop"]] = True
    return out


@given(cuts=st.lists(st.integers(1, 19_999), max_size=300), ones=st.integers(0, 19_900))
@settings(max_examples=12, deadline=None)
def test_spikes_and_blindness_do_not_depend_on_the_cut(rec: Rec, cuts: list[int], ones: int) -> None:
    codes = rec.codes[700_000:720_000].copy()
    codes[9000:9020, 3] = 1023
    codes[12_000:12_300] = 0
    flags = {12_000: Flag.GAP, 12_300: Flag.NONE}
    whole = run(rec.pipeline(units=rec.sequences), codes, [], flags, 700_000)
    pieces = run(rec.pipeline(units=rec.sequences), codes, [*cuts, *range(ones, ones + 60)], flags, 700_000)
    end = min(whole[-1].decided_until, pieces[-1].decided_until)
    for name in ("spikes", "mua"):
        a, b = joined(whole, name), joined(pieces, name)
        assert len(a) > 5
        a, b = a[a["sample"] < end], b[b["sample"] < end]
        assert np.array_equal(a["sample"], b["sample"]) and np.array_equal(a["unit"], b["unit"])
        assert np.array_equal(a["channel"], b["channel"])
        assert np.allclose(a["score"], b["score"], atol=1e-3)
    n = 720_000
    assert np.array_equal(
        covered(whole, rec.info, n)[:, 700_000:end], covered(pieces, rec.info, n)[:, 700_000:end]
    )


@given(seed=st.integers(0, 100_000), single=st.sampled_from([3, 50, 400]))
@settings(max_examples=15, deadline=None)
def test_nor_with_gaps_anywhere_and_single_samples(rec: Rec, seed: int, single: int) -> None:
    rng, n, first = np.random.default_rng(seed), 16_000, 700_000
    codes, gone = rec.codes[first : first + n].copy(), np.zeros(n, bool)
    for start in rng.integers(0, n, 4).tolist():
        gone[start : start + int(rng.choice([1, 5, 40, 700]))] = True
    codes[gone] = 0
    codes[int(rng.integers(0, n)), 3] = 1023
    flags = {int(k): Flag.GAP if gone[k] else Flag.NONE for k in np.flatnonzero(np.diff(gone)) + 1}
    flags[0] = Flag.GAP if gone[0] else Flag.NONE
    missing = [(int(a), int(a + rng.integers(1, 300)), rng.random(16) < 0.3) for a in rng.integers(0, n, 3)]

    def through(borders: list[int], reuse: bool) -> tuple[list[LiveResult], np.ndarray]:
        pipeline = rec.pipeline(units=rec.sequences, scaling=rec.scaling, reuse=reuse)
        for a, b, mask in missing:
            pipeline.mark_missing(first + a, first + b, mask)
        results = run(pipeline, codes, borders, flags, first)
        return results, pipeline.flush()

    (whole, rest), (pieces, late) = through([], False), through(cuts(rng, n, single), True)
    assert np.array_equal(
        covered(whole, rec.info, first + n)[:, first:], covered(pieces, rec.info, first + n)[:, first:]
    )
    a, b = (np.concatenate([*(r.spikes for r in part), end]) for part, end in ((whole, rest), (pieces, late)))
    assert len(a) > 3 and (np.diff(a["sample"]) >= 0).all()
    for name in ("sample", "unit", "channel"):
        assert np.array_equal(a[name], b[name])
    a, b = joined(whole, "mua"), joined(pieces, "mua")
    until = min(a["sample"].max(), b["sample"].max())  # the cut decides how much of the last moment is told
    for name in ("sample", "channel"):
        assert np.array_equal(a[name][a["sample"] < until], b[name][b["sample"] < until])


def test_blind_intervals_are_the_causes_and_their_guard(rec: Rec) -> None:
    codes = rec.codes[:40_000].copy()
    codes[20_000:20_010, 3] = 1023
    codes[30_000:30_500] = 0
    pipeline = rec.pipeline(scaling=rec.scaling)
    pipeline.mark_missing(25_000, 25_100, np.arange(16) == 7)
    results = run(pipeline, codes, range(200, 40_000, 200), {30_000: Flag.GAP, 30_500: Flag.NONE})
    blind = covered(results, rec.info, 40_000)[:, 2000:39_900]
    expected = np.zeros_like(blind)
    expected[3, 20_000 - 2000 - 10 : 20_014 - 2000 + 10] = True  # clipped, 0.2 ms of hold, 0.5 ms of guard
    expected[7, 25_000 - 2000 - 10 : 25_100 - 2000 + 10] = True
    expected[:, 30_000 - 2000 - 10 : 30_500 - 2000 + 10] = True
    assert np.array_equal(blind, expected)
    reasons = {BLIND_REASONS[row["reason"]] for r in results for row in r.blind if row["start"] > 2000}
    assert reasons == {"clipped", "partial", "gap"}
    mua = np.concatenate([r.mua for r in results])
    assert not covered(results, rec.info, 40_000)[mua["channel"], mua["sample"]].any()


def test_live_units_are_the_true_ones(rec: Rec) -> None:
    start = int(CALIBRATE_S * FS)
    pipeline = rec.pipeline(units=rec.sequences, scaling=rec.scaling)
    results = run(pipeline, rec.codes[start:], range(100, len(rec.codes), 100), first=start)
    spikes = np.concatenate([joined(results, "spikes"), pipeline.flush()])
    truth = rec.truth[rec.truth["sample"] > start + 1000]
    found = score(truth["sample"], truth["unit"], spikes["sample"], spikes["unit"], FS, 0.4)
    accuracy = [v["accuracy"] for v in found.values()]
    assert len(accuracy) == 5
    assert np.mean(accuracy) > 0.75


def test_latency_of_the_decision_is_bounded(rec: Rec) -> None:
    start = int(CALIBRATE_S * FS)
    pipeline = rec.pipeline(units=rec.sequences, scaling=rec.scaling)
    codes, waits = rec.codes[start : start + 100_000], []
    for a in range(0, len(codes), 20):
        r = pipeline.process(Chunk(start + a, codes[a : a + 20], 0))
        waits += (start + a + 20 - r.spikes["sample"]).tolist()
    assert len(waits) > 20
    # 2 ms of network, 0.5 ms of window, the conflict window, one chunk
    assert np.median(waits) <= pipeline.lookahead + 20


def test_skipping_ahead_forgets_and_goes_on(rec: Rec) -> None:
    pipeline = rec.pipeline(units=rec.sequences, scaling=rec.scaling)
    run(pipeline, rec.codes[:20_000], range(400, 20_000, 400))
    pipeline.skip(20_000, 60_000)
    results = run(pipeline, rec.codes[60_000:100_000], range(400, 40_000, 400), first=60_000)
    spikes = joined(results, "spikes")
    assert len(spikes) > 5 and spikes["sample"].min() >= 60_000
    # whatever is not blind after the hole is sorted at once: the noise is still known there
    fresh = run(rec.pipeline(units=rec.sequences, scaling=rec.scaling), rec.codes[:100_000], [])
    expected = joined(fresh, "spikes")
    soon = expected[(expected["sample"] >= 60_200) & (expected["sample"] < 64_000)]
    assert len(soon) > 0 and set(soon["sample"].tolist()) <= set(spikes["sample"].tolist())


def test_latency_histogram() -> None:
    latency = Latency()
    assert latency.summary()["mean"] is None
    values = np.random.default_rng(0).gamma(3.0, 1.0, 20_000)
    for part in np.array_split(values, 7):
        latency.add(part)
    s = latency.summary()
    assert s["n"] == 20_000 and s["mean"] == pytest.approx(values.mean(), abs=1e-3)
    for q in (50, 99):
        assert s[f"p{q}"] == pytest.approx(np.percentile(values, q), abs=0.06)
    latency.add(np.array([5000.0]))
    assert latency.summary()["max"] == 5000.0
