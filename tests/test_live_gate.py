"""The sentinel's gate in the live path: less work, the same spikes but for a stated share, no arrays, any cut."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from allocations import counted
from live_rig import FS, Rec, recording, run

from spiked.config import Live
from spiked.detect.detector import Detected
from spiked.errors import ConfigError
from spiked.sort.sequences import Sequences
from spiked.stream import Chunk
from spiked_models.sentinel import KEEP_LOOSE, KEEP_STRINGENT, Sentinel, learn, peaks


@pytest.fixture(scope="module")
def rec() -> Rec:
    return recording()


@cache
def logits_of(seconds: int) -> tuple[np.ndarray, np.ndarray]:
    """Cleaned samples and logits of the recording's first seconds, network everywhere."""
    r, taken = recording(), list[tuple[np.ndarray, np.ndarray]]()

    def take(found: Detected) -> None:
        taken.append((found.x.copy(), found.logits.copy()))

    run(r.pipeline(scaling=r.scaling, tap=take), r.codes[: seconds * FS], range(0, seconds * FS, 2000))
    x, q = (np.concatenate(part, axis=1) for part in zip(*taken, strict=True))
    return x, q


@cache
def gated() -> Sequences:
    """The recording's units with a sentinel learned on its first 40 s."""
    r = recording()
    x, q = logits_of(50)
    pipeline = r.pipeline(scaling=r.scaling)
    n = 40 * FS
    found = learn(
        lambda a, b: (x[:, a:b], q[:, a:b]),
        len(x),
        n,
        FS,
        pipeline.detector.scale,
        pipeline.stringent,
        pipeline.loose,
    )
    assert found is not None
    return dataclasses.replace(r.sequences, sentinel=found, network={"sha256": r.network.sha256})


def test_it_keeps_what_it_promises_on_samples_it_never_saw(rec: Rec) -> None:
    s = gated().sentinel
    assert s is not None and s.open_share < 0.5
    q = logits_of(50)[1]
    new, pipeline = slice(41 * FS, None), rec.pipeline(scaling=rec.scaling)
    pipeline.swap(gated())
    kept = []

    def take(found: Detected) -> None:
        kept.append(found.logits.copy())

    pipeline.tap = take
    run(pipeline, rec.codes, range(0, 50 * FS, 2000))
    open_logits = np.concatenate(kept, axis=1)
    for limit, promise in ((pipeline.stringent, KEEP_STRINGENT), (pipeline.loose, KEEP_LOOSE)):
        wanted = peaks(q[:, new], limit)
        assert wanted.sum() > 500
        assert (open_logits[:, new][wanted] > -29).mean() > 1 - 3 * (1 - promise)


def test_the_spikes_are_nearly_all_the_same(rec: Rec) -> None:
    full = dataclasses.replace(gated(), sentinel=None)
    got = []
    for sequences in (full, gated()):
        pipeline = rec.pipeline(units=sequences, scaling=rec.scaling)
        results = run(pipeline, rec.codes, range(0, len(rec.codes), 20 * 50))
        spikes = np.concatenate([*(r.spikes for r in results), pipeline.flush()])
        got.append({(int(s["unit"]), int(s["sample"])) for s in spikes if s["sample"] > FS})
        share = (pipeline.detector.stream.computed or 0) / rec.codes.size
    assert len(got[0]) > 300
    assert len(got[0] ^ got[1]) <= 0.02 * len(got[0])
    assert share < 0.6


def test_no_cut_changes_a_spike_with_a_gate_either(rec: Rec) -> None:
    codes = rec.codes[: 6 * FS]
    rng = np.random.default_rng(4)
    got = []
    for cuts in (range(0, len(codes), 4000), range(0, len(codes), 20), rng.integers(1, len(codes), 300)):
        pipeline = rec.pipeline(units=gated(), scaling=rec.scaling)
        got.append(np.concatenate([r.spikes for r in run(pipeline, codes, cuts)]))
        pipeline.prepare()
    n = min(map(len, got))  # a longer last chunk decides no less
    assert n > 20 and all(np.array_equal(g[:n], got[0][:n]) for g in got)


def test_nothing_is_allocated_with_a_gate(rec: Rec) -> None:
    pipeline = rec.pipeline(units=gated(), scaling=rec.scaling, reuse=True)
    stream = [Chunk(a, rec.codes[a : a + 20], 0) for a in range(0, 3 * FS, 20)]
    for c in stream[:1500]:
        pipeline.process(c)
        pipeline.prepare()
    with counted() as found:
        for c in stream[1500:]:
            pipeline.process(c)
            pipeline.prepare()
    assert found.calls == 0


def test_a_sentinel_of_another_network_or_unwanted_is_not_used(rec: Rec) -> None:
    other = dataclasses.replace(gated(), network={"sha256": "another"})
    for config, sequences in ((Live(), other), (Live(gate=False), gated())):
        pipeline = rec.pipeline(config, units=sequences, scaling=rec.scaling)
        run(pipeline, rec.codes[:FS], range(0, FS, 1000))
        assert pipeline.detector.stream.computed == rec.info.n_channels * FS


def test_the_gate_is_open_while_a_calibration_collects(rec: Rec) -> None:
    pipeline = rec.pipeline(units=gated(), scaling=rec.scaling)
    codes = rec.codes[:FS]
    run(pipeline, codes, range(0, FS, 1000))
    counts = [pipeline.detector.stream.computed or 0]
    for wanted in (False, True):
        pipeline.gate(wanted)
        run(pipeline, codes, range(0, FS, 1000), first=FS * len(counts))
        counts.append(pipeline.detector.stream.computed or 0)
    assert counts[1] - counts[0] == codes.size
    assert counts[2] - counts[1] < 0.6 * codes.size


def test_it_travels_in_the_sequences_file(tmp_path: Path) -> None:
    gated().save(tmp_path / "a.sequences.h5")
    back, s = Sequences.load(tmp_path / "a.sequences.h5").sentinel, gated().sentinel
    assert back is not None and s is not None
    assert np.array_equal(back.filters, s.filters) and np.array_equal(back.weights, s.weights)
    assert (back.threshold, back.margin, back.kept_loose) == (s.threshold, s.margin, s.kept_loose)


def test_a_broken_one_is_refused(tmp_path: Path) -> None:
    s = gated().sentinel
    assert s is not None
    with pytest.raises(ValueError, match="fit together"):
        Sentinel.from_arrays({**s.to_arrays(), "weights": s.weights[:-1]})
    with pytest.raises(ValueError, match="fit together"):
        Sentinel.from_arrays({**s.to_arrays(), "bias": s.bias[:-1]})
    with pytest.raises(ValueError, match="finite"):
        Sentinel.from_arrays({**s.to_arrays(), "bias": s.bias * np.nan})
    bad = dataclasses.replace(gated(), sentinel=dataclasses.replace(s, bias=s.bias * np.nan))
    bad.save(tmp_path / "b.sequences.h5")
    with pytest.raises(ConfigError, match="not a whole sequences file"):
        Sequences.load(tmp_path / "b.sequences.h5")


def test_too_little_to_learn_from_gives_none() -> None:
    rng = np.random.default_rng(0)
    x, q = rng.normal(size=(2, 4000)).astype(np.float32), np.full((2, 4000), -9.0, np.float32)
    assert learn(lambda a, b: (x[:, a:b], q[:, a:b]), 2, 4000, FS, 1.0, -1.0, -2.0) is None
