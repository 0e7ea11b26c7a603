"""The detection network on a stream, on a CPU: generated kernels, state kept per channel, nothing allocated per chunk.

Each layer's outputs are kept as frames (channel, time, width). What a logit needs of a layer is computed once, when
the first logit that needs it is asked for, so a closed gate saves the work of all layers.

Gate: with a sentinel a logit is computed only if the sentinel's score reaches its threshold within its margin;
elsewhere it reads CLOSED_LOGIT. The gate looks at absolute samples, never at chunks.
"""

from __future__ import annotations

import queue
import threading
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from spiked_models import cpu_kernel
from spiked_models.networks import DetectionNetwork
from spiked_models.sentinel import FILTERS, Sentinel

# mypy: disable-error-code="no-untyped-def"

CLOSED_LOGIT = -30.0
PIECE = 128  # columns computed at a time
BLOCK = 64  # channels whose layers are computed together: their frames stay in the cache
ROOM = 2 * PIECE
PARALLEL_FROM = 2048  # channels x samples of a chunk worth waking other threads for
WORK_AREAS = 8  # chunk lengths whose output arrays are kept
LAYERS = 4


@intrinsic
def _run(typingctx, address, source, at, panel, dots, bias, target, to, tiles):
    """Call a kernel of spiked_models.cpu_kernel by its address; all arguments int64."""
    signature = types.void(*[types.int64] * 9)

    def codegen(context, builder, _signature, args):
        from llvmlite import ir

        pointer, i64 = ir.IntType(8).as_pointer(), ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [pointer] * 7 + [i64])
        function = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(function, [*(builder.inttoptr(a, pointer) for a in args[1:8]), args[8]])
        return context.get_dummy_value()

    return signature, codegen


@njit(nogil=True, cache=True)
def _make_room(x, hot, frames, ends, lo, hi, fill, n, keep, needs):
    """Where the next sample goes; slides what is still needed to the front when n more do not fit."""
    if fill + n <= x.shape[1]:
        return fill
    cut = fill - keep
    for c in range(lo, hi):
        x[c, :keep] = x[c, cut:fill]
        hot[c, :keep] = hot[c, cut:fill]
        for j in range(3):
            first = max(cut, fill - needs[j])
            for p in range(first, min(fill, ends[j, c])):
                frames[j, c, p - cut] = frames[j, c, p]
            ends[j, c] = max(0, ends[j, c] - cut)
    return keep


@njit(nogil=True, cache=True)
def _take(x, new, at, n, lo, hi, fill, scale):
    """Scale new[:, at : at + n] into x."""
    for c in range(lo, hi):
        for t in range(n):
            x[c, fill + t] = new[c, at + t] * scale


@njit(nogil=True, cache=True)
def _watch(x_base, x_row, hot, lo, hi, fill, n, reach, threshold, kernels, rows, hidden, scores, at, to):
    """Score the columns that have `reach` samples after them now, and mark those at or above the threshold."""
    k = 0
    for c in range(lo, hi):
        for t in range(n):
            at[k] = c * x_row + (fill + t - 2 * reach) * 4
            to[k] = k * hidden.shape[1] * 4
            k += 1
    tiles = _fill_tile(at, to, k, rows[4])
    _run(kernels[4, 0], x_base, at.ctypes.data, kernels[4, 1], kernels[4, 2], kernels[4, 3], hidden.ctypes.data,
         to.ctypes.data, tiles)  # fmt: skip
    for i in range(k):
        at[i], to[i] = i * hidden.shape[1] * 4, i * 4
    tiles = _fill_tile(at, to, k, rows[5])
    _run(kernels[5, 0], hidden.ctypes.data, at.ctypes.data, kernels[5, 1], kernels[5, 2], kernels[5, 3],
         scores.ctypes.data, to.ctypes.data, tiles)  # fmt: skip
    k = 0
    for c in range(lo, hi):
        for t in range(n):
            hot[c, fill + t - reach] = scores[k] >= threshold
            k += 1


@njit(nogil=True, cache=True)
def seen_ahead(lag, reach, margin):
    """Columns after the newest for which the sentinel may know already that they are wanted."""
    return lag + margin - reach


@njit(nogil=True, cache=True)
def _open(hot, opened, lo, hi, fill, n, lag, reach, margin):
    """opened[c, t]: whether the logit that column fill + t completes is wanted, as far as it is known already.

    It is certain for t < n; the columns after that, up to `seen_ahead`, tell what the next chunk will need.
    """
    first, known = fill - lag, fill + n - reach
    width = n + seen_ahead(lag, reach, margin)
    for c in range(lo, hi):
        until = 0
        for p in range(first - margin, first + margin):
            if p < known and hot[c, p]:
                until = p + margin + 1 - first
        for t in range(width):
            p = first + t + margin
            if p < known and hot[c, p]:
                until = t + 2 * margin + 1
            opened[c, t] = t < until


@njit(nogil=True, cache=True)
def _rows(
    opened,
    gated,
    ends,
    layer,
    lo,
    hi,
    fill,
    n,
    width,
    back,
    reach,
    source_row,
    target_row,
    source_frame,
    target_frame,
    at,
    to,
):
    """Byte offsets of the windows and outputs of this layer that are still missing; how many.

    `back`: taps of the layer less one; `reach`: columns before the newest that its outputs are still needed for.
    With `width` beyond the n new columns: also what those after them will need of this layer and can be made now.
    """
    k = 0
    for c in range(lo, hi):
        t = 0
        while t < width and t - reach < n:
            if gated and not opened[c, t]:
                t += 1
                continue
            stop = t + 1
            while stop < width and (not gated or opened[c, stop]):
                stop += 1
            end = fill + min(stop, n)
            for p in range(max(ends[layer, c], fill + t - reach), end):
                at[k] = c * source_row + (p - back) * source_frame
                to[k] = c * target_row + p * target_frame
                k += 1
            ends[layer, c] = max(ends[layer, c], end)
            t = stop
    return k


@njit(nogil=True, cache=True)
def _output_rows(opened, gated, lo, hi, fill, n, back, source_row, source_frame, out, column, at, to):
    k = 0
    for c in range(lo, hi):
        for t in range(n):
            if gated and not opened[c, t]:
                out[c, column + t] = CLOSED_LOGIT
                continue
            at[k] = c * source_row + (fill + t - back) * source_frame
            to[k] = (c * out.shape[1] + column + t) * 4
            k += 1
    return k


@njit(nogil=True, cache=True)
def _fill_tile(at, to, k, rows):
    """Repeat the last row until the tile is full; number of tiles."""
    tiles = (k + rows - 1) // rows
    for i in range(k, tiles * rows):
        at[i], to[i] = at[k - 1], to[k - 1]
    return tiles


@njit(nogil=True, cache=True)
def advance(new, scale, gated, threshold, reach, margin, keep, lo, hi, fill, lag, backs, needs, kernels, rows, bases,
            element, x, hot, frames, ends, opened, hidden, scores, at, to, out, out_base, counts):  # fmt: skip
    """Channels lo to hi of a chunk `new` (channels, n): logits into out (channels, n). Returns the new fill.

    kernels (6, 4) int64: address, panel, dots, bias of the four layers and the sentinel's two; bases (4,) int64:
    addresses of x and the frames; lag: lookahead; backs (4,): taps less one; needs (4,): sum of those after a layer.
    """
    n_all = new.shape[1]
    values = frames.shape[3]
    source_row, frame_row = x.shape[1] * 4, frames.shape[2] * values * element
    done = 0
    while done < n_all:
        n = min(PIECE, n_all - done)
        fill = _make_room(x, hot, frames, ends, lo, hi, fill, n, keep, needs)
        for first in range(lo, hi, BLOCK):
            last = min(first + BLOCK, hi)
            _take(x, new, done, n, first, last, fill, scale)
            if gated:
                _watch(bases[0], source_row, hot, first, last, fill, n, reach, threshold, kernels, rows, hidden, scores,
                       at, to)  # fmt: skip
                _open(hot, opened, first, last, fill, n, lag, reach, margin)
            for layer in range(3):
                row, frame = (source_row, 4) if layer == 0 else (frame_row, values * element)
                k = _rows(opened, gated, ends, layer, first, last, fill, n, n, backs[layer], needs[layer], row,
                          frame_row, frame, values * element, at, to)  # fmt: skip
                tiles = _fill_tile(at, to, k, rows[layer])
                _run(kernels[layer, 0], bases[layer], at.ctypes.data, kernels[layer, 1], kernels[layer, 2],
                     kernels[layer, 3], bases[layer + 1], to.ctypes.data, tiles)  # fmt: skip
            k = _output_rows(
                opened, gated, first, last, fill, n, backs[3], frame_row, values * element, out, done, at, to
            )
            tiles = _fill_tile(at, to, k, rows[3])
            _run(kernels[3, 0], bases[3], at.ctypes.data, kernels[3, 1], kernels[3, 2], kernels[3, 3], out_base,
                 to.ctypes.data, tiles)  # fmt: skip
            counts[0] += k
        fill += n
        done += n
    return fill


@njit(nogil=True, cache=True)
def look_ahead(
    reach,
    margin,
    lo,
    hi,
    fill,
    n,
    lag,
    backs,
    needs,
    kernels,
    rows,
    bases,
    element,
    x,
    frames,
    ends,
    opened,
    at,
    to,
):
    """Make now what the next chunk is already known to need; fill and n are those of the last piece."""
    values = frames.shape[3]
    source_row, frame_row = x.shape[1] * 4, frames.shape[2] * values * element
    width = n + seen_ahead(lag, reach, margin)
    for first in range(lo, hi, BLOCK):
        last = min(first + BLOCK, hi)
        for layer in range(3):
            row, frame = (source_row, 4) if layer == 0 else (frame_row, values * element)
            k = _rows(opened, True, ends, layer, first, last, fill, n, width, backs[layer], needs[layer], row,
                      frame_row, frame, values * element, at, to)  # fmt: skip
            tiles = _fill_tile(at, to, k, rows[layer])
            _run(kernels[layer, 0], bases[layer], at.ctypes.data, kernels[layer, 1], kernels[layer, 2],
                 kernels[layer, 3], bases[layer + 1], to.ctypes.data, tiles)  # fmt: skip


class _Workers:
    """Threads that wait for a share of a chunk; the caller does the first share itself."""

    def __init__(self, n: int) -> None:
        self._jobs: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(n)]
        self._done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for jobs in self._jobs:
            threading.Thread(target=self._serve, args=(jobs, self._done), daemon=True).start()
        weakref.finalize(self, self._end, self._jobs)

    @staticmethod
    def _serve(jobs: queue.SimpleQueue[Any], done: queue.SimpleQueue[Any]) -> None:
        while (job := jobs.get()) is not None:
            function, share = job
            try:
                done.put((function(share), None))
            except BaseException as e:  # noqa: BLE001 - told to the caller
                done.put((None, e))

    @staticmethod
    def _end(jobs: list[queue.SimpleQueue[Any]]) -> None:
        for q in jobs:
            q.put(None)

    def run(self, function: Any) -> None:
        """function(0) here and function(1), function(2) ... on the threads; returns when all are done."""
        for i, jobs in enumerate(self._jobs):
            jobs.put((function, i + 1))
        function(0)
        for _ in self._jobs:
            _, error = self._done.get()
            if error is not None:
                raise error


class CpuStream:
    """State of one stream for the compiled kernels. Chunks in, a view of the logits out."""

    def __init__(self, network: DetectionNetwork, n_channels: int, precision: str, threads: int) -> None:
        self.n_channels, self.threads = n_channels, max(1, min(threads, n_channels))
        self.lag = network.lookahead
        self._backs = np.array(network.kernels, np.int64) - 1
        self._needs = self._backs[::-1].cumsum()[::-1] - self._backs
        wide = cpu_kernel.padded_width(network.width)
        self._built = _kernels(network, wide, precision)
        kind = np.uint16 if precision == cpu_kernel.BFLOAT16 else np.float32
        self._element = np.dtype(kind).itemsize
        self._keep = network.receptive_field + max(network.kernels) + 1
        columns = self._keep + ROOM
        self._x = cpu_kernel.aligned((n_channels, columns), np.float32)
        self._hot = np.zeros((n_channels, columns), np.bool_)
        self._frames = cpu_kernel.aligned((3, n_channels, columns, wide), kind)
        self._ends = np.zeros((3, n_channels), np.int64)
        self._opened = np.zeros((n_channels, PIECE + network.receptive_field), np.bool_)
        size = BLOCK * (PIECE + network.receptive_field) + 16
        self._at = [np.zeros(size, np.int64) for _ in range(self.threads)]
        self._to = [np.zeros(size, np.int64) for _ in range(self.threads)]
        self._hidden = [
            cpu_kernel.aligned((BLOCK * PIECE + 16, FILTERS), np.float32) for _ in range(self.threads)
        ]
        self._scores = [np.zeros(BLOCK * PIECE + 16, np.float32) for _ in range(self.threads)]
        self._counts = np.zeros((self.threads, 8), np.int64)
        self._kernels, self._rows = np.zeros((6, 4), np.int64), np.ones(6, np.int64)
        for i, k in enumerate(self._built):
            self._install(i, k)
        self._bases = np.array([self._x.ctypes.data, *(f.ctypes.data for f in self._frames)], np.int64)
        self._outputs: dict[int, tuple[np.ndarray, int]] = {}
        edges = np.linspace(0, n_channels, self.threads + 1).round().astype(int)
        self._shares = [(int(a), int(b)) for a, b in pairwise(edges)]
        self._workers = _Workers(self.threads - 1) if self.threads > 1 else None
        self._sentinel: Sentinel | None = None
        self.reset()

    def _install(self, place: int, kernel: cpu_kernel.Kernel) -> None:
        w = kernel.weights
        self._kernels[place] = kernel.address, w.panel.ctypes.data, w.dots.ctypes.data, w.bias.ctypes.data
        self._rows[place] = kernel.rows

    def watch(self, sentinel: Sentinel | None) -> None:
        """Let a sentinel close the gate from the next sample on; None opens it for good."""
        if sentinel is not None:
            if sentinel.reach + sentinel.margin > self.lag or len(sentinel.filters) != FILTERS:
                raise ValueError("this sentinel was made for another network")
            f32 = cpu_kernel.FLOAT32
            offset = np.array([sentinel.offset], np.float32)
            watchers = [
                cpu_kernel.build(sentinel.filters, sentinel.bias, True, f32, f32),
                cpu_kernel.build(sentinel.weights[None], offset, False, f32, f32),
            ]
            self._built = [*self._built[:LAYERS], *watchers]
            for i, k in enumerate(watchers):
                self._install(LAYERS + i, k)
            if self._sentinel is None:
                self._hot[:] = True
            self._last = 0
        self._sentinel = sentinel

    def reset(self) -> None:
        """The next sample is the first, after zeros."""
        self._x[:], self._hot[:], self._ends[:] = 0, False, 0
        self._fill = self._keep
        self._last = 0

    @property
    def computed(self) -> int:
        """Logits computed so far, all channels; with a gate fewer than were asked for."""
        return int(self._counts[:, 0].sum())

    def process(self, x: np.ndarray, scale: float) -> np.ndarray:
        """x (channels, n) float32 -> logits (channels, n) float32, valid until the next call with n samples.

        Column t completes the logit of `lookahead` samples before.
        """
        out, base = self._output(x.shape[1])
        s, fill = self._sentinel, self._fill
        gate = (False, 0.0, 0, 0) if s is None else (True, s.threshold, s.reach, s.margin)

        def share(i: int) -> None:
            lo, hi = self._shares[i]
            self._filled = advance(
                x, scale, *gate, self._keep, lo, hi, fill, self.lag, self._backs, self._needs, self._kernels, self._rows,
                self._bases, self._element, self._x, self._hot, self._frames, self._ends, self._opened,
                self._hidden[i], self._scores[i], self._at[i], self._to[i], out, base, self._counts[i],
            )  # fmt: skip

        if self._workers is not None and x.size >= PARALLEL_FROM:
            self._workers.run(share)
        else:
            for i in range(self.threads):
                share(i)
        self._fill = self._filled
        self._last = (x.shape[1] - 1) % PIECE + 1 if x.shape[1] else 0
        return out

    def prepare(self) -> None:
        """Do now what the next chunk is known to need: a spike opens the gate a millisecond before its logits are due.

        For the time when nobody waits for this chunk any more; without it the next chunk takes longer.
        """
        s, n = self._sentinel, self._last
        if s is None or n == 0:
            return
        self._last = 0
        for i, (lo, hi) in enumerate(self._shares):
            look_ahead(
                s.reach, s.margin, lo, hi, self._fill - n, n, self.lag, self._backs, self._needs, self._kernels,
                self._rows, self._bases, self._element, self._x, self._frames, self._ends, self._opened, self._at[i], self._to[i],
            )  # fmt: skip

    def _output(self, n: int) -> tuple[np.ndarray, int]:
        found = self._outputs.get(n)
        if found is None:
            if len(self._outputs) >= WORK_AREAS:
                del self._outputs[next(iter(self._outputs))]
            out = np.zeros((self.n_channels, n), np.float32)
            found = self._outputs[n] = out, out.ctypes.data
        return found


def _kernels(network: DetectionNetwork, wide: int, precision: str) -> list[cpu_kernel.Kernel]:
    """The four layers; frames hold `wide` values, those beyond the network's width are zero."""
    out = []
    for i, (weight, bias) in enumerate(network.layers):
        w, b = weight.cpu().numpy(), bias.cpu().numpy()
        outputs, inputs = (1 if i == 3 else wide), (1 if i == 0 else wide)
        full = np.zeros((outputs, network.kernels[i], inputs), np.float32)
        full[: w.shape[0], :, : w.shape[1]] = w.transpose(0, 2, 1)
        biases = np.zeros(outputs, np.float32)
        biases[: len(b)] = b
        read = cpu_kernel.FLOAT32 if i == 0 else precision
        write = cpu_kernel.FLOAT32 if i == 3 else precision
        out.append(cpu_kernel.build(full.reshape(outputs, -1), biases, i < 3, read, write))
    return out
