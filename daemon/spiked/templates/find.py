"""Who fired when, for templates: a sorter of SpikeInterface's, run on the calibration's cleaned samples.

The sorter has a process of its own, because only its end gives the memory back, and a crash in it is then an error of
one line. It is `python -m spiked.offline.find`, started by name: that room comes after this one and reads nothing of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from spiked.errors import SpikedError

SORTERS = ("lupin", "tridesclous2", "spykingcircus2", "kilosort4")
NEEDS = {"spykingcircus2": "hdbscan", "kilosort4": "kilosort"}  # besides SpikeInterface
INSTEAD = 'set live.templates_from = "rt_sort"'
PIECE_S = 1.0
FINE, COARSE = 16, 2  # codes in one SD of the noise: as wished, and at least
LARGEST = 30_000  # code that a sample is given
ROOM = 4  # bytes per sample that the sorters' filtered copy takes, besides our two
BINARY, JOB, FOUND, FAILED = "samples.bin", "find.json", "found.npz", "failed.txt"

Progress = Callable[[float, str], None]


def find_spikes(
    x: np.ndarray, fs_hz: float, positions_um: np.ndarray, channel_ids: tuple[str, ...], folder: Path, sorter: str = "lupin",
    progress: Progress = lambda _f, _t: None, device: str = "auto",
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:  # fmt: skip
    """Spikes of the units that `sorter` finds: (positions in x int64, units int64, what found them).

    x (channels, n) cleaned microvolts of any float type, may be memory-mapped; folder: an existing one, for what is only needed
    meanwhile. Kilosort4's units are labelled and merged as after a session; `device` is for Kilosort4. Raises SpikedError: package
    missing, no room, sorter failed, no units.
    """
    _require(sorter)
    _check_room(x, folder)
    progress(0.0, "writing the samples for the sorter")
    lsb_uv = write_int16(x, fs_hz, folder / BINARY)
    job = {
        "binary": str(folder / BINARY), "fs_hz": fs_hz, "gain_uv": [lsb_uv] * len(x), "n_samples": x.shape[1], "sorter": sorter,
        "positions_um": np.asarray(positions_um, float).tolist(), "channel_ids": list(channel_ids), "folder": str(folder / "sorter"),
        "device": device,
    }  # fmt: skip
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    try:
        _run(folder, sorter, progress)
        with np.load(folder / FOUND, allow_pickle=False) as z:
            sample, unit = z["sample"].astype(np.int64), z["unit"].astype(np.int64)
            source = {str(k): str(v) for k, v in json.loads(str(z["source"])).items()}
    finally:
        shutil.rmtree(folder / "sorter", ignore_errors=True)
        for name in (BINARY, JOB, FOUND, FAILED):
            (folder / name).unlink(missing_ok=True)
    if not len(sample):
        curation = f" to keep ({source['curation']})" if "curation" in source else ""
        raise SpikedError(
            f"{sorter} found no units{curation}; record longer (live.calibrate_s), check the signal, or {INSTEAD}"
        )
    progress(1.0, f"{sorter} found {len(np.unique(unit))} units, {len(sample)} spikes")
    return sample, unit, source


def _require(sorter: str) -> None:
    if sorter not in SORTERS:
        raise SpikedError(f"live.templates_from = {sorter!r} is not one of {', '.join(SORTERS)}, rt_sort")
    if importlib.util.find_spec("spikeinterface") is None:
        raise SpikedError(
            f"{sorter} needs SpikeInterface, which is not installed: pip install 'spiked[offline]', or {INSTEAD}"
        )
    more = NEEDS.get(sorter)
    if more and importlib.util.find_spec(more) is None:
        what = "'spiked[offline]'" if sorter == "kilosort4" else more
        raise SpikedError(
            f"{sorter} needs the package {more}, which is not installed: pip install {what}, or {INSTEAD}"
        )


def _check_room(x: np.ndarray, folder: Path) -> None:
    need, free = (2 + ROOM) * x.size, shutil.disk_usage(folder).free
    if free < need:
        raise SpikedError(
            f"the sorter needs {need / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free; free space, "
            f"lower live.calibrate_s, or {INSTEAD}"
        )


# ---- the samples ------------------------------------------------------------------------------------------------


def write_int16(x: np.ndarray, fs_hz: float, path: Path) -> float:
    """Write x (channels, n) as (n, channels) int16, piece by piece; returns the microvolts per code.

    The noise of the quietest channel spans FINE codes; where the largest sample would not fit then, fewer. Beyond what COARSE
    leaves room for, samples are clipped: 15000 SDs are no spike. What is not finite becomes 0.
    """
    step = max(1, round(PIECE_S * fs_hz))
    starts = range(0, x.shape[1], step)
    few = np.concatenate([_piece(x, a, a + step)[:, ::11] for a in starts[:: max(1, len(starts) // 20)]], 1)
    sd = np.median(np.abs(few), 1) / 0.6745
    quietest = float(sd[sd > 0].min()) if (sd > 0).any() else 0.0
    peak = max(float(np.abs(_piece(x, a, a + step)).max(initial=0)) for a in starts)
    if peak == 0:
        raise SpikedError("the calibration's samples are all zero; check the signal")
    lsb_uv = max(quietest / FINE, peak / LARGEST)
    if quietest:
        lsb_uv = min(lsb_uv, quietest / COARSE)
    try:
        with path.open("wb") as out:
            for a in starts:
                codes = np.rint(_piece(x, a, a + step) / np.float32(lsb_uv))
                np.clip(codes, -LARGEST, LARGEST).astype("<i2").T.tofile(out)
    except OSError as e:
        raise SpikedError(f"cannot write {path}: {e.strerror or e}; free space there") from e
    return lsb_uv


def _piece(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    """(channels, samples) float32, finite."""
    return np.nan_to_num(np.asarray(x[:, start:stop], np.float32), nan=0.0, posinf=0.0, neginf=0.0)


# ---- the process ------------------------------------------------------------------------------------------------


def _run(folder: Path, sorter: str, progress: Progress) -> None:
    """Run the sorter's process to its end; SpikedError with its last words where it failed."""
    env = {**os.environ, "MPLBACKEND": "Agg"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        env[name] = "1"  # it shares the computer with the live path
    command = [sys.executable, "-m", "spiked.offline.find", str(folder / JOB)]
    tail: deque[str] = deque(maxlen=20)
    furthest = 0.0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
    ) as child:
        try:
            assert child.stderr is not None
            for line in _lines(child.stderr):
                told = said(line)
                if told is not None:
                    furthest = max(furthest, told[0])
                    progress(furthest, f"{sorter}: {told[1]}")
                elif line.strip() and "%|" not in line:  # a bar that is not known
                    tail.append(line.strip())
        except BaseException:
            child.kill()
            raise
    if child.returncode == 0 and (folder / FOUND).is_file():
        return
    with contextlib.suppress(OSError):
        raise SpikedError((folder / FAILED).read_text(encoding="utf-8").strip())
    if child.returncode < 0:
        why = f"it was ended by signal {-child.returncode}, most likely for lack of memory"
    else:
        why = tail[-1][:200] if tail else f"exit status {child.returncode}"
    raise SpikedError(f"{sorter} failed: {why}; lower live.calibrate_s or {INSTEAD}")


def _lines(pipe: IO[bytes]) -> Iterator[str]:
    """Lines as they come; a progress bar ends each of its states with a carriage return."""
    rest = ""
    while data := os.read(pipe.fileno(), 65536):
        *whole, rest = (rest + data.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
        yield from whole
    yield rest


# What SpikeInterface's own sorters call the loops they show a bar for, in order, with the share of the time each takes
# on one core, and in our words.
STEPS = (
    ("write_", 0.15, "filtering"),
    ("noise_level", 0.02, "measuring the noise"),
    ("get protoype", 0.03, "looking for spikes"),
    ("detect peaks", 0.15, "looking for spikes"),
    ("Fit peaks svd", 0.05, "comparing waveforms"),
    ("Transform peaks svd", 0.05, "comparing waveforms"),
    ("split_clusters", 0.20, "clustering"),
    ("estimate_templates", 0.05, "averaging waveforms"),
    ("find spikes", 0.20, "matching"),
)  # and then it merges, without a bar
_BAR = re.compile(r"^([^|]*?)(?: \(no parallelization\))?:\s+\d+%\|[^|]*\|\s*(\d+)/(\d+)")
_PROGRESS = re.compile(r"^progress (\d+(?:\.\d*)?) (.*)$")


def said(line: str) -> tuple[float, str] | None:
    """(fraction, what is being done) of a line that tells progress: the process's own words, or a sorter's bar."""
    own = _PROGRESS.match(line)
    if own:
        return float(own[1]), own[2]
    bar = _BAR.match(line)
    if not bar:
        return None
    before = 0.0
    for name, share, text in STEPS:
        if bar[1].startswith(name):
            return before + share * int(bar[2]) / max(int(bar[3]), 1), text
        before += share
    return None
