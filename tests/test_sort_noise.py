"""Noise along the stream: right, and the same however the stream is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sort_scene import FS, cuts

from spiked.clean.noise import FLOOR_UV, NoiseTracker, noise_table


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    sd = rng.uniform(2, 20, 6)
    x = (rng.normal(0, 1, (6, 12_345)) * sd[:, None]).astype(np.float32)
    return x, sd


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), first=st.integers(0, 5000), masked=st.booleans())
def test_the_cut_does_not_matter(
    data: tuple[np.ndarray, np.ndarray], seed: int, first: int, masked: bool
) -> None:
    x, _ = data
    rng = np.random.default_rng(seed)
    valid = (rng.random(x.shape) > 0.3) & (rng.random(x.shape[1]) > 0.2) if masked else None
    table, first_block = noise_table(x, valid, FS, first)
    tracker = NoiseTracker(len(x), FS)
    ones = int(rng.integers(0, x.shape[1] - 1100))
    borders = sorted({*cuts(rng, x.shape[1]), *range(ones, ones + 1100)})
    for a, b in itertools.pairwise(borders):
        tracker.process(x[:, a:b], None if valid is None else valid[:, a:b], first + a)
        k = (first + b - 1) // tracker.block_samples
        np.testing.assert_array_equal(tracker.table(k, k)[0], table[k - first_block])
    np.testing.assert_array_equal(tracker.table(first_block, first_block + len(table) - 1), table)


def test_blocks_are_medians_of_medians(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, _ = data
    table, _ = noise_table(x, None, FS)
    thin = np.sort(np.abs(x[:, : len(x[0]) // 1000 * 1000].reshape(6, -1, 1000)[:, :, ::4]), axis=2)
    values = (thin[:, :, 124].astype(float) / 0.6745).astype(np.float32)
    np.testing.assert_array_equal(table[1], values[:, 0])
    np.testing.assert_array_equal(table[2], values[:, 0])  # block 1's value is due one block late
    for k in range(3, 12):
        np.testing.assert_array_equal(table[k], np.sort(values[:, : k - 1], axis=1)[:, (k - 2) // 2])


def test_it_is_the_noise(data: tuple[np.ndarray, np.ndarray]) -> None:
    x, sd = data
    table, _ = noise_table(x, None, FS)
    assert np.isnan(table[0]).all()
    assert np.isfinite(table[1:]).all()
    np.testing.assert_allclose(table[-1], sd, rtol=0.08)


def test_spikes_bursts_and_blanks_do_not_move_it() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(0, 10, (2, 60_000)).astype(np.float32)
    x[0, 30_000:32_000] *= 8  # 100 ms of storm
    x[1, 40_000:50_000] = 0  # half a second blanked
    valid = np.ones(x.shape, bool)
    valid[1, 40_000:50_000] = False
    table, _ = noise_table(x, valid, FS)
    assert np.nanmax(table[3:]) < 12.5
    assert np.nanmin(table[3:]) > 8


def test_a_dead_electrode_has_the_floor_and_a_long_blank_keeps_the_last_value() -> None:
    x = np.zeros((1, 60_000), np.float32)
    assert noise_table(x, None, FS)[0][-1, 0] == pytest.approx(FLOOR_UV)
    x[0, :10_000] = np.random.default_rng(3).normal(0, 7, 10_000)
    valid = np.arange(60_000) < 10_000
    table, _ = noise_table(x, valid, FS)
    assert table[-1, 0] == pytest.approx(7, rel=0.1)


def test_a_jump_back_starts_anew() -> None:
    x = np.random.default_rng(4).normal(0, 7, (2, 5000)).astype(np.float32)
    tracker = NoiseTracker(2, FS)
    tracker.process(x, None, 10_000)
    assert np.isfinite(tracker.current).all()
    tracker.process(x[:, :500], None, 0)
    assert np.isnan(tracker.current).all()
