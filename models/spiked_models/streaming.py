"""The detection network on a stream: every layer computes new samples only, whatever the length of a chunk.

On a CPU generated kernels run it (cpu_stream), elsewhere torch (torch_stream); both give the logits of the batch
network on the whole stream, to the precision chosen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spiked_models import cpu_kernel
from spiked_models.cpu_stream import CLOSED_LOGIT, CpuStream
from spiked_models.networks import DetectionNetwork, NetworkError
from spiked_models.sentinel import Sentinel
from spiked_models.torch_stream import TorchStream

__all__ = ["CLOSED_LOGIT", "StreamingNetwork"]

GATE_FROM = 8  # a gate is worth its own work in front of a network of this many times the sentinel's


class StreamingNetwork:
    """A detection network that is fed a stream.

    The stream counts as preceded by zeros without end. The logit of sample t is returned by the call that
    brings sample t + lookahead: over a stream of N samples N - lookahead logits come out, in order from
    sample 0, so the first calls may return fewer than n, or none. To have the last ones, push `lookahead`
    zeros. Not for use by two threads at once.

    `precision`: "auto" (bfloat16 on a CPU that multiplies it, float16 on a GPU, else float32), or one of these.
    `threads` is for the CPU; a GPU ignores it.
    """

    def __init__(
        self, network: DetectionNetwork, n_channels: int, device: str | torch.device = "cpu",
        precision: str = "float32", threads: int = 1,
    ) -> None:  # fmt: skip
        if n_channels < 1:
            raise NetworkError(f"a stream of {n_channels} channels cannot be detected on; give at least one")
        self.network, self.n_channels = network, n_channels
        self.device = torch.device(device)
        self.lookahead = network.lookahead
        self._cpu: CpuStream | None = None
        self._torch: TorchStream | None = None
        if self.device.type == "cpu":
            try:
                self.precision = cpu_kernel.check_precision(precision)
            except ValueError as e:
                raise NetworkError(str(e)) from e
            self._cpu = CpuStream(network, n_channels, self.precision, threads)
        else:
            self.precision = "float16" if precision == "auto" else precision
            self._torch = TorchStream(network, n_channels, self.device, self.precision)
        self._silent = self.lookahead

    def reset(self) -> None:
        """Forget the stream: the next sample is the first, after zeros."""
        self._silent = self.lookahead
        if self._cpu is not None:
            self._cpu.reset()
        if self._torch is not None:
            self._torch.reset()

    def watch(self, sentinel: Sentinel | None) -> None:
        """Let a sentinel say where the network need not run, from the next sample on (CPU; a GPU runs it everywhere).

        A network that costs little more than the sentinel, or that looks less far ahead, runs everywhere, too.
        """
        if self._cpu is None:
            return
        if sentinel is not None and (
            self.network.macs < GATE_FROM * sentinel.macs or sentinel.reach + sentinel.margin > self.lookahead
        ):
            sentinel = None
        self._cpu.watch(sentinel)

    def prepare(self) -> None:
        """Between chunks, when nobody waits: do what the next one is already known to need (changes no result)."""
        if self._cpu is not None:
            self._cpu.prepare()

    @property
    def computed(self) -> int | None:
        """Logits computed so far, all channels together; None where no gate can close."""
        return None if self._cpu is None else self._cpu.computed

    def process_array(self, x: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """Traces (channels, n) float32 -> logits (channels, n_out) float32, the next ones of the stream.

        The traces are multiplied by `scale`. The result is a view that the next call may overwrite.
        """
        if x.ndim != 2 or x.shape[0] != self.n_channels:
            raise NetworkError(f"a chunk of shape {x.shape} came; ({self.n_channels}, samples) is needed")
        if self._cpu is not None:
            out = self._cpu.process(x if x.dtype == np.float32 else x.astype(np.float32), scale)
        else:
            assert self._torch is not None
            out = self._torch.process(x, scale)
        dropped = min(self._silent, x.shape[1])
        self._silent -= dropped
        return out[:, dropped:] if dropped else out

    def process(self, x_new: Tensor) -> Tensor:
        """Scaled traces (channels, n), n >= 0 -> logits (channels, n_out) of its own, the next ones of the stream."""
        if x_new.ndim != 2:
            raise NetworkError(
                f"a chunk of shape {tuple(x_new.shape)} came; ({self.n_channels}, samples) is needed"
            )
        return torch.from_numpy(self.process_array(x_new.numpy(force=True)).copy())
