"""Loading of networks: shipped ones by name, published ones by folder, and the ways a folder can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spiked.sort.parameters import RTSortParameters
from spiked_models import cards
from spiked_models.networks import DetectionNetwork, NetworkError, available, card, default_for, load
from spiked_models.training import LEVEL

SHARED = Path(os.environ.get("SPIKED_SHARED", Path(__file__).parents[1] / ".." / "shared"))
LEVELLED = ("lite-20k",)  # whose thresholds for RT-Sort are its own
INIT: dict[str, Any] = {
    "num_channels_in": 1, "sample_size": 200, "buffer_front_sample": 40, "buffer_end_sample": 40,
    "loc_prob_thresh": 27.5, "buffer_front_loc": 0, "buffer_end_loc": 0, "device": "cuda",
    "architecture_params": [4, 6, "relu", 0, 0, 0, 0], "input_scale": 0.15,
}  # fmt: skip


def state(width: int = 6, kernel: int = 21, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = [1, width, width, width, 1]
    out = {}
    for i, layer in enumerate((0, 2, 4, 6)):
        weight = torch.randn(sizes[i + 1], sizes[i], kernel, generator=generator) / (sizes[i] * kernel) ** 0.5
        out[f"model.conv.{layer}.weight"] = weight.to(dtype)
        out[f"model.conv.{layer}.bias"] = torch.randn(sizes[i + 1], generator=generator).to(dtype)
    return out


def folder(at: Path, init: Any = INIT, weights: Any = None) -> Path:
    at.mkdir(exist_ok=True)
    (at / "init_dict.json").write_text(init if isinstance(init, str) else json.dumps(init))
    torch.save(state() if weights is None else weights, at / "state_dict.pt")
    return at


def one_line(error: pytest.ExceptionInfo[NetworkError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_published_folder(tmp_path: Path) -> None:
    net = load(folder(tmp_path / "net"))
    assert (net.fs_hz, net.kernel, net.width, net.lookahead, net.receptive_field) == (20_000, 21, 6, 40, 81)
    assert net.input_scale == 0.15 and net.inference_scaling_numerator == 12.6
    assert net.stringent_p == pytest.approx(0.275) and net.loose_p == 0.1
    assert len(net.sha256) == 64


def test_rate_as_a_string_and_half_precision(tmp_path: Path) -> None:
    init = {**INIT, "architecture_params": ["30", 6, "relu", 0, 0, 0, 0], "sample_size": 300,
            "buffer_front_sample": 60, "buffer_end_sample": 60}  # fmt: skip
    net = load(folder(tmp_path / "net", init, state(kernel=31, dtype=torch.float16)))
    assert (net.fs_hz, net.kernel, net.lookahead) == (30_000, 31, 60)
    assert all(t.dtype == torch.float32 for layer in net.layers for t in layer)
    assert net.inference_scaling_numerator == 15.4


def test_logits_are_the_plain_convolutions(tmp_path: Path) -> None:
    net = load(folder(tmp_path / "net"))
    x = np.random.default_rng(0).normal(size=(2, 100)).astype(np.float32)
    h = x[:, None].astype(np.float64)
    for i, (weight, bias) in enumerate(net.layers):
        windows = np.lib.stride_tricks.sliding_window_view(h, net.kernel, axis=2)
        h = np.einsum("bcnk,ock->bon", windows, weight.double().numpy()) + bias.double().numpy()[:, None]
        h = np.maximum(h, 0) if i < 3 else h
    logits = net.batch_logits(torch.from_numpy(x))
    assert logits.shape == (2, 20)
    assert np.abs(logits.numpy() - h[:, 0]).max() < 1e-4
    with pytest.raises(NetworkError, match="81 or more"):
        net.batch_logits(torch.zeros(2, 80))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture_params": [7, 6, "relu", 0, 0, 0, 0]}, "architecture 7"),
        ({"architecture_params": [4, 6, "tanh", 0, 0, 0, 0]}, "tanh"),
        ({"architecture_params": [4, 6, "relu", 2, 0, 0, 0]}, "does not know"),
        ({"architecture_params": None}, "architecture_params is None"),
        ({"architecture_params": [4, 7, "relu", 0, 0, 0, 0]}, "shape (7, 1, 21) is needed"),
        ({"architecture_params": [[], 6, "relu", 0, 0, 0, 0]}, "architecture []"),
        ({"buffer_front_sample": 60}, "buffer_front_sample is 60"),
        ({"sample_size": "many"}, "sample_size"),
        ({"sample_size": 80}, "sample_size 80"),
        ({"loc_prob_thresh": 0}, "loc_prob_thresh"),
        ({"input_scale": "big"}, "input_scale"),
        ({"num_channels_in": 4}, "num_channels_in 4"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(NetworkError) as error:
        load(folder(tmp_path / "net", {**INIT, **change}))
    assert says in one_line(error)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="is not JSON"):
        load(folder(tmp_path / "a", "{"))
    with pytest.raises(NetworkError, match="holds a list"):
        load(folder(tmp_path / "b", "[]"))
    with pytest.raises(NetworkError, match=r"must hold init_dict\.json"):
        load(tmp_path)
    lost = folder(tmp_path / "c")
    (lost / "state_dict.pt").write_bytes(b"not a pickle")
    with pytest.raises(NetworkError) as error:
        load(lost)
    assert "not a torch state_dict" in one_line(error)
    with pytest.raises(NetworkError, match="not a state_dict"):
        load(folder(tmp_path / "d", weights=[1, 2]))
    broken = state()
    broken["model.conv.2.bias"][3] = float("nan")
    with pytest.raises(NetworkError, match=r"conv\.2\.bias holds values that are not finite"):
        load(folder(tmp_path / "e", weights=broken))
    del broken["model.conv.2.bias"]
    with pytest.raises(NetworkError, match=r"conv\.2\.bias is absent"):
        load(folder(tmp_path / "f", weights=broken))
    with pytest.raises(NetworkError, match="no folder and no shipped network"):
        load("nothing-of-this-name")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickle-ran-code",)


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetworkError) as error:
        load(folder(tmp_path / "net", weights={"model.conv.0.weight": Evil()}))
    one_line(error)
    assert not (tmp_path / "pickle-ran-code").exists()


def test_rate_check(tmp_path: Path) -> None:
    net = load(folder(tmp_path / "net"))
    net.check_rate(20_000)
    net.check_rate(20_000.3)
    with pytest.raises(NetworkError, match="is for 20000 Hz, but the stream has 30000 Hz"):
        net.check_rate(30_000)


@pytest.mark.parametrize("name", available())
def test_shipped_networks_keep_their_card(name: str) -> None:
    about, net = card(name), load(name)
    assert isinstance(net, DetectionNetwork)
    assert (list(net.kernels), net.width, net.macs) == (about.kernels, about.width, about.macs)
    assert (net.lookback, net.lookahead) == (about.lookback_samples, about.lookahead_samples)
    assert net.receptive_field == net.lookback + 1 + net.lookahead
    assert 0 < about.threshold_loose <= about.threshold_stringent < 1
    assert about.metrics["this network"]["stringent"]["f1"] > 50
    assert about.training["command"].startswith("python -m spiked_models.training")


@pytest.mark.parametrize("name", LEVELLED)
def test_rt_sort_is_given_probabilities_as_it_weighs_them(name: str) -> None:
    about, net = card(name), load(name)
    assert abs(about.threshold_stringent - LEVEL) < 0.03
    stringent, loose = net.sorting_p or (0.0, 0.0)
    # Electrodes below its least probability count as not seen: a loose threshold below it would be none.
    assert RTSortParameters().min_prob < loose < stringent < about.threshold_loose


def test_a_default_for_each_usual_rate() -> None:
    assert card(default_for(20_000)).fs_hz == 20_000
    assert card(default_for(30_000.07)).fs_hz == 30_000
    for fs_hz in (20_000, 30_000):
        offered = [card(n) for n in available() if card(n).fs_hz == fs_hz]
        assert card(default_for(fs_hz)).f1 == max(c.f1 for c in offered)
        assert card(default_for(fs_hz, lite=True)).macs == min(c.macs for c in offered)
        carried = [card(default_for(fs_hz, channels_per_core=n)).macs for n in (1, 30, 100, 300, 3000)]
        assert carried[-1] == min(c.macs for c in offered) and carried[-1] <= carried[0]
    with pytest.raises(NetworkError, match="no network was trained for 44100 Hz"):
        default_for(44_100)


def test_tampered_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = available()[0]
    for suffix in (".json", ".safetensors"):
        shutil.copy(cards.WEIGHTS / f"{name}{suffix}", tmp_path)
    tensors = load_file(tmp_path / f"{name}.safetensors")
    tensors["conv.0.bias"] += 1
    save_file(tensors, tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(cards, "WEIGHTS", tmp_path)
    monkeypatch.setattr("spiked_models.networks.WEIGHTS", tmp_path)
    with pytest.raises(NetworkError, match="sha256 differs"):
        load(name)
    (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(NetworkError, match="not a network card"):
        load(name)


@pytest.mark.parametrize(
    ("name", "fs_hz", "rest"), [("mea", 20_000, -16.132), ("neuropixels", 30_000, -14.614)]
)
def test_published_weights(name: str, fs_hz: float, rest: float) -> None:
    path = SHARED / "weights" / name
    if not path.is_dir():
        pytest.skip("published RT-Sort weights are not beside the repository (SPIKED_SHARED)")
    net = load(path)
    assert net.fs_hz == fs_hz and net.width == 50
    assert float(net.batch_logits(torch.zeros(1, net.receptive_field))) == pytest.approx(rest, abs=0.01)
