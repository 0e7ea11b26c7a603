"""From the float microvolts that Open Ephys sends back to the ADC's own int16 codes, each value checked."""

from __future__ import annotations

import logging
import math

import numpy as np

log = logging.getLogger(__name__)

TOLERANCE = 0.01  # of a code; float32 rounding stays below 0.004 within int16
FEWEST_VALUES = 16  # distinct values below which a step cannot be told


class Quantizer:
    """(channels, samples) float32 as they came -> (samples, channels) in the stream's type.

    With a step, codes are int16 and every value is checked: `counters` get how many were no whole number of
    steps ("inexact") and how many did not fit ("clipped"). Without one, values stay float32.
    """

    def __init__(self, step_uv: float | None, stream: str, counters: dict[str, int]) -> None:
        self._uv = None if step_uv is None else np.float32(step_uv)
        self._stream, self._counters = stream, counters

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self._uv is None:
            return np.ascontiguousarray(x.T)
        r = x / self._uv
        k = np.rint(r)
        if not (k.max(initial=0) <= 32767 and k.min(initial=0) >= -32768):  # also when one is NaN
            high = int(np.count_nonzero(~((k <= 32767) & (k >= -32768))))
            self._count("clipped", high, "values beyond int16; set uv_per_bit = 'float'")
            k = np.clip(np.nan_to_num(k, nan=0.0), -32768, 32767)
            r = np.clip(np.nan_to_num(r, nan=0.0), -32768, 32767)
        np.subtract(r, k, out=r)
        if np.abs(r, out=r).max(initial=0) > TOLERANCE:
            bad = int(np.count_nonzero(r > TOLERANCE))
            self._count(
                "inexact", bad, f"values are no whole number of {self._uv:g} uV; set uv_per_bit = 'float'"
            )
        return np.ascontiguousarray(k.astype(np.int16).T)

    def _count(self, counter: str, n: int, text: str) -> None:
        if not self._counters[counter]:
            log.warning("stream %s: %s", self._stream, text)
        self._counters[counter] += n


def rail_code(rail_uv: float | None, step_uv: float | None) -> float | None:
    """The code from which on, either way, the amplifier is at its end; None: nothing says where.

    The last code of an ADC is a step short of the range that its data sheet names: 0.2 % in ten bits.
    """
    if rail_uv is None:
        return None if step_uv is None else 32767.0
    if step_uv is None:
        return 0.998 * rail_uv
    return float(min(math.floor(0.998 * rail_uv / step_uv), 32767))


def learn_step(x: np.ndarray, most: int = 400_000) -> float | None:
    """The value b such that every x is a whole number of b, within float32 rounding; None if there is none.

    The plugin sends int16 codes times a scale as float32, so that neighbouring codes differ by the scale.
    None also when x has too few values to tell, or when the codes would not fit int16.
    """
    flat = x.ravel()
    part = np.abs(flat[:: max(1, flat.size // most)].astype(np.float64))
    if not np.isfinite(part).all():
        return None
    v = np.unique(part[part > 0])
    if len(v) < FEWEST_VALUES:
        return None
    step = min(float(v[0]), float(np.diff(v).min()))
    if v[-1] > 33_000 * step:
        return None
    limit = 64.0
    while True:  # the small values first: their whole numbers are certain while the step is still rough
        near = v[v <= limit * step]
        k = np.rint(near / step)
        step = float(near @ k / (k @ k)) if len(near) else step
        if limit * step >= v[-1]:
            break
        limit *= 2
    k = np.rint(v / step)
    if k[-1] > 32_768 or np.abs(v / step - k).max() > TOLERANCE:
        return None
    return _shortest(step, k, v) if whole(flat, step) else None


def whole(x: np.ndarray, step: float) -> bool:
    """True if every x is within a hundredth of a whole number of steps."""
    r = x / np.float32(step)
    return bool(np.abs(r - np.rint(r)).max() <= TOLERANCE)


def _shortest(step: float, k: np.ndarray, v: np.ndarray) -> float:
    """The shortest decimal near `step` that gives v exactly in float32, else the step itself."""
    k32, v32 = k.astype(np.float32), v.astype(np.float32)
    for digits in range(1, 10):
        c = float(f"{step:.{digits}g}")
        if np.array_equal(k32 * np.float32(c), v32):
            return c
    return float(f"{step:.8g}")
