"""The streaming network gives the logits of the batch network, however the stream is cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from spiked_models.networks import DetectionNetwork, NetworkError, available, load
from spiked_models.streaming import StreamingNetwork

SHARED = Path(os.environ.get("SPIKED_SHARED", Path(__file__).parents[1] / ".." / "shared"))


Kernels = int | tuple[int, int, int, int]
UNEQUAL = (25, 3, 2, 28), (9, 1, 1, 31), (5, 12, 20, 1)


def drawn(width: int, kernel: Kernels, seed: int = 0, ahead: int | None = None) -> DetectionNetwork:
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, width, width, width, 1]
    kernels = (kernel,) * 4 if isinstance(kernel, int) else kernel
    layers = tuple(
        (torch.randn(sizes[i + 1], sizes[i], k, generator=generator) * (2 / (sizes[i] * k)) ** 0.5,
         torch.randn(sizes[i + 1], generator=generator) * 0.3)
        for i, k in enumerate(kernels)
    )  # fmt: skip
    return DetectionNetwork("drawn", 20_000.0, layers, 1.0, 1.349, 0.3, 0.1, "", ahead)


def traces(channels: int, samples: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed)) * 1.5


def expected(net: DetectionNetwork, x: torch.Tensor) -> torch.Tensor:
    """Zeros before the stream; the logits of samples 0 to N - lookahead."""
    return net.batch_logits(functional.pad(x, (net.lookback, 0)))


def streamed(net: DetectionNetwork, x: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    stream, out, at = StreamingNetwork(net, len(x)), [], 0
    for n in [*cuts, max(0, x.shape[1] - sum(cuts))]:
        piece = stream.process(x[:, at : at + n])
        at = min(at + n, x.shape[1])
        out.append(piece)
        assert sum(p.shape[1] for p in out) == max(0, at - net.lookahead)
    return torch.cat(out, dim=1)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60) | st.just(1), max_size=30), width=st.sampled_from([3, 16]),
       kernel=st.sampled_from([11, 21, 31]), channels=st.integers(1, 5))  # fmt: skip
def test_any_cut_gives_the_batch_logits(cuts: list[int], width: int, kernel: int, channels: int) -> None:
    net, x = drawn(width, kernel), traces(channels, 200)
    assert (streamed(net, x, cuts) - expected(net, x)).abs().max() < 1e-4


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 60) | st.just(1), max_size=30), width=st.sampled_from([8, 16]),
       kernels=st.sampled_from(UNEQUAL), ahead=st.sampled_from([0, 7, 16, 36]))  # fmt: skip
def test_any_cut_gives_the_batch_logits_whatever_the_layers_and_the_lookahead(
    cuts: list[int], width: int, kernels: Kernels, ahead: int
) -> None:
    net, x = drawn(width, kernels, ahead=ahead), traces(3, 200)
    assert (net.lookahead, net.lookback) == (ahead, net.receptive_field - 1 - ahead)
    assert (streamed(net, x, cuts) - expected(net, x)).abs().max() < 1e-4


@pytest.mark.parametrize("cuts", [[1] * 150, [20] * 15, [300], [0, 3, 290], [129, 1, 170]])
def test_many_channels_and_long_pieces(cuts: list[int]) -> None:
    net, x = drawn(16, 21), traces(130, 300)
    assert (streamed(net, x, cuts) - expected(net, x)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["mea", "neuropixels"])
@pytest.mark.parametrize("cuts", [[1] * 40, [20] * 10, [7, 230]])
def test_published_networks(name: str, cuts: list[int]) -> None:
    path = SHARED / "weights" / name
    if not path.is_dir():
        pytest.skip("published RT-Sort weights are not beside the repository (SPIKED_SHARED)")
    net = load(path)
    x = traces(8, 260) * net.input_scale * 10
    assert (streamed(net, x, cuts) - expected(net, x)).abs().max() < 1e-4


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("cuts", [[1] * 40, [20] * 10, [7, 230]])
def test_shipped_networks(name: str, cuts: list[int]) -> None:
    net, x = load(name), traces(8, 260)
    assert (streamed(net, x, cuts) - expected(net, x)).abs().max() < 1e-4


def test_reset_forgets_the_stream() -> None:
    net, x = drawn(8, 21), traces(3, 150)
    stream = StreamingNetwork(net, 3)
    first = stream.process(x)
    second = stream.process(x)
    assert first.shape[1] == 110 and second.shape[1] == 150
    stream.reset()
    assert torch.equal(stream.process(x), first)


def test_earlier_results_are_left_alone() -> None:
    net, x = drawn(8, 21), traces(3, 150)
    stream = StreamingNetwork(net, 3)
    first = stream.process(x)
    kept = first.clone()
    stream.process(traces(3, 150, seed=9))
    assert torch.equal(first, kept)


def test_wrong_shapes_are_refused() -> None:
    stream = StreamingNetwork(drawn(4, 21), 3)
    for bad in (torch.zeros(4, 10), torch.zeros(3)):
        with pytest.raises(NetworkError, match="is needed"):
            stream.process(bad)
    with pytest.raises(NetworkError, match="at least one"):
        StreamingNetwork(drawn(4, 21), 0)


@pytest.mark.gpu
def test_same_logits_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    net, x = drawn(50, 21), traces(64, 300)
    stream = StreamingNetwork(net, 64, "cuda")
    got = torch.cat([stream.process(x[:, i : i + 20]) for i in range(0, 300, 20)], dim=1).cpu()
    assert (got - expected(net, x)).abs().max() < 1e-3
