"""Units keep their ids from one calibration to the next; what is new gets an id that was never given."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
from live_rig import FS, LEARN_S, cleaned, recording, templates

from spiked.errors import ConfigError
from spiked.templates.identity import match_ids, similarity
from spiked.templates.learn import learn
from spiked.templates.library import Templates


@cache
def later() -> Templates:
    """The same cells, learned from the other half of the recording, in another order."""
    rec, n = recording(), LEARN_S * FS
    k = rec.truth["sample"] >= n + 100
    x = np.ascontiguousarray(cleaned()[:, n:]).astype(np.float16)
    unit = 4 - rec.truth["unit"][k]
    return learn(x, rec.truth["sample"][k] - n, unit, FS, rec.info.positions, rec.info.channel_ids)


def test_the_same_cells_keep_their_ids_whatever_their_order() -> None:
    earlier = templates().with_ids(np.array([40, 11, 23, 8, 5], np.int32), 60)
    m = match_ids(earlier, later())
    known = dict(zip([40, 11, 23, 8, 5], earlier.roots.tolist(), strict=True))
    assert sorted(m.previous_id.tolist()) == [5, 8, 11, 23, 40]
    apart = [
        np.hypot(*(earlier.positions_um[r] - earlier.positions_um[known[int(u)]]))
        for u, r in zip(m.templates.unit_ids, m.templates.roots, strict=True)
    ]
    assert max(apart) <= 20  # of electrodes that see a cell equally well, now one is the root and now another
    np.testing.assert_array_equal(m.templates.unit_ids, [5, 8, 23, 11, 40])
    assert m.confidence.min() > 0.8
    np.testing.assert_array_equal(m.templates.id_confidence, m.confidence)


def test_a_new_cell_takes_no_old_id_and_a_missing_one_leaves_its_id_unused() -> None:
    earlier = templates().keep(np.array([0, 1, 2, 3])).with_ids(np.array([0, 1, 2, 3], np.int32), 9)
    m = match_ids(earlier, later().keep(np.array([0, 1, 2])))  # true cells 4, 3 and 2
    np.testing.assert_array_equal(m.templates.unit_ids, [9, 3, 2])
    np.testing.assert_array_equal(m.previous_id, [-1, 3, 2])
    assert m.confidence[0] == 0 and m.templates.next_unit_id == 10


def test_other_channels_or_no_units_match_nothing() -> None:
    elsewhere = dataclasses.replace(templates(), channel_ids=tuple(f"other{i}" for i in range(16)))
    assert (match_ids(elsewhere, later()).previous_id == -1).all()
    moved = dataclasses.replace(templates(), positions_um=templates().positions_um + 100.0)
    assert (match_ids(moved, later()).previous_id == -1).all()
    none = templates().keep(np.zeros(5, bool))
    assert similarity(none, later()).shape == (5, 0)
    assert len(match_ids(none, later()).templates) == 5


def test_a_quieter_unit_is_still_itself_and_a_much_quieter_one_is_not() -> None:
    def scaled(by: float) -> Templates:
        return dataclasses.replace(templates(), waveform=templates().waveform * by)

    assert (match_ids(scaled(0.8), later()).previous_id >= 0).all()
    assert (match_ids(scaled(0.2), later()).previous_id == -1).all()


def test_rates_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match="30000 Hz cannot be compared with those of 20000 Hz"):
        match_ids(dataclasses.replace(templates(), fs_hz=30_000.0), later())
