"""Noise per electrode, followed along the stream: a robust SD in microvolt for every 50-ms block.

Blocks lie on the absolute grid of sample numbers (block k is samples [k*B, (k+1)*B)), and the noise in force in
block k is made from earlier blocks alone, so it depends on the data and never on how the stream was cut.

    value of a block = median|x| / 0.6745 over its valid samples (every `stride`-th; at least half must be valid)
    noise of block k = median of the values of blocks k-21 to k-2, or of block k-1 if there is none,
                       or the noise of block k-1 if there is none either; at least 0.5 microvolt

A block's value is due one block late so that the medians of 1024 electrodes can be spread over the chunks of the
next block instead of delaying one chunk.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK_MS = 50.0
WINDOW_BLOCKS = 20
FLOOR_UV = 0.5
SAMPLES_PER_BLOCK = 250  # enough for 7 % per block, 2 % per window


@njit(nogil=True, cache=True)
def lower_median(a, n):  # type: ignore[no-untyped-def]
    """Element (n - 1) // 2 of a[:n] in order (Hoare's selection; reorders a)."""
    lo, hi, k = 0, n - 1, (n - 1) // 2
    while lo < hi:
        pivot = a[(lo + hi) // 2]
        i, j = lo, hi
        while i <= j:
            while a[i] < pivot:
                i += 1
            while a[j] > pivot:
                j -= 1
            if i <= j:
                a[i], a[j] = a[j], a[i]
                i += 1
                j -= 1
        if k <= j:
            hi = j
        elif k >= i:
            lo = i
        else:
            break
    return a[k]


@njit(nogil=True, cache=True)
def _collect(x, valid, per_channel, start, offset, stride, buffer, count):  # type: ignore[no-untyped-def]
    """Put |x| of the valid samples on the stride grid into buffer (channels, samples)."""
    n = x.shape[1]
    first = (-offset) % stride
    for c in range(x.shape[0]):
        k = count[c]
        row = c if per_channel else 0
        for i in range(first, n, stride):
            if valid[row, start + i]:
                buffer[c, k] = abs(x[c, i])
                k += 1
        count[c] = k


@njit(nogil=True, cache=True)
def _finish(buffer, count, need, lo, hi, values, noise, block, window, floor):  # type: ignore[no-untyped-def]
    """Value of `block` for channels lo to hi, and from it the noise of block + 2 (what can be known by then)."""
    rows = values.shape[0]
    past = np.empty(window, np.float32)
    for c in range(lo, hi):
        v = np.float32(np.nan)
        if count[c] >= need:
            v = np.float32(lower_median(buffer[c], count[c]) / 0.6745)
        values[block % rows, c] = v
        k = 0
        for b in range(block - window + 1, block + 1):
            p = values[b % rows, c]
            if not np.isnan(p):
                past[k] = p
                k += 1
        noise[(block + 2) % rows, c] = max(floor, lower_median(past, k)) if k else np.float32(np.nan)


class NoiseTracker:
    """Noise SD per electrode along a stream.

    `process(x, valid, first_sample)` takes consecutive samples (channels, n) float32 in microvolt, baseline removed.
    `table(first_block, last_block)` returns the noise of those blocks, (blocks, channels) float32, NaN where nothing
    is known yet; blocks up to that of the newest sample can be asked for, and `keep_blocks` back from it.
    A jump forward in sample numbers counts as invalid samples; a jump back or of more than a minute starts anew.
    """

    def __init__(self, n_channels: int, fs_hz: float, keep_blocks: int = 64) -> None:
        self.n_channels, self.fs_hz = n_channels, float(fs_hz)
        self.block_samples = max(1, round(fs_hz * BLOCK_MS / 1000))
        self.keep_blocks = keep_blocks
        self._stride = max(1, self.block_samples // SAMPLES_PER_BLOCK)
        self._need = max(1, self.block_samples // self._stride // 2)
        self._rows = keep_blocks + WINDOW_BLOCKS + 4
        size = self.block_samples // self._stride + 2
        self._buffers = np.zeros((2, n_channels, size), np.float32)
        self._counts = np.zeros((2, n_channels), np.int64)
        self._yes = np.ones((1, self.block_samples), np.bool_)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._values = np.full((self._rows, self.n_channels), np.nan, np.float32)
        self._noise = np.full((self._rows, self.n_channels), np.nan, np.float32)
        self._counts[:] = 0
        self._next: int | None = None
        self._block = 0  # the block being filled
        self._finished = self.n_channels  # channels of the block before whose value is made

    def process(self, x: np.ndarray, valid: np.ndarray | None, first_sample: int) -> None:
        """Take samples [first_sample, first_sample + n). `valid` is None, (n,) or (channels, n) bool."""
        n = x.shape[1]
        jump = 0 if self._next is None else first_sample - self._next
        if self._next is None or jump < 0 or jump > 60 * self.fs_hz:
            self.reset()
            self._block = first_sample // self.block_samples
            self._next = first_sample
        mask = None if valid is None else np.atleast_2d(np.asarray(valid, np.bool_))
        self._advance_to(first_sample // self.block_samples)
        at = 0
        while at < n:
            sample = first_sample + at
            block, offset = divmod(sample, self.block_samples)
            self._advance_to(block)
            m = min(n - at, self.block_samples - offset)
            self._take(x[:, at : at + m], mask, at, offset)
            at += m
            if offset + m == self.block_samples:
                self._advance_to(block + 1)
        self._next = first_sample + n

    def _take(self, x: np.ndarray, mask: np.ndarray | None, at: int, offset: int) -> None:
        b = self._block % 2
        if mask is None:
            mask, at = self._yes, 0
        _collect(
            np.ascontiguousarray(x, np.float32),
            mask,
            len(mask) > 1,
            at,
            offset,
            self._stride,
            self._buffers[b],
            self._counts[b],
        )
        done = min(1.0, 2 * (offset + x.shape[1]) / self.block_samples)
        self._finish_previous(int(np.ceil(done * self.n_channels)))

    def _finish_previous(self, until: int) -> None:
        if until <= self._finished:
            return
        b = (self._block - 1) % 2
        _finish(
            self._buffers[b],
            self._counts[b],
            self._need,
            self._finished,
            until,
            self._values,
            self._noise,
            self._block - 1,
            WINDOW_BLOCKS,
            np.float32(FLOOR_UV),
        )
        self._finished = until

    def _advance_to(self, block: int) -> None:
        while self._block < block:
            self._finish_previous(self.n_channels)
            full, rows = self._block, self._rows
            self._block += 1
            self._finished = 0
            coming = self._noise[self._block % rows]
            # Nothing older is known for these electrodes: take the block that just ended, or hold what there was.
            unknown = np.isnan(coming)
            if unknown.any():
                self._finish_previous(self.n_channels)
                now = np.maximum(self._values[full % rows], np.float32(FLOOR_UV))
                held = self._noise[full % rows]
                coming[unknown] = np.where(np.isnan(now), held, now)[unknown]
            self._counts[self._block % 2] = 0

    @property
    def newest_block(self) -> int:
        """The newest block whose noise is known."""
        return self._block

    def table(self, first_block: int, last_block: int) -> np.ndarray:
        """Noise of blocks first_block to last_block inclusive, (blocks, channels) float32 microvolt."""
        blocks = np.arange(first_block, last_block + 1)
        out = self._noise[blocks % self._rows]
        out[(blocks > self._block) | (blocks <= self._block - self.keep_blocks)] = np.nan
        return out

    @property
    def current(self) -> np.ndarray:
        """Noise in force at the newest sample, (channels,) float32 microvolt."""
        return self.table(self._block, self._block)[0]

    def at(self, sample: int) -> np.ndarray:
        """Noise in force at a sample, (channels,) float32 microvolt."""
        return self.table(sample // self.block_samples, sample // self.block_samples)[0]


def noise_table(
    x: np.ndarray, valid: np.ndarray | None, fs_hz: float, first_sample: int = 0
) -> tuple[np.ndarray, int]:
    """Noise of a whole array (channels, samples): ((blocks, channels) float32, number of the first block).

    The same numbers as a NoiseTracker fed with it.
    """
    size = max(1, round(fs_hz * BLOCK_MS / 1000))
    first, last = first_sample // size, (first_sample + x.shape[1] - 1) // size
    tracker = NoiseTracker(x.shape[0], fs_hz)
    rows = []
    at = 0
    for block in range(first, last + 1):
        stop = min(x.shape[1], (block + 1) * size - first_sample)
        piece = np.asarray(x[:, at:stop], np.float32)
        tracker.process(piece, None if valid is None else valid[..., at:stop], first_sample + at)
        rows.append(tracker.table(block, block))
        at = stop
    return np.concatenate(rows), first
