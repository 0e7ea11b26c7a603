"""Online assignment: exact, the same under every cut, honest about what is final and what could not be seen."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sort_scene import FS, LOOSE, STRINGENT, Scene, cuts, scene

from spiked.clean.noise import NoiseTracker
from spiked.offline.truth import score
from spiked.sort.assign import ElectrodePeaks, RTSort
from spiked.sort.calibrate import calibrate
from spiked.sort.conflicts import PENDING, resolve
from spiked.sort.parameters import RTSortParameters
from spiked.sort.sequences import Sequences
from spiked_client.protocol import SPIKE


@pytest.fixture(scope="module")
def world() -> tuple[Scene, Sequences]:
    s = scene(24, 6, seed=11)
    n = round(20 * FS)
    found = calibrate(s.x[:, :n], s.logits[:, :n], None, FS, s.positions, None, STRINGENT, LOOSE)
    assert len(found) >= 5
    return s, found


TAIL = slice(round(20 * FS), round(24 * FS))
SHORT = slice(round(20 * FS), round(20.6 * FS))


def run(
    world: tuple[Scene, Sequences],
    part: slice,
    borders: list[int],
    valid: np.ndarray | None = None,
    first: int = 12_345,
    cleaned: tuple[tuple[int, int], ...] = (),
) -> np.ndarray:
    """`cleaned`: columns from which an artifact was removed, told no earlier than their samples."""
    s, sequences = world
    x, q = s.x[:, part], s.logits[:, part]
    noise, sorter = NoiseTracker(len(x), FS), RTSort(sequences, FS, len(x))
    out, final = [], first
    for a, b in itertools.pairwise(borders):
        v = None if valid is None else valid[..., a:b]
        noise.process(x[:, a:b], v, first + a)
        for start, stop in cleaned:
            if max(a, start) < min(b, stop):
                sorter.note_cleaned(first + max(a, start), first + min(b, stop))
        spikes = sorter.process(x[:, a:b], q[:, a:b], v, noise, first + a)
        assert spikes.dtype == SPIKE
        assert (spikes["sample"] >= final).all(), "a spike came before what was called final"
        assert final <= sorter.decided_until <= first + b
        final = sorter.decided_until
        assert (spikes["sample"] < final).all()
        out.append(spikes)
    assert final >= first + borders[-1] - 8 * sorter.lookahead_samples
    out.append(sorter.flush())
    assert sorter.decided_until == first + borders[-1]
    assert sorter.dropped == 0
    return np.concatenate(out)


def test_it_finds_the_spikes(world: tuple[Scene, Sequences]) -> None:
    s, _ = world
    n = TAIL.stop - TAIL.start
    got = run(world, TAIL, [*range(0, n, 20), n], first=TAIL.start)
    inside = s.samples >= TAIL.start + 3000
    result = score(s.samples[inside], s.units[inside], got["sample"], got["unit"], FS, 0.4)
    assert np.mean([r["accuracy"] for r in result.values()]) > 0.7
    assert (got["amplitude_uv"] < 0).all()
    assert ((got["score"] > 0) & (got["score"] <= 1)).all()
    sequences = world[1]
    root = dict(zip(sequences.unit_ids.tolist(), sequences.roots.tolist(), strict=True))
    assert [root[u] for u in got["unit"].tolist()] == got["channel"].tolist()
    assert (np.diff(got["sample"]) >= 0).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 100_000), masked=st.sampled_from(["no", "samples", "channels"]))
def test_the_cut_does_not_matter(world: tuple[Scene, Sequences], seed: int, masked: str) -> None:
    rng = np.random.default_rng(seed)
    n = SHORT.stop - SHORT.start
    valid = None
    if masked != "no":
        valid = np.ones((len(world[0].x), n), bool)
        for _ in range(30):
            a = int(rng.integers(0, n))
            rows = slice(None) if masked == "samples" else rng.random(len(valid)) < 0.3
            valid[rows, a : a + int(rng.integers(1, 200))] = False
        valid = valid[0] if masked == "samples" else valid
    whole = run(world, SHORT, [0, n], valid)
    assert len(whole) > 5
    np.testing.assert_array_equal(run(world, SHORT, cuts(rng, n), valid), whole)


def weakened(s: Scene, part: slice, stretches: tuple[tuple[int, int], ...]) -> Scene:
    """On all electrodes but the one that a spike is largest on, more than half of it is lost, as where a removed artifact took it along."""
    x = s.x.copy()
    for start, stop in stretches:
        piece = x[:, part.start + start : part.start + stop]
        blocks = [piece[:, k : k + 30] for k in range(0, piece.shape[1], 30)]
        for b in blocks:
            rows = np.arange(len(b)) != np.abs(b).max(1).argmax()
            b[rows] *= 0.45
    return dataclasses.replace(s, x=x)


def test_where_an_artifact_was_removed_amplitudes_may_be_further_off(world: tuple[Scene, Sequences]) -> None:
    stretches = ((2000, 7000), (30_000, 45_000), (60_000, 61_000))
    n = TAIL.stop - TAIL.start
    even = [*range(0, n, 20), n]
    weak = weakened(world[0], TAIL, stretches), world[1]

    def inside(spikes: np.ndarray) -> int:
        return sum(int(((spikes["sample"] >= a) & (spikes["sample"] < b)).sum()) for a, b in stretches)

    whole = run(world, TAIL, even, first=0)
    untold, told = run(weak, TAIL, even, first=0), run(weak, TAIL, even, first=0, cleaned=stretches)
    assert inside(untold) < 0.7 * inside(whole)
    assert inside(told) > 1.2 * inside(untold)
    beside = np.ones(n, bool)  # further away than a spike lasts nothing is different
    for a, b in stretches:
        beside[a - 40 : b + 40] = False
    np.testing.assert_array_equal(told[beside[told["sample"]]], untold[beside[untold["sample"]]])
    for seed in range(3):
        borders = cuts(np.random.default_rng(seed), n)
        np.testing.assert_array_equal(run(weak, TAIL, borders, first=0, cleaned=stretches), told)


def test_a_spikes_size_at_its_root_has_room_live_and_none_in_the_published_limits() -> None:
    live, published = RTSortParameters.mea(), RTSortParameters.published_mea()
    assert live.root_amplitude_sd_spike > live.max_root_amplitude_sd
    assert published.root_amplitude_sd_spike == published.max_root_amplitude_sd
    for p in (published, RTSortParameters.published_neuropixels()):
        assert p.cleaned_amplitude_diff == p.max_amplitude_diff


def test_one_sample_at_a_time(world: tuple[Scene, Sequences]) -> None:
    part = slice(SHORT.start, SHORT.start + 4000)
    np.testing.assert_array_equal(run(world, part, list(range(4001))), run(world, part, [0, 4000]))


def test_blind_stretches_bring_no_spikes(world: tuple[Scene, Sequences]) -> None:
    n = SHORT.stop - SHORT.start
    valid = np.ones(n, bool)
    valid[4000:6000] = False
    seen, all_of_it = (run(world, SHORT, [0, n], v, first=0)["sample"] for v in (valid, None))
    assert ((all_of_it >= 4000) & (all_of_it < 6000)).any()
    assert not ((seen >= 4000) & (seen < 6000)).any()
    assert len(seen) > 0.6 * len(all_of_it)


def test_a_blind_stretch_ends_where_the_mask_says(world: tuple[Scene, Sequences]) -> None:
    """What is told as blind is what is: the detector has put its guard around blank samples already."""
    n = SHORT.stop - SHORT.start
    whole = run(world, SHORT, [0, n], first=0)
    at = whole["sample"]
    lone = at[1:-1][(np.diff(at)[:-1] > 60) & (np.diff(at)[1:] > 60)][:5]
    assert len(lone) >= 3
    for k in lone:
        beside, over = np.ones(n, bool), np.ones(n, bool)
        beside[k + 2 : k + 30] = beside[k - 30 : k - 1] = False
        over[k] = False
        kept = run(world, SHORT, [0, n], beside, first=0)
        assert whole["unit"][at == k] == kept["unit"][kept["sample"] == k], k
        assert k not in run(world, SHORT, [0, n], over, first=0)["sample"]


def test_a_jump_ends_what_was_before(world: tuple[Scene, Sequences]) -> None:
    s, sequences = world
    x, q = s.x[:, SHORT], s.logits[:, SHORT]
    n = x.shape[1]
    noise, sorter = NoiseTracker(len(x), FS), RTSort(sequences, FS, len(x))
    noise.process(x, None, 0)
    first = sorter.process(x, q, None, noise, 0)
    noise.process(x, None, n + 500)
    second = sorter.process(x, q, None, noise, n + 500)
    alone = run(world, SHORT, [0, n], first=0)
    before = np.concatenate([first, second[second["sample"] < n]])
    np.testing.assert_array_equal(before, alone)
    assert (second["sample"] >= n + 500).sum() >= len(alone)  # noise is known from the start now
    sorter.reset(9_000_000)
    assert sorter.decided_until == 9_000_000


def test_no_units_no_spikes(world: tuple[Scene, Sequences]) -> None:
    s, sequences = world
    empty = Sequences(FS, sequences.channel_ids, s.positions, STRINGENT, LOOSE, sequences.parameters)
    sorter, noise = RTSort(empty, FS, len(s.x)), NoiseTracker(len(s.x), FS)
    noise.process(s.x[:, :1000], None, 0)
    assert len(sorter.process(s.x[:, :1000], s.logits[:, :1000], None, noise, 0)) == 0
    assert sorter.decided_until == 1000
    with pytest.raises(ValueError, match="channels"):
        RTSort(empty, FS, 3)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 60), knowing=st.booleans())
def test_resolving_along_the_stream_is_greedy_by_score(seed: int, n: int, knowing: bool) -> None:
    rng = np.random.default_rng(seed)
    window = np.where(rng.random((4, 4)) < 0.6, rng.integers(0, 12, (4, 4)), -1).astype(np.int16)
    window = np.maximum(window, window.T)
    shadow = np.where(rng.random((4, 4)) < 0.4, rng.integers(0, 20, (4, 4)), -1).astype(np.int16)
    p = np.zeros(n, PENDING)
    p["sample"], p["unit"] = np.sort(rng.integers(0, 200, n)), rng.integers(0, 4, n)
    p["score"] = rng.integers(0, 6, n)  # many ties
    _, once = np.unique(p[["sample", "unit"]], return_index=True)
    p = p[once]
    accepted: list[tuple[int, int]] = []
    for c in sorted(p.tolist(), key=lambda c: (-c[3], c[0], c[1])):
        if all(not 0 <= abs(c[0] - t) <= window[c[1], u] for t, u in accepted):
            accepted.append((c[0], c[1]))
    store, out, order = np.zeros(200, PENDING), np.zeros(200, PENDING), np.zeros(200, np.int64)
    told: list[tuple[int, int]] = []
    for t, u in sorted(accepted):  # of those accepted, none in the shadow of one told before
        if all(not 0 <= t - before <= shadow[v, u] for before, v in told):
            told.append((t, u))
    reach = max(0, int(window.max(initial=0)), int(shadow.max(initial=0)))
    kept = n_out = 0
    for stop in [*sorted(rng.integers(0, 220, 5).tolist()), 1 << 40]:
        new = p[(p["sample"] < stop) & (p["sample"] >= 0)]
        store[kept : kept + len(new)] = new
        p = p[p["sample"] >= stop]
        now = store[: kept + len(new)]
        if knowing:  # exactly those that meet a rival later
            near = np.abs(now["sample"][:, None] - p["sample"]) <= window[now["unit"]][:, p["unit"]]
            contested = near.any(1)
        else:
            contested = now["sample"] + reach >= stop
        kept, n_out, final = resolve(
            store, len(now), window, shadow, reach, stop, contested, out, n_out, order
        )
        assert final <= stop
    got = [(int(a), int(b)) for a, b in zip(out["sample"][:n_out], out["unit"][:n_out], strict=True)]
    assert got == told


def test_what_is_reused_is_the_same_until_the_next_call(world: tuple[Scene, Sequences]) -> None:
    s, sequences = world
    x, q = s.x[:, SHORT], s.logits[:, SHORT]
    noise = NoiseTracker(len(x), FS)
    own, lent = (RTSort(sequences, FS, len(x), reuse=reuse) for reuse in (False, True))
    own_peaks, lent_peaks = (
        ElectrodePeaks(s.positions, FS, STRINGENT, reuse=reuse) for reuse in (False, True)
    )
    first: list[np.ndarray] = []
    for a in range(0, x.shape[1], 100):
        part = x[:, a : a + 100], q[:, a : a + 100], None
        noise.process(part[0], None, a)
        kept, found = own.process(*part, noise, a), lent.process(*part, noise, a)
        np.testing.assert_array_equal(kept, found)
        np.testing.assert_array_equal(own_peaks.process(*part, a), lent_peaks.process(*part, a))
        if len(found):
            first.append(found)
    assert len(first) > 10
    assert np.shares_memory(first[0], first[-1]) and first[0]["sample"][0] == first[-1]["sample"][0]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_electrode_peaks_do_not_depend_on_the_cut(world: tuple[Scene, Sequences], seed: int) -> None:
    s, _ = world
    x, q = s.x[:, SHORT], s.logits[:, SHORT]
    rng = np.random.default_rng(seed)
    valid = np.ones(x.shape, bool)
    valid[rng.integers(0, len(x)), 3000:5000] = False

    def peaks(borders: list[int]) -> np.ndarray:
        p = ElectrodePeaks(s.positions, FS, STRINGENT)
        out = [p.process(x[:, a:b], q[:, a:b], valid[:, a:b], 50 + a) for a, b in itertools.pairwise(borders)]
        return np.concatenate([*out, p.flush()])

    whole = peaks([0, x.shape[1]])
    np.testing.assert_array_equal(peaks(cuts(rng, x.shape[1])), whole)
    assert (whole["unit"] == -1).all()
    assert ((whole["score"] >= 0.27) & (whole["score"] <= 1)).all()


def test_one_spike_is_one_electrode_peak(world: tuple[Scene, Sequences]) -> None:
    s, _ = world
    p = ElectrodePeaks(s.positions, FS, STRINGENT)
    x, q = s.x[:, TAIL], s.logits[:, TAIL]
    got = np.concatenate([p.process(x, q, None, TAIL.start), p.flush()])
    marked = sum(
        len(np.flatnonzero((c[1:-1] > STRINGENT) & (c[1:-1] > c[:-2]) & (c[1:-1] >= c[2:]))) for c in q
    )
    true = (s.samples >= TAIL.start).sum()
    assert marked > 3 * true
    assert 0.8 * true < len(got) < marked / 4  # waves crossing the whole array count at both ends
    d = np.hypot(
        *(s.positions[got["channel"]][:, None] - s.positions[got["channel"]][None]).transpose(2, 0, 1)
    )
    dt = np.abs(got["sample"][:, None] - got["sample"][None])
    assert ((d > 50) | (dt > 10) | np.eye(len(got), dtype=bool)).all()
