"""Template matching offline: the live path's own pipeline, with templates learned on the recording."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from spiked.offline.session import StreamFiles
from spiked.offline.sorters import Preset, Work, live
from spiked.offline.sorters.parameters import Parameter

NAME = "templates"
WHAT = "template matching, as live: templates of units that another sorter finds in a part of the recording"
NEEDS_BINARY = False
PRESETS = {"auto": "the network that fits the recording's rate and the computer"}


@cache
def parameters() -> tuple[Parameter, ...]:
    return live.parameters(("templates_from",), "templates")


def missing(device: str) -> str:
    return "" if find_spec("torch") else "the package torch is not installed; pip install 'spiked[daemon]'"


def choose(preset: str, device: str, stream: StreamFiles) -> Preset:
    return live.choose(NAME, preset, device)


def check(params: Mapping[str, Any], stream: StreamFiles) -> None:
    live.check(NAME, params, stream, "templates")


def run(work: Work) -> dict[str, Any]:
    return live.run(work, matching=True)
