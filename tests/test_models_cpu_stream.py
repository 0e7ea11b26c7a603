"""The CPU's streaming kernels: any precision, any cut, any number of threads, and a gate that changes no open logit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models_streaming import UNEQUAL, drawn, expected

from spiked_models import cpu_kernel
from spiked_models.cpu_stream import CpuStream
from spiked_models.networks import DetectionNetwork, NetworkError
from spiked_models.sentinel import FILTERS, Sentinel
from spiked_models.streaming import CLOSED_LOGIT, StreamingNetwork
from spiked_models.torch_stream import TorchStream

KERNEL = 21
LAG = 2 * (KERNEL - 1)
PRECISIONS = ["float32", *(["bfloat16"] if cpu_kernel.best_precision() == "bfloat16" else [])]


def traces(channels: int, samples: int, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(channels, samples)) * 1.5).astype(np.float32)


def watcher(threshold: float, reach: int = 20, margin: int = 5) -> Sentinel:
    """Looks for troughs: what it marks is easily told without it."""
    filters = np.zeros((FILTERS, 2 * reach + 1), np.float32)
    filters[0, reach - 1 : reach + 2] = -1
    weights = np.zeros(FILTERS, np.float32)
    weights[0] = 1
    return Sentinel(filters, np.zeros(FILTERS, np.float32), weights, 0.0, threshold, margin, 1.0, 1.0, 0.5)


def streamed(
    net: DetectionNetwork, x: np.ndarray, cuts: list[int], precision: str = "float32", threads: int = 1,
    sentinel: Sentinel | None = None, scale: float = 1.0, ahead: bool = False,
) -> tuple[np.ndarray, int]:  # fmt: skip
    """All logits of x in these cuts (the rest at the end), and how many were computed."""
    stream = StreamingNetwork(net, len(x), precision=precision, threads=threads)
    stream.watch(sentinel)
    out, at = [], 0
    for n in [*cuts, x.shape[1]]:
        out.append(stream.process_array(x[:, at : at + n], scale).copy())
        if ahead:
            stream.prepare()
        at = min(at + n, x.shape[1])
    computed = stream.computed
    assert computed is not None
    return np.concatenate(out, axis=1), computed


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [3, 16, 32, 50, 64])
def test_batch_logits_to_the_precision_asked_for(precision: str, width: int) -> None:
    net, x = drawn(width, KERNEL), traces(5, 400)
    want = net.batch_logits(torch.from_numpy(np.pad(x, ((0, 0), (LAG, 0))))).numpy()
    got, _ = streamed(net, x, [20] * 10, precision)
    scale = float(np.abs(want).max())
    assert np.abs(got - want).max() < {"float32": 1e-5, "bfloat16": 2e-2}[precision] * scale


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 90), max_size=20), precision=st.sampled_from(PRECISIONS),
       threshold=st.sampled_from([None, 2.0, 4.0, 6.0, 99.0]), channels=st.sampled_from([1, 7, 70]), ahead=st.booleans())  # fmt: skip
def test_no_cut_changes_a_bit(
    cuts: list[int], precision: str, threshold: float | None, channels: int, ahead: bool
) -> None:
    net, x = drawn(16, KERNEL), traces(channels, 700)
    sentinel = None if threshold is None else watcher(threshold)
    whole, computed = streamed(net, x, [], precision, sentinel=sentinel)
    cut, again = streamed(net, x, cuts, precision, sentinel=sentinel, ahead=ahead)
    assert np.array_equal(whole, cut) and computed == again


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 90), max_size=20), kernels=st.sampled_from(UNEQUAL), ahead=st.sampled_from([26, 30, 36]),
       threshold=st.sampled_from([None, 4.0]), precision=st.sampled_from(PRECISIONS), early=st.booleans())  # fmt: skip
def test_no_cut_changes_a_bit_whatever_the_layers_and_the_lookahead(
    cuts: list[int],
    kernels: tuple[int, int, int, int],
    ahead: int,
    threshold: float | None,
    precision: str,
    early: bool,
) -> None:
    net, x = drawn(32, kernels, ahead=ahead), traces(9, 700)
    sentinel = None if threshold is None else watcher(threshold)
    whole, computed = streamed(net, x, [], precision, sentinel=sentinel)
    cut, again = streamed(net, x, cuts, precision, sentinel=sentinel, ahead=early)
    assert np.array_equal(whole, cut) and computed == again


@pytest.mark.parametrize("kernels", UNEQUAL)
def test_a_gate_with_a_short_lookahead_opens_where_it_did_and_changes_no_logit(
    kernels: tuple[int, int, int, int],
) -> None:
    net, x, sentinel = drawn(64, kernels, ahead=16), traces(5, 2000), watcher(4.0, reach=12, margin=4)
    full, all_of_it = streamed(net, x, [20] * 60)
    got, computed = streamed(net, x, [20] * 60, sentinel=sentinel, ahead=True)
    hot = np.stack([sentinel.score(np.pad(c, 12)) for c in x]) >= 4.0
    near = np.stack([np.convolve(h, np.ones(9), "same") > 0 for h in hot])[:, : got.shape[1]]
    settled = slice(100, 1900)
    assert np.array_equal(got[:, settled] > CLOSED_LOGIT, near[:, settled])
    opened = got > CLOSED_LOGIT
    assert np.array_equal(got[opened], full[opened]) and computed < 0.8 * all_of_it


@pytest.mark.parametrize("threshold", [3.0, 5.0])
def test_an_open_gate_changes_nothing_and_a_closed_one_saves_the_work(threshold: float) -> None:
    net, x = drawn(16, KERNEL), traces(9, 3000)
    sentinel = watcher(threshold)
    full, all_of_it = streamed(net, x, [20] * 100)
    got, computed = streamed(net, x, [20] * 100, sentinel=sentinel)
    hot = np.stack([sentinel.score(np.pad(c, 20)) for c in x]) >= threshold
    near = np.stack([np.convolve(h, np.ones(11), "same") > 0 for h in hot])[:, : got.shape[1]]
    settled = slice(100, 2800)  # the watch begins with an open gate
    assert np.array_equal(got[:, settled] > CLOSED_LOGIT, near[:, settled])
    opened = got > CLOSED_LOGIT
    assert np.array_equal(got[opened], full[opened])
    assert computed < 0.8 * all_of_it


def test_the_scale_is_applied_to_what_the_sentinel_sees_too() -> None:
    net, x = drawn(16, KERNEL), traces(4, 600)
    plain, a = streamed(net, x * np.float32(0.25), [], sentinel=watcher(1.5))
    scaled, b = streamed(net, x, [], sentinel=watcher(1.5), scale=0.25)
    assert a == b and np.array_equal(plain, scaled)


@pytest.mark.parametrize("sentinel", [None, watcher(4.0)])
def test_threads_give_the_same_bits(sentinel: Sentinel | None) -> None:
    net, x = drawn(16, KERNEL), traces(70, 600)
    one, _ = streamed(net, x, [100] * 5, sentinel=sentinel)
    three, _ = streamed(net, x, [100] * 5, threads=3, sentinel=sentinel)
    assert np.array_equal(one, three)


def test_a_reset_stream_is_a_new_one() -> None:
    net, x = drawn(16, KERNEL), traces(3, 500)
    stream = StreamingNetwork(net, 3)
    stream.watch(watcher(4.0))
    stream.process_array(traces(3, 333, seed=8))
    stream.reset()
    fresh = StreamingNetwork(net, 3)
    fresh.watch(watcher(4.0))
    fresh.reset()
    assert np.array_equal(stream.process_array(x), fresh.process_array(x))


def test_a_sentinel_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="another network"):
        CpuStream(drawn(8, 11), 2, "float32", 1).watch(watcher(1.0, reach=30))


@pytest.mark.parametrize("net", [drawn(16, (25, 3, 2, 28)), drawn(50, 21, ahead=16)])
def test_where_a_gate_is_not_worth_it_or_sees_too_late_the_network_runs_everywhere(
    net: DetectionNetwork,
) -> None:
    x = traces(3, 500)
    got, computed = streamed(net, x, [20] * 20, sentinel=watcher(99.0))
    assert (got > CLOSED_LOGIT).all() and computed == x.size


def test_precisions_that_are_not_there_are_refused() -> None:
    with pytest.raises(NetworkError, match="precision 'float8' is not known"):
        StreamingNetwork(drawn(8, 21), 2, precision="float8")


def test_torch_stream_gives_the_same_logits() -> None:
    net, x = drawn(12, KERNEL), traces(6, 500)
    reference = TorchStream(net, 6, torch.device("cpu"), "float32")
    out = [reference.process(x[:, a : a + 25], 0.5).copy() for a in range(0, 500, 25)]
    mine, _ = streamed(net, x, [25] * 19, scale=0.5)
    assert np.abs(np.concatenate(out, axis=1)[:, LAG:] - mine).max() < 1e-4


@pytest.mark.parametrize("kernels", UNEQUAL)
def test_torch_stream_gives_the_same_logits_whatever_the_layers(kernels: tuple[int, int, int, int]) -> None:
    net, x = drawn(8, kernels, ahead=16), traces(4, 400)
    reference = TorchStream(net, 4, torch.device("cpu"), "float32")
    out = [reference.process(x[:, a : a + n], 1.0).copy() for a, n in ((0, 3), (3, 97), (100, 300))]
    want = expected(net, torch.from_numpy(x)).numpy()
    assert np.abs(np.concatenate(out, axis=1)[:, 16:] - want).max() < 1e-4


@pytest.mark.parametrize("read", PRECISIONS)
@pytest.mark.parametrize(("outputs", "width"), [(50, 50), (16, 16), (1, 50), (34, 34)])
def test_a_layer_is_a_matrix_product(read: str, outputs: int, width: int) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(outputs, width * KERNEL)) / (width * KERNEL) ** 0.5).astype(np.float32)
    bias, x = rng.normal(size=outputs).astype(np.float32), rng.normal(size=(300, width)).astype(np.float32)
    kernel = cpu_kernel.build(weight, bias, outputs > 1, read, "float32")
    low = read == "bfloat16"
    source = cpu_kernel.aligned(x.shape, np.uint16 if low else np.float32)
    source[...] = cpu_kernel.to_bfloat16(x) if low else x
    n = 5 * kernel.rows
    at, to = (np.arange(n, dtype=np.int64) * k for k in (width * source.itemsize, outputs * 4))
    out = cpu_kernel.aligned((n, outputs), np.float32)
    cpu_kernel.call(kernel, source, at, out, to)

    def rounded(a: np.ndarray) -> np.ndarray:
        return (cpu_kernel.to_bfloat16(a).astype(np.uint32) << 16).view(np.float32) if low else a

    windows = np.stack([rounded(x)[i : i + KERNEL].ravel() for i in range(n)]).astype(np.float64)
    want = windows @ rounded(weight).T.astype(np.float64) + bias
    assert np.abs(out - (np.maximum(want, 0) if outputs > 1 else want)).max() < 1e-4
