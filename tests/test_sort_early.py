"""Early decisions: the spikes of the rule that waits for every possible rival, in its order, none later."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sort_scene import FS, LOOSE, STRINGENT, Scene, cuts, scene

from spiked.clean.noise import NoiseTracker
from spiked.sort import assign
from spiked.sort.assign import RTSort
from spiked.sort.calibrate import calibrate
from spiked.sort.parameters import RTSortParameters
from spiked.sort.sequences import Sequences

N, WARM = 3000, 2000  # samples of a test; before them noise becomes known
KEYS = ["sample", "unit", "channel", "amplitude_uv", "score"]


@pytest.fixture(scope="module")
def world() -> tuple[Scene, Sequences]:
    s = scene(24, 8, seed=5)
    n = round(20 * FS)
    found = calibrate(s.x[:, :n], s.logits[:, :n], None, FS, s.positions, None, STRINGENT, LOOSE)
    assert len(found) >= 6
    return s, found


def crowd(s: Scene, rng: np.random.Generator, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Several stretches of the scene on top of each other: spikes of all units overlap."""
    starts = rng.integers(0, s.x.shape[1] - N - WARM, layers)
    x, q = (np.array([a[:, k : k + N + WARM] for k in starts]) for a in (s.x, s.logits))
    largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    return np.where(np.abs(largest) > 25, largest, x[0]), q.max(0)


def run(sorter: RTSort, x: np.ndarray, q: np.ndarray, borders: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """All spikes and, for each, how many samples had come when it did."""
    noise, out, seen = NoiseTracker(len(x), FS), [], []
    for a, b in itertools.pairwise(borders):
        noise.process(x[:, a:b], None, a)
        out.append(sorter.process(x[:, a:b], q[:, a:b], None, noise, a).copy())
        seen.append(np.full(len(out[-1]), b))
    out.append(sorter.flush().copy())
    return np.concatenate(out), np.concatenate([*seen, np.full(len(out[-1]), borders[-1])])


def patient(
    found: np.ndarray, unit: list[int], window: np.ndarray, until: int, ahead: int
) -> list[tuple[int, int]]:
    """The rule that waits `longest` samples for whatever may come: (row of the candidate, samples there by then)."""
    sample, score, longest = found["sample"].tolist(), found["score"].tolist(), int(window.max())
    live: list[int] = []
    accepted: set[int] = set()
    told: dict[int, int] = {}
    for fill in range(ahead + 1, until + 1):
        seen = fill - ahead
        live = sorted(
            [*live, *np.flatnonzero(found["sample"] == seen - 1).tolist()],
            key=lambda i: (-score[i], sample[i], unit[i]),
        )
        kept: list[int] = []
        for i in live:
            rivals = [j for j in kept if abs(sample[j] - sample[i]) <= window[unit[i], unit[j]]]
            if i in accepted or not accepted.intersection(rivals):
                kept.append(i)
                if not rivals and sample[i] + longest < seen:
                    accepted.add(i)
        first = min((sample[i] for i in kept if i not in accepted), default=seen)
        ready = [i for i in kept if i in accepted and sample[i] < first and i not in told]
        told |= dict.fromkeys(sorted(ready, key=lambda i: (sample[i], unit[i])), fill)
        live = [i for i in kept if i not in told or sample[i] >= first - longest]
    return list(told.items())


def lit(
    told: list[tuple[int, int]], sample: np.ndarray, unit: np.ndarray, shadow: np.ndarray
) -> list[tuple[int, int]]:
    """Those of the rows told, in their order, that no earlier one of them casts its shadow on."""
    out: list[tuple[int, int]] = []
    for i, fill in told:
        if all(sample[i] - sample[j] > shadow[unit[j], unit[i]] for j, _ in out):
            out.append((i, fill))
    return out


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 100_000), layers=st.integers(1, 8), overlap_ms=st.sampled_from([0.1, 0.2, 0.6]),
    shared_ms=st.sampled_from([0.3, 0.5, 0.9]), root_sd=st.sampled_from([0.5, 2.5, 50.0]),
    hurry=st.booleans(),
)  # fmt: skip
def test_the_same_spikes_only_earlier(
    world: tuple[Scene, Sequences],
    seed: int,
    layers: int,
    overlap_ms: float,
    shared_ms: float,
    root_sd: float,
    hurry: bool,
) -> None:
    s, sequences = world
    rng = np.random.default_rng(seed)
    x, q = crowd(s, rng, layers)
    params = RTSortParameters(
        overlap_ms=overlap_ms, shared_overlap_ms=shared_ms, max_root_amplitude_sd=root_sd,
        max_latency_diff_ms=0.3, max_amplitude_diff=2.0, min_loose_fraction=0,
    )  # fmt: skip
    sequences = dataclasses.replace(
        sequences, min_loose=np.ones(len(sequences)), min_inner=np.ones(len(sequences))
    )
    sorter = RTSort(sequences, FS, len(x), params, hurry=hurry)
    end = x.shape[1]
    got, seen = run(sorter, x, q, list(range(end + 1)))
    assert sorter.dropped == 0

    free = RTSort(sequences, FS, len(x), params, hurry=hurry)  # nothing conflicts: it tells every candidate
    window = assign.conflict_windows(sequences, params, hurry)
    free._window[:] = free._shadow[:] = -1
    candidates = run(free, x, q, [0, end])[0]
    unit = np.searchsorted(sequences.unit_ids, candidates["unit"])
    told = patient(candidates, unit.tolist(), window, end, sorter._ahead)
    told = lit(told, candidates["sample"], unit, assign.shadows(sequences, params))
    # what the patient rule still waits for at the end of the stream is told by both when it is flushed
    n = len(told)
    assert n > 5 or layers < 3 or root_sd < 1
    np.testing.assert_array_equal(got[:n], candidates[[i for i, _ in told]])
    assert (seen[:n] <= [fill for _, fill in told]).all()
    if n > 20 and layers < 3:
        assert np.median(seen[:n] - got["sample"][:n]) < np.median(
            [f - candidates["sample"][i] for i, f in told]
        )

    pieces, _ = run(RTSort(sequences, FS, len(x), params, hurry=hurry), x, q, cuts(rng, end))
    np.testing.assert_array_equal(pieces, got)


def test_a_spike_alone_is_final_with_the_samples_it_is_judged_by(world: tuple[Scene, Sequences]) -> None:
    s, sequences = world
    sorter = RTSort(sequences, FS, len(s.x))
    x, q = s.x[:, : N + WARM], s.logits[:, : N + WARM]
    got, seen = run(sorter, x, q, list(range(N + WARM + 1)))
    waited = seen - got["sample"]
    assert len(got) >= 10
    assert waited.min() == sorter.lookahead_samples <= sorter.half + 1
    assert np.median(waited) <= sorter.lookahead_samples + 1
