"""Logged stimulation times moved to where the pulses are in the traces."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

PeakMode = Literal["abs_max", "down_edge", "up_edge", "pos_peak", "neg_peak"]
Select = Literal["first", "last"]
N_REFERENCE = 8
EDGE_MS = 5.0  # an edge begins within this before its peak


def checked(traces: np.ndarray, stim_times_ms: np.ndarray, fs_hz: float) -> tuple[np.ndarray, np.ndarray]:
    """The traces and the stimuli's samples, or ValueError in one line."""
    x = np.asarray(traces)
    if x.ndim != 2 or x.shape[1] == 0 or x.dtype.kind not in "iuf":
        raise ValueError(f"traces must be numbers (channels, samples), not {x.dtype} of shape {x.shape}")
    if not fs_hz > 0:
        raise ValueError(f"fs_Hz = {fs_hz}: give the sampling rate in Hz")
    times = np.atleast_1d(np.asarray(stim_times_ms, float))
    if times.ndim != 1 or not np.isfinite(times).all():
        raise ValueError("stim_times_ms must be a list of finite times in ms from the start of the traces")
    at = np.round(times * fs_hz / 1000).astype(np.int64)
    if len(at) and (at.min() < 0 or at.max() >= x.shape[1]):
        length = x.shape[1] * 1000 / fs_hz
        raise ValueError(
            f"stim_times_ms {times.min():g} to {times.max():g} lie outside the traces (0 to {length:g} ms)"
        )
    return x, at


def recenter_stim_times(
    traces: np.ndarray, stim_times_ms: np.ndarray, fs_Hz: float, max_offset_ms: float = 50.0, peak_mode: PeakMode = "abs_max",
    n_reference_channels: int = N_REFERENCE, multi_peak: bool = False, multi_peak_select: Select = "first",
    multi_peak_threshold: float = 0.6, multi_peak_min_separation_ms: float = 2.0,
) -> np.ndarray:  # fmt: skip
    """Times (ms) of the pulses nearest to the logged ones, one for each, in the order given.

    traces (channels, samples); times in ms from their start. A pulse is looked for within `max_offset_ms`, but never beyond
    half way to the next or the last logged stimulus, so that no two of them find the same pulse. `peak_mode`: where the largest
    absolute value of any channel is (abs_max), the highest or lowest point (pos_peak, neg_peak) of the sum of the channels that
    deflect most there, or where that sum crosses zero between its two peaks (down_edge, up_edge; the steepest step where it
    has one peak only). `multi_peak`: among peaks of at least `multi_peak_threshold` of the largest, the first or the last.
    """
    x, at = checked(traces, stim_times_ms, fs_Hz)
    if peak_mode not in get_args(PeakMode):
        raise ValueError(f"peak_mode = {peak_mode!r}: use one of {', '.join(get_args(PeakMode))}")
    if multi_peak_select not in get_args(Select):
        raise ValueError(f"multi_peak_select = {multi_peak_select!r}: use first or last")
    if not 0 < multi_peak_threshold <= 1 or max_offset_ms <= 0 or n_reference_channels < 1:
        raise ValueError(
            "multi_peak_threshold must lie in (0, 1], max_offset_ms and n_reference_channels above 0"
        )
    reach, apart = (
        round(max_offset_ms * fs_Hz / 1000),
        max(1, round(multi_peak_min_separation_ms * fs_Hz / 1000)),
    )
    order = np.argsort(at, kind="stable")
    found = np.zeros(len(at), np.int64)
    for i, j in enumerate(order):
        a, b = max(0, at[j] - reach), min(x.shape[1], at[j] + reach + 1)
        if i and (before := at[order[i - 1]]) < at[j]:
            a = max(a, (before + at[j]) // 2 + 1)
        if i + 1 < len(order) and (after := at[order[i + 1]]) > at[j]:
            b = min(b, (at[j] + after) // 2 + 1)
        part = x[:, a:b].astype(np.float64)
        part -= np.median(part, axis=1, keepdims=True)
        signal = _reference(part, peak_mode, n_reference_channels)
        height = _height(signal, peak_mode)
        peak = _peak(height, multi_peak, multi_peak_select, multi_peak_threshold, apart)
        found[j] = a + _edge(signal, peak, peak_mode, round(EDGE_MS * fs_Hz / 1000))
    return found * 1000.0 / fs_Hz


def _reference(part: np.ndarray, mode: PeakMode, n: int) -> np.ndarray:
    if mode == "abs_max":
        return np.abs(part).max(axis=0)
    largest = np.argsort(np.abs(part).max(axis=1))[-n:]
    return np.asarray(part[largest].sum(axis=0))


def _height(signal: np.ndarray, mode: PeakMode) -> np.ndarray:
    return -signal if mode in ("neg_peak", "down_edge") else signal


def _peak(height: np.ndarray, multi: bool, select: Select, threshold: float, apart: int) -> int:
    best = int(height.argmax())
    if not multi:
        return best
    wide = sliding_window_view(np.pad(height, apart, constant_values=-np.inf), 2 * apart + 1).max(axis=1)
    peaks = np.flatnonzero((height == wide) & (height >= threshold * height[best]))
    return int(peaks[0 if select == "first" else -1])


def _edge(signal: np.ndarray, peak: int, mode: PeakMode, before: int) -> int:
    """Where the step to this peak crosses zero, coming from the opposite peak; the steepest step if there is none."""
    if mode not in ("down_edge", "up_edge"):
        return peak
    s = signal if mode == "down_edge" else -signal  # falls towards the peak
    a = max(0, peak - before)
    opposite = a + int(s[a : peak + 1].argmax())
    if s[opposite] > 0.2 * -s[peak]:
        below = np.flatnonzero(s[opposite : peak + 1] <= 0)
        return opposite + int(below[0]) if len(below) else peak
    steps = np.diff(s[a : peak + 1])
    return a + int(steps.argmin()) + 1 if len(steps) else peak
