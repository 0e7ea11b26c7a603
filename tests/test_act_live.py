"""Rules behind the real pipeline: any cut of the samples gives the same decisions, blind or not."""

from __future__ import annotations

import numpy as np
import pytest
from live_rig import FS, recording, run, templates

from spiked.act.rules import Rules
from spiked.config import Trigger
from spiked.live.acting import facts_of
from spiked.live.pipeline import LiveResult
from spiked.stream import Flag

SECONDS = 8


def decisions(results: list[LiveResult], sorter: str) -> list[tuple[object, ...]]:
    units = templates() if sorter == "templates" else recording().sequences
    facts = facts_of(units)
    u = facts.ids.tolist()
    triggers = [
        Trigger(name="unit", when="unit", units=u[:2], refractory_ms=30, probability=0.8, sham_fraction=0.5),
        Trigger(name="count", when="count", units=u, count=3, window_ms=40, refractory_ms=20),
        Trigger(name="share", when="burst", share=0.5, window_ms=25),
        Trigger(name="run", when="sequence", units=[u[0], u[1]], intervals_ms=[[0, 60]], blind="array"),
    ]
    rules, out = Rules(triggers, FS, recording().info.n_channels, seed=5), []
    rules.use(facts)
    for r in results:
        found = rules.process(r.spikes, r.blind, r.decided_until)
        out += [(f.rule.name, f.sample, f.units, f.samples, f.blocked, rules.is_sham(f)) for f in found]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("sorter", ["templates", "sequences"])
def test_any_cut_of_the_samples_gives_the_same_decisions(sorter: str) -> None:
    rec = recording()
    units = templates() if sorter == "templates" else rec.sequences
    codes = rec.codes[: SECONDS * FS]
    flags = {
        at + late: flag
        for at in range(60_000, 160_000, 5_003)
        for late, flag in ((0, Flag.GAP), (70, Flag.NONE))
    }
    rng = np.random.default_rng(2)
    cuts = [*rng.integers(1, len(codes), 900).tolist(), *range(59_950, 60_050), *range(20, 40_000, 20)]
    told = []
    for places in (range(20_000, len(codes), 20_000), cuts):
        results = run(rec.pipeline(units=units, scaling=rec.scaling), codes, places, flags, first=700_000)
        told.append(decisions(results, sorter))
    whole, pieces = told
    until = min(whole[-1][1], pieces[-1][1])  # how much of the last moment is final depends on the last cut
    whole, pieces = ([d for d in part if d[1] <= until] for part in told)
    assert whole == pieces
    assert len(whole) > 50 and {d[0] for d in whole} == {"unit", "count", "share", "run"}
    assert "blind" in {d[4] for d in whole} and "chance" in {d[4] for d in whole}
