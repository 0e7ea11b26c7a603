"""Stimulation artifacts in a stream: any cut gives the same, what has no artifact is untouched, blind is what is blank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stim_scene import FS, N_CHANNELS, Scene, info, scene

from spiked.clean.stim import StimCleaner
from spiked.config import Live, Stim
from spiked.live.pipeline import LivePipeline
from spiked.sort.assign import RTSort, one_unit
from spiked.stream import Chunk
from spiked_models.networks import load


def run(
    s: Scene, cuts: list[int], stim: Stim | None = None, marks: bool = True, dead: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, StimCleaner]:
    cleaner = StimCleaner(s.info, stim or Stim())
    for k, p in zip(s.stims, s.patterns, strict=True):
        if marks:
            cleaner.mark(int(k), int(p))
    x, bad, at, next_out = [], [], 0, 0
    for n in [*cuts, len(s.codes)]:
        stop = min(len(s.codes), at + n)
        d = None if dead is None else dead[at:stop]
        first, y, b = cleaner.process(at, s.codes[at:stop], d)
        assert not len(y) or first == next_out
        next_out += len(y)
        x.append(y.astype(np.float32))
        bad.append(np.zeros(y.shape, bool) if b is None else b.copy())
        at = stop
    _, y, b = cleaner.flush()
    x.append(y.astype(np.float32))
    bad.append(np.zeros(y.shape, bool) if b is None else b.copy())
    out = np.concatenate(x), np.concatenate(bad)
    assert len(out[0]) == len(s.codes)
    return *out, cleaner


@pytest.fixture(scope="module")
def pulses() -> Scene:
    return scene(seed=3, seconds=1.0)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 700), min_size=5, max_size=60), detect=st.booleans())
def test_any_cut_gives_the_same_bit_for_bit(pulses: Scene, cuts: list[int], detect: bool) -> None:
    stim = Stim(detect=detect)
    whole, blank, c = run(pulses, [], stim, marks=not detect)
    x, bad, d = run(pulses, cuts, stim, marks=not detect)
    assert np.array_equal(whole, x) and np.array_equal(blank, bad)
    assert np.array_equal(c.found(), d.found())


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), min_size=5, max_size=60))
def test_any_cut_gives_the_same_with_samples_missing(pulses: Scene, cuts: list[int]) -> None:
    dead = np.zeros(pulses.codes.shape, bool)
    k = int(pulses.stims[1])
    dead[k + 30 : k + 60] = True
    dead[k - 400 : k - 350, :3] = True
    whole, blank, _ = run(pulses, [], dead=dead)
    x, bad, _ = run(pulses, cuts, dead=dead)
    assert np.array_equal(whole, x) and np.array_equal(blank, bad)
    assert blank[dead].all()


def test_without_stimuli_the_very_array_comes_back() -> None:
    s = scene(seed=1, seconds=0.2, stims=())
    cleaner = StimCleaner(s.info, Stim())
    for a in range(0, len(s.codes), 20):
        part = s.codes[a : a + 20]
        first, y, dead = cleaner.process(a, part, None)
        assert first == a and y is part and dead is None and not cleaner.open


def test_the_artifact_goes_and_the_noise_stays(pulses: Scene) -> None:
    x, bad, _ = run(pulses, [20] * 5000)
    clean = pulses.clean.astype(np.float32)
    rest = x - clean
    after = np.zeros(len(x), bool)
    for k in pulses.stims:
        after[k + 100 : k + 400] = True
    carried = pulses.carries
    raw = pulses.codes - clean
    assert np.std(raw[after][:, carried]) > 15
    assert np.std(rest[after][:, carried][~bad[after][:, carried]]) < 1.0  # codes; noise is 1.2


def test_channels_without_artifact_are_untouched(pulses: Scene) -> None:
    x, bad, _ = run(pulses, [20] * 5000)
    free = ~pulses.carries
    assert free.sum() >= 4
    assert np.array_equal(x[:, free], pulses.codes[:, free].astype(np.float32))
    assert not bad[:, free].any()


def test_what_is_clipped_is_blank_and_little_more(pulses: Scene) -> None:
    _, bad, _ = run(pulses, [])
    clipped = (pulses.codes <= 0) | (pulses.codes >= 1023)
    assert bad[clipped].all()
    for k, after in zip(pulses.stims, [*pulses.stims[1:], len(bad)], strict=True):
        for c in np.flatnonzero(pulses.carries):
            ends = np.flatnonzero(clipped[k : k + 100, c])
            end = k + (ends[-1] + 1 if len(ends) else 8)
            assert not bad[end + 20 : min(k + 300, after), c].any(), (k, c)


@pytest.mark.parametrize("off", [-18, 0, 15])
def test_the_true_onset_is_found_near_a_mark(pulses: Scene, off: int) -> None:
    moved = pulses._replace(stims=pulses.stims + off)
    _, _, cleaner = run(moved, [20] * 5000)
    found = cleaner.found()
    assert np.array_equal(found["sample"], pulses.stims)
    assert np.array_equal(found["pattern"], pulses.patterns)
    assert (found["channels"] == pulses.carries.sum()).all()
    assert (found["clipped_until"] > found["sample"]).all() and (found["peak_uv"] > 1000).all()
    assert len(cleaner.found()) == 0


def test_a_mark_without_a_pulse_changes_nothing() -> None:
    s = scene(seed=5, seconds=0.5, stims=())
    marked = s._replace(stims=np.array([3000]), patterns=np.array([1]))
    x, bad, cleaner = run(marked, [20] * 2000)
    assert np.array_equal(x, s.codes.astype(np.float32)) and not bad.any()
    assert cleaner.found()["channels"].tolist() == [0]


def test_stimuli_are_found_in_the_data(pulses: Scene) -> None:
    _, bad, cleaner = run(pulses, [20] * 5000, Stim(detect=True), marks=False)
    found = cleaner.found()
    assert np.array_equal(found["sample"], pulses.stims[pulses.stims > FS // 4])
    assert bad.any()


def test_bursts_of_spikes_and_gaps_are_no_stimuli() -> None:
    s = scene(seed=7, seconds=1.0, stims=())
    codes, rng = s.codes.astype(np.int32), np.random.default_rng(0)
    shape = -np.exp(-0.5 * ((np.arange(30) - 10) / 3.0) ** 2) * 60  # 380 uV
    for k in rng.integers(8000, 8400, 200):
        codes[k : k + 30, rng.integers(N_CHANNELS)] += shape.astype(np.int32)
    dead = np.zeros(codes.shape, bool)
    dead[12000:12400] = True
    codes[dead] = 0
    t = s._replace(codes=np.clip(codes, 0, 1023).astype(np.uint16))
    _, _, cleaner = run(t, [20] * 5000, Stim(detect=True), dead=dead)
    assert len(cleaner.found()) == 0


def test_a_channel_that_stays_at_the_rail_is_given_up() -> None:
    s = scene(seed=9, seconds=1.2, stims=(4000,))
    s.codes[4000:, 0] = 1023
    x, _, cleaner = run(s, [20] * 5000)
    assert not cleaner.open
    assert np.array_equal(x[-2000:], s.codes[-2000:].astype(np.float32))


def test_marks_that_come_late_or_in_disorder_do_no_harm(pulses: Scene) -> None:
    cleaner = StimCleaner(pulses.info, Stim())
    k = int(pulses.stims[0])
    total = 0
    for a in range(0, len(pulses.codes), 20):
        if a == k - k % 20 + 60:
            cleaner.mark(k + 40_000)
            cleaner.mark(k, 3)
        _, y, _ = cleaner.process(a, pulses.codes[a : a + 20])
        total += len(y)
    total += len(cleaner.flush()[1])
    assert total == len(pulses.codes)
    assert cleaner.found()[0]["sample"] == k


def test_reset_forgets_the_window_but_not_the_templates(pulses: Scene) -> None:
    _, _, cleaner = run(pulses, [])
    seen = cleaner._state.seen.copy()
    assert seen.any()
    cleaner.process(10**6, pulses.codes[:100])
    assert not cleaner.open and np.array_equal(cleaner._state.seen, seen)


def blind_mask(rows: np.ndarray, n: int) -> np.ndarray:
    out = np.zeros((n, N_CHANNELS), bool)
    for r in rows:
        out[r["start"] : r["stop"], slice(None) if r["channel"] < 0 else r["channel"]] = True
    return out


@pytest.mark.parametrize("step", [1, 20, 333])
def test_what_was_cleaned_is_told_and_the_sorter_hears_it(
    pulses: Scene, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is not told comes out as it went in; the stretches do not depend on the cut."""
    x, _, _ = run(pulses, [step] * 5000)
    told = np.zeros(len(pulses.codes), bool)

    def note(_: RTSort, start: int, stop: int) -> None:
        told[start:stop] = True

    monkeypatch.setattr(RTSort, "note_cleaned", note)
    units = one_unit(pulses.info.fs_hz, pulses.info.channel_ids, pulses.info.positions)
    pipeline = LivePipeline(pulses.info, load("lite-20k"), Live(), units, scaling=1.0)
    for k, p in zip(pulses.stims, pulses.patterns, strict=True):
        pipeline.mark_stim(int(k), int(p))
    for a in range(0, len(pulses.codes), step):
        pipeline.process(Chunk(a, pulses.codes[a : a + step], 0))
    pipeline.flush()
    touched = (x != pulses.codes).any(1)
    assert touched.any() and not (touched & ~told).any()
    first = min(pulses.stims)
    assert not told[: first - 20].any() and 0.1 < told.mean() < 0.9
    cleaner = StimCleaner(pulses.info, Stim())
    for k, p in zip(pulses.stims, pulses.patterns, strict=True):
        cleaner.mark(int(k), int(p))
    cleaner.process(0, pulses.codes)
    stretches = list(cleaner.cleaned)
    cleaner.flush()
    whole = np.zeros(len(told), bool)
    for a, b in [*stretches, *cleaner.cleaned]:
        whole[a:b] = True
    assert np.array_equal(whole, told)


@pytest.mark.parametrize("step", [1, 20, 333])
def test_blind_intervals_published_are_those_without_valid_output(pulses: Scene, step: int) -> None:
    net = load("lite-20k")
    pipeline = LivePipeline(pulses.info, net, Live(), scaling=1.0)
    for k, p in zip(pulses.stims, pulses.patterns, strict=True):
        pipeline.mark_stim(int(k), int(p))
    seen: list[tuple[int, np.ndarray]] = []
    pipeline.tap = lambda d: seen.append((d.first_sample, d.valid.copy()))
    rows = [
        pipeline.process(Chunk(a, pulses.codes[a : a + step], 0)).blind.copy()
        for a in range(0, len(pulses.codes), step)
    ]
    pipeline.flush()
    n = max(a + v.shape[1] for a, v in seen)
    invalid = np.zeros((n, N_CHANNELS), bool)
    for a, v in seen:
        invalid[a : a + v.shape[1]] = ~v.T
    told = np.concatenate(rows)
    covered = n if step == 1 else max(a + v.shape[1] for a, v in seen[:-1])
    assert np.array_equal(blind_mask(told, n)[:covered], invalid[:covered])
    late = told[told["start"] > 600]
    assert len(late) and (late["reason"] == 2).all()  # artifact
    assert len(pipeline.stims_found()) == len(pulses.stims)


def test_a_pipeline_with_removal_off_is_as_before(pulses: Scene) -> None:
    pipeline = LivePipeline(pulses.info, load("lite-20k"), Live(), scaling=1.0, stim=Stim(enabled=False))
    pipeline.mark_stim(int(pulses.stims[0]))
    r = pipeline.process(Chunk(0, pulses.codes[:100], 0))
    assert r.first_sample == 0 and len(pipeline.stims_found()) == 0


def test_float_streams_are_cleaned_too() -> None:
    s = scene(seed=3, seconds=0.6)
    volts = ((s.codes.astype(np.float32) - 512) * np.float32(6.0)).astype(np.float32)
    floats = s._replace(info=info("float32", 1.0, 0.0, -3072.0, 3066.0), codes=volts)
    x, bad, _ = run(floats, [100] * 200)
    rest = x / 6 + 512 - s.clean
    k = int(s.stims[0])
    part = slice(k + 100, k + 400)
    carried = s.carries
    assert np.std(rest[part][:, carried][~bad[part][:, carried]]) < 1.0
