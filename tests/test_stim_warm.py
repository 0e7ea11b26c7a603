"""No chunk after a stimulus waits for a compiler."""

from __future__ import annotations

from stim_scene import scene

from spiked.clean import kernels as cleaning
from spiked.clean.stim import kernels
from spiked.config import Live
from spiked.live.pipeline import LivePipeline
from spiked.stream import Chunk
from spiked_models.networks import load


def test_everything_a_stimulus_needs_is_compiled_beforehand() -> None:
    s = scene(seed=2, seconds=0.4)
    pipeline = LivePipeline(s.info, load("lite-20k"), Live(), scaling=1.0)
    pipeline.warm_up()
    compiled = [kernels.arm, kernels.advance, kernels.decided, kernels.read, kernels.measure, cleaning.clean]
    before = [len(f.signatures) for f in [*compiled, cleaning.clean_doubted, cleaning.any_at_rail]]
    pipeline.mark_stim(int(s.stims[0]), 1)
    for a in range(0, len(s.codes), 20):
        pipeline.process(Chunk(a, s.codes[a : a + 20], 0))
    after = [len(f.signatures) for f in [*compiled, cleaning.clean_doubted, cleaning.any_at_rail]]
    assert before == after
