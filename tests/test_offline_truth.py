"""Spike-train matching and the score against a known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from spiked.offline.truth import Trains, accuracy_matrix, coincidences, pair_lags, score, summary

FS = 20_000.0


def poisson(rng: np.random.Generator, n: int, stop: int, refractory: int = 40) -> np.ndarray:
    gaps = refractory + rng.exponential(stop / n - refractory, n)
    return np.cumsum(gaps).astype(np.int64)


@pytest.fixture
def truth() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    trains = [poisson(rng, 400, 400_000) for _ in range(6)]
    units = np.repeat(np.arange(6) * 3, [len(t) for t in trains])
    return np.concatenate(trains), units


def test_perfect_sorting_with_a_constant_lag_scores_one(truth: tuple[np.ndarray, np.ndarray]) -> None:
    samples, units = truth
    for lag in (-10, 0, 7, 10):
        result = score(samples, units, samples + lag, 100 - units, FS)
        assert [r["accuracy"] for r in result.values()] == [1.0] * 6
        assert {t: r["unit"] for t, r in result.items()} == {t: 100 - t for t in range(0, 18, 3)}
        assert all(r["lag_ms"] == pytest.approx(lag * 1000 / FS) for r in result.values())


def test_a_lag_beyond_half_a_millisecond_is_not_forgiven(truth: tuple[np.ndarray, np.ndarray]) -> None:
    samples, units = truth
    result = score(samples, units, samples + 30, units, FS)  # 1.5 ms
    assert max(r["accuracy"] for r in result.values()) < 0.1


def test_known_losses_and_inventions(truth: tuple[np.ndarray, np.ndarray]) -> None:
    samples, units = truth
    first = samples[units == 0]
    lost = first[100:]  # 100 of 400 missed
    invented = np.arange(60) * 200_000 + 50_000_000  # far from every true spike
    result = score(samples, units, np.concatenate([lost, invented]), np.zeros(360, int), FS)
    assert result[0]["n_match"] == 300
    assert result[0]["recall"] == pytest.approx(0.75)
    assert result[0]["precision"] == pytest.approx(300 / 360)
    assert result[0]["accuracy"] == pytest.approx(300 / 460)
    assert result[3]["unit"] is None and result[3]["n_true"] == 400
    totals = summary(result)
    assert totals["well"] == 0 and totals["half"] == 1 and totals["accuracy"] == pytest.approx(300 / 460 / 6)


def test_a_doubled_spike_counts_once(truth: tuple[np.ndarray, np.ndarray]) -> None:
    samples, units = truth
    one = samples[units == 0]
    result = score(one, np.zeros(len(one)), np.concatenate([one, one + 2]), np.zeros(2 * len(one)), FS)
    assert result[0]["n_match"] == len(one)
    assert result[0]["precision"] == 0.5 and result[0]["recall"] == 1.0


def test_unsorted_spikes_do_not_count(truth: tuple[np.ndarray, np.ndarray]) -> None:
    samples, units = truth
    assert all(
        r["unit"] is None for r in score(samples, units, samples, np.full(len(units), -1), FS).values()
    )
    assert score([], [], samples, units, FS) == {}


def brute(a: np.ndarray, b: np.ndarray, window: int) -> int:
    """Size of the largest one-to-one matching, by the assignment problem."""
    near = (np.abs(a[:, None] - b[None, :]) <= window).astype(float)
    rows, columns = linear_sum_assignment(-near)
    return int(near[rows, columns].sum())


def test_matching_is_the_largest_one_to_one_matching() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        a = [np.sort(rng.integers(0, 300, 30)) for _ in range(2)]
        b = [np.sort(rng.integers(0, 300, 40)) for _ in range(3)]
        ta = Trains.of(np.concatenate(a), np.repeat([0, 1], 30))
        tb = Trains.of(np.concatenate(b), np.repeat([0, 1, 2], 40))
        lags = rng.integers(-5, 6, (2, 3))
        got = coincidences(ta, tb, 4, lags)
        want = [[brute(x, y - lags[m, n], 4) for n, y in enumerate(b)] for m, x in enumerate(a)]
        np.testing.assert_array_equal(got, want)


def test_pair_lags_find_the_shift_of_each_pair() -> None:
    rng = np.random.default_rng(2)
    a, b = poisson(rng, 300, 300_000), poisson(rng, 300, 300_000)
    left = Trains.of(np.concatenate([a, b]), np.repeat([0, 1], 300))
    right = Trains.of(np.concatenate([a + 12, b - 33]), np.repeat([0, 1], 300))
    lags, heights = pair_lags(left, right, 40)
    assert lags[0, 0] == 12 and lags[1, 1] == -33
    assert heights[0, 0] >= 300 and heights[1, 1] >= 300 and heights[0, 1] < 30


def test_mismatched_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="equally long"):
        Trains.of(np.arange(3), np.arange(4))


def test_accuracy_of_empty_units_is_zero() -> None:
    np.testing.assert_array_equal(
        accuracy_matrix(np.zeros((1, 1), int), np.array([0]), np.array([0])), [[0.0]]
    )
