"""Stimulation artifacts taken out of traces that are all there; the calls that users of SpikeLab know."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from spiked.clean.stim.cleaner import StimCleaner
from spiked.clean.stim.recenter import checked
from spiked.clean.stim.relaxation import projections
from spiked.config import Stim
from spiked.stream import StreamInfo

Method = Literal["polynomial", "blank", "salpa", "template"]
BASELINE_MS = 5.0
PULSE_MS = 1.0  # clipping and the pulse are looked for from this before to this after the stimulus, and on while they last
HOLD_MS = 0.2
DEFLECTION_SIGMAS = 8.0
STEP_SIGMAS = 6.0
STEP_SHARE = 0.25
FLAT_SHARE = 0.95  # of the largest deflection: the two rails are not equally far from the baseline
RETURN_SIGMAS = 3.0
RETURNED_MS = 1.0
ROBUST_SIGMAS = 3.0
PIECES_MS = (1.5, 3.0)  # the first pieces of a polynomial's window; the rest is the last


def remove_stim_artifacts(
    traces: np.ndarray, stim_times_ms: np.ndarray, fs_Hz: float, method: Method = "polynomial",
    artifact_window_ms: float = 10.0, poly_order: int = 3, rails: tuple[float, float] | None = None, timeout_ms: float = 50.0,
    patterns: np.ndarray | None = None, half_window_ms: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Artifacts removed: (traces float32, blank), both (channels, samples); blank samples hold the channel's baseline.

    traces (channels, samples) in microvolt or codes, stimuli in ms from their start at the true onsets (`recenter_stim_times`).
    Per channel and event: what does not leave the baseline is left as it is; clipping (at `rails`, else flat at the event's
    extreme) and the steep pulse are searched from 1 ms before the stimulus on, no longer than `timeout_ms`, and blank. Stimuli
    between which a channel does not come back to its baseline are one event for it.

    blank: the whole `artifact_window_ms` after clipping is blank. polynomial: robust polynomials of `poly_order` over pieces
    that grow with the time since clipping, joined by cross-fades. salpa, template: the streaming removal (`StimCleaner`) without
    and with a template for every one of `patterns` (an integer per stimulus). Raises ValueError.
    """
    x, at = checked(traces, stim_times_ms, fs_Hz)
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}: use one of {', '.join(get_args(Method))}")
    if artifact_window_ms <= 0 or not 0 <= poly_order <= 7 or timeout_ms <= 0:
        raise ValueError("artifact_window_ms and timeout_ms must be above 0, poly_order 0 to 7")
    if patterns is not None and len(np.atleast_1d(patterns)) != len(at):
        raise ValueError(f"{len(np.atleast_1d(patterns))} patterns for {len(at)} stimuli; give one for each")
    kinds = np.zeros(len(at), np.int64) if patterns is None else np.atleast_1d(patterns).astype(np.int64)
    if method in ("salpa", "template"):
        return _streamed(
            x,
            at,
            kinds,
            fs_Hz,
            rails,
            Stim(template=method == "template", half_window_ms=half_window_ms, timeout_ms=timeout_ms),
        )
    out, blank = x.astype(np.float32), np.zeros(x.shape, bool)
    work = _Window(fs_Hz, rails, artifact_window_ms, poly_order, timeout_ms)
    at = np.unique(at)
    for c in range(len(out)):
        work.clean(out[c], blank[c], at, method == "blank")
    return out, blank


def _streamed(
    x: np.ndarray,
    at: np.ndarray,
    kinds: np.ndarray,
    fs_hz: float,
    rails: tuple[float, float] | None,
    settings: Stim,
) -> tuple[np.ndarray, np.ndarray]:
    n = len(x)
    info = StreamInfo(
        "traces", fs_hz, tuple(map(str, range(n))), tuple((0.0, float(i)) for i in range(n)), "float32", (1.0,) * n,
        code_min=None if rails is None else rails[0], code_max=None if rails is None else rails[1],
    )  # fmt: skip
    out, blank = np.empty(x.shape, np.float32), np.zeros(x.shape, bool)
    cleaner = StimCleaner(info, settings)
    order = np.argsort(at, kind="stable")
    for s, kind in zip(at[order], kinds[order], strict=True):
        cleaner.mark(int(s), int(kind))

    def take(first: int, y: np.ndarray, bad: np.ndarray | None) -> None:
        out[:, first : first + len(y)] = y.T
        if bad is not None:
            blank[:, first : first + len(y)] = bad.T

    step = round(fs_hz)
    for a in range(0, x.shape[1], step):
        take(*cleaner.process(a, np.ascontiguousarray(x[:, a : a + step].T, np.float32)))
    take(*cleaner.flush())
    return out, blank


class _Window:
    """The window after every event of one channel: found, then blank or fitted."""

    def __init__(
        self, fs_hz: float, rails: tuple[float, float] | None, window_ms: float, order: int, timeout_ms: float
    ) -> None:
        def samples(ms: float) -> int:
            return max(1, round(ms * fs_hz / 1000))

        self.rails, self.order = rails, order
        self.window, self.timeout, self.hold = samples(window_ms), samples(timeout_ms), samples(HOLD_MS)
        self.before, self.baseline, self.returned = (
            samples(PULSE_MS),
            samples(BASELINE_MS),
            samples(RETURNED_MS),
        )
        self.pieces = [samples(ms) for ms in PIECES_MS]

    def clean(self, x: np.ndarray, blank: np.ndarray, at: np.ndarray, blank_all: bool) -> None:
        """One channel (samples,), in place."""
        i = 0
        while i < len(at):
            base, sigma = self._quiet(x, blank, at[i])
            if not self._carries(x, at[i], base, sigma):
                i += 1
                continue
            start, stop = max(0, at[i] - self.before), self._clipped_until(x, at[i], base, sigma)
            start = self._onset(x, start, at[i], base, sigma)
            i += 1
            while i < len(at) and not self._back(x, stop, at[i], base, sigma):
                last = at[i] if blank_all else max(stop, at[i] - 1)
                if not blank_all and last - stop > self.returned:
                    self._fit(x, blank, stop, at[i], base, sigma)
                else:
                    blank[stop : at[i]] = True
                blank[start:stop] = True
                start, stop = at[i], self._clipped_until(x, at[i], base, sigma)
                i += 1
            end = min(len(x), stop + self.window, at[i] if i < len(at) else len(x))
            blank[start:stop] = True
            if blank_all:
                blank[stop:end] = True
            else:
                self._fit(x, blank, stop, end, base, sigma)
            x[max(0, start - self.window) : end][blank[max(0, start - self.window) : end]] = base

    def _quiet(self, x: np.ndarray, blank: np.ndarray, at: int) -> tuple[float, float]:
        """Baseline and noise before a stimulus, from what is not blank."""
        a = max(0, at - self.before - self.baseline)
        part = x[a : max(a + 2, at - self.before)]
        good = part[~blank[a : a + len(part)]]
        good = good if len(good) > 8 else x[max(0, at - 40 * self.before) : at + 1]
        base = float(np.median(good))
        return base, max(float(np.median(np.abs(good - base))) / 0.6745, 1e-6)

    def _carries(self, x: np.ndarray, at: int, base: float, sigma: float) -> bool:
        """A step that no spike makes within 1 ms of the stimulus, or clipping there."""
        part = x[max(0, at - self.before) : at + self.before].astype(np.float64)
        steps = np.abs(np.diff(part)).max() if len(part) > 1 else 0.0
        return bool(steps > DEFLECTION_SIGMAS * sigma or self._railed(part).any())

    def _railed(self, part: np.ndarray) -> np.ndarray:
        if self.rails is None:
            return np.zeros(len(part), bool)
        return (part <= self.rails[0]) | (part >= self.rails[1])

    def _onset(self, x: np.ndarray, start: int, at: int, base: float, sigma: float) -> int:
        """The first sample of the pulse, at the latest the stimulus itself."""
        part = x[start : at + 1]
        bad = np.flatnonzero((np.abs(np.diff(part)) > STEP_SIGMAS * sigma) | self._railed(part[1:]))
        return min(at, start + 1 + int(bad[0])) if len(bad) else at

    def _clipped_until(self, x: np.ndarray, at: int, base: float, sigma: float) -> int:
        """The first sample after clipping, the steep pulse and what must settle."""
        a = max(1, at - self.before)
        part = x[a : at + self.timeout].astype(np.float64)
        step = np.abs(np.diff(x[a - 1 : a + len(part)].astype(np.float64)))
        away = np.abs(part - base)
        peak = np.maximum.accumulate(away)
        flat = (step == 0) & (away >= FLAT_SHARE * peak) & (away > 20 * sigma)
        flat[1:] &= step[:-1] == 0
        bad = self._railed(part) | (step > np.maximum(STEP_SIGMAS * sigma, STEP_SHARE * peak)) | flat
        last = at
        for k in np.flatnonzero(bad) + a:
            if k > last + self.before:  # a later event
                break
            last = max(last, int(k))
        return int(min(len(x), last + 1 + self.hold))

    def _back(self, x: np.ndarray, start: int, stop: int, base: float, sigma: float) -> bool:
        """Whether the channel came back to its baseline before the next stimulus."""
        near = np.abs(x[start : max(start, stop - self.before)] - base) < RETURN_SIGMAS * sigma
        run = (
            np.convolve(near, np.ones(self.returned), "valid") if len(near) >= self.returned else np.zeros(0)
        )
        return bool((run >= self.returned).any())

    def _fit(
        self, x: np.ndarray, blank: np.ndarray, start: int, stop: int, base: float, sigma: float
    ) -> None:
        """Robust polynomials over pieces that overlap by half, taken off x[start:stop] with cross-fades."""
        n = stop - start
        if n <= 2 * (self.order + 1):
            blank[start:stop] = True
            return
        part = x[start:stop].astype(np.float64) - base
        total, weight = np.zeros(n), np.zeros(n)
        for a, b in self._piece_bounds(n):
            fit = self._polynomial(part[a:b], sigma)
            ramp = np.minimum(np.arange(b - a) + 1.0, np.arange(b - a, 0, -1.0))
            ramp[: (b - a) // 2 if a == 0 else 0] = ramp.max()
            ramp[(b - a) // 2 if b == n else b - a :] = ramp.max()
            total[a:b] += ramp * fit
            weight[a:b] += ramp
        rest = part - total / weight
        blank[start:stop] |= np.abs(rest) > 10 * max(np.abs(part).max(), sigma)
        x[start:stop] = base + rest

    def _piece_bounds(self, n: int) -> list[tuple[int, int]]:
        bounds: list[tuple[int, int]] = []
        a, size = 0, self.pieces[0]
        while True:
            b = a + size
            if b >= n or n - b < size:
                return [*bounds, (a, n)]
            bounds.append((a, b))
            a += size // 2
            size = min(2 * self.pieces[-1], size + size // 2)

    def _polynomial(self, y: np.ndarray, sigma: float) -> np.ndarray:
        p = projections(len(y), min(self.order, max(0, len(y) - 2))).astype(np.float64)
        fit = p.T @ (p @ y)
        for _ in range(4):
            fit = p.T @ (p @ (fit + np.clip(y - fit, -ROBUST_SIGMAS * sigma, ROBUST_SIGMAS * sigma)))
        return np.asarray(fit)
