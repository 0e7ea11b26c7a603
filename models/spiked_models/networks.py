"""RT-Sort's detection network, and where its weights come from.

Four convolutions along time (1 -> width -> width -> width -> 1, no padding, ReLU between them), the same weights
for every channel. Published by van der Molen, Lim et al. 2024 (RT-Sort, PLOS ONE) with kernels of sampling rate in
kHz + 1 and as much lookahead as look-back. Here each layer has a kernel of its own, and a network says how many of
the samples it needs come after the one it judges. Two sources of weights:

- a shipped network by name: weights/<name>.safetensors with its card;
- a folder in RT-Sort's published format: init_dict.json and state_dict.pt.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from spiked_models.cards import (
    WEIGHTS,
    Card,
    NetworkError,
    available,
    card,
    default_for,
    rate_fits,
    sha256_of,
)

__all__ = ["Card", "DetectionNetwork", "NetworkError", "available", "card", "default_for", "load"]

Layers = tuple[tuple[Tensor, Tensor], ...]
# Published presets by sampling rate: inference-scaling numerator, loose probability.
_PRESETS = {20: (12.6, 0.1), 30: (15.4, 0.075)}
_KERNEL_OF_ID = {4: 21, -4: 31}


@dataclass(frozen=True, eq=False)
class DetectionNetwork:
    """Weights of a detection network and what is needed to feed it; see Card for the scaling.

    `layers`: four (weight (out, in, kernel), bias (out,)) float32 pairs on one device. `ahead`: samples after t
    that the logit for sample t needs; None: half of the receptive field.
    """

    name: str
    fs_hz: float
    layers: Layers
    input_scale: float
    inference_scaling_numerator: float
    stringent_p: float
    loose_p: float
    sha256: str
    ahead: int | None = None
    sorting_p: tuple[float, float] | None = None  # stringent, loose, for RT-Sort; None: as for detection

    @property
    def kernels(self) -> tuple[int, ...]:
        return tuple(int(weight.shape[2]) for weight, _ in self.layers)

    @property
    def kernel(self) -> int:
        """Taps of the first layer."""
        return self.kernels[0]

    @property
    def width(self) -> int:
        return int(self.layers[0][0].shape[0])

    @property
    def receptive_field(self) -> int:
        return sum(self.kernels) - len(self.kernels) + 1

    @property
    def lookahead(self) -> int:
        """Samples after t that the logit for sample t needs."""
        return self.receptive_field // 2 if self.ahead is None else self.ahead

    @property
    def lookback(self) -> int:
        """Samples before t that the logit for sample t needs."""
        return self.receptive_field - 1 - self.lookahead

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample of one channel when nothing is computed twice."""
        return sum(int(weight.numel()) for weight, _ in self.layers)

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    def check_rate(self, fs_hz: float) -> None:
        """Raise NetworkError unless the network was trained for a stream of this rate."""
        if not rate_fits(self.fs_hz, fs_hz):
            raise NetworkError(
                f"network {self.name} is for {self.fs_hz:g} Hz, but the stream has {fs_hz:g} Hz; "
                "choose a network for this rate"
            )

    @torch.inference_mode()
    def batch_logits(self, x: Tensor) -> Tensor:
        """Logits of scaled traces: (batch, samples) -> (batch, samples - receptive_field + 1), float32.

        Output j belongs to input sample j + lookback. The reference for every faster way.
        """
        if x.ndim != 2 or x.shape[1] < self.receptive_field:
            raise NetworkError(
                f"traces of shape {tuple(x.shape)} came; (batch, {self.receptive_field} or more) is needed"
            )
        h = x.to(self.device, torch.float32)[:, None]
        for i, (weight, bias) in enumerate(self.layers):
            h = functional.conv1d(h, weight, bias)
            if i < 3:
                h = functional.relu(h)
        return h[:, 0]


def load(name_or_folder: str | Path, device: str | torch.device = "cpu") -> DetectionNetwork:
    """A shipped network by name, or a folder in the published format. Raises NetworkError."""
    folder = Path(name_or_folder).expanduser()
    if str(name_or_folder) in available():
        return _load_shipped(str(name_or_folder), torch.device(device))
    if folder.is_dir():
        return load_published(folder, torch.device(device))
    raise NetworkError(
        f"{name_or_folder} is no folder and no shipped network ({', '.join(available()) or 'none'})"
    )


def _load_shipped(name: str, device: torch.device) -> DetectionNetwork:
    about, path = card(name), WEIGHTS / f"{name}.safetensors"
    found = sha256_of(path)
    if found != about.sha256:
        raise NetworkError(
            f"{path} is not what its card describes (sha256 differs); install the package again"
        )
    try:
        state = load_file(path, device="cpu")
    except (SafetensorError, OSError) as e:
        raise NetworkError(f"{path} cannot be read ({e}); install the package again") from e
    names = [f"conv.{i}" for i in range(4)]
    layers = _layers(state, names, tuple(about.kernels), about.width, path, device)
    return DetectionNetwork(
        name, about.fs_hz, layers, about.input_scale, about.inference_scaling_numerator,
        about.threshold_stringent, about.threshold_loose, found, about.lookahead_samples,
        None if about.threshold_sorting is None else (about.threshold_sorting[0], about.threshold_sorting[1]),
    )  # fmt: skip


def load_published(folder: Path, device: torch.device) -> DetectionNetwork:
    """A folder with init_dict.json and state_dict.pt. The pickle is read with weights_only: no code runs."""
    init = _read_init(folder / "init_dict.json")
    kernel, width = _architecture(init, folder)
    fs_khz = kernel - 1
    lookahead, size = 2 * fs_khz, _number(init, "sample_size", folder)
    for key in ("buffer_front_sample", "buffer_end_sample"):
        if _number(init, key, folder) != lookahead:
            raise NetworkError(
                f"{folder}: {key} is {init[key]}, but a kernel of {kernel} makes it {lookahead}"
            )
    if size <= 2 * lookahead or _number(init, "num_channels_in", folder) != 1:
        raise NetworkError(
            f"{folder}: sample_size {size}, num_channels_in {init['num_channels_in']} fit no network"
        )
    scale = _number({"input_scale": 0.15887516, **init}, "input_scale", folder)
    stringent = _number(init, "loc_prob_thresh", folder) / 100
    if not 0 < stringent < 1 or not 0 < scale < float("inf"):
        raise NetworkError(
            f"{folder}: loc_prob_thresh {100 * stringent:g} % or input_scale {scale:g} is out of range"
        )
    path = folder / "state_dict.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise NetworkError(f"cannot read {path}: {e.strerror or e}") from e
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as e:
        raise NetworkError(f"{path} is not a torch state_dict ({str(e).splitlines()[0][:80]})") from e
    if not isinstance(state, Mapping):
        raise NetworkError(f"{path} holds a {type(state).__name__}, not a state_dict")
    names = [f"model.conv.{i}" for i in (0, 2, 4, 6)]
    layers = _layers(state, names, (kernel,) * 4, width, path, device)
    numerator, loose = _PRESETS[30 if fs_khz >= 25 else 20]
    return DetectionNetwork(
        folder.name,
        fs_khz * 1000.0,
        layers,
        scale,
        numerator,
        stringent,
        min(loose, stringent),
        sha256_of(path),
    )


def _read_init(path: Path) -> dict[str, Any]:
    try:
        init = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise NetworkError(
            f"cannot read {path}: {e.strerror}; the folder must hold init_dict.json and state_dict.pt"
        ) from e
    except ValueError as e:
        raise NetworkError(f"{path} is not JSON: {e}") from e
    if not isinstance(init, dict):
        raise NetworkError(f"{path} holds a {type(init).__name__}, not the settings of a network")
    return init


def _number(init: dict[str, Any], key: str, folder: Path) -> float:
    value = init.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NetworkError(f"{folder}: {key} in init_dict.json is {value!r}, a number is needed")
    return value


def _architecture(init: dict[str, Any], folder: Path) -> tuple[int, int]:
    """(kernel, width) from architecture_params."""
    params = init.get("architecture_params")
    if not isinstance(params, list) or len(params) != 7:
        raise NetworkError(f"{folder}: architecture_params is {params!r}, seven values are needed")
    number, width, activation, *extras = params
    if isinstance(number, str) and number.isdecimal():
        kernel = int(number) + 1
    elif isinstance(number, int) and number in _KERNEL_OF_ID:
        kernel = _KERNEL_OF_ID[number]
    else:
        raise NetworkError(
            f"{folder}: architecture {number!r} is not the four-layer network (4, -4 or a rate in kHz)"
        )
    if not isinstance(width, int) or width < 1 or kernel < 3 or activation != "relu" or any(extras):
        raise NetworkError(f"{folder}: architecture {params!r} has parts that this loader does not know")
    return kernel, width


def _layers(
    state: Mapping[str, Any],
    names: list[str],
    kernels: tuple[int, ...],
    width: int,
    path: Path,
    device: torch.device,
) -> Layers:
    """The four layers as float32 on `device`, each shape checked."""
    out = []
    for i, (name, kernel) in enumerate(zip(names, kernels, strict=True)):
        shape = (1 if i == 3 else width, 1 if i == 0 else width, kernel)
        pair = []
        for part, want in (("weight", shape), ("bias", shape[:1])):
            value = state.get(f"{name}.{part}")
            if not isinstance(value, Tensor) or tuple(value.shape) != want:
                found = tuple(value.shape) if isinstance(value, Tensor) else "absent"
                raise NetworkError(f"{path}: {name}.{part} is {found}, shape {want} is needed")
            value = value.to(device, torch.float32).contiguous()
            if not bool(torch.isfinite(value).all()):
                raise NetworkError(f"{path}: {name}.{part} holds values that are not finite")
            pair.append(value)
        out.append((pair[0], pair[1]))
    return tuple(out)
