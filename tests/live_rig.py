"""A small synthetic array through the live pipeline, calibrated once for all tests that need it."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from spiked.config import Live
from spiked.detect.detector import Detected
from spiked.live.pipeline import LivePipeline, LiveResult
from spiked.sort.calibrate import calibrate
from spiked.sort.parameters import RTSortParameters
from spiked.sort.sequences import Sequences
from spiked.sources.simulate import Synthetic
from spiked.stream import Chunk, Flag, StreamInfo
from spiked.templates.expected import expect
from spiked.templates.learn import learn
from spiked.templates.library import Templates
from spiked_models import networks, synthesis

FS, SECONDS, CALIBRATE_S = 20_000, 50.0, 30.0
ADC = synthesis.Adc(lsb_uv=6.29, zero_code=512, dtype="uint16", code_min=0, code_max=1023)


class Rec:
    """Codes of 4 x 4 electrodes with 5 cells, and the units found in the first 30 s of them."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        made = synthesis.synthesize(
            synthesis.hdmea_grid(4, 4), FS, SECONDS, 5, seed=3, adc=ADC, snr=(8, 25), rate_hz=(4, 12)
        )
        self.codes, self.truth = made.codes, made.spikes
        self.info: StreamInfo = dataclasses.replace(Synthetic(made, "s").info, code_min=0, code_max=1023)
        self.network = networks.load("rtsort-20k-lite")
        taken: list[tuple[np.ndarray, ...]] = []
        first: list[int] = []

        def take(found: Detected) -> None:
            taken.append((found.x.copy(), found.logits.copy(), found.valid.copy()))
            first.append(found.first_sample)

        pipeline = self.pipeline(tap=take)
        n = int(CALIBRATE_S * FS)
        run(pipeline, self.codes[:n], range(1000, n, 1000))
        x, logits, valid = (np.concatenate(part, axis=1) for part in zip(*taken, strict=True))
        logits[~valid] = -1e4
        self.scaling = pipeline.scaling
        self.sequences: Sequences = calibrate(
            x, logits, None, FS, self.info.positions, RTSortParameters(), pipeline.stringent, pipeline.loose,
            first_sample=first[0], channel_ids=self.info.channel_ids, inference_scaling=self.scaling,
        )  # fmt: skip

    def pipeline(self, config: Live | None = None, **kw: Any) -> LivePipeline:
        return LivePipeline(self.info, self.network, config or Live(), **kw)


recording = cache(Rec)


def run(
    pipeline: LivePipeline, codes: np.ndarray, cuts: Any, flags: dict[int, Flag] | None = None, first: int = 0
) -> list[LiveResult]:
    """Feed codes cut at these places (and where flags change)."""
    flags = flags or {}
    edges = sorted({0, len(codes), *(c for c in cuts if 0 < c < len(codes)), *flags})
    out = []
    now = Flag.NONE
    for a, b in pairwise(edges):
        now = flags.get(a, now)
        r = pipeline.process(Chunk(first + a, codes[a:b], 0, now))
        out.append(r._replace(spikes=r.spikes.copy(), mua=r.mua.copy(), blind=r.blind.copy()))
    return out


LEARN_S = 25  # of the recording, for templates


@cache
def cleaned() -> np.ndarray:
    """(channels, n) cleaned samples of the recording, as calibration gets them."""
    rec, parts = recording(), []
    pipeline = rec.pipeline(tap=lambda found: parts.append(found.x.copy()), scaling=rec.scaling)
    run(pipeline, rec.codes, range(2000, len(rec.codes), 2000))
    return np.concatenate(parts, axis=1)


@cache
def templates() -> Templates:
    """Learned from the true spikes of the first 25 s."""
    rec, n = recording(), LEARN_S * FS
    truth = rec.truth
    k = truth["sample"] < n - 100
    made = learn(
        cleaned()[:, :n].astype(np.float16), truth["sample"][k], truth["unit"][k], FS, rec.info.positions, rec.info.channel_ids
    )  # fmt: skip
    return dataclasses.replace(made, threshold=np.minimum(expect(made, cleaned()[:, :n]).threshold, 200))
