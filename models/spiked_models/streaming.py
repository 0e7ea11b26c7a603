"""The detection network on a stream: every layer computes new samples only.

The last kernel - 1 inputs of each layer are kept, so a chunk of n samples costs n columns of every layer,
whatever n is, and the logits are those of the batch network on the whole stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spiked_models.networks import DetectionNetwork, NetworkError

# Measured on a CPU (AVX-512): 64 channels at a time stay in the cache, up to 4 samples one matrix product
# beats the library's convolution, and pieces longer than this gain nothing more.
CPU_GROUP, MATRIX_UP_TO, CPU_PIECE, GPU_PIECE = 64, 4, 128, 2048
WORK_AREAS = 8  # chunk lengths whose work areas are kept


@dataclass
class _Group:
    """State of some channels: what each layer saw last."""

    channels: slice
    input_tail: Tensor  # (channels, kernel - 1)
    hidden_tails: tuple[Tensor, Tensor]  # (channels, kernel - 1, width) before layers 2 and 3
    output_tail: Tensor  # (channels, kernel - 1, kernel): products of the last layer, one per tap


class StreamingNetwork:
    """A detection network that is fed a stream.

    The stream counts as preceded by zeros without end. The logit of sample t is returned by the call that
    brings sample t + lookahead: over a stream of N samples N - lookahead logits come out, in order from
    sample 0, so the first calls may return fewer than n, or none. To have the last ones, push `lookahead`
    zeros. Runs on any device; `dtype` may be half precision on a GPU. Not for use by two threads at once.
    """

    def __init__(
        self, network: DetectionNetwork, n_channels: int, device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        if n_channels < 1:
            raise NetworkError(f"a stream of {n_channels} channels cannot be detected on; give at least one")
        self.network, self.n_channels = network, n_channels
        self.device, self.dtype = torch.device(device), dtype
        self.lookahead, self.kernel, self.width = network.lookahead, network.kernel, network.width
        layers = [(w.to(self.device, dtype), b.to(self.device, dtype)) for w, b in network.layers]
        (w0, b0), (w1, b1), (w2, b2), (w3, b3) = layers
        self._first = w0[:, 0].t().contiguous(), b0  # (kernel, width)
        self._hidden = tuple(_HiddenLayer(w, b) for w, b in ((w1, b1), (w2, b2)))
        self._last = w3[0].contiguous(), b3  # (width, kernel)
        on_cpu = self.device.type == "cpu"
        step = CPU_GROUP if on_cpu else n_channels
        self._piece = CPU_PIECE if on_cpu else GPU_PIECE
        self._work: dict[tuple[int, int], list[Tensor]] = {}
        self._slices = [slice(i, min(i + step, n_channels)) for i in range(0, n_channels, step)]
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget the stream: the next sample is the first, after zeros."""
        self._silent = self.lookahead
        rest = torch.relu(self._first[1])
        resting = [rest]
        for layer in self._hidden:
            rest = torch.relu(layer.matrix.view(self.kernel, self.width, -1).sum(0).t() @ rest + layer.bias)
            resting.append(rest)
        products = resting[2] @ self._last[0]
        self._groups = []
        for channels in self._slices:
            shape = channels.stop - channels.start, self.kernel - 1
            tails = tuple(r.expand(*shape, self.width).clone() for r in resting[:2])
            zeros = torch.zeros(shape, device=self.device, dtype=self.dtype)
            output = products.expand(*shape, self.kernel).clone()
            self._groups.append(_Group(channels, zeros, (tails[0], tails[1]), output))

    @torch.inference_mode()
    def process(self, x_new: Tensor) -> Tensor:
        """Scaled traces (channels, n), n >= 0 -> logits (channels, n_out), the next ones of the stream."""
        if x_new.ndim != 2 or x_new.shape[0] != self.n_channels:
            raise NetworkError(
                f"a chunk of shape {tuple(x_new.shape)} came; ({self.n_channels}, samples) is needed"
            )
        x = x_new.to(self.device, self.dtype)
        n = x.shape[1]
        out = torch.empty((self.n_channels, n), device=self.device, dtype=self.dtype)
        for start in range(0, n, self._piece):
            piece = slice(start, min(start + self._piece, n))
            for group in self._groups:
                self._advance(group, x[group.channels, piece], out[group.channels, piece])
        dropped = min(self._silent, n)
        self._silent -= dropped
        return out[:, dropped:]

    def _advance(self, group: _Group, x: Tensor, out: Tensor) -> None:
        c, n = x.shape
        k, keep = self.kernel, self.kernel - 1
        inputs, *hidden, products = self._areas(c, n)
        inputs[:, :keep], inputs[:, keep:] = group.input_tail, x
        group.input_tail.copy_(inputs[:, n:])
        weight, bias = self._first
        h = torch.addmm(bias, inputs.unfold(1, k, 1).reshape(c * n, k), weight).view(c, n, self.width)
        for area, tail, layer in zip(hidden, group.hidden_tails, self._hidden, strict=True):
            area[:, :keep] = tail
            torch.clamp_min(h, 0, out=area[:, keep:])
            tail.copy_(area[:, n:])
            h = layer(area, n)
        weight, bias = self._last
        products[:, :keep] = group.output_tail
        products[:, keep:] = h.clamp_min_(0) @ weight
        group.output_tail.copy_(products[:, n:])
        # Output j sums the product of tap i at input j + i: a diagonal of (time, tap).
        diagonal = products.as_strided((c, n, k), (products.stride(0), k, k + 1))
        torch.add(diagonal.sum(2), bias, out=out)

    def _areas(self, c: int, n: int) -> list[Tensor]:
        """Scratch for one piece, shared by all groups: inputs of the layers, products of the last."""
        areas = self._work.get((c, n))
        if areas is None:
            if len(self._work) >= WORK_AREAS:
                del self._work[next(iter(self._work))]
            frames = self.kernel - 1 + n
            shapes = (frames,), (frames, self.width), (frames, self.width), (frames, self.kernel)
            areas = [torch.empty((c, *s), device=self.device, dtype=self.dtype) for s in shapes]
            self._work[c, n] = areas
        return areas


class _HiddenLayer:
    """width -> width: (channels, kernel - 1 + n, width) -> (channels, n, width), before the ReLU."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        width, _, self.kernel = weight.shape
        self.bias = bias
        self.matrix = weight.permute(2, 1, 0).reshape(self.kernel * width, width).contiguous()
        self.planes = weight[:, :, None].contiguous(memory_format=torch.channels_last)

    def __call__(self, area: Tensor, n: int) -> Tensor:
        c, frames, width = area.shape
        if n <= MATRIX_UP_TO:
            # Consecutive frames are adjacent in memory, so a window is one run of kernel * width values.
            windows = area.as_strided((c, n, self.kernel * width), (frames * width, width, 1))
            return torch.addmm(self.bias, windows.reshape(c * n, -1), self.matrix).view(c, n, width)
        # The same memory seen as (channels, width, 1, frames) in channels-last order.
        planes = area[:, None].permute(0, 3, 1, 2)
        return functional.conv2d(planes, self.planes, self.bias)[:, :, 0].transpose(1, 2)
