"""Unit ids across recalibration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sort_scene import FS, LOOSE, STRINGENT, scene

from spiked.sort.calibrate import calibrate
from spiked.sort.match import match_ids
from spiked.sort.sequences import Sequences


@pytest.fixture(scope="module")
def halves() -> tuple[Sequences, Sequences]:
    s = scene(40, 6, seed=3)
    cut = round(20 * FS)
    both = [
        calibrate(
            s.x[:, z], s.logits[:, z], None, FS, s.positions, None, STRINGENT, LOOSE, first_sample=z.start
        )
        for z in (slice(0, cut), slice(cut, 2 * cut))
    ]
    assert min(map(len, both)) >= 5
    return both[0], both[1]


def without(s: Sequences, unit: int) -> Sequences:
    keep = np.arange(len(s)) != unit
    entry = np.repeat(keep, np.diff(s.ptr))
    per_unit = (
        "unit_ids",
        "roots",
        "root_amp_mean",
        "root_amp_sd",
        "root_amplitude_uv",
        "min_loose",
        "min_inner",
        "n_spikes",
        "rate_hz",
        "id_confidence",
    )
    per_entry = ("electrode", "latency", "latency_sd", "amp", "amp_sd", "prob", "flags")
    return dataclasses.replace(
        s,
        **{k: getattr(s, k)[keep] for k in per_unit},
        **{k: getattr(s, k)[entry] for k in per_entry},
        ptr=np.concatenate([[0], np.cumsum(np.diff(s.ptr)[keep])]),
    )


def test_the_same_units_keep_their_ids(halves: tuple[Sequences, Sequences]) -> None:
    first, second = halves
    first = first.with_ids(np.arange(len(first))[::-1] + 30)
    m = match_ids(first, second)
    for k in range(len(second)):
        if m.previous_id[k] >= 0:
            before = np.flatnonzero(first.unit_ids == m.previous_id[k])[0]
            assert first.roots[before] == second.roots[k]
            assert abs(first.root_amp_mean[before] - second.root_amp_mean[k]) < 0.2 * second.root_amp_mean[k]
            assert 0 < m.confidence[k] <= 1
    assert (m.previous_id >= 0).sum() >= 5


def test_itself_is_matched_surely(halves: tuple[Sequences, Sequences]) -> None:
    m = match_ids(halves[0], halves[0])
    np.testing.assert_array_equal(m.sequences.unit_ids, halves[0].unit_ids)
    assert m.confidence.min() > 0.45


def test_a_new_unit_gets_a_new_id_and_a_lost_one_is_not_reused(halves: tuple[Sequences, Sequences]) -> None:
    full = halves[0]
    last = len(full) - 1
    m = match_ids(without(full, 0), full)
    assert m.previous_id[0] == -1
    assert m.sequences.unit_ids[0] == full.unit_ids.max() + 1
    assert m.confidence[0] == 0
    # the largest id disappears, then something new turns up
    gone = match_ids(full, without(full, last)).sequences
    again = match_ids(gone, full).sequences
    assert again.unit_ids[last] == full.unit_ids.max() + 1


def test_nothing_in_common_gives_new_ids(halves: tuple[Sequences, Sequences]) -> None:
    first, second = halves
    other = dataclasses.replace(first, channel_ids=tuple(f"x{c}" for c in range(first.n_channels)))
    m = match_ids(other, second)
    assert (m.previous_id == -1).all()
    assert m.sequences.unit_ids.min() == other.next_unit_id
    assert len(match_ids(first, without(without(second, 0), 0)).sequences) == len(second) - 2


def test_a_surplus_piece_does_not_take_the_id_of_another_cell(halves: tuple[Sequences, Sequences]) -> None:
    """Two pieces of one cell where there was one: the second gets a new id, although another cell's is free."""
    first, second = halves
    ids = match_ids(first, second).previous_id
    whole = int(np.flatnonzero(ids >= 0)[0])
    gone = int(np.flatnonzero((ids >= 0) & (np.arange(len(ids)) != whole))[0])
    pieces = louder(second, gone, whole, 1.2)  # in the place of `gone` a second piece of `whole`
    m = match_ids(first, pieces)
    assert m.previous_id[gone] == -1 or m.previous_id[whole] == -1
    assert ids[gone] not in m.previous_id


def louder(s: Sequences, unit: int, of: int, factor: float) -> Sequences:
    """`unit` replaced by unit `of` with all amplitudes times `factor`."""
    order = np.arange(len(s))
    order[unit] = of
    entries = np.concatenate([np.arange(s.ptr[k], s.ptr[k + 1]) for k in order])
    size = np.diff(s.ptr)[order]
    amp = s.amp[entries] * np.repeat(np.where(np.arange(len(s)) == unit, factor, 1.0), size)
    per_entry = ("electrode", "latency", "latency_sd", "amp_sd", "prob", "flags")
    return dataclasses.replace(
        s, roots=s.roots[order], amp=amp, **{k: getattr(s, k)[entries] for k in per_entry},
        ptr=np.concatenate([[0], np.cumsum(size)]),
    )  # fmt: skip


def test_the_confidence_is_kept_with_the_ids(halves: tuple[Sequences, Sequences], tmp_path: Path) -> None:
    first, second = halves
    m = match_ids(first, second)
    m.sequences.save(tmp_path / "s.h5")
    np.testing.assert_array_equal(Sequences.load(tmp_path / "s.h5").id_confidence, m.confidence)
    assert ((m.confidence > 0) == (m.previous_id >= 0)).all()
    assert (first.id_confidence == 0).all()
