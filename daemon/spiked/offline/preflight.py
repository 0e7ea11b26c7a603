"""Is this recording worth sorting, and is there room? Before an hour of sorting, not after.

Kilosort4 stops with the same message for silence, saturation, wrong units and a one-channel file, and
says nothing at all about a non-finite sample that costs it two seconds of spikes; the data itself tells
them apart.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import OfflineError
from spiked.offline.session import StreamFiles

MIN_CHANNELS = 4
SHORT_S = 60.0  # below this Kilosort's clustering has too few spikes to split by
N_WINDOWS, WINDOW_S = 12, 1.0
BYTES_PER_SPIKE = 600.0  # what Kilosort keeps on disk, per detected spike
QUIET_HZ = 0.1  # detections per second over all channels


def check(
    stream: StreamFiles, folder: Path, batch_size: int, say: Callable[[float, str], None]
) -> dict[str, Any]:
    """Findings about a recording; a classified OfflineError where it cannot be sorted.

    Returns {"warnings": [...], "bad_channels": [indices], "noise_uv": median over channels, "events_hz":
    threshold crossings per second summed over channels, "free_gb", "need_gb"}.
    """
    warnings: list[str] = []
    _check_shape(stream, batch_size, warnings)
    need, free = _check_disk(stream, folder)
    noise, finite, rail, events = _sample(stream, say)
    if not finite:
        raise OfflineError(
            f"{stream.nwb.name} holds samples that are not finite; Kilosort would lose their whole batch",
            "environment",
            "preflight",
        )
    flat = (noise < 1e-3) | (rail > 0.5)
    if flat.all():
        raise OfflineError(
            f"all {stream.n_channels} channels are flat or at the rail; check amplifier and electrodes",
            "biology",
            "preflight",
        )
    if flat.any():
        warnings.append(f"{int(flat.sum())} of {len(flat)} channels are flat or at the rail")
    if events < QUIET_HZ:
        raise OfflineError(
            f"only {events:.2f} threshold crossings per second on {len(flat)} channels: nothing to sort",
            "biology",
            "preflight",
        )
    if stream.blind_s:
        warnings.append(f"{stream.blind_s:.2f} s never arrived and are sorted as silence")
    return {
        "warnings": warnings,
        "bad_channels": np.flatnonzero(flat).tolist(),
        "noise_uv": float(np.median(noise[~flat])),
        "events_hz": float(events),
        "free_gb": free / 1e9,
        "need_gb": need / 1e9,
    }


def _check_shape(stream: StreamFiles, batch_size: int, warnings: list[str]) -> None:
    if stream.n_channels < MIN_CHANNELS:
        raise OfflineError(
            f"{stream.n_channels} channels are too few; Kilosort4 needs at least {MIN_CHANNELS}",
            stage="preflight",
        )
    least = batch_size + 4 * 61
    if stream.n_samples <= least:
        raise OfflineError(
            f"{stream.duration_s:.1f} s are too short; record more than {least / stream.fs_hz:.1f} s",
            "biology",
            "preflight",
        )
    if len(np.unique(stream.positions_um, axis=0)) < stream.n_channels:
        raise OfflineError(
            f"{stream.name}: electrodes share positions; record with the right probe file", stage="preflight"
        )
    if stream.duration_s < SHORT_S:
        warnings.append(
            f"{stream.duration_s:.0f} s are short: units with few spikes may stay together (low confidence)"
        )


def _check_disk(stream: StreamFiles, folder: Path) -> tuple[float, float]:
    copy = stream.n_samples * stream.n_channels * 2
    spikes = BYTES_PER_SPIKE * stream.duration_s * stream.n_channels * 5
    need, free = copy + spikes + 5e7, shutil.disk_usage(folder).free
    if free < need:
        raise OfflineError(
            f"{free / 1e9:.1f} GB free at {folder}, {need / 1e9:.1f} GB needed; free space, start again",
            "resource",
            "preflight",
        )
    return need, free


def _sample(
    stream: StreamFiles, say: Callable[[float, str], None]
) -> tuple[np.ndarray, bool, np.ndarray, float]:
    """Noise (channels,) uV, all finite, share at the rail (channels,), crossings per second.

    From a dozen windows. Non-finite values can only occur in float recordings, which are scanned whole
    when they are exported.
    """
    from scipy.ndimage import minimum_filter1d
    from scipy.signal import butter, sosfilt

    n = min(round(WINDOW_S * stream.fs_hz), stream.n_samples)
    starts = np.linspace(0, stream.n_samples - n, N_WINDOWS).astype(int)
    sos = butter(3, 300.0, "high", fs=stream.fs_hz, output="sos")
    noise, rail, crossings, finite = [], [], 0, True
    with stream.codes() as data:
        for k, start in enumerate(starts):
            say(k / N_WINDOWS, "checking the recording")
            x = np.asarray(data[start : start + n], np.float32)
            if not np.isfinite(x).all():
                finite = False
                break
            extreme = (x == x.max(0)) | (x == x.min(0))
            rail.append(extreme.mean(0))
            y = sosfilt(sos, (x - np.median(x, 0)) * stream.gain_uv, axis=0)[n // 50 :]
            mad = np.median(np.abs(y), axis=0) / 0.6745
            noise.append(mad)
            reach = max(round(stream.fs_hz * 0.0005), 1)
            trough = (y == minimum_filter1d(y, 2 * reach + 1, axis=0)) & (y < -6 * mad) & (mad > 1e-3)
            crossings += int(trough.sum())
            del extreme, y
    if not finite:
        return np.zeros(stream.n_channels), False, np.zeros(stream.n_channels), 0.0
    seconds = len(starts) * n / stream.fs_hz
    return np.median(noise, axis=0), True, np.median(rail, axis=0), crossings / seconds
