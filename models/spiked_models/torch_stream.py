"""The detection network on a stream, on a GPU: state kept between chunks, one captured graph per chunk length.

A chunk goes up from pinned memory, through every layer and back to pinned memory in one replayed graph; the only
synchronisation is the one that waits for its logits. The same lines run on a CPU, uncaptured, as a reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spiked_models.networks import DetectionNetwork, NetworkError

MATRIX_UP_TO = 4  # samples up to which one matrix product beats the library's convolution
PIECE = 2048  # longer chunks are cut
WORK_AREAS = 8  # chunk lengths whose work areas (and graphs) are kept
TENSOR_CORE = 8  # widths are padded to a multiple of this in half precision
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class _Area:
    """What one chunk length needs: where it arrives, the layers' inputs, where logits leave, and its graph."""

    host_in: Tensor
    host_out: Tensor
    device_in: Tensor
    inputs: Tensor
    hidden: tuple[Tensor, Tensor]
    products: Tensor
    out: Tensor
    graph: Any = None


class TorchStream:
    """Chunks (channels, n) in, logits (channels, n) out; column t completes the logit of `lookahead` samples before."""

    def __init__(
        self, network: DetectionNetwork, n_channels: int, device: torch.device, precision: str
    ) -> None:
        if precision not in PRECISIONS:
            raise NetworkError(f"precision {precision!r} is not known; choose auto, {', '.join(PRECISIONS)}")
        self.n_channels, self.device, self.dtype = n_channels, device, PRECISIONS[precision]
        self.kernels, half = network.kernels, precision != "float32"
        self.width = -(-network.width // TENSOR_CORE) * TENSOR_CORE if half else network.width
        layers = [self._padded(i, w, b) for i, (w, b) in enumerate(network.layers)]
        (w0, b0), (w1, b1), (w2, b2), (w3, b3) = layers
        self._first = w0[:, 0].t().contiguous(), b0  # (kernel, width)
        self._hidden = tuple(_HiddenLayer(w, b) for w, b in ((w1, b1), (w2, b2)))
        self._last = w3[0].contiguous(), b3  # (width, kernel)
        self._scale = torch.ones((), device=device, dtype=torch.float32)
        self._scale_value = 1.0
        self._areas: dict[int, _Area] = {}
        c, (k0, k1, k2, k3) = n_channels, self.kernels
        self._input_tail = self._zeros(c, k0 - 1)
        self._hidden_tails = self._zeros(c, k1 - 1, self.width), self._zeros(c, k2 - 1, self.width)
        self._output_tail = self._zeros(c, k3 - 1, k3)
        self.reset()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def _padded(self, layer: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights on the device, with channels of zeros up to the padded width."""
        more_out = 0 if layer == 3 else self.width - weight.shape[0]
        more_in = 0 if layer == 0 else self.width - weight.shape[1]
        weight = functional.pad(weight, (0, 0, 0, more_in, 0, more_out))
        bias = functional.pad(bias, (0, more_out))
        return weight.to(self.device, self.dtype), bias.to(self.device, self.dtype)

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget the stream: the next sample is the first, after zeros."""
        rest = torch.relu(self._first[1])
        resting = [rest]
        for layer in self._hidden:
            rest = torch.relu(layer.matrix.view(layer.kernel, self.width, -1).sum(0).t() @ rest + layer.bias)
            resting.append(rest)
        self._input_tail.zero_()
        for tail, value in zip(self._hidden_tails, resting, strict=False):
            tail.copy_(value.expand_as(tail))
        self._output_tail.copy_((resting[2] @ self._last[0]).expand_as(self._output_tail))

    @torch.inference_mode()
    def process(self, x: np.ndarray, scale: float) -> np.ndarray:
        """x (channels, n) float32 times `scale` -> logits (channels, n) float32; the next call may overwrite them."""
        if scale != self._scale_value:
            self._scale_value = scale
            self._scale.fill_(scale)
        if x.shape[1] <= PIECE:
            return self._piece(x)
        parts = [self._piece(x[:, a : a + PIECE]).copy() for a in range(0, x.shape[1], PIECE)]
        return np.concatenate(parts, axis=1)

    def _piece(self, x: np.ndarray) -> np.ndarray:
        if x.shape[1] == 0:
            return np.zeros((self.n_channels, 0), np.float32)
        area = self._area(x.shape[1])
        np.copyto(area.host_in.numpy(), x)
        if area.graph is None:
            self._advance(area)
        else:
            area.graph.replay()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return np.asarray(area.host_out.numpy())

    def _area(self, n: int) -> _Area:
        area = self._areas.get(n)
        if area is None:
            if len(self._areas) >= WORK_AREAS:
                del self._areas[next(iter(self._areas))]
            area = self._areas[n] = self._new_area(n)
        return area

    def _new_area(self, n: int) -> _Area:
        c, cuda, (f0, f1, f2, f3) = (
            self.n_channels,
            self.device.type == "cuda",
            (k - 1 + n for k in self.kernels),
        )
        area = _Area(
            torch.zeros((c, n), pin_memory=cuda), torch.zeros((c, n), pin_memory=cuda),
            torch.zeros((c, n), device=self.device), self._zeros(c, f0),
            (self._zeros(c, f1, self.width), self._zeros(c, f2, self.width)),
            self._zeros(c, f3, self.kernels[3]), self._zeros(c, n),
        )  # fmt: skip
        if cuda:
            area.graph = self._captured(area)
        return area

    def _captured(self, area: _Area) -> Any:
        """The graph of one chunk. Warming up and capturing must leave the stream's state as it was."""
        state = (self._input_tail, *self._hidden_tails, self._output_tail)
        kept = [s.clone() for s in state]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self._advance(area)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance(area)
        for s, k in zip(state, kept, strict=True):
            s.copy_(k)
        return graph

    def _advance(self, a: _Area) -> None:
        c, n = a.out.shape
        k0, _, _, k3 = self.kernels
        a.device_in.copy_(a.host_in, non_blocking=True)
        a.inputs[:, : k0 - 1] = self._input_tail
        a.inputs[:, k0 - 1 :] = a.device_in * self._scale
        self._input_tail.copy_(a.inputs[:, n:])
        weight, bias = self._first
        h = torch.addmm(bias, a.inputs.unfold(1, k0, 1).reshape(c * n, k0), weight).view(c, n, self.width)
        for area, tail, layer in zip(a.hidden, self._hidden_tails, self._hidden, strict=True):
            keep = layer.kernel - 1
            area[:, :keep] = tail
            torch.clamp_min(h, 0, out=area[:, keep:])
            tail.copy_(area[:, n:])
            h = layer(area, n)
        weight, bias = self._last
        a.products[:, : k3 - 1] = self._output_tail
        a.products[:, k3 - 1 :] = h.clamp_min_(0) @ weight
        self._output_tail.copy_(a.products[:, n:])
        # Output j sums the product of tap i at input j + i: a diagonal of (time, tap).
        diagonal = a.products.as_strided((c, n, k3), (a.products.stride(0), k3, k3 + 1))
        torch.add(diagonal.sum(2), bias, out=a.out)
        a.host_out.copy_(a.out, non_blocking=True)


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
