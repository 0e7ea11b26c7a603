"""The generator: determinism, known spikes where they are said to be, physics of the templates, speed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spiked_models.cells import grow, make_template, membrane_currents
from spiked_models.synthesis import (
    MAXWELL,
    Noise,
    Recording,
    hdmea_grid,
    neuropixels,
    synthesize,
)


def small(duration_s: float | None = 1.0, seed: int = 3) -> Recording:
    return synthesize(
        hdmea_grid(4, 4), 20_000, duration_s, n_units=4, seed=seed, rate_hz=(5, 30), n_background=6
    )


def test_geometry() -> None:
    grid = hdmea_grid(3, 5)
    assert grid.shape == (15, 2)
    assert grid[1].tolist() == [17.5, 0] and grid[5].tolist() == [0, 17.5]
    sites = neuropixels(8)
    assert sites[:, 1].tolist() == [0, 0, 20, 20, 40, 40, 60, 60]
    assert len(np.unique(sites[:, 0])) == 4
    assert len(np.unique(sites, axis=0)) == 8


@settings(max_examples=15, deadline=None)
@given(block=st.integers(1, 5000))
def test_stream_does_not_depend_on_the_cut(block: int) -> None:
    whole = small(0.35)
    parts = list(whole.blocks(block))
    assert np.array_equal(np.concatenate([c for c, _ in parts]), whole.codes)
    assert np.array_equal(np.concatenate([s for _, s in parts]), whole.spikes)
    assert [len(c) for c, _ in parts[:-1]] == [block] * (len(parts) - 1)
    for i, (codes, spikes) in enumerate(parts):
        at = spikes["sample"] - i * block
        assert ((at >= 0) & (at < len(codes))).all()


def test_same_seed_same_recording_other_seed_other() -> None:
    assert np.array_equal(small().codes, small().codes)
    assert not np.array_equal(small().codes, small(seed=4).codes)


def test_endless_stream_and_its_limits() -> None:
    rec = small(None)
    stream = rec.blocks(3000)
    first = next(stream)[0]
    assert first.shape == (3000, 16)
    assert np.array_equal(first, small(0.15).codes)
    with pytest.raises(ValueError, match="no end"):
        _ = rec.codes
    with pytest.raises(ValueError, match="at least 1"):
        next(rec.blocks(0))
    with pytest.raises(ValueError, match="no recording"):
        synthesize(hdmea_grid(2, 2), 20_000, -1, n_units=1)


def test_spikes_are_where_the_truth_says() -> None:
    quiet = Noise(uv=1.0, spread=0.0, tissue=0.3)
    rec = synthesize(hdmea_grid(6, 6), 20_000, 4.0, 5, seed=5, noise=quiet, snr=(40, 80), rate_hz=(2, 4),
                     burst_p=0.0, n_background=0)  # fmt: skip
    x, spikes = rec.microvolts(), rec.spikes
    order = np.diff(spikes["sample"])
    alone = spikes[1:-1][(order[1:] > 200) & (order[:-1] > 200)]
    assert len(alone) > 15
    off, heights = [], []
    for s in alone:
        piece = x[s["sample"] - 6 : s["sample"] + 7, s["channel"]]
        # Judged by its sign: the root may see a positive spike.
        piece = piece * np.sign(s["peak_uv"])
        off.append(int(piece.argmax()) - 6)
        heights.append(piece.max() / abs(s["peak_uv"]))
    assert np.mean(np.abs(off) <= 1) > 0.95
    assert 0.85 < np.median(heights) < 1.1
    assert np.allclose(
        np.abs(spikes["peak_uv"]) / spikes["snr"], rec.noise_sd_uv[spikes["channel"]], rtol=1e-3
    )


def test_refractory_period_and_rates() -> None:
    rec = synthesize(hdmea_grid(2, 2), 10_000, 40.0, 2, seed=9, rate_hz=(20, 20.001), n_background=0)
    for unit in range(2):
        times = rec.spikes["sample"][rec.spikes["unit"] == unit]
        assert np.diff(times).min() >= 0.002 * 10_000 - 1
        assert 14 < len(times) / 40 < 30


def test_noise_level_and_spatial_correlation() -> None:
    noise = Noise(uv=7.0, spread=0.0, tissue=0.8, tissue_um=40)
    rec = synthesize(hdmea_grid(6, 6), 20_000, 4.0, 0, seed=2, noise=noise, n_background=0)
    x = rec.microvolts()
    assert 6.3 < x.std(0).mean() < 7.7
    corr = np.corrcoef(x.T)
    apart = np.linalg.norm(rec.positions_um[:, None] - rec.positions_um[None], axis=2)
    near, far = corr[(apart > 0) & (apart < 20)].mean(), np.abs(corr[apart > 80]).mean()
    assert near > far + 0.1
    power = np.abs(np.fft.rfft(x, axis=0)) ** 2
    hz = np.fft.rfftfreq(len(x), 1 / 20_000)
    assert power[(hz > 20) & (hz < 200)].mean() > 4 * power[hz > 6000].mean()


def test_field_hum_and_common_noise_are_what_they_are_called() -> None:
    def made(**more: float) -> np.ndarray:
        noise = Noise(uv=2.0, spread=0.0, **more)
        return synthesize(hdmea_grid(4, 4), 10_000, 4.0, 0, seed=2, noise=noise, n_background=0).microvolts()

    plain, hz = made(), np.fft.rfftfreq(40_000, 1e-4)

    def power(x: np.ndarray) -> np.ndarray:
        return np.asarray((np.abs(np.fft.rfft(x - x.mean(0), axis=0)) ** 2).mean(1))

    field = made(lfp_uv=30.0)
    assert 20 < field.std(0).mean() < 40
    assert power(field)[hz < 300].sum() > 0.8 * power(field).sum()
    assert abs(np.corrcoef(field.T)[0, 1]) > 0.9
    mains = power(made(hum_uv=5.0)) / power(plain)
    assert mains[np.isclose(hz, 50)] > 100 and np.median(mains) < 3
    shared = np.corrcoef(made(common=1.0).T)[np.triu_indices(16, 1)].mean()
    assert shared > np.corrcoef(plain.T)[np.triu_indices(16, 1)].mean() + 0.2


def test_population_bursts_bring_the_units_together() -> None:
    def together(population_hz: float) -> float:
        rec = synthesize(hdmea_grid(3, 3), 10_000, 30.0, 8, seed=4, rate_hz=(2, 4), burst_p=0.0, n_background=0,
                         population_hz=population_hz)  # fmt: skip
        times, units = rec.spikes["sample"], rec.spikes["unit"]
        for unit in range(8):
            assert np.diff(times[units == unit]).min() >= 19
        counts = np.bincount(times // 1000, minlength=300)
        return float(counts.var() / counts.mean())

    assert together(0.5) > 5 * together(0.0)


def test_amplitudes_fall_along_a_burst() -> None:
    rec = synthesize(hdmea_grid(2, 2), 10_000, 60.0, 1, seed=5, rate_hz=(3, 4), burst_p=0.9, n_background=0,
                     amplitude_jitter=0.01, burst_decay=(0.6, 0.6), burst_ms=(2.5, 4.0))  # fmt: skip
    near = np.diff(rec.spikes["sample"]) < 41
    ratio = rec.spikes["scale"][1:][near] / rec.spikes["scale"][:-1][near]
    assert len(ratio) > 20 and 0.58 < np.median(ratio) < 0.62


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_few_channels(channels: int) -> None:
    rec = synthesize(neuropixels(channels), 30_000, 0.3, 2, seed=1, rate_hz=(30, 40))
    assert rec.codes.shape == (9000, channels)
    assert len(rec.spikes) > 2 and rec.microvolts().std() > 3


def test_codes_of_an_adc() -> None:
    rec = synthesize(hdmea_grid(3, 3), 20_000, 0.5, 2, seed=1, adc=MAXWELL, snr=(500, 600), rate_hz=(50, 60))
    assert rec.codes.dtype == np.uint16
    assert rec.codes.min() >= 0 and rec.codes.max() <= 1023
    assert abs(np.median(rec.codes) - 512) < 5
    assert (rec.codes == 0).any(), "large spikes must reach the rail"


def test_currents_of_a_cell_sum_to_zero() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        current = membrane_currents(grow(rng), np.linspace(-2, 4, 300), rng)
        assert np.abs(current.sum(0)).max() < 1e-9 * np.abs(current).max() * len(current)


def test_templates_look_like_spikes() -> None:
    positions, widths, spread = hdmea_grid(9, 9), [], []
    for seed in range(30):
        t = make_template(positions, 20_000, (70.0, 70.0, 20.0), np.random.default_rng(seed))
        root = t.waves[0, np.searchsorted(t.channels, t.root)]
        assert np.abs(t.waves[:, :, [0, -1]]).max() < 0.02
        widths.append((root < -0.5).sum() / 20)
        at, height = t.peaks()
        assert at[np.searchsorted(t.channels, t.root)] == pytest.approx(t.pre, abs=1)
        distance = np.linalg.norm(positions[t.channels] - (70.0, 70.0), axis=1)
        spread.append(np.abs(height[distance > 60]).mean() / np.abs(height[distance < 20]).mean())
    assert 0.1 <= np.median(widths) <= 0.5
    assert np.median(spread) < 0.4
    assert np.std(widths) > 0.03


@pytest.mark.parametrize("family", ["lobes", "axon"])
def test_other_families_look_like_spikes_too(family: str) -> None:
    positions, widths, delays = hdmea_grid(9, 9), [], []
    for seed in range(30):
        t = make_template(
            positions, 20_000, (70.0, 70.0, 20.0), np.random.default_rng(seed), 0.1, family=family
        )
        root = t.waves[0, np.searchsorted(t.channels, t.root)]
        assert np.isfinite(t.waves).all() and np.abs(root).max() == pytest.approx(1, abs=0.2)
        widths.append((root < -0.5).sum() / 20)
        at, height = t.peaks()
        delays.append(np.ptp(at[height < -0.2]))
    assert 0.05 <= np.median(widths) <= 0.5 and np.std(widths) > 0.02
    assert np.median(delays) >= 1


def test_a_mixture_of_families_is_a_recording() -> None:
    shares = {"cable": 1.0, "lobes": 1.0, "axon": 1.0}
    mixed = synthesize(hdmea_grid(4, 4), 20_000, 0.5, 9, seed=1, families=shares)
    plain = synthesize(hdmea_grid(4, 4), 20_000, 0.5, 9, seed=1)
    assert mixed.codes.shape == plain.codes.shape and not np.array_equal(mixed.codes, plain.codes)
    assert len(mixed.spikes) > 10


def test_synthesis_needs_no_torch() -> None:
    code = "import sys, spiked_models.synthesis, spiked_models.cards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0
