"""What is known of each shipped network: a JSON card beside its weights. No torch here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
RATE_TOLERANCE = (
    0.02  # a network also serves a stream whose rate differs by this share (probes say 30000.07 Hz)
)
CORE_SHARE = (
    0.35  # of a core's time that the network may take: the rest is cleaning, sorting and other programs
)


class NetworkError(ValueError):
    """A network cannot be loaded, or does not fit the stream. One line: what is wrong, then what to do."""


@dataclass(frozen=True)
class Card:
    """A network's description, written by the training command.

    Input of the network = (microvolt - median) * input_scale * inference_scaling, with inference_scaling =
    inference_scaling_numerator / median over channels of the interquartile range in microvolt. A logit for
    sample t needs the samples t - lookback_samples to t + lookahead_samples. `kernels`: taps of the layers.
    `threshold_stringent` and `threshold_loose` are probabilities; `threshold_sorting`: those (stringent, loose) at which RT-Sort
    sorts best, which asks for several electrodes and so gains from weaker peaks. `metrics` holds what the training command
    measured, `training` how it was run.
    """

    name: str
    fs_hz: float
    kernels: list[int]
    width: int
    lookahead_samples: int
    lookback_samples: int
    input_scale: float
    inference_scaling_numerator: float
    threshold_stringent: float
    threshold_loose: float
    data: str
    seed: int
    training: dict[str, Any]
    metrics: dict[str, Any]
    licence: str
    sha256: str
    threshold_sorting: list[float] | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the network for one sample of one channel."""
        first, *middle, last = self.kernels
        return self.width * (first + last) + self.width**2 * sum(middle)

    @property
    def f1(self) -> float:
        """Percent, against labels, at the stringent threshold."""
        return float(self.metrics["this network"]["stringent"]["f1"])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Card:
        """Raises NetworkError when the file is absent or is no card."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(**fields)
        except OSError as e:
            raise NetworkError(f"cannot read {path}: {e.strerror}") from e
        except (ValueError, TypeError) as e:
            raise NetworkError(f"{path} is not a network card ({e}); install the package again") from e


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def available() -> list[str]:
    """Names of the shipped networks, sorted."""
    return sorted(p.stem for p in WEIGHTS.glob("*.json") if p.with_suffix(".safetensors").is_file())


def card(name: str) -> Card:
    """The card of a shipped network; NetworkError names those there are."""
    if name not in available():
        raise NetworkError(f"no network is called {name!r}; there are: {', '.join(available()) or 'none'}")
    return Card.read(WEIGHTS / f"{name}.json")


def rate_fits(network_hz: float, stream_hz: float) -> bool:
    return abs(stream_hz - network_hz) <= RATE_TOLERANCE * network_hz


def cost_ns(about: Card) -> float:
    """Time of one core for one sample of one channel, about; measured in docs/benchmarks.md."""
    return 20 + about.macs / 260


def default_for(fs_hz: float, lite: bool = False, channels_per_core: float = 0.0) -> str:
    """Name of the shipped network for a stream of `fs_hz`: the best of those that a CPU core carries.

    Best: by F1 against labels; the cards of one rate were measured on the same recordings. `channels_per_core`: of
    the stream; 0: no limit. With `lite`, and where a core carries none, the cheapest. Raises NetworkError when there
    is none for that rate.
    """
    fitting = [c for c in map(card, available()) if rate_fits(c.fs_hz, fs_hz)]
    if not fitting:
        rates = sorted({f"{card(n).fs_hz:g}" for n in available()})
        raise NetworkError(
            f"no network was trained for {fs_hz:g} Hz (there are some for {', '.join(rates) or 'no'} Hz); "
            "name a folder with weights for this rate, or use the threshold detector"
        )
    budget_ns = CORE_SHARE * 1e9 / fs_hz / channels_per_core if channels_per_core else float("inf")
    carried = [c for c in fitting if cost_ns(c) <= budget_ns]
    if lite or not carried:
        return min(fitting, key=lambda c: (c.macs, c.name)).name
    return max(carried, key=lambda c: (c.f1, -c.macs, c.name)).name
