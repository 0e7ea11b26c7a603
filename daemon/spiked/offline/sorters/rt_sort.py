"""RT-Sort (van der Molen, Lim et al. 2024) offline: the live path's own pipeline, calibrated on the recording."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from spiked.offline.session import StreamFiles
from spiked.offline.sorters import Preset, Work, live
from spiked.offline.sorters.parameters import Parameter

NAME = "rt_sort"
WHAT = "RT-Sort (van der Molen, Lim et al. 2024), as live: propagation sequences behind a detection network"
NEEDS_BINARY = False
PRESETS = {"auto": "the network that fits the recording's rate and the computer"}


@cache
def parameters() -> tuple[Parameter, ...]:
    return live.parameters((), "sequences")


def missing(device: str) -> str:
    return "" if find_spec("torch") else "the package torch is not installed; pip install 'spiked[daemon]'"


def choose(preset: str, device: str, stream: StreamFiles) -> Preset:
    return live.choose(NAME, preset, device)


def check(params: Mapping[str, Any], stream: StreamFiles) -> None:
    live.check(NAME, params, stream, "sequences")


def run(work: Work) -> dict[str, Any]:
    return live.run(work, matching=False)
