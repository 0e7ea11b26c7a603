"""DARTsort (Windolf, Paninski et al.), called directly: every field of its `DARTsortUserConfig`, read from the installed package.

Its authors do not recommend it for production yet. It saves a preprocessed float copy of the recording for its own use, in the job's
folder, and removes it. On a CPU it takes many times the recording's length.
"""

from __future__ import annotations

import ast
import importlib.util
import shutil
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError
from spiked.offline.session import StreamFiles
from spiked.offline.sorters import OUTPUT, Preset, Work, rows_of
from spiked.offline.sorters.annotations import parameter
from spiked.offline.sorters.parameters import ANY, LIST, TEXT, Parameter

NAME = "dartsort"
WHAT = "DARTsort (Windolf et al.), denoising and drift-aware templates; its authors call it experimental, and it wants a GPU"
NEEDS_BINARY = False
PRESETS = {
    "auto": "the one that fits the electrodes",
    "default": "DARTsort's own configuration",
    "still": "arrays and other recordings that do not drift: no motion estimation",
}
OURS = ("device", "dredge_only", "fit_matching_models_only")  # the job's; and those that sort nothing


def _folder() -> Path:
    spec = importlib.util.find_spec("dartsort")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("dartsort is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def parameters() -> tuple[Parameter, ...]:
    """The fields, from the source of the installed package: importing it takes ten seconds."""
    folder = _folder()
    names = _names(folder / "util" / "internal_config.py")
    tree = ast.parse((folder / "config.py").read_text(encoding="utf-8"))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DARTsortUserConfig").body
    found = [
        Parameter("bad_channels", LIST, [], "Names of channels that are left out, besides those that preflight finds dead.", items=TEXT),
        Parameter("probe", TEXT, None, "Probe file (probeinterface JSON) with the electrodes' positions, instead of what the recording says."),
    ]  # fmt: skip
    for k, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        if (name := node.target.id) not in OURS:
            found.append(_parameter(name, node, body[k + 1] if k + 1 < len(body) else None, names))
    return tuple(found)


def _parameter(name: str, node: ast.AnnAssign, after: ast.stmt | None, names: dict[str, Any]) -> Parameter:
    text = ""
    if (
        isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    ):
        text = after.value.value
    try:
        assert node.value is not None
        default = _value(node.value, names)
        return parameter(name, _value(node.annotation, names), default, text)
    except (NameError, ValueError, TypeError, AttributeError):  # a later version's: DARTsort checks it itself
        return Parameter(name, ANY, None, text, optional=True)


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an annotation or a default of the package's source means."""
    return eval(compile(ast.Expression(node), "dartsort", "eval"), {"__builtins__": {}}, names)


def _names(path: Path) -> dict[str, Any]:
    """The words of the annotations: typing's, pydantic's, and the package's own names for choices."""
    from collections.abc import Sequence

    from pydantic import Field

    names: dict[str, Any] = {
        "Literal": typing.Literal, "Annotated": typing.Annotated, "Sequence": Sequence, "Field": Field,
        "int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple, "dict": dict,
    }  # fmt: skip
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                names[node.targets[0].id] = _value(node.value, names)
            except (NameError, TypeError, ValueError, AttributeError):
                continue
    return names


def missing(device: str) -> str:
    if importlib.util.find_spec("dartsort") is None:
        return "the package dartsort is not installed; pip install 'spiked[dartsort]'"
    return ""


def choose(preset: str, device: str, stream: StreamFiles) -> Preset:
    from spiked.offline.sorters import layout

    if preset not in PRESETS:
        raise ConfigError(f"dartsort has no preset {preset!r}; known are {', '.join(PRESETS)}")
    if preset == "auto":
        preset = "still" if layout(stream.positions_um) == "array" else "default"
    slow = "; on a CPU it takes many times the recording's length" if device == "cpu" else ""
    if preset == "still":
        return Preset(preset, {"do_motion_estimation": False}, "no motion estimation" + slow)
    return Preset(preset, {}, "DARTsort's own configuration" + slow)


def check(params: Mapping[str, Any], stream: StreamFiles) -> None:
    rows_of(params.get("bad_channels") or [], stream)


def run(work: Work) -> dict[str, Any]:
    """Sort; also leaves a SpikeInterface sorting in work.folder / "sorting"."""
    import dartsort as package
    import spikeinterface.core as si

    from spiked.offline import reading
    from spiked.offline.si_recording import recording_of
    from spiked.offline.sorters import phy

    given = {k: v for k, v in work.params.items() if k not in ("bad_channels", "probe")}
    workers = 0 if work.threads == 1 else work.threads  # 0: none, all in the main thread
    own = {"tmpdir_parent": str(work.folder), "n_jobs_small": workers, "n_jobs_small_gpu": workers}
    config = package.DARTsortUserConfig(**{**own, **given}, device=work.device)
    recording = recording_of(work.recording)
    kept = np.setdiff1d(np.arange(work.stream.n_channels), work.left_out)
    if work.left_out:
        recording = recording.select_channels(recording.channel_ids[kept])
    results = work.folder / "dartsort"
    found = package.dartsort(recording, results, config, overwrite=True)["sorting"]
    labels = np.asarray(found.labels)
    sorted_ = labels >= 0
    at, unit = np.asarray(found.times_samples, np.int64)[sorted_], labels[sorted_].astype(np.int64)
    with reading.opened(work.stream) as codes:
        ids = phy.write(work.folder / OUTPUT, at, unit, codes, work.stream.positions_um, work.stream.fs_hz)
    phy.table(work.folder / OUTPUT, "source_unit", ids.tolist())
    sorting = si.NumpySorting.from_samples_and_labels([at], [unit], work.stream.fs_hz)
    shutil.rmtree(work.folder / "sorting", ignore_errors=True)
    sorting.save(folder=work.folder / "sorting")
    return {"version": f"dartsort {package.__version__}", "unsorted": int((~sorted_).sum())}
