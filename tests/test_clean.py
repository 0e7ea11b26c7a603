"""Cleaning: the same output for every cut of the stream; what cannot be trusted is marked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiked.clean.cleaner import Cleaner
from spiked.clean.medians import FEW, lower_median, median_near
from spiked.stream import StreamInfo

C, FS = 3, 20_000.0
INFO = StreamInfo(
    "m", FS, ("0", "1", "2"), ((0.0, 0.0), (20.0, 0.0), (40.0, 0.0)), "uint16", (6.0, 6.0, 3.0), 512.0, 0, 1023
)  # fmt: skip


def run(
    data: np.ndarray, cuts: list[int], dead: np.ndarray | None = None, **kw: object
) -> tuple[np.ndarray, np.ndarray]:
    cleaner = Cleaner(INFO, **kw)  # type: ignore[arg-type]
    edges = [0, *sorted(c % len(data) for c in cuts), len(data)]
    parts = []
    for a, b in pairwise(edges):
        if b > a:
            gone = None if dead is None or not dead[a:b].any() else dead[a:b]
            x, valid, all_valid = cleaner.process(11 + a, data[a:b], gone)
            assert all_valid == valid.all()
            parts.append((x.copy(), valid.copy()))
    return np.concatenate([p[0] for p in parts], 1), np.concatenate([p[1] for p in parts], 1)


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(512, 3, (n, C)).round().astype(np.uint16)


@given(
    st.lists(st.integers(0, 10**6), max_size=60),
    st.sampled_from([{}, {"highpass_hz": 120.0}, {"reference": "median"}]),
    st.integers(0, 3000),
)
@settings(max_examples=40, deadline=None)
def test_any_cut_gives_the_same(cuts: list[int], kw: dict, ones: int) -> None:
    data = noise(3000)
    data[1000:1015, 1] = 1023
    dead = np.zeros(data.shape, bool)
    dead[2000:2100] = True
    dead[2500:2530, 2] = True
    whole, pieces = run(data, [], dead, **kw), run(data, [*cuts, *range(ones, ones + 300)], dead, **kw)
    assert np.array_equal(whole[0], pieces[0]) and np.array_equal(whole[1], pieces[1])


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=300), st.integers(-60, 60), st.integers(0, 20),
    st.sampled_from([1.0, 6.29, 1e-3]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_the_median_does_not_depend_on_the_guess(
    codes: list[int], guess: int, unknown: int, lsb: float
) -> None:
    values = (np.array(codes) * lsb).astype(np.float32)
    expected = np.sort(values)[(len(values) - 1) // 2]
    scratch = np.zeros(len(values) + unknown + FEW, np.float32)
    padded = np.append(values, np.full(unknown, np.inf, np.float32))
    for near in (np.float32(guess * lsb), np.float32(guess * lsb + 0.1), expected):
        assert median_near(padded, len(values), near, scratch) == expected
    assert lower_median(values.copy(), len(values)) == expected


def test_the_baseline_is_the_median_of_the_window_before_the_hop() -> None:
    data = noise(4000)
    x, _ = run(data, [0, 777, 1501], None, highpass_hz=0.0)
    uv = (data.astype(np.float32) - 512) * np.array([6, 6, 3], np.float32)
    for t in (400, 1511, 3999):
        hop = (11 + t) // 40 * 40 - 11  # hops lie on the grid of sample numbers, the first of which is 11
        base = np.sort(uv[hop - 200 : hop], axis=0)[99]
        np.testing.assert_array_equal(x[:, t], uv[t] - base)


def test_microvolts_and_baseline() -> None:
    data = noise(4000)
    data[3000, 2] -= 40
    x, valid = run(data, [])
    assert valid[:, 400:].all()
    assert abs(float(np.median(x[:, 400:]))) <= 6.0
    # the deflection keeps its size: 40 codes of 3 uV, within the noise of 9 uV
    assert x[2, 3000] == pytest.approx(-120, abs=40)


def test_clipped_and_missing_samples_read_zero_and_are_invalid() -> None:
    data = noise(4000)
    data[1000:1010, 1] = 1023
    data[1500:1503, 0] = 0
    dead = np.zeros(data.shape, bool)
    dead[2000:2050] = True
    x, valid = run(data, [], dead)
    assert (
        not valid[1, 1000:1010].any() and not valid[1, 1010:1014].any() and valid[1, 1015]
    )  # 0.2 ms of hold
    assert valid[0, 1000:1010].all() and not valid[0, 1500:1503].any()
    assert not valid[:, 2000:2050].any() and valid[:, 2050].all()
    assert not x[~valid].any()


def test_a_gap_does_not_move_the_baseline() -> None:
    data = noise(6000)
    data[2000:4000] = 0  # zero-filled, 512 codes away from the baseline
    dead = np.zeros(data.shape, bool)
    dead[2000:4000] = True
    x, valid = run(data, [], dead)
    assert valid[:, 4000:].all()
    assert (
        np.abs(x[:, 4000:4100]).max() < 100
    )  # five noise SDs; a baseline moved by the zeros would be 3000 off


def test_highpass_removes_drift() -> None:
    t = np.arange(40_000) / FS
    data = (noise(40_000) + (30 * np.sin(2 * np.pi * 3 * t)).round()[:, None]).astype(np.uint16)
    x, valid = run(data, [], highpass_hz=120.0)
    assert valid[:, 400:].all()
    assert x[0, 2000:].std() < 1.3 * run(noise(40_000), [])[0][0, 2000:].std()
