"""Kilosort2 through SpikeInterface: in MATLAB with a copy of its code, as a compiled program, or in a container."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError
from spiked.offline.session import StreamFiles
from spiked.offline.sorters import OUTPUT, Preset, Work, rows_of
from spiked.offline.sorters.parameters import ANY, BOOL, FLOAT, INT, LIST, TEXT, Parameter, plain

NAME = "kilosort2"
WHAT = "Kilosort2 (Pachitariu et al. 2023), in MATLAB or in SpikeInterface's container; needs an NVIDIA GPU"
NEEDS_BINARY = True
PRESETS = {"auto": "Kilosort2's own settings"}
RUNNERS = ("auto", "matlab", "docker", "singularity")
PROGRAM = "ks2_compiled"
KINDS: dict[type, str] = {bool: BOOL, int: FLOAT, float: FLOAT, str: TEXT, list: LIST}
HIDDEN = ("delete_recording_dat",)  # the job sees to it


def _table() -> tuple[dict[str, Any], dict[str, str]]:
    """(defaults, helps), from the source of the installed package: importing its sorters takes seconds. ImportError without."""
    spec = importlib.util.find_spec("spikeinterface")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("spikeinterface is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "sorters" / "external" / "kilosort2.py"
    found: dict[str, Any] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Dict)
        ):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found["_default_params"], found["_params_description"]


@cache
def parameters() -> tuple[Parameter, ...]:
    """SpikeInterface's table, typed by its defaults."""
    defaults, told = _table()
    whole = ("whiteningRange", "nPCs", "ntbuff", "nfilt_factor", "NT", "wave_length")
    table = [
        Parameter("runner", TEXT, "auto", "Where it runs; auto: the first that is there.", choices=RUNNERS),
        Parameter("image", TEXT, None, "Container image instead of SpikeInterface's own."),
        Parameter("bad_channels", LIST, [], "Names of channels that are left out, besides those that preflight finds dead.", items=TEXT),
        Parameter("probe", TEXT, None, "Probe file (probeinterface JSON) with the electrodes' positions, instead of what the recording says."),
    ]  # fmt: skip
    for name, value in defaults.items():
        if name in HIDDEN:
            continue
        kind = INT if name in whole else KINDS.get(type(value), ANY)
        length = len(value) if isinstance(value, list) else 0
        default = list(value) if isinstance(value, tuple) else value
        items = FLOAT if isinstance(value, list) else ANY
        least = 0.0 if kind in (INT, FLOAT) else -np.inf
        table.append(Parameter(name, kind, default, plain(told.get(name, "")), least=least, items=items, length=length, optional=value is None))  # fmt: skip
    return tuple(table)


def lacks(runner: str) -> str:
    """What is not there to run it that way, and what to do; "" where all of it is."""
    if importlib.util.find_spec("spikeinterface") is None:
        return "the package spikeinterface is not installed; pip install 'spiked[offline]'"
    if runner == "matlab":
        if shutil.which(PROGRAM):
            return ""
        if not shutil.which("matlab"):
            return "there is no matlab in PATH; install MATLAB"
        there = Path(os.environ.get("KILOSORT2_PATH", "").strip('"') or "/nowhere")
        if not any((there / name).is_file() for name in ("master_kilosort.m", "main_kilosort.m")):
            return "KILOSORT2_PATH names no folder with Kilosort2's master_kilosort.m; clone it and set that variable"
        return ""
    if runner == "docker":
        if importlib.util.find_spec("docker") is None:
            return "the Python package docker is not installed; pip install docker cuda-python"
        if not _answers(["docker", "version"]):
            return "the docker service does not answer; install and start it, and let this user use it"
    elif importlib.util.find_spec("spython") is None or not shutil.which("singularity"):
        return "singularity, or its Python package spython, is not installed; install both"
    if importlib.util.find_spec("cuda") is None:
        return "the package cuda-python is not installed; pip install cuda-python"
    if not any(Path(d).exists() for d in ("/dev/nvidiactl", "/dev/dxg")):
        return "there is no NVIDIA GPU here; run the job on a computer that has one"
    return ""


def _answers(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def missing(device: str) -> str:
    found = {runner: lacks(runner) for runner in RUNNERS[1:]}
    if not all(found.values()):
        return ""
    return "; or ".join(
        dict.fromkeys(f"{runner}: {why.replace('; ', ', ')}" for runner, why in found.items())
    )


def choose(preset: str, device: str, stream: StreamFiles) -> Preset:
    if preset != "auto":
        raise ConfigError(f"kilosort2 has no preset {preset!r}; known is auto")
    return Preset("auto", {}, "Kilosort2's own settings")


def check(params: Mapping[str, Any], stream: StreamFiles) -> None:
    rows_of(params.get("bad_channels") or [], stream)
    runner = params.get("runner", "auto")
    if runner != "auto" and (why := lacks(runner)):
        raise ConfigError(f"kilosort2 parameter runner = {runner!r}: {why}")
    if params.get("wave_length", 61) > 81:
        raise ConfigError(f"kilosort2 parameter wave_length = {params['wave_length']}: it must be at most 81")


def run(work: Work) -> dict[str, Any]:
    """SpikeInterface's runner leaves files beside the folder that it is given: that is one of its own."""
    if os.getpgrp() == os.getpid():  # MATLAB would outlive a job that is killed, with the GPU and its memory
        signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    import spikeinterface.sorters as ss

    from spiked.offline.si_recording import recording_of

    given = {k: v for k, v in work.params.items() if k not in ("runner", "image", "bad_channels", "probe")}
    wanted = work.params.get("runner", "auto")
    runner = wanted if wanted != "auto" else next(r for r in RUNNERS[1:] if not lacks(r))
    container = {} if runner == "matlab" else {f"{runner}_image": work.params.get("image") or True}
    recording = recording_of(work.recording)
    if work.left_out:
        kept = np.setdiff1d(np.arange(work.stream.n_channels), work.left_out)
        recording = recording.select_channels(recording.channel_ids[kept])
    own = work.folder / "run"
    ss.run_sorter(
        NAME, recording, folder=own, remove_existing_folder=True, verbose=False, with_output=False,
        delete_recording_dat=True, **container, **given,
    )  # fmt: skip
    (own / "sorter_output").rename(work.folder / OUTPUT)
    return {"version": f"kilosort2, {runner}"}
