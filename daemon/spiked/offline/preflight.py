"""Is this recording worth sorting, and is there room? Before an hour of sorting, not after.

Kilosort4 stops with the same message for silence, saturation, wrong units and a one-channel file, and
says nothing at all about a non-finite sample that costs it two seconds of spikes; the data itself tells
them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import OfflineError
from spiked.offline.guards import sensors, traces, versions
from spiked.offline.lock import is_written
from spiked.offline.session import StreamFiles

MIN_CHANNELS, FEW_CHANNELS = 4, 8
SHORT_S = 60.0  # below this Kilosort's clustering has too few spikes to split by
STRIDE = 25  # Kilosort learns its templates from every 25th batch
BYTES_PER_SPIKE = 600.0  # what Kilosort keeps on disk, per detected spike
QUIET_HZ = 0.1  # detections per second over all channels
RATES_HZ = (8_000.0, 60_000.0)  # what amplifiers for spikes sample at
NOISE_UV, SURE_NOISE_UV = (1.0, 100.0), (0.05, 1000.0)  # thermal noise and tissue; beyond all doubt
# Kilosort4's memory: packages and start-up; per sample and channel of a batch; per spike, three times 288 bytes.
BASE_GB, BATCH_BYTES, SPIKE_BYTES = 1.2, 132.0, 864.0
LEAST_GB, LEAST_GPU_GB = 1.0, 1.0


@dataclass(frozen=True)
class Plan:
    """What the job means to do: how large a batch, on which device, with how much memory, and what it writes."""

    batch_size: int  # 0: the sorter has none
    sorter: str = "kilosort4"
    device: str = "cpu"
    memory_gb: float = 0.0
    least_gb: float = 0.0  # of disk that must be left over, or a guard ends the sorter
    copies: bool = True  # whether an int16 copy of the recording is written for the sorter


def check(stream: StreamFiles, folder: Path, plan: Plan, say: Callable[[float, str], None]) -> dict[str, Any]:
    """Findings about a recording and the computer; a classified OfflineError where it cannot be sorted.

    Returns {"warnings": [...], "bad_channels": [indices], "noise_uv": median over channels, "events_hz":
    threshold crossings per second summed over channels, "free_gb", "need_gb", "need_memory_gb"}.
    """
    sizes = _sizes(stream)
    warnings = _packages(plan)
    _still_written(stream)
    _device(plan)
    warnings += _shape(stream, plan)
    seen = traces.sample(stream, say)
    flat, told = _signal(stream, seen, plan.batch_size)
    warnings += told
    events = float(seen.events_hz.mean())
    n_spikes = events * stream.duration_s
    need, free = _disk(stream, folder, n_spikes, plan)
    need_memory, told = _memory(stream, n_spikes, plan)
    warnings += told
    if sizes != _sizes(stream):
        raise _wrong(f"{stream.nwb} is still growing", "end that recording first", "still_written")
    return {
        "warnings": warnings,
        "bad_channels": np.flatnonzero(flat).tolist(),
        "noise_uv": float(np.median(seen.noise_uv[~flat])),
        "events_hz": events,
        "free_gb": free,
        "need_gb": need,
        "need_memory_gb": need_memory,
        "packages": versions.installed(),
    }


def _wrong(
    what: str, remedy: str, name: str, kind: str = "environment", evidence: tuple[str, ...] = ()
) -> OfflineError:
    return OfflineError(f"{what}; {remedy}", kind, "preflight", name, evidence)


# ---- the computer --------------------------------------------------------------------------------------------


def _packages(plan: Plan) -> list[str]:
    errors, warnings = versions.conflicts(versions.installed(), plan.sorter)
    if errors:
        raise OfflineError(errors[0], "environment", "preflight", "versions", tuple(errors))
    return warnings


def _device(plan: Plan) -> None:
    """OfflineError when the GPU that was asked for is not there or has no room."""
    if not plan.device.startswith("cuda"):
        return
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        why = (
            "torch is built for the CPU only"
            if torch.version.cuda is None
            else "there is no NVIDIA GPU or driver"
        )
        raise _wrong(f"device = {plan.device!r} was asked for and {why}", "set device = 'auto', or install a CUDA build of torch and the driver it needs", "cuda_missing")  # fmt: skip
    gpu = sensors.gpu(plan.device)
    if gpu is not None and gpu.free_gb < LEAST_GPU_GB:
        raise _wrong(
            f"{gpu.free_gb:.1f} of {gpu.total_gb:.0f} GB are free on GPU {gpu.index}",
            "end what else uses it",
            "gpu_memory",
            "resource",
        )


def _memory(stream: StreamFiles, n_spikes: float, plan: Plan) -> tuple[float, list[str]]:
    """(GB that the sorter will take, what to say of it). OfflineError where not even its packages fit."""
    now = sensors.memory()
    need = BASE_GB + (BATCH_BYTES * plan.batch_size * stream.n_channels + SPIKE_BYTES * n_spikes) / 1e9
    if now.available_gb < LEAST_GB:
        text = f"{now.available_gb:.1f} of {now.total_gb:.0f} GB of memory are free, the sorter alone needs {BASE_GB} GB"
        raise _wrong(text, "end other programs", "host_memory", "resource")
    if not plan.batch_size:
        return BASE_GB, []
    said, on_gpu = [], plan.device.startswith("cuda")
    have = min(now.available_gb, plan.memory_gb or now.available_gb)
    if need > have and not on_gpu:
        said.append(
            f"sorting will take about {need:.1f} GB of memory ({n_spikes:.0f} spikes, batches of {plan.batch_size} "
            f"samples), {have:.1f} GB are free: it may have to be tried again with smaller batches"
        )
    gpu = sensors.gpu(plan.device)
    if gpu is not None and need - BASE_GB > gpu.free_gb:
        said.append(
            f"sorting will take about {need - BASE_GB:.1f} GB of GPU memory, {gpu.free_gb:.1f} GB are free: it may "
            "have to be tried again with smaller batches"
        )
    return need, said


def _disk(stream: StreamFiles, folder: Path, n_spikes: float, plan: Plan) -> tuple[float, float]:
    """(GB needed, GB free) where the results go. OfflineError('resource') when it does not fit."""
    copy = stream.n_samples * stream.n_channels * 2 / 1e9 if plan.copies else 0.0
    spikes = BYTES_PER_SPIKE * n_spikes / 1e9
    need, free = copy + spikes + 0.05 + plan.least_gb, sensors.free_gb(folder)
    if free < need:
        how = f"{copy:.2f} for an int16 copy of the recording, {spikes:.2f} for about {n_spikes:.0f} spikes"
        how += f", {plan.least_gb:g} to be left over" if plan.least_gb else ""
        text = f"{free:.2f} GB free at {folder}, {need:.2f} GB needed ({how})"
        raise _wrong(text, "free space and start the job again", "disk_full", "resource")
    return need, free


# ---- the recording -------------------------------------------------------------------------------------------


def _files(stream: StreamFiles) -> list[Path]:
    return [e.path for e in getattr(stream, "epochs", ())] or [stream.nwb]


def _sizes(stream: StreamFiles) -> list[int]:
    return [p.stat().st_size for p in _files(stream) if p.is_file()]


def _still_written(stream: StreamFiles) -> None:
    """OfflineError while a program holds a file open for writing: what it has not flushed cannot be seen."""
    for path in _files(stream):
        if path.is_file() and is_written(path):
            raise _wrong(f"{path} is still being written", "end that session first", "still_written")


def _shape(stream: StreamFiles, plan: Plan) -> list[str]:
    """Warnings about the probe, the rate and the length; OfflineError where they make sorting impossible."""
    warnings = []
    if stream.n_channels < MIN_CHANNELS:
        raise _wrong(f"{stream.n_channels} channels are too few", f"{plan.sorter} needs at least {MIN_CHANNELS}", "too_few_channels")  # fmt: skip
    if stream.n_channels < FEW_CHANNELS:
        warnings.append(
            f"{stream.n_channels} channels are few: spikes are hard to tell apart (low confidence)"
        )
    if not RATES_HZ[0] <= stream.fs_hz <= RATES_HZ[1]:
        text = f"{stream.name} is said to be sampled at {stream.fs_hz:g} Hz"
        raise _wrong(text, "spikes need 8 to 60 kHz: give the right --fs-hz or choose another stream", "rate")
    least = plan.batch_size + 4 * 61 if plan.batch_size else round(stream.fs_hz)
    if stream.n_samples <= least:
        text = f"{stream.duration_s:.1f} s are too short"
        raise _wrong(text, f"record more than {least / stream.fs_hz:.1f} s", "too_short", "biology")
    if not np.isfinite(stream.positions_um).all():
        raise _wrong(f"{stream.name}: an electrode has no position", "give the right probe file", "probe")
    sites, where = np.unique(stream.positions_um, axis=0, return_inverse=True)
    if len(sites) < stream.n_channels:
        same = np.flatnonzero(where == np.argmax(np.bincount(where.ravel())))[:2]
        x, y = stream.positions_um[same[0]]
        text = (
            f"{stream.name}: electrodes share positions (channels {same[0]} and {same[1]} at {x:g}, {y:g} um)"
        )
        raise _wrong(text, "record with the right probe file", "probe")
    if stream.duration_s < SHORT_S:
        warnings.append(
            f"{stream.duration_s:.0f} s are short: units with few spikes may stay together (low confidence)"
        )
    if stream.blind_s:
        warnings.append(f"{stream.blind_s:.2f} s never arrived and are sorted as silence")
    return warnings


def _signal(stream: StreamFiles, seen: traces.Traces, batch_size: int) -> tuple[np.ndarray, list[str]]:
    """((channels,) that are flat or at the rail, warnings); OfflineError for what no sorter can use."""
    if not seen.finite:
        text = f"{stream.nwb.name} holds samples that are not finite, which cost Kilosort their whole batch of spikes"
        raise _wrong(text, "write the recording again without them", "non_finite")
    flat = seen.flat
    n = len(flat)
    if flat.all():
        text = f"all {n} channels are flat or at the rail"
        levels = f"noise {np.median(seen.noise_uv):.3g} uV, {100 * np.median(seen.rail):.0f} % of the samples at their extremes"
        raise _wrong(text, "check amplifier and electrodes", "flat", "biology", (levels,))
    noise = float(np.median(seen.noise_uv[~flat]))
    warnings = _gain(stream, noise)
    if len(seen.twins) >= max(n - 1 - int(flat.sum()), 1):
        raise _wrong(f"all {n} channels hold the same samples", "check how the file was written and the reference", "same_signal")  # fmt: skip
    events = float(seen.events_hz.mean())
    if events < QUIET_HZ:
        text = f"only {events:.2f} threshold crossings per second on {n} channels: nothing to sort"
        raise _wrong(text, "look at the raw traces", "too_few_spikes", "biology", (f"noise {noise:.3g} uV",))
    if flat.any():
        warnings.append(f"{int(flat.sum())} of {n} channels are flat or at the rail")
    if seen.twins:
        a, b = seen.twins[0]
        warnings.append(f"channels {a} and {b} hold the same samples ({len(seen.twins)} such pairs)")
    if seen.common > traces.SAME:
        warnings.append("the channels hardly differ: check the reference electrode")
    if seen.period:
        warnings.append(
            f"the samples repeat after {seen.period} values, not after {n}: is {n} the right number of channels?"
        )
    first = seen.active_from_s
    if stream.n_samples <= STRIDE * batch_size and first is not None and first * stream.fs_hz >= batch_size:
        warnings.append(
            f"Kilosort learns its templates from the first {batch_size / stream.fs_hz:.1f} s, which are silent; "
            f"spikes begin at about {first:.0f} s: it may find none, and tmin = {first:.0f} would let it"
        )
    return flat, warnings


def _gain(stream: StreamFiles, noise_uv: float) -> list[str]:
    said = f"the noise is {noise_uv:.3g} uV"
    if not SURE_NOISE_UV[0] <= noise_uv <= SURE_NOISE_UV[1]:
        hint = ", in volts 1e6" if noise_uv < 1e-3 else ""
        raise _wrong(f"{stream.name}: {said}, so its gain cannot be right", f"give --gain-uv (microvolt per code{hint})", "gain")  # fmt: skip
    if not NOISE_UV[0] <= noise_uv <= NOISE_UV[1]:
        return [f"{said}, unusual for an amplifier in tissue: is the gain right?"]
    return []
