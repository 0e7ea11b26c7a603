"""The offline calls: pulses found where they are, artifacts removed, spikes kept, bad input told in one line."""

from __future__ import annotations

import numpy as np
import pytest
from stim_scene import FREE, FS, N_CHANNELS, Scene, scene

from spiked.clean.stim import recenter_stim_times, remove_stim_artifacts

METHODS = ("polynomial", "blank", "salpa", "template")


@pytest.fixture(scope="module")
def pulses() -> Scene:
    return scene(seed=11, seconds=1.2)


def traces(s: Scene) -> np.ndarray:
    return s.codes.T.astype(np.float32)


def pulse(n: int, at: list[int], shape: np.ndarray) -> np.ndarray:
    x = np.random.default_rng(0).normal(0, 1, (4, n))
    for k in at:
        x[:, k : k + len(shape)] += shape
    return x


BIPHASIC = np.r_[np.full(4, 300.0), np.full(4, -300.0)]


@pytest.mark.parametrize(
    ("mode", "shape", "expected"),
    [
        ("abs_max", np.r_[np.full(4, 200.0), np.full(4, -300.0)], (4, 7)),
        ("pos_peak", BIPHASIC, (0, 3)),
        ("neg_peak", BIPHASIC, (4, 7)),
        ("down_edge", BIPHASIC, (4, 4)),
        ("up_edge", -BIPHASIC, (4, 4)),
        ("down_edge", np.full(6, -300.0), (0, 0)),  # one phase only: its steepest step
        ("up_edge", np.full(6, 300.0), (0, 0)),
    ],
)
def test_peak_modes(mode: str, shape: np.ndarray, expected: tuple[int, int]) -> None:
    x = pulse(4000, [2000], shape)
    (t,) = recenter_stim_times(x, np.array([97.0]), FS, peak_mode=mode)  # type: ignore[arg-type]
    assert 2000 + expected[0] <= t * 20 <= 2000 + expected[1]


def test_stimuli_close_together_find_a_pulse_each() -> None:
    at = [1000 + 200 * k for k in range(10)]  # 100 Hz
    x = pulse(4000, at, BIPHASIC)
    x[:, at[4] : at[4] + 8] *= 3
    found = recenter_stim_times(x, np.array(at) / 20 + 1.0, FS, peak_mode="down_edge") * 20
    assert np.array_equal(np.round(found), np.array(at) + 4)


def test_order_is_kept_and_multi_peak_chooses() -> None:
    x = pulse(8000, [1000, 1100, 5000, 5100], np.full(3, 300.0))
    x[:, 1100:1103] *= 1.3
    times = np.array([252.0, 52.0])
    first = recenter_stim_times(
        x, times, FS, peak_mode="pos_peak", multi_peak=True, multi_peak_select="first"
    )
    last = recenter_stim_times(x, times, FS, peak_mode="pos_peak", multi_peak=True, multi_peak_select="last")
    plain = recenter_stim_times(x, times, FS, peak_mode="pos_peak")
    assert np.abs(first * 20 - [5000, 1000]).max() <= 2
    assert np.abs(last * 20 - [5100, 1100]).max() <= 2
    assert abs(plain[1] * 20 - 1100) <= 2


@pytest.mark.parametrize("method", METHODS)
def test_artifacts_go_and_channels_without_them_are_untouched(pulses: Scene, method: str) -> None:
    x, times = traces(pulses), pulses.stims / 20.0
    out, blank = remove_stim_artifacts(x, times, FS, method=method, rails=(0, 1023), patterns=pulses.patterns)  # type: ignore[arg-type]
    assert out.shape == blank.shape == x.shape and out.dtype == np.float32 and blank.dtype == bool
    assert np.array_equal(out[-FREE:], x[-FREE:]) and not blank[-FREE:].any()
    clipped = (x <= 0) | (x >= 1023)
    assert blank[clipped].all()
    rest = out - pulses.clean.T
    for k in pulses.stims[3:]:
        part = slice(k + 80, k + 200)
        good = ~blank[: N_CHANNELS - FREE, part]
        if method == "blank":
            assert not good[:, : 200 - 120].any() or good.mean() < 0.5
        else:
            assert good.mean() > 0.9
            assert np.sqrt((rest[: N_CHANNELS - FREE, part][good] ** 2).mean()) < 3.0


@pytest.mark.parametrize("method", ["polynomial", "salpa", "template"])
def test_a_spike_after_the_pulse_stays(method: str) -> None:
    s = scene(seed=13, seconds=1.6)
    x = traces(s)
    spike = -16 * np.exp(-0.5 * ((np.arange(24) - 8) / 2.5) ** 2)
    for k in s.stims[4:]:
        x[:, k + 160 : k + 184] += spike
    out, _ = remove_stim_artifacts(x, s.stims / 20.0, FS, method=method, rails=(0, 1023))  # type: ignore[arg-type]
    plain, _ = remove_stim_artifacts(traces(s), s.stims / 20.0, FS, method=method, rails=(0, 1023))  # type: ignore[arg-type]
    kept = [(out - plain)[: N_CHANNELS - FREE, k + 168].mean() / -16 for k in s.stims[4:]]
    assert np.mean(kept) > 0.85
    assert np.abs((out - x)[-FREE:]).max() == 0


def test_clipping_is_found_though_the_stimulus_is_logged_early(pulses: Scene) -> None:
    x = traces(pulses)
    _, blank = remove_stim_artifacts(x, (pulses.stims - 12) / 20.0, FS, rails=(0, 1023))
    assert blank[(x <= 0) | (x >= 1023)].all()


def test_rails_need_not_be_known(pulses: Scene) -> None:
    x = traces(pulses)
    _, blank = remove_stim_artifacts(x, pulses.stims / 20.0, FS)
    clipped = (x <= 0) | (x >= 1023)
    assert blank[clipped].mean() > 0.95


def test_input_is_not_changed_and_no_stimuli_change_nothing(pulses: Scene) -> None:
    x = traces(pulses)
    before = x.copy()
    out, blank = remove_stim_artifacts(x, np.array([]), FS)
    remove_stim_artifacts(x, pulses.stims / 20.0, FS)
    assert np.array_equal(x, before) and np.array_equal(out, x) and not blank.any()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "spline"}, "method"),
        ({"traces": np.zeros(5)}, "traces"),
        ({"stim_times_ms": [1e9]}, "outside"),
        ({"stim_times_ms": [np.nan]}, "finite"),
        ({"fs_Hz": 0}, "fs_Hz"),
        ({"poly_order": 9}, "poly_order"),
        ({"patterns": [1, 2, 3]}, "patterns"),
    ],
)
def test_bad_input_is_told_in_one_line(change: dict, word: str) -> None:  # type: ignore[type-arg]
    arguments = {"traces": np.zeros((2, 2000)), "stim_times_ms": [10.0], "fs_Hz": FS, **change}
    with pytest.raises(ValueError, match=word) as e:
        remove_stim_artifacts(**arguments)
    assert "\n" not in str(e.value)


def test_bad_peak_modes_are_told() -> None:
    x = np.zeros((2, 2000))
    with pytest.raises(ValueError, match="peak_mode"):
        recenter_stim_times(x, [10.0], FS, peak_mode="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multi_peak_select"):
        recenter_stim_times(x, [10.0], FS, multi_peak_select="third")  # type: ignore[arg-type]
