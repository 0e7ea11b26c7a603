"""How a job is run: its settings, and what of the computer it may use."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from typing import Any

from spiked.config import Guards, Labels, Offline, Slay, checked
from spiked.errors import ConfigError
from spiked.offline import sorters

CHECKED = ("sorter", "preset", "labels", "slay", "guards")  # checked against what is known of them


@dataclass(frozen=True)
class JobSettings:
    """What the operator may choose. `sorter_params` overrides the preset key by key."""

    sorter: str = "kilosort4"
    preset: str = "auto"
    sorter_params: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    threads: int = 0  # 0: half of the processors that are idle when the job starts, 1 to 8
    curate: bool = True
    labels: dict[str, Any] = field(default_factory=dict)  # fields of config.Labels
    slay: dict[str, Any] = field(default_factory=dict)  # fields of config.Slay
    guards: dict[str, Any] = field(default_factory=dict)  # fields of config.Guards
    library: bool = True  # the curated units become those that live.templates = "library" loads
    phy: bool = True  # a folder for Phy with the curated units, beside the sorter's own
    timeout_s: float = 24 * 3600.0
    memory_gb: float = 0.0  # the sorter may have so much of the computer's memory; 0: all
    retries: int = 2  # after running out of memory, each with half the batch_size

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("sorter", self.sorter, sorters.NAMES),
            ("preset", self.preset, tuple(sorters.of(self.sorter).PRESETS) if self.sorter in sorters.NAMES else ()),
        ):  # fmt: skip
            if value not in allowed:
                raise ConfigError(f"offline {key} = {value!r} is not one of {', '.join(allowed)}")
        fields = {f.name for f in dataclasses.fields(self)} & set(Offline.model_fields) - set(CHECKED)
        offline = checked(Offline, {key: getattr(self, key) for key in fields}, "offline")
        for key in fields:
            object.__setattr__(self, key, getattr(offline, key))
        if type(self.threads) is not int or self.threads < 0:
            raise ConfigError(f"offline threads = {self.threads!r} is not a whole number of at least 0")
        if not isinstance(self.sorter_params, dict):
            raise ConfigError(f"offline sorter_params = {self.sorter_params!r} is not a table of parameters")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"offline device = {self.device!r} is not auto, cpu, cuda or cuda:<number>")
        for section, given in ((Labels, self.labels), (Slay, self.slay), (Guards, self.guards)):
            checked(section, given, f"offline.{section.__name__.lower()}")
        object.__setattr__(self, "sorter_params", sorters.check_params(self.sorter, self.sorter_params))

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
        "preset": section.preset,
        "sorter_params": section.params,
        "device": section.device,
        "curate": section.curate,
        "labels": section.labels.model_dump(),
        "slay": section.slay.model_dump(),
        "guards": section.guards.model_dump(),
        "library": section.library,
        "phy": section.phy,
        "timeout_s": section.timeout_s,
        "memory_gb": section.memory_gb,
        "retries": section.retries,
    }


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
