"""Template matching, live: the same spikes for every cut, overlaps resolved, gaps told, nothing made per chunk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_rig import FS, LEARN_S, cleaned, recording, run, templates

from spiked.errors import ConfigError
from spiked.offline.truth import score
from spiked.stream import Flag
from spiked.templates.expected import expect
from spiked.templates.learn import matched
from spiked.templates.library import Templates
from spiked.templates.sorter import PIECE, TemplateSorter
from spiked.templates.torch_scores import TorchScores


def unfiltered() -> Templates:
    """The same units for samples that passed the filters already."""
    return dataclasses.replace(templates(), sos=np.zeros((0, 6)), taps=np.ones(1, np.float32))


def spikes_of(results: list) -> np.ndarray:
    found = np.concatenate([r.spikes for r in results])
    return found[np.lexsort((found["unit"], found["sample"]))]


def test_finds_the_cells_in_samples_it_did_not_learn_from() -> None:
    rec, n = recording(), LEARN_S * FS
    results = run(
        rec.pipeline(units=templates(), scaling=rec.scaling),
        rec.codes[n:],
        range(20, len(rec.codes) - n, 20),
        first=n,
    )
    found = spikes_of(results)
    late = rec.truth["sample"] >= n
    per_unit = score(
        rec.truth["sample"][late], rec.truth["unit"][late], found["sample"], found["unit"], FS, 0.4
    )
    accuracy = [v["accuracy"] for v in per_unit.values()]
    assert np.mean(accuracy) > 0.9, accuracy


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 59_999), max_size=60), ones=st.integers(0, 59_000), gap=st.booleans())
def test_any_cut_gives_the_same_spikes(cuts: list[int], ones: int, gap: bool) -> None:
    rec, codes = recording(), recording().codes[:60_000].copy()
    flags = {}
    if gap:
        codes[30_000:30_500] = 0
        flags = {30_000: Flag.GAP, 30_500: Flag.NONE}
    results = []
    for places in ([], [*cuts, *range(ones, ones + 60)]):
        pipeline = rec.pipeline(units=templates(), scaling=rec.scaling)
        results.append((run(pipeline, codes, places, flags, 7_000_000), pipeline.flush()))
    whole, cut = (np.concatenate([spikes_of(r), rest]) for r, rest in results)
    assert len(whole) > 50
    np.testing.assert_array_equal(whole, cut)


def test_matching_alone_is_the_same_in_pieces_of_one_sample() -> None:
    x = np.ascontiguousarray(cleaned()[:, :30_000])
    at_once = TemplateSorter(templates()).process(x, None, 0)
    sorter = TemplateSorter(templates(), reuse=True)
    pieces = [
        sorter.process(np.ascontiguousarray(x[:, a : a + 1]), None, a).copy() for a in range(x.shape[1])
    ]
    both = np.concatenate(pieces)
    np.testing.assert_array_equal(
        at_once[np.argsort(at_once["sample"], kind="stable")], both[np.argsort(both["sample"], kind="stable")]
    )


def test_is_final_up_to_where_it_says_and_within_its_lookahead() -> None:
    x = np.ascontiguousarray(cleaned()[:, :100_000])
    sorter, late = TemplateSorter(templates()), []
    for a in range(0, x.shape[1], 20):
        before = sorter.decided_until if a else 0
        found = sorter.process(np.ascontiguousarray(x[:, a : a + 20]), None, a)
        assert (found["sample"] >= before).all()
        late += (a + 20 - found["sample"]).tolist()
    assert np.median(late) <= sorter.lookahead_samples + 20
    assert max(late) <= sorter.lookahead_samples + 20 + 2 * sorter.window + 2


def test_two_cells_at_once_are_both_found() -> None:
    t, rng = templates(), np.random.default_rng(1)
    waves = t.waveforms()
    a, b = np.argsort(-np.abs(t.root_amplitude_uv))[:2]
    y = rng.normal(0, 1e-3, (t.n_channels, 20_000)).astype(np.float32)
    truth = []
    for i, lag in enumerate((-14, -6, -3, 3, 6, 14)):
        for u, at in ((a, 2000 + 2500 * i), (b, 2000 + 2500 * i + lag)):
            y[:, at - t.before : at - t.before + waves.shape[2]] += waves[u]
            truth.append((at, int(u)))
    found = TemplateSorter(t).match_filtered(y, 0)
    assert {(int(s), int(u)) for u, s, _, _ in found} == set(truth)
    np.testing.assert_allclose(found[:, 2], 1, atol=0.15)  # the first of two takes a share of the other


def test_amplitude_is_followed() -> None:
    t = templates()
    u = int(np.argmax(np.abs(t.root_amplitude_uv)))
    y = np.zeros((t.n_channels, 400 * 200 + 500), np.float32)
    wave = t.waveforms()[u]
    for i in range(400):  # loses 40 % slowly, further than its limits would let it go at once
        at = 100 + 200 * i
        y[:, at : at + wave.shape[1]] += (1 - 0.4 * i / 400) * wave
    sorter = TemplateSorter(dataclasses.replace(t, low=np.full(len(t), 0.7, np.float32)))
    found = sorter.match_filtered(y, 0)
    assert (found[:, 0] == u).sum() == 400
    assert sorter.level[u] < 0.85


def test_a_gap_is_blind_and_nothing_is_found_in_it() -> None:
    rec, codes = recording(), recording().codes[:40_000].copy()
    codes[20_000:24_000] = 0
    results = run(
        rec.pipeline(units=templates(), scaling=rec.scaling),
        codes,
        range(20, 40_000, 20),
        {20_000: Flag.GAP, 24_000: Flag.NONE},
    )
    found, blind = spikes_of(results), np.concatenate([r.blind for r in results])
    assert not ((found["sample"] > 19_990) & (found["sample"] < 24_010)).any()
    assert blind["start"].min() <= 20_000 and blind["stop"].max() >= 24_000
    assert (found["sample"] > 24_100).any()


def test_new_templates_take_over_without_a_hole() -> None:
    rec, codes = recording(), recording().codes[:100_000]
    whole = run(rec.pipeline(units=templates(), scaling=rec.scaling), codes, range(20, 100_000, 20))
    pipeline, results = rec.pipeline(units=templates(), scaling=rec.scaling), []
    for a in range(0, 100_000, 20_000):
        results += run(pipeline, codes[a : a + 20_000], range(20, 20_000, 20), first=a)
        pipeline.swap(templates())
    one, other = spikes_of(whole), spikes_of(results)
    assert len(one) > 100
    # a fresh sorter does not know how the former one's filters and amplitudes stood: a few weak spikes may differ
    pairs = set(zip(one["sample"].tolist(), one["unit"].tolist(), strict=True))
    others = list(zip(other["sample"].tolist(), other["unit"].tolist(), strict=True))
    assert len(others) == len(set(others))
    assert len(pairs ^ set(others)) <= 0.02 * len(pairs)


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    t = dataclasses.replace(
        templates(), expected={"templates": {"accuracy": [0.5] * len(templates())}}, source={"sorter": "x"}
    )
    t.save(tmp_path / "a.templates.h5")
    back = Templates.load(tmp_path / "a.templates.h5")
    for f in dataclasses.fields(Templates):
        a, b = getattr(t, f.name), getattr(back, f.name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, f.name
    back.check(recording().info)
    half = back.keep(np.arange(len(back)) % 2 == 0)
    assert half.expected["templates"]["accuracy"] == [0.5] * len(half)
    np.testing.assert_array_equal(half.waveforms(), back.waveforms()[::2])


def test_a_file_that_does_not_fit_says_why(tmp_path: Path) -> None:
    info = recording().info
    t = templates()
    other = dataclasses.replace(info, channel_ids=tuple(f"x{c}" for c in info.channel_ids))
    with pytest.raises(ConfigError, match=r"channel 0 being .*calibrate again"):
        t.check(other)
    path = tmp_path / "a.templates.h5"
    with pytest.raises(ConfigError, match="no templates at"):
        Templates.load(path)
    path.write_bytes(b"no hdf5")
    with pytest.raises(ConfigError, match="not a whole templates file"):
        Templates.load(path)
    recording().sequences.save(path)
    with pytest.raises(ConfigError, match="not a templates file"):
        Templates.load(path)
    with pytest.raises(ConfigError, match="not consistent"):
        dataclasses.replace(t, ptr=t.ptr[:-1])


def test_expectation_tells_good_units_from_bad_ones() -> None:
    t, n = templates(), LEARN_S * FS
    x = cleaned()[:, :n]
    strong = expect(t, x)
    loudest = int(np.argmax(np.abs(t.root_amplitude_uv)))
    assert strong.accuracy[loudest] > 0.9
    weak = dataclasses.replace(t, waveform=0.08 * t.waveform, weight=0.08 * t.weight)
    assert expect(weak, x).accuracy[loudest] < 0.5


def test_matched_calibration_agrees_with_the_truth() -> None:
    spikes, amplitude = matched(templates(), cleaned()[:, : LEARN_S * FS])
    assert np.abs(np.median(amplitude) - 1) < 0.1
    assert (np.diff(spikes.sample) >= 0).all()


def test_a_waveform_that_changes_slowly_is_followed() -> None:
    t = templates()
    u = int(np.argmax(np.abs(t.root_amplitude_uv)))
    start = t.waveforms()[u]
    end = np.roll(start, 1, axis=0)  # what neighbouring electrodes see
    rng, n = np.random.default_rng(2), 3000
    y = rng.normal(0, 0.05, (t.n_channels, 300 * n + 1000)).astype(np.float32)
    for i in range(n):
        f, at = min(1.0, i / (n - 500)), 150 + 300 * i
        y[:, at : at + start.shape[1]] += (1 - 0.5 * f) * start + 0.5 * f * end
    found = {}
    for track in (False, True):
        sorter = TemplateSorter(unfiltered(), track=track)
        found[track] = sorter.process(y, None, 0)
    mine = {track: (f["unit"] == u).sum() for track, f in found.items()}
    assert mine[True] > 0.95 * n
    moved = sorter.tracker.waveform[t.wave_ptr[u] : t.wave_ptr[u + 1]]
    assert np.abs(moved - t.waveform[t.wave_ptr[u] : t.wave_ptr[u + 1]]).max() > 0.2 * np.abs(start).max()
    late = found[True][(found[True]["unit"] == u) & (found[True]["sample"] > 280 * n)]
    before = found[False][(found[False]["unit"] == u) & (found[False]["sample"] > 280 * n)]
    assert len(before) == 0 or late["score"].mean() > before["score"].mean()


def test_a_unit_that_is_another_now_is_doubtful() -> None:
    t = templates()
    u = int(np.argmax(np.abs(t.root_amplitude_uv)))
    sorter = TemplateSorter(unfiltered())
    n = 1500
    y = np.zeros((t.n_channels, 200 * n + 500), np.float32)
    for i in range(n):  # its amplitude falls to half
        y[:, 100 + 200 * i : 100 + 200 * i + t.waveform.shape[1]] += (1 - 0.55 * i / n) * t.waveforms()[u]
    assert len(sorter.doubtful) == 0
    sorter.process(y, None, 0)
    assert sorter.doubtful.tolist() == [u]


@pytest.mark.parametrize("device", ["torch:cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_torch_device_gives_the_same_spikes(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = np.ascontiguousarray(cleaned()[:, :100_000])
    here, there = TemplateSorter(templates()), TemplateSorter(templates())
    there._dense = TorchScores(templates(), device.removeprefix("torch:"), PIECE)
    one, other = here.process(x, None, 0), there.process(x, None, 0)
    assert len(one) > 100
    pairs = [set(zip(s["sample"].tolist(), s["unit"].tolist(), strict=True)) for s in (one, other)]
    assert len(pairs[0] ^ pairs[1]) <= 0.002 * len(one)  # a score on the edge of its threshold


def test_a_broken_template_finds_nothing_and_holds_nothing_up() -> None:
    t = templates()
    x = np.ascontiguousarray(cleaned()[:, :100_000])
    first = slice(t.ptr[0], t.ptr[1])
    turned, loud = t.weight.copy(), t.weight.copy()
    turned[first] *= -1  # its own waveform scores below nothing
    loud[first] *= 30
    for weight in (turned, loud):
        sorter = TemplateSorter(dataclasses.replace(t, weight=weight, threshold=np.full(len(t), 1e-3)))
        sorter.process(x, None, 0)
        assert sorter.decided_until > 99_000
    found = TemplateSorter(dataclasses.replace(t, weight=turned)).process(x, None, 0)
    assert len(found) > 100 and t.unit_ids[0] not in found["unit"]
