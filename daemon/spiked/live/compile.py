"""`spiked warmup`: compile every kernel of the live path and of calibration once, into numba's cache.

Without it the first session after an installation compiles them while samples are waiting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from spiked.config import Live
from spiked.live import calibration
from spiked.live.pipeline import LivePipeline
from spiked.sources.simulate import Synthetic
from spiked.stream import Chunk, StreamInfo
from spiked_models import networks, synthesis

SECONDS, CHUNK = 12.0, 100


def compile_kernels(say: Callable[[str], None] = lambda _s: None) -> None:
    """Run a small synthetic array through the live path and its calibration, for every sample type there is."""
    torch.set_num_threads(1)
    made = synthesis.synthesize(
        synthesis.hdmea_grid(4, 4), 20_000, SECONDS, 4, seed=1, snr=(12, 25), rate_hz=(10, 15)
    )
    info, codes = Synthetic(made, "warmup").info, made.codes
    network = networks.load(networks.default_for(info.fs_hz, lite=True))
    with tempfile.TemporaryDirectory(prefix="spiked-warmup-") as scratch:
        folder = Path(scratch) / "calibration"
        pipeline = LivePipeline(info, network, Live())
        meta = {
            "stringent": pipeline.stringent, "loose": pipeline.loose, "scaling": 1.0, "input_scale": network.input_scale,
            "network": {"name": network.name, "sha256": network.sha256}, "previous": None,
        }  # fmt: skip
        collector = calibration.Collector(folder, info, int((SECONDS - 1) * info.fs_hz), meta)
        pipeline.tap = collector.add
        say("compiling the live path")
        for a in range(0, len(codes), CHUNK):
            pipeline.process(Chunk(a, codes[a : a + CHUNK], 0))
        collector.close()
        say("compiling calibration")
        sequences = calibration.run(folder)
        pipeline.tap = None
        pipeline.swap(sequences)
        for a in range(0, len(codes) // 4, CHUNK):
            pipeline.process(Chunk(len(codes) + a, codes[a : a + CHUNK], 0))
    for dtype in ("int16", "uint16", "float32"):
        load_kernels(dtype, highpass=True)
    say("kernels are compiled")


def load_kernels(dtype: str = "int16", highpass: bool = False) -> None:
    """Have the kernels of the live path in memory before a stream is there: they do not depend on its size."""
    info = StreamInfo("any", 20_000.0, ("0", "1"), ((0.0, 0.0), (20.0, 0.0)), dtype, (1.0, 1.0))
    network = networks.load(networks.default_for(info.fs_hz, lite=True))
    settings = Live(highpass_hz=100.0 if highpass else 0.0)
    LivePipeline(info, network, settings).warm_up()
