"""Decisions in two steps: the final ones as ever, the early ones the same for every cut, and each of these resolved once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from allocations import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from live_rig import FS, recording, templates

from spiked.config import Live
from spiked.live.early import END, TwoSteps
from spiked.live.pipeline import LivePipeline
from spiked.stream import Chunk, Flag
from spiked.templates.sorter import REFRACTORY_MS
from spiked_client.protocol import FATES, RESOLVED, SPIKE, TOLD_EARLY

N = 60_000
REACH = round(REFRACTORY_MS * FS / 1000) - 1
CONFIRMED, WITHDRAWN = FATES.index("confirmed"), FATES.index("withdrawn")


def pipeline(early: bool = True) -> LivePipeline:
    rec = recording()
    return rec.pipeline(Live(early=early), units=templates(), scaling=rec.scaling, reuse=True)


def by_sample(found: list[np.ndarray]) -> np.ndarray:
    out = np.concatenate(found)
    return out[np.lexsort((out["unit"], out["sample"]))]


class Told:
    """What a stream that was cut in this way told: final spikes, early decisions, the early ones told, what became of them."""

    def __init__(
        self,
        cuts: list[int],
        codes: np.ndarray,
        gap: bool = False,
        p: LivePipeline | None = None,
        first: int = 0,
    ) -> None:
        p = p or pipeline()
        self.steps, self.pipeline = TwoSteps(REACH), p
        final, decided, told, resolved = [], [], [], []
        self.late = np.zeros(0)  # samples that had come when an early one was told
        for a, b in pairwise(sorted({0, len(codes), *(c for c in cuts if 0 < c < len(codes))})):
            flag = Flag.GAP if gap and 30_000 <= a < 30_500 else Flag.NONE
            r = p.process(Chunk(first + a, codes[a:b], 0, flag))
            resolved.append(self.steps.final(r.spikes, r.decided_until).copy())
            found = p.early()
            decided.append(found.copy())
            told.append(self.steps.early(found, r.spikes, r.decided_until).copy())
            self.late = np.concatenate([self.late, first + b - told[-1]["sample"]])
            final.append(r.spikes.copy())
            p.prepare()
        rest = p.flush()
        resolved.append(self.steps.final(rest, END).copy())
        self.final, self.decided = by_sample([*final, rest]), by_sample(decided)
        self.told, self.resolved = np.concatenate(told), np.concatenate(resolved)

    def check(self) -> None:
        """Every early spike is resolved once; what is confirmed is a final spike, no final spike is confirmed twice."""
        assert not len(self.steps)
        assert self.told["number"].tolist() == list(range(1, len(self.told) + 1))
        assert sorted(self.resolved["number"].tolist()) == self.told["number"].tolist()
        of = {int(e["number"]): e for e in self.told}
        finals = Counter(zip(self.final["sample"].tolist(), self.final["unit"].tolist(), strict=True))
        assert max(finals.values()) == 1
        flagged = self.final[(self.final["flags"] & TOLD_EARLY) > 0]
        confirmed = self.resolved[self.resolved["fate"] == CONFIRMED]
        assert by_sample([confirmed])[["sample", "unit"]].tolist() == flagged[["sample", "unit"]].tolist()
        for r in self.resolved:
            e = of[int(r["number"])]
            assert (r["unit"], r["early_sample"]) == (e["unit"], e["sample"])
            near = abs(self.final["sample"][self.final["unit"] == r["unit"]] - e["sample"]) <= REACH
            if r["fate"] == CONFIRMED:
                assert abs(int(r["sample"]) - int(e["sample"])) <= REACH
            else:
                assert r["sample"] == -1 and (not near.any() or len(confirmed))
        counts = {"told": len(self.told), "confirmed": len(confirmed)}
        assert self.steps.counters == {**counts, "withdrawn": len(self.told) - len(confirmed)}


def codes(gap: bool = False) -> np.ndarray:
    out = recording().codes[:N].copy()
    if gap:
        out[30_000:30_500] = 0
    return out


def test_final_spikes_are_the_same_with_early_ones_and_without() -> None:
    data, cuts = codes(), list(range(20, N, 20))
    off, final = pipeline(early=False), []
    for a, b in pairwise([0, *cuts, N]):
        final.append(off.process(Chunk(a, data[a:b], 0, Flag.NONE)).spikes.copy())
        assert not len(off.early())
    without = by_sample([*final, off.flush()])
    told = Told(cuts, data)
    told.check()
    assert len(without) > 50
    plain = told.final.copy()
    plain["flags"] = 0
    np.testing.assert_array_equal(plain, without)


def test_most_spikes_are_told_early_and_few_for_nothing() -> None:
    told = Told(list(range(20, N, 20)), codes())
    assert (told.final["flags"] & TOLD_EARLY).mean() > 0.7
    assert told.steps.counters["withdrawn"] < 0.1 * len(told.told)
    early = told.pipeline.sorter.early  # type: ignore[union-attr]
    assert early is not None and early.lookahead_samples <= 12  # of 28 of the final step
    assert np.median(told.late) <= early.lookahead_samples + 20


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, N - 1), max_size=60), ones=st.integers(0, N - 1000), gap=st.booleans())
def test_any_cut_gives_the_same_decisions_of_both_kinds(cuts: list[int], ones: int, gap: bool) -> None:
    data, edges = codes(gap), [30_000, 30_500] if gap else []
    whole = Told(edges, data, gap, first=7_000_000)
    cut = Told([*edges, *cuts, *range(ones, ones + 60)], data, gap, first=7_000_000)
    for t in (whole, cut):
        t.check()
    np.testing.assert_array_equal(whole.decided, cut.decided)
    plain = whole.final.copy(), cut.final.copy()
    for p in plain:
        p["flags"] = 0
    np.testing.assert_array_equal(*plain)
    assert len(whole.decided) > 50
    # What depends on the cut: one that the same chunk makes final is not told early any more.
    keys = {(int(e["sample"]), int(e["unit"])) for e in cut.decided}
    assert all((int(e["sample"]), int(e["unit"])) in keys for e in [*whole.told, *cut.told])


def test_other_units_and_holes_leave_nothing_open() -> None:
    data, p = codes(), pipeline()
    steps, told, resolved, final = TwoSteps(REACH), [], [], []
    for a, b in pairwise(range(0, N + 1, 20)):
        if a in (15_000, 45_000):
            p.swap(templates())
        if a == 30_000:
            p.skip(30_000, 30_400)
        if 30_000 <= a < 30_400:
            continue
        r = p.process(Chunk(a, data[a:b], 0, Flag.NONE))
        resolved.append(steps.final(r.spikes, r.decided_until).copy())
        told.append(steps.early(p.early(), r.spikes, r.decided_until).copy())
        final.append(r.spikes.copy())
        p.prepare()
    rest = p.flush()
    resolved.append(steps.final(rest, END).copy())
    numbers = np.concatenate(resolved)["number"]
    assert sorted(numbers.tolist()) == np.concatenate(told)["number"].tolist()
    keys = [(int(e["sample"]), int(e["unit"])) for part in told for e in part]
    assert len(keys) == len(set(keys)) > 50
    fates = np.concatenate(resolved)["fate"]
    assert (fates == CONFIRMED).mean() > 0.8


def test_a_chunk_with_early_decisions_makes_no_arrays_in_the_sorter() -> None:
    p, steps, data = pipeline(), TwoSteps(REACH), codes()
    found = 0
    for a in range(0, 8000, 20):
        r = p.process(Chunk(a, data[a : a + 20], 0, Flag.NONE))
        steps.final(r.spikes, r.decided_until)
        steps.early(p.early(), r.spikes, r.decided_until)
        p.prepare()
    with counted() as made:
        for a in range(8000, 19_900, 20):
            r = p.process(Chunk(a, data[a : a + 20], 0, Flag.NONE))
            before = made.calls
            found += len(p.early())
            assert made.calls == before
            p.prepare()
    assert found > 3


def spikes(*rows: tuple[int, int]) -> np.ndarray:
    out = np.zeros(len(rows), SPIKE)
    for i, (unit, sample) in enumerate(rows):
        out["unit"][i], out["sample"][i] = unit, sample
    return out


def test_what_becomes_of_an_early_spike() -> None:
    steps, none = TwoSteps(5), spikes()
    told = steps.early(spikes((1, 100), (2, 101), (1, 300)), none, 50).copy()
    assert told["number"].tolist() == [1, 2, 3] and (told["flags"] == TOLD_EARLY).all()
    final = spikes((1, 103), (2, 200), (3, 100))
    first = steps.final(final, 105).copy()  # (2, 101) may still come as late as 106
    assert first.tolist() == [(1, 100, 103, 1, CONFIRMED)] and first.dtype == RESOLVED
    assert final["flags"].tolist() == [TOLD_EARLY, 0, 0]
    assert steps.final(none, 107).tolist() == [(2, 101, -1, 2, WITHDRAWN)]
    # settled by the same chunk, passed by the final decisions, told by an earlier life: none of them is told
    assert not len(steps.early(spikes((4, 400), (5, 100), (6, 290)), spikes((4, 402)), 200, since=295))
    assert steps.early(spikes((6, 296)), none, 200, since=295)["number"].tolist() == [4]
    both = steps.final(spikes((1, 299), (1, 301)), 500)  # a second spike of the unit confirms nothing twice
    assert both[["number", "fate"]].tolist() == [(3, CONFIRMED), (4, WITHDRAWN)]
    assert len(steps) == 0 and steps.counters == {"told": 4, "confirmed": 2, "withdrawn": 2}
