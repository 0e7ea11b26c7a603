"""The sorters behind one interface: what each can be told, whether it can run here, and how it is run.

A sorter is a module of this package with the names of `Sorter`. Asking one for its parameters imports nothing heavy; `run` does,
and is called in a process of its own (sort_child).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from spiked.errors import ConfigError, OfflineError
from spiked.offline.session import StreamFiles
from spiked.offline.sorters.parameters import Parameter, checked, listing

NAMES = ("kilosort4", "rt_sort", "templates", "dartsort", "kilosort2")
OUTPUT = "sorter_output"  # the folder for Phy, in the sorter's


@dataclass(frozen=True)
class Preset:
    """Named parameters and the sentence that the report says about them."""

    name: str
    params: dict[str, Any]
    why: str


@dataclass(frozen=True)
class Work:
    """What a sorter's process is given: `recording` is the job that si_recording.recording_of takes, `stream` the recorded
    stream, or the binary that was made of it. `left_out` are rows of channels that are not sorted."""

    recording: dict[str, Any]
    stream: StreamFiles
    params: dict[str, Any]
    left_out: list[int]
    folder: Path
    device: str
    threads: int


class Sorter(Protocol):
    """What a sorter's module holds."""

    NAME: str
    WHAT: str  # one line
    PRESETS: dict[str, str]  # name: what it is for
    NEEDS_BINARY: bool  # it reads a plain int16 file only

    def parameters(self) -> tuple[Parameter, ...]:
        """Everything that can be set. ConfigError where the sorter's package is not installed."""

    def missing(self, device: str) -> str:
        """Why it cannot run here and what to do, in one line; "" where it can."""

    def choose(self, preset: str, device: str, stream: StreamFiles) -> Preset:
        """The preset of that name, or for 'auto' the one that fits."""

    def check(self, params: Mapping[str, Any], stream: StreamFiles) -> None:
        """ConfigError where checked parameters do not fit the recording."""

    def run(self, work: Work) -> dict[str, Any]:
        """Sort, and leave a folder for Phy in work.folder / OUTPUT; what the report should know. In its own process."""


def of(name: str) -> Sorter:
    """The sorter of that name; ConfigError where there is none."""
    if name not in NAMES:
        raise ConfigError(f"there is no sorter {name!r}; known are {', '.join(NAMES)}")
    return cast(Sorter, importlib.import_module(f"spiked.offline.sorters.{name}"))


def check_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` in their own types; ConfigError in one line for the first that is wrong.

    Where the sorter's package is not installed they are let pass: `missing` says so before anything runs.
    """
    sorter = of(name)
    try:
        table = sorter.parameters()
    except ImportError:
        return dict(params)
    return checked(name, table, params)


def require(sorter: Sorter, device: str) -> None:
    """OfflineError('environment') where the sorter cannot run here."""
    if lacks := sorter.missing(device):
        raise OfflineError(
            f"{sorter.NAME} cannot run here: {lacks}", "environment", "preflight", "sorter_missing"
        )


def placed(stream: StreamFiles, params: Mapping[str, Any]) -> StreamFiles:
    """The stream with its electrodes where the parameter `probe` says, if there is one."""
    if not params.get("probe"):
        return stream
    from spiked.sources.probe import positions_for

    positions = positions_for(Path(params["probe"]).expanduser(), stream.n_channels)
    return replace(stream, positions_um=np.asarray(positions, float))


def rows_of(channels: list[Any], stream: StreamFiles) -> list[int]:
    """Rows of the channels with these names, or these contacts' numbers where the channels have no names.

    A number is never taken for a row where channels have names: row 5 is seldom the channel called 5.
    """
    names = list(stream.channel_ids) or [str(k) for k in range(stream.n_channels)]
    rows = []
    for channel in channels:
        if str(channel) not in names:
            few = ", ".join(names[:3]) + (f" ... {names[-1]}" if len(names) > 3 else "")
            raise ConfigError(
                f"bad_channels: the recording has no channel {channel!r}; its channels are {few}"
            )
        rows.append(names.index(str(channel)))
    return sorted(set(rows))


def describe(name: str = "", device: str = "cpu") -> list[str]:
    """Lines for the terminal: every sorter and whether it can run here, or the parameters of one."""
    if not name:
        lines = []
        for each in NAMES:
            sorter = of(each)
            lacks = sorter.missing(device)
            lines.append(f"{each}: {sorter.WHAT}")
            lines.append(f"    {'cannot run here: ' + lacks if lacks else 'can run here'}")
        return [*lines, "`spiked sorters NAME` lists what one can be told"]
    sorter = of(name)
    lacks = sorter.missing(device)
    lines = [
        f"{name}: {sorter.WHAT}",
        f"  {'cannot run here: ' + lacks if lacks else 'can run here'}",
        "presets:",
    ]
    lines += [f"  {preset}: {what}" for preset, what in sorter.PRESETS.items()]
    try:
        table = sorter.parameters()
    except ImportError as e:
        raise ConfigError(f"the parameters of {name} are known where it is installed: {lacks or e}") from e
    return [*lines, "parameters (--set NAME=VALUE, or [offline] params):", *listing(table)]


def as_mapping(name: str) -> dict[str, Any]:
    """What `describe` tells, for programs."""
    sorter = of(name)
    try:
        table: tuple[Parameter, ...] = sorter.parameters()
    except ImportError:
        table = ()
    return {
        "name": name,
        "what": sorter.WHAT,
        "missing": sorter.missing("cpu"),
        "presets": sorter.PRESETS,
        "parameters": {
            p.name: {"kind": p.kind, "default": p.default, "wanted": p.wanted(), "help": p.help}
            for p in table
        },
    }


def pitch_um(positions_um: np.ndarray) -> float:
    """Median distance of an electrode to its nearest neighbour."""
    from scipy.spatial import cKDTree

    if len(positions_um) < 2:
        return 0.0
    return float(np.median(cKDTree(positions_um).query(positions_um, 2)[0][:, 1]))


def shanks(positions_um: np.ndarray) -> np.ndarray:
    """(channels,) int: which shank each electrode is on, from left to right.

    A gap between columns that is above 100 um and three times the electrodes' own distance is a gap between shanks.
    """
    x = np.unique(positions_um[:, 0])
    wide = np.diff(x) > max(100.0, 3 * pitch_um(positions_um))
    edges = x[1:][wide]
    return np.searchsorted(edges, positions_um[:, 0], "right").astype(np.int64)


def layout(positions_um: np.ndarray) -> str:
    """'array' for electrodes that spread over an area, 'probe' for a shank or several."""
    width, height = np.ptp(positions_um, axis=0)
    alone = shanks(positions_um).max(initial=0) == 0
    return "array" if alone and width > 0 and min(width, height) > 0.2 * max(width, height) else "probe"
