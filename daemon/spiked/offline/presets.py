"""How a job is run: its settings, and the Kilosort4 parameters for the computer at hand."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from spiked.config import Offline
from spiked.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
PRESETS = ("auto", "default", "cpu_small")
MERGERS = ("auto", "slay_l2", "slay_autoencoder", "spikeinterface", "none")


@dataclass(frozen=True)
class JobSettings:
    """What the operator may choose. `sorter_params` overrides the preset key by key."""

    sorter: str = "kilosort4"
    preset: str = "auto"
    sorter_params: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    threads: int = 0  # 0: half of the processors that are idle when the job starts, 1 to 8
    curate: bool = True
    merger: str = "auto"
    library: bool = True  # the curated units become those that live.templates = "library" loads
    timeout_s: float = 24 * 3600.0
    memory_gb: float = 0.0  # the sorter may have so much of the computer's memory; 0: all
    retries: int = 2  # after running out of memory, each with half the batch_size

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("sorter", self.sorter, ("kilosort4",)),
            ("preset", self.preset, PRESETS),
            ("merger", self.merger, MERGERS),
        ):
            if value not in allowed:
                raise ConfigError(f"offline {key} = {value!r} is not one of {', '.join(allowed)}")
        if self.device.split(":")[0] not in DEVICES:
            raise ConfigError(f"offline device = {self.device!r} is not auto, cpu, cuda or cuda:<number>")

    @classmethod
    def of(cls, params: dict[str, Any] | None) -> JobSettings:
        """From a mapping; ConfigError names the first key that does not exist."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in params or {}:
            if key not in known:
                raise ConfigError(
                    f"offline setting {key!r} does not exist; known are {', '.join(sorted(known))}"
                )
        return cls(**(params or {}))


def params_of(section: Offline) -> dict[str, Any]:
    """The [offline] section of a configuration as parameters of `run_offline`."""
    return {
        "sorter": section.sorter,
        "sorter_params": section.params,
        "device": section.device,
        "curate": section.curate,
        "library": section.library,
        "timeout_s": section.timeout_s,
        "memory_gb": section.memory_gb,
        "retries": section.retries,
    }


@dataclass(frozen=True)
class Preset:
    """Named Kilosort4 parameters and the sentence that the report says about them."""

    name: str
    params: dict[str, Any]
    why: str


# A CPU spends its time comparing every sample with every universal template on the grid of possible
# positions. On a two-dimensional array of 17.5 um pitch Kilosort's own grid is finer than the electrodes.
# 64 channels, 75 s at 20 kHz, 12 neurons, one thread: Kilosort's grid and window 124 s, accuracy 0.75; this
# preset 52 s, 0.82. A smaller cluster_downsampling (10, 5, 1) gave no more accurate and many more units (111 at 1).
SMALL_CHANNELS, SMALL_S = 128, 1800.0
GRID_UM = 35.0


def choose(name: str, device: str, fs_hz: float, n_channels: int, duration_s: float) -> Preset:
    """The preset of that name, or for 'auto' the one that fits. `device` is 'cpu' or 'cuda...'."""
    small = n_channels <= SMALL_CHANNELS and duration_s <= SMALL_S
    if name == "auto":
        name = "cpu_small" if device == "cpu" and small else "default"
    if name == "cpu_small":
        return Preset(
            name,
            {
                "nblocks": 0,
                "nt": window(fs_hz),
                "dmin": GRID_UM,
                "dminx": GRID_UM,
                "nearest_templates": 25,
            },
            "small recording on a CPU: no drift correction, template grid of "
            f"{GRID_UM:g} um, 2 ms waveforms; a GPU host uses Kilosort's own settings",
        )
    why = "Kilosort's own settings"
    if device == "cpu":
        why += "; on a CPU they take about ten times the recording's length or more"
    return Preset("default", {}, why)


def window(fs_hz: float) -> int:
    """Waveform length in samples, odd: Kilosort's 61 at 30 kHz, the same 2 ms at other rates."""
    return round(61 / 30_000 * fs_hz / 2 - 0.5) * 2 + 1


def resolve_device(wanted: str) -> str:
    """'cpu' or 'cuda[:n]' for 'auto', else as told."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_threads() -> int:
    """Half of the processors that are idle now, 1 to 8: torch's threads wait for each other on busy ones."""
    idle = len(os.sched_getaffinity(0)) - round(os.getloadavg()[0])
    return min(max(idle // 2, 1), 8)
