"""What a dozen windows of a recording say of it, before a sorter has seen it. Arrays are (samples, channels)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from spiked.offline.session import StreamFiles

N_WINDOWS, WINDOW_S = 12, 1.0
THRESHOLD = 6.0  # noise levels (MAD / 0.6745) that a trough has to reach
RAIL = 0.5  # of a channel's samples at its own extremes
SAME = 0.999  # correlation of a channel with all others' mean above which it says nothing of its own
ALIKE = 0.3  # correlation of neighbouring samples that a real amplifier's bandwidth leaves
FLAT_UV = 1e-9


@dataclass
class Traces:
    """`noise_uv` and `rail` are per channel, `events_hz` per window, summed over channels; `starts_s` are the windows'."""

    noise_uv: np.ndarray
    rail: np.ndarray
    events_hz: np.ndarray
    starts_s: np.ndarray
    finite: bool = True
    constant: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    twins: list[tuple[int, int]] = field(default_factory=list)  # pairs of channels with the same samples
    common: float = 0.0  # median correlation of a channel with the mean of all
    period: int = 0  # values after which the file repeats itself, where that is not the number of channels

    @property
    def flat(self) -> np.ndarray:
        """(channels,) without a signal: constant, or at the rail."""
        return self.constant | (self.rail > RAIL)

    @property
    def active_from_s(self) -> float | None:
        """Where the first window with spikes begins."""
        found = np.flatnonzero(self.events_hz > 0)
        return float(self.starts_s[found[0]]) if len(found) else None


def sample(stream: StreamFiles, say: Callable[[float, str], None]) -> Traces:
    """Read N_WINDOWS of the recording, the first of them at its beginning; windows that never arrived do not count."""
    n = min(round(WINDOW_S * stream.fs_hz), stream.n_samples)
    starts = np.linspace(0, stream.n_samples - n, N_WINDOWS).astype(int)
    kept, noise, rail, constant, events, common = [], [], [], [], [], []
    twins: set[tuple[int, int]] | None = None
    period = 0
    with stream.codes() as data:
        for k, start in enumerate(starts):
            say(k / N_WINDOWS, "checking the recording")
            codes = np.asarray(data[start : start + n])
            codes = codes[~_lost(stream, start, len(codes))]
            if len(codes) < n / 2:
                continue
            x = codes.astype(np.float32)
            if not np.isfinite(x).all():
                none = np.zeros(stream.n_channels)
                return Traces(none, none, none[:0], none[:0], finite=False)
            period = period or _period(codes)
            found = _twins(codes)
            twins = found if twins is None else twins & found
            kept.append(start)
            rail.append(((x == x.max(0)) | (x == x.min(0))).mean(0))
            constant.append(x.max(0) == x.min(0))
            level, count = _spikes((x - np.median(x, 0)) * stream.gain_uv.astype(np.float32), stream.fs_hz)
            noise.append(level)
            events.append(count / (len(x) / stream.fs_hz))
            common.append(_common(x))
    if not kept:
        none = np.zeros(stream.n_channels)
        return Traces(none, none + 1, none[:0], none[:0], constant=np.ones(stream.n_channels, bool))
    return Traces(
        np.median(noise, axis=0), np.median(rail, axis=0), np.array(events), np.array(kept) / stream.fs_hz, True,
        np.mean(constant, axis=0) > 0.5, sorted(twins or ()), float(np.median(common)), period,
    )  # fmt: skip


def _lost(stream: StreamFiles, start: int, n: int) -> np.ndarray:
    """(n,) samples from `start` on that never arrived."""
    lost = np.zeros(n, bool)
    for a, b in np.clip(stream.gaps - start, 0, n):
        lost[a:b] = True
    return lost


def _spikes(x: np.ndarray, fs_hz: float) -> tuple[np.ndarray, int]:
    """(noise of each channel in uV, how many troughs below THRESHOLD all channels have)."""
    from scipy.ndimage import minimum_filter1d
    from scipy.signal import butter, sosfilt

    sos = butter(3, min(300.0, fs_hz / 4), "high", fs=fs_hz, output="sos")
    y = sosfilt(sos, x, axis=0)[len(x) // 50 :]
    mad = np.median(np.abs(y), axis=0) / 0.6745
    reach = max(round(fs_hz * 0.0005), 1)
    trough = (y == minimum_filter1d(y, 2 * reach + 1, axis=0)) & (y < -THRESHOLD * mad) & (mad > FLAT_UV)
    return mad, int(trough.sum())


def _twins(codes: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of channels that hold the same samples; constant ones are no pairs."""
    first: dict[bytes, int] = {}
    pairs = set()
    for channel in range(codes.shape[1]):
        column = np.ascontiguousarray(codes[:, channel])
        if column.max() == column.min():
            continue
        other = first.setdefault(column.tobytes(), channel)
        if other != channel:
            pairs.add((other, channel))
    return pairs


def _common(x: np.ndarray) -> float:
    """Median over channels of the correlation with the mean of the others."""
    if x.shape[1] < 3:
        return 0.0
    x = x - x.mean(0)
    scale = x.std(0)
    x = x[:, scale > 0] / scale[scale > 0]
    if x.shape[1] < 3:
        return 0.0
    total = x.sum(1)
    rest = total[:, None] - x
    spread = rest.std(0)
    return float(np.median((x * rest).mean(0) / np.where(spread > 0, spread, np.inf)))


def _period(codes: np.ndarray) -> int:
    """The distance at which the values of the file resemble each other most, if it is not a multiple of a row.

    A file read with a wrong number of channels sorts into garbage without a complaint. Samples of one channel
    follow each other closely, so the right number shows as the file's period. 0 where nothing is conspicuous.
    """
    rows = codes[: max(200_000 // codes.shape[1], 1)].astype(np.float32)
    n = codes.shape[1]
    x = rows.ravel() - rows.mean()
    lags = min(8 * n, len(x) // 4)
    if lags < n or not x.any():
        return 0
    spectrum = np.fft.rfft(x, 2 * len(x))
    like = np.fft.irfft(np.abs(spectrum) ** 2)[: lags + 1]
    like /= like[0]
    best = int(np.argmax(like[2:])) + 2
    if like[best] < ALIKE or like[n] > 0.7 * like[best] or best % n == 0:
        return 0
    return best
