"""Training and validation data: synthetic recordings of many kinds, with a label for every frame.

A frame of a channel is labelled 1 where a unit's wave has its trough (or its positive peak, if that is more
than twice the trough) and the wave reaches LIMIT_SD times the channel's noise; where it only reaches
MASK_SD the frames around it are left out of the loss and of the scores. numpy and scipy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.signal import lfilter

from spiked_models.synthesis import (
    MAXWELL,
    NEUROPIXELS,
    NEUROPIXELS_2,
    OPEN_EPHYS,
    Adc,
    Noise,
    Recording,
    hdmea_grid,
    neuropixels,
    synthesize,
)

# Converters as rigs use them, in microvolt per code: Maxwell at gain 512 and 1024, Neuropixels 1.0 at 250 and 500.
ADCS = (
    replace(MAXWELL, lsb_uv=6.29), MAXWELL, replace(NEUROPIXELS, lsb_uv=4.69), NEUROPIXELS, NEUROPIXELS_2, OPEN_EPHYS,
)  # fmt: skip
COARSEST = 1.4  # step over noise SD: beyond it a rig would be set to another gain

LIMIT_SD, MASK_SD = 3.0, 2.0
MASK_MS = 0.2  # half-width of what is left out around a weak wave
APART_MS = 0.2  # of two troughs closer than this the smaller one is left out
MASKED = -1
VALIDATION_SEED = 1 << 30  # training recordings stay below


@dataclass(frozen=True)
class Labelled:
    """One recording as the network sees it.

    traces: (channels, samples) float32 in units of the median noise SD (interquartile range / 1.349), median
    not subtracted. labels: (channels, samples) int8: 1 spike, 0 none, MASKED.
    """

    traces: np.ndarray
    labels: np.ndarray
    fs_hz: float


def draw_recording(seed: int, fs_hz: float, n_channels: int = 32, duration_s: float = 1.5) -> Recording:
    """A recording whose geometry, cells, density, rates, noise and ADC are drawn from `seed`."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 77]))
    side = int(np.sqrt(n_channels))
    if rng.random() < 0.5:
        positions = hdmea_grid(side, n_channels // side, float(rng.choice([17.5, 17.5, 25, 35, 50])))
    else:
        positions = neuropixels(n_channels)
    uv = float(np.exp(rng.uniform(np.log(3), np.log(15))))
    if rng.random() < 0.5:
        adc = ADCS[rng.integers(len(ADCS))]
        uv = max(uv, adc.lsb_uv / COARSEST)
    else:
        adc = Adc(lsb_uv=min(float(np.exp(rng.uniform(np.log(0.1), np.log(7)))), COARSEST * uv))
    if rng.random() < 0.15:
        adc = _narrowed(adc, uv * rng.uniform(12, 50))
    noise = Noise(
        uv=uv, spread=rng.uniform(0, 0.25), tissue=rng.uniform(0.05, 0.9), tissue_um=rng.uniform(20, 200),
        low_hz=5.0 * 100 ** rng.random(), colour=rng.choice([0.0, rng.uniform(0, 1)]),
        drift_uv=rng.choice([0.0, uv * rng.uniform(0, 5)]), offset_uv=rng.choice([0.0, 50.0]),
        common=rng.choice([0.0, rng.uniform(0, 0.5)]), lfp_uv=rng.choice([0.0, uv * rng.uniform(0, 10)]),
        hum_uv=rng.choice([0.0, 0.0, uv * rng.uniform(0, 3)]),
    )  # fmt: skip
    shares = rng.dirichlet([2.0, 1.0, 0.4])
    decay = float(rng.uniform(0.5, 0.95))
    return synthesize(
        positions, fs_hz, duration_s, int(rng.integers(2, 25)), seed, noise=noise, adc=adc,
        snr=(3.0, float(rng.choice([8, 15, 30, 60]))), rate_hz=(2.0, float(rng.choice([10, 30, 60]))),
        burst_p=rng.uniform(0, 0.4), n_background=int(rng.integers(0, 40)),
        background_snr=(0.3, float(rng.uniform(1, 2.5))), inverted=rng.choice([0.0, 0.1]), apart_um=0.0,
        amplitude_jitter=rng.uniform(0.03, 0.15), families=dict(zip(("cable", "lobes", "axon"), shares, strict=True)),
        burst_decay=(decay, 1.0), burst_ms=(2.5, float(rng.uniform(5, 12))),
        population_hz=rng.choice([0.0, 0.0, rng.uniform(0.3, 2)]),
    )  # fmt: skip


def _narrowed(adc: Adc, reach_uv: float) -> Adc:
    """The converter with rails at +-reach_uv, or where they were if that is nearer."""
    steps = max(4, round(reach_uv / adc.lsb_uv))
    low, high = max(adc.code_min, adc.zero_code - steps), min(adc.code_max, adc.zero_code + steps)
    return replace(adc, code_min=low, code_max=high)


def label(recording: Recording, highpass_hz: float = 0.0) -> Labelled:
    """Traces and labels of a recording, with a causal first-order high-pass when `highpass_hz` is not 0."""
    traces = np.ascontiguousarray(recording.microvolts().T)
    if highpass_hz > 0:
        a = np.exp(-2 * np.pi * highpass_hz / recording.fs_hz)
        ahead, back = np.array([0.5 + a / 2, -0.5 - a / 2], np.float32), np.array([1, -a], np.float32)
        traces = lfilter(ahead, back, traces - traces[:, :1], axis=1).astype(np.float32, copy=False)
    # Coarse converters can leave a quiet channel with no spread at all; half a step stands for it.
    sd = np.maximum(_noise_sd(traces, round(recording.fs_hz / 100)), 0.5 * recording.lsb_uv)
    labels = np.zeros(traces.shape, np.int8)
    frames = recording.fs_hz / 1000
    channel, at, height = _troughs(recording, sd)
    order = np.lexsort((at, channel))
    channel, at, height = channel[order], at[order], height[order]
    strong = height >= LIMIT_SD
    near = (np.diff(channel) == 0) & (np.diff(at) < APART_MS * frames)
    left_smaller = height[:-1] < height[1:]
    strong[:-1] &= ~(near & left_smaller)
    strong[1:] &= ~(near & ~left_smaller)
    reach = max(1, round(MASK_MS * frames))
    for step in range(-reach, reach + 1):
        frame = np.clip(at[~strong] + step, 0, len(labels[0]) - 1)
        labels[channel[~strong], frame] = MASKED
    labels[channel[strong], at[strong]] = 1
    return Labelled(traces / np.float32(np.median(sd)), labels, recording.fs_hz)


def _noise_sd(traces: np.ndarray, block: int) -> np.ndarray:
    """(channels,) SD from the interquartile range within blocks, so that drift does not count."""
    n = traces.shape[1] // block * block
    pieces = traces[:, :n].reshape(len(traces), -1, block)[:, ::4]
    spread = np.percentile(pieces, 75, axis=2) - np.percentile(pieces, 25, axis=2)
    return spread.mean(1) / 1.349


def _troughs(recording: Recording, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(channel, frame, height in noise SD) of every wave of at least MASK_SD inside the recording."""
    placed = recording.placed()
    channels, frames, heights = [], [], []
    for i, unit in enumerate(recording.units):
        mine = placed[placed["unit"] == i]
        t = unit.template
        at, height = t.peaks()
        ratio = np.abs(height)[None] * np.abs(mine["peak_uv"])[:, None] / sd[t.channels]
        # "sample" is the trough on the root, which sits at frame `pre` of the template.
        time = mine["sample"][:, None] + (at - t.pre)[None]
        keep = (ratio >= MASK_SD) & (time >= 0) & (time < (recording.n_samples or 0))
        channels.append(np.repeat(t.channels[None], len(mine), axis=0)[keep])
        frames.append(time[keep])
        heights.append(ratio[keep])
    empty = np.empty(0, np.int64)
    return (np.concatenate([empty, *channels]), np.concatenate([empty, *frames]),
            np.concatenate([np.empty(0), *heights]))  # fmt: skip


def draw(seed: int, fs_hz: float, n_channels: int = 32, duration_s: float = 1.5) -> Labelled:
    """A labelled recording drawn from `seed`; half of them high-passed as an acquisition system would."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 78]))
    corner = float(rng.choice([0.0, rng.uniform(100, 500)]))
    return label(draw_recording(seed, fs_hz, n_channels, duration_s), corner)
