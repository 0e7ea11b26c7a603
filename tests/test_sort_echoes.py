"""Units that take part of another's spikes for their own are known after calibration, and compete for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sort_scene import FS, LOOSE, STRINGENT, Scene, scene

from spiked.bench.sort import reports
from spiked.errors import ConfigError
from spiked.sort.assign import conflict_windows, shadows
from spiked.sort.calibrate import calibrate
from spiked.sort.echoes import NO_ECHOES, echoes, renumbered
from spiked.sort.parameters import RTSortParameters
from spiked.sort.sequences import Sequences


def trains(seed: int = 0, n: int = 2000) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(60 * 20_000, n, replace=False)) for _ in range(4)]


def test_spikes_at_a_fixed_lag_are_echoes_and_chance_is_not() -> None:
    rng, known = np.random.default_rng(1), trains()
    assert len(echoes(known, FS, 0.5, 0.02)) == 0
    copied = known[2][rng.random(len(known[2])) < 0.1]
    known[0] = np.unique([*known[0], *(copied + 6 + rng.integers(-1, 2, len(copied)))])
    assert echoes(known, FS, 0.5, 0.02).tolist() == [[0, 2, 8]]


def test_cells_that_burst_together_are_not_echoes() -> None:
    rng, known = np.random.default_rng(2), trains(n=200)
    bursts = rng.integers(0, 60 * 20_000, 500)
    known = [np.unique([*t, *(bursts + rng.integers(-200, 200, 500))]) for t in known]
    assert len(echoes(known, FS, 0.5, 0.02)) == 0


def test_echoes_follow_their_units() -> None:
    known = np.array([[0, 2, 8], [1, 3, 2]], np.int32)
    assert renumbered(known, np.array([1, 0, -1, 2])).tolist() == [[0, 2, 2]]
    assert renumbered(NO_ECHOES, np.arange(3)).shape == (0, 3)


@pytest.fixture(scope="module")
def world() -> tuple[Scene, Sequences]:
    s = scene(20, 5, seed=4)
    return s, calibrate(s.x, s.logits, None, FS, s.positions, None, STRINGENT, LOOSE)


def test_an_echo_competes_and_is_kept_in_the_file(world: tuple[Scene, Sequences], tmp_path: Path) -> None:
    _, s = world
    with_one = dataclasses.replace(s, echoes=np.array([[0, len(s) - 1, 7]]))
    window = conflict_windows(with_one, s.parameters)
    assert window[0, -1] == window[-1, 0] >= 7
    with_one.save(tmp_path / "s.h5")
    np.testing.assert_array_equal(Sequences.load(tmp_path / "s.h5").echoes, with_one.echoes)
    with pytest.raises(ConfigError, match="echo"):
        dataclasses.replace(s, echoes=np.array([[0, len(s), 7]]))


def test_a_unit_shadows_itself_and_smaller_ones(world: tuple[Scene, Sequences]) -> None:
    _, s = world
    shadow = shadows(s, s.parameters)
    assert (np.diag(shadow) == 10).all()
    smaller = s.root_amp_mean[:, None] < s.root_amp_mean[None]
    assert (shadow[smaller] == -1).all() and (shadow[~smaller] > 0).any()


def test_the_published_rule_can_be_had(world: tuple[Scene, Sequences]) -> None:
    s, _ = world
    p = RTSortParameters.published(FS)
    found = calibrate(s.x, s.logits, None, FS, s.positions, p, STRINGENT, LOOSE)
    assert len(found) and len(found.echoes) == 0
    assert found.parameters == p == RTSortParameters.from_json(p.to_json())
    assert found.min_loose.min() >= 4 and found.min_inner.min() >= 3
    assert RTSortParameters.published(30_000.0).max_amplitude_diff == 0.45


def test_reports_of_isolated_spikes_are_counted() -> None:
    true = np.array([1000, 2000, 3000, 3010, 5000])  # 3000 and 3010 are not isolated
    told = np.array([1003, 2001, 2005, 3000])
    out = reports(true, told, FS)
    assert out["isolated_true_spikes"] == 3
    assert out["isolated_reported"] == {"0": 0.3333, "1": 0.3333, "2+": 0.3333}
