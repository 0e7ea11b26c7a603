"""Calibration beside the live path: fed by it, never in its way."""

from __future__ import annotations

import numpy as np

from spiked.sort.features import as_float32, seen_in


def test_every_float16_becomes_the_float32_that_numpy_makes_of_it() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    got = as_float32(halves[:, 3:200])
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, halves[:, 3:200].astype(np.float32))


def test_only_what_was_not_seen_makes_a_mask() -> None:
    logits = np.full((2, 5), -3.0, np.float32)
    assert seen_in(logits, None) is None and seen_in(logits, np.ones(5, bool)) is None
    logits[1, 2] = -60_000
    mask = seen_in(logits, np.array([True, True, True, True, False]))
    assert mask is not None
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 0, 1, 0]])
