"""Calibration finds the units that are there, whatever the storage, and says so when there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sort_scene import FS, LOOSE, QUIET, STRINGENT, Scene, grid, scene

from spiked.clean.noise import NoiseTracker
from spiked.errors import ConfigError
from spiked.offline.truth import score
from spiked.sort.assign import RTSort
from spiked.sort.calibrate import calibrate
from spiked.sort.mixture import parts
from spiked.sort.sequences import ROOT, Sequences


@pytest.fixture(scope="module")
def world() -> Scene:
    return scene(30, 6, seed=5)


def found(s: Scene, **more: object) -> Sequences:
    return calibrate(s.x, s.logits, None, FS, s.positions, None, STRINGENT, LOOSE, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1, 2, 5])
def test_units_are_found(seed: int) -> None:
    s = scene(30, 6, seed=seed)
    n = round(20 * FS)
    sequences = calibrate(s.x[:, :n], s.logits[:, :n], None, FS, s.positions, None, STRINGENT, LOOSE)
    noise, sorter = NoiseTracker(len(s.x), FS), RTSort(sequences, FS, len(s.x))
    out = []
    for a in range(n, s.x.shape[1], 2000):
        noise.process(s.x[:, a : a + 2000], None, a)
        out.append(sorter.process(s.x[:, a : a + 2000], s.logits[:, a : a + 2000], None, noise, a))
    got = np.concatenate([*out, sorter.flush()])
    later = s.samples >= n + 3000
    result = score(s.samples[later], s.units[later], got["sample"], got["unit"], FS, 0.4)
    accuracy = [r["accuracy"] for r in result.values()]
    assert np.mean(accuracy) > 0.75, accuracy
    assert len(sequences) <= 9


def test_what_a_sequence_says_is_so(world: Scene) -> None:
    s = found(world, first_sample=777, channel_ids=[f"ch{c}" for c in range(25)], network={"name": "made up"})
    assert (s.electrode[s.ptr[:-1]] == s.roots).all()
    assert (s.flags[s.ptr[:-1]] & ROOT).all()
    assert (s.latency[s.ptr[:-1]] == 0).all()
    assert s.channel_ids[3] == "ch3" and s.network["name"] == "made up"
    assert (s.first_sample, s.stop_sample) == (777, 777 + world.x.shape[1])
    np.testing.assert_allclose(s.rate_hz, s.n_spikes / 30)
    # in noise SDs of 5 uV
    np.testing.assert_allclose(-s.root_amplitude_uv / 5, s.root_amp_mean, rtol=0.2)


def test_float16_on_disk_gives_the_same_units(world: Scene, tmp_path: Path) -> None:
    for name, data in (("x", world.x), ("q", world.logits)):
        np.save(tmp_path / f"{name}.npy", data.astype(np.float16))
    x, q = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xq")
    a, b = found(world), calibrate(x, q, None, FS, world.positions, None, STRINGENT, LOOSE)
    assert abs(len(a) - len(b)) <= 1
    common = sum(np.minimum(np.bincount(a.roots, minlength=25), np.bincount(b.roots, minlength=25)))
    assert common >= min(len(a), len(b)) - 1


def test_it_is_deterministic(world: Scene) -> None:
    a, b = found(world), found(world)
    for name in ("roots", "ptr", "electrode", "latency", "amp", "prob", "n_spikes"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_nothing_there_gives_no_units() -> None:
    rng = np.random.default_rng(0)
    pos = grid(4)
    x = rng.normal(0, 5, (16, 40_000)).astype(np.float32)
    s = calibrate(x, np.full_like(x, QUIET), None, FS, pos, None, STRINGENT, LOOSE)
    assert len(s) == 0 and s.n_channels == 16
    flat = calibrate(np.zeros_like(x), np.full_like(x, 5.0), None, FS, pos, None, STRINGENT, LOOSE)
    assert len(flat) == 0


def test_invalid_stretches_are_left_out(world: Scene) -> None:
    n = world.x.shape[1]
    spoiled = world.x.copy()
    logits = world.logits.copy()
    bad = slice(200_000, 420_000)
    spoiled[:, bad] *= 50
    logits[:, bad] += 12
    clean = np.delete(np.arange(n), np.r_[bad])
    by_interval = calibrate(
        spoiled,
        logits,
        [(1000 + bad.start, 1000 + bad.stop)],
        FS,
        world.positions,
        None,
        STRINGENT,
        LOOSE,
        first_sample=1000,
    )
    mask = np.zeros(n, bool)
    mask[clean] = True
    by_mask = calibrate(spoiled, logits, mask, FS, world.positions, None, STRINGENT, LOOSE, first_sample=1000)
    unseen = logits.copy()
    unseen[:, bad] = -60_000
    by_logit = calibrate(
        spoiled, unseen, None, FS, world.positions, None, STRINGENT, LOOSE, first_sample=1000
    )
    for s in (by_interval, by_logit):
        np.testing.assert_array_equal(s.roots, by_mask.roots)
        np.testing.assert_array_equal(s.n_spikes, by_mask.n_spikes)
    assert len(by_mask) >= 4
    assert by_mask.root_amp_mean.max() < 60


def test_progress_rises_and_can_cancel(world: Scene) -> None:
    told: list[float] = []
    found(world, progress=lambda f, text: told.append(f))
    assert told == sorted(told) and told[-1] == 1.0

    class Cancelled(Exception):
        pass

    def stop(f: float, text: str) -> None:
        if f > 0.4:
            raise Cancelled

    with pytest.raises(Cancelled):
        found(world, progress=stop)


def test_arrays_that_do_not_fit_are_refused(world: Scene) -> None:
    with pytest.raises(ConfigError, match="must agree"):
        calibrate(world.x, world.logits[:, :-1], None, FS, world.positions, None, STRINGENT, LOOSE)
    with pytest.raises(ConfigError, match="mask"):
        calibrate(world.x, world.logits, np.ones(3, bool), FS, world.positions, None, STRINGENT, LOOSE)


def test_mixtures_find_the_parts() -> None:
    rng = np.random.default_rng(0)
    one = parts(rng.normal(3, 0.5, 400), 4, 1 / 12)
    assert one.max() == 0
    v = np.concatenate([rng.normal(0, 0.5, 300), rng.normal(4, 0.5, 200), rng.normal(9, 0.5, 100)])
    label = parts(v, 4, 1 / 12)
    assert label.max() == 2
    assert [len(set(label[a:b])) for a, b in ((0, 300), (300, 500), (500, 600))] == [1, 1, 1]
    assert parts(np.array([1.0]), 4, 1 / 12).tolist() == [0]
    assert parts(np.full(50, 2.0), 4, 1 / 12).max() == 0
