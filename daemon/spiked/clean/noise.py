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

import math

import numpy as np
from numba import njit

from spiked.clean.medians import FEW, lower_median, median_near

# mypy: disable-error-code="no-untyped-def"

BLOCK_MS = 50.0
WINDOW_BLOCKS = 20
FLOOR_UV = 0.5
SAMPLES_PER_BLOCK = 250  # enough for 7 % per block, 2 % per window
BLOCK, FINISHED = (
    0,
    1,
)  # places in the state: the block being filled, channels of the one before whose value is made


@njit(nogil=True, cache=True)
def _collect(x, valid, at, m, offset, stride, buffer, count):
    """Put |x| of the valid ones of m samples from column `at` on, `offset` into their block, into buffer."""
    for c in range(x.shape[0]):
        k = count[c]
        row = c if valid.shape[0] > 1 else 0
        for i in range(at + (-offset) % stride, at + m, stride):
            if valid.shape[0] == 0 or valid[row, i]:
                buffer[c, k] = abs(x[c, i])
                k += 1
        count[c] = k


@njit(nogil=True, cache=True)
def _finish(state, buffers, counts, need, until, values, noise, past, scratch):
    """Value of the block before for channels up to `until`, and from it the noise of the one after the present."""
    rows, window = len(values), len(past)
    block = state[BLOCK] - 1
    buffer, count = buffers[block % 2], counts[block % 2]
    for c in range(state[FINISHED], until):
        v = np.float32(np.nan)
        if count[c] >= need:
            before = values[(block - 1) % rows, c] * np.float32(0.6745)
            guess = np.float32(0) if np.isnan(before) else before
            v = np.float32(median_near(buffer[c, : count[c]], count[c], guess, scratch) / 0.6745)
        values[block % rows, c] = v
        k = 0
        for b in range(block - window + 1, block + 1):
            p = values[b % rows, c]
            if not np.isnan(p):
                past[k] = p
                k += 1
        noise[(block + 2) % rows, c] = (
            max(np.float32(FLOOR_UV), lower_median(past, k)) if k else np.float32(np.nan)
        )
    state[FINISHED] = max(state[FINISHED], until)


@njit(nogil=True, cache=True)
def _begin(state, buffers, counts, need, values, noise, past, scratch):
    """Go on to the next block. Electrodes of which nothing older is known take the one that just ended."""
    channels, rows = values.shape[1], len(values)
    _finish(state, buffers, counts, need, channels, values, noise, past, scratch)
    ended = state[BLOCK] % rows
    state[BLOCK] += 1
    state[FINISHED] = 0
    coming = state[BLOCK] % rows
    unknown = 0
    for c in range(channels):
        unknown += np.isnan(noise[coming, c])
    if unknown:
        _finish(state, buffers, counts, need, channels, values, noise, past, scratch)
        for c in range(channels):
            if np.isnan(noise[coming, c]):
                now = max(values[ended, c], np.float32(FLOOR_UV))
                noise[coming, c] = noise[ended, c] if np.isnan(values[ended, c]) else now
    counts[state[BLOCK] % 2] = 0


@njit(nogil=True, cache=True)
def _advance(x, valid, first, size, stride, need, state, buffers, counts, values, noise, past, scratch):
    """Take in x (channels, n) from sample `first` on; valid is (channels, n), (1, n), or (0, 0) for all valid."""
    channels, n = x.shape
    while state[BLOCK] < first // size:
        _begin(state, buffers, counts, need, values, noise, past, scratch)
    at = 0
    while at < n:
        offset = (first + at) % size
        m = min(n - at, size - offset)
        b = state[BLOCK] % 2
        _collect(x, valid, at, m, offset, stride, buffers[b], counts[b])
        done = min(1.0, 2 * (offset + m) / size)
        _finish(state, buffers, counts, need, math.ceil(done * channels), values, noise, past, scratch)
        at += m
        if offset + m == size:
            _begin(state, buffers, counts, need, values, noise, past, scratch)


@njit(nogil=True, cache=True)
def _read(noise, first, last, oldest, newest, out):
    for block in range(first, last + 1):
        for c in range(noise.shape[1]):
            known = oldest <= block <= newest
            out[block - first, c] = noise[block % len(noise), c] if known else np.float32(np.nan)


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
        rows, size = keep_blocks + WINDOW_BLOCKS + 4, self.block_samples // self._stride + 2
        self._buffers = np.zeros((2, n_channels, size), np.float32)
        self._counts = np.zeros((2, n_channels), np.int64)
        self._values = np.zeros((rows, n_channels), np.float32)
        self._noise = np.zeros((rows, n_channels), np.float32)
        self._past, self._scratch = np.zeros(WINDOW_BLOCKS, np.float32), np.zeros(size + FEW, np.float32)
        self._all_valid = np.zeros((0, 0), np.bool_)
        self._state = np.zeros(2, np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._values[:] = np.nan
        self._noise[:] = np.nan
        self._counts[:] = 0
        self._next: int | None = None
        self._state[BLOCK], self._state[FINISHED] = 0, self.n_channels

    def process(self, x: np.ndarray, valid: np.ndarray | None, first_sample: int) -> None:
        """Take samples [first_sample, first_sample + n). `valid` is None, (n,) or (channels, n) bool."""
        jump = 0 if self._next is None else first_sample - self._next
        if self._next is None or jump < 0 or jump > 60 * self.fs_hz:
            self.reset()
            self._state[BLOCK] = first_sample // self.block_samples
        mask = self._all_valid if valid is None else np.atleast_2d(np.ascontiguousarray(valid, np.bool_))
        _advance(
            np.ascontiguousarray(x, np.float32), mask, first_sample, self.block_samples, self._stride, self._need, self._state,
            self._buffers, self._counts, self._values, self._noise, self._past, self._scratch,
        )  # fmt: skip
        self._next = first_sample + x.shape[1]

    @property
    def newest_block(self) -> int:
        """The newest block whose noise is known."""
        return int(self._state[BLOCK])

    @property
    def oldest_block(self) -> int:
        """The oldest block whose noise is still kept."""
        return self.newest_block - self.keep_blocks + 1

    @property
    def ring(self) -> np.ndarray:
        """(rows, channels) float32 microvolt: block k, oldest to newest, lies in row k % rows; NaN where not known."""
        return self._noise

    def table(self, first_block: int, last_block: int) -> np.ndarray:
        """Noise of blocks first_block to last_block inclusive, (blocks, channels) float32 microvolt."""
        out = np.empty((last_block - first_block + 1, self.n_channels), np.float32)
        _read(self._noise, first_block, last_block, self.oldest_block, self.newest_block, out)
        return out

    @property
    def current(self) -> np.ndarray:
        """Noise in force at the newest sample, (channels,) float32 microvolt."""
        return self.table(self.newest_block, self.newest_block)[0]

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
