"""A recording through the live pipeline, and the units found in what came out of it: what several benchmarks share."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from spiked.live.choosing import find_templates
from spiked.live.latency import Latency
from spiked.live.pipeline import LivePipeline
from spiked.live.taken import Taken
from spiked.sort.calibrate import calibrate
from spiked.sort.sequences import Sequences
from spiked.sources.recordings import Recording
from spiked.stream import Chunk
from spiked.templates.library import Templates

READ = 100_000  # samples read from the file at once, in whole chunks


def feed(
    pipeline: LivePipeline, rec: Recording, start: int, stop: int, step: int, times: Latency
) -> list[np.ndarray]:
    """Run [start, stop) through the pipeline in chunks of `step`, each timed; sorted spikes."""
    out = []
    at_once = step * max(1, READ // step)
    for big in range(start, stop, at_once):
        data = rec.read(big, min(big + at_once, stop))
        for a in range(0, len(data), step):
            part = data[a : a + step]
            t = time.perf_counter()
            result = pipeline.process(Chunk(big + a, part, 0))
            times.add(np.array([(time.perf_counter() - t) * 1e3]))
            if len(result.spikes):
                out.append(result.spikes)
    return out


def find_matching(pipeline: LivePipeline, taken: Taken, found_by: str, network: str) -> Templates:
    """Templates of what was taken from this pipeline, as a live calibration would find them."""
    info, net = pipeline.info, pipeline.network
    meta = {
        "templates_from": found_by, "first_sample": taken.first, "network": {"name": net.name}, "network_from": network,
        "scaling": pipeline.scaling,
    }  # fmt: skip
    x, logits = taken.x[:, : taken.filled], taken.logits[:, : taken.filled]
    with tempfile.TemporaryDirectory(prefix="spiked-templates-") as folder:
        return find_templates(
            x, logits, find_units(pipeline, taken), info, meta, Path(folder), lambda _f, _t: None
        )


def find_units(pipeline: LivePipeline, taken: Taken) -> Sequences:
    """Calibrate on what was taken from this pipeline."""
    info, net = pipeline.info, pipeline.network
    return calibrate(
        taken.x[:, : taken.filled], taken.logits[:, : taken.filled], None, info.fs_hz, info.positions, None,
        pipeline.stringent, pipeline.loose, first_sample=taken.first, channel_ids=info.channel_ids,
        network={"name": net.name, "sha256": net.sha256}, inference_scaling=pipeline.scaling,
        input_scale=pipeline.detector.scale if pipeline.config.gate else None,
    )  # fmt: skip
