"""`spiked templates`: curated units become live ones, under the ids they have.

The recording's samples are cleaned as the live path cleans them, and the templates learned from them: yesterday's units sort
today's stream from its first second (`live.templates`).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from spiked import config
from spiked.clean.cleaner import Cleaner
from spiked.errors import ConfigError, SpikedError
from spiked.offline.carry_options import LAST_S
from spiked.offline.curated import Curated, read
from spiked.sources.formats.recording import Choice
from spiked.sources.recordings import Recording, open_recording
from spiked.templates.expected import expect
from spiked.templates.learn import MIN_SPIKES, learn
from spiked.templates.library import Templates

WANTED = ("good", "undetermined", "sua", "live")  # kept by default, where units have labels
PIECE_S = 1.0
OUTSIDE = 0.01  # of the spikes may lie beyond the recording's end
LEAST_ACCURACY = 0.3  # expected; below it a unit keeps the threshold that all begin with

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Wish:
    """What the operator asks for; None: as the source or the session's own settings say."""

    recording: Path | None = None
    choice: Choice = field(default_factory=Choice)
    units: tuple[int, ...] | None = None
    labels: tuple[str, ...] | None = None
    last_s: float = LAST_S
    highpass_hz: float | None = None
    reference: str | None = None


def carry(
    source: Path, out: Path, wish: Wish, progress: Progress = lambda _f, _t: None
) -> tuple[Templates, list[str]]:
    """Write the templates of `source`'s units to `out`; returns them and what the operator should know.

    Raises ConfigError, RecordingError, OfflineError or SpikedError with one line.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is not a folder; give --out in an existing one")
    units = read(source, wish.choice.stream)
    kept = chosen(units, wish.units, wish.labels)
    with _recording(source, units, wish) as recording:
        told = _doubts(source, units, recording, wish)
        info, settings = recording.info, _settings(source, recording.path, wish)
        start = max(0, recording.n_samples - info.samples(wish.last_s * 1000))
        inside = np.isin(units.units, kept) & (units.samples >= start) & (units.samples < recording.n_samples)
        sample, unit = units.samples[inside] - start, units.units[inside]
        ids, counts = np.unique(unit, return_counts=True)
        ids = ids[counts >= MIN_SPIKES]
        few = sorted(set(kept.tolist()) - set(ids.tolist()))
        seconds = (recording.n_samples - start) / info.fs_hz
        if not len(ids):
            raise SpikedError(
                f"none of {len(kept)} units has {MIN_SPIKES} spikes in the last {seconds:.0f} s; give a larger --last-s"
            )
        with tempfile.TemporaryDirectory(prefix=".templates-", dir=out.parent) as folder:
            x = cleaned(recording, start, settings, Path(folder), lambda f, t: progress(0.3 * f, t))
            known = {"sorter": units.kind, "file": str(source), **{k: str(v) for k, v in settings.items()}}
            first = recording.device_sample(start)
            t = learn(
                x, sample, unit, info.fs_hz, info.positions, info.channel_ids, first, known, lambda f, t: progress(0.3 + 0.5 * f, t)
            )  # fmt: skip
            progress(0.8, "injecting spikes to see which come back")
            t = judged(t.with_ids(ids[t.unit_ids], int(units.ids.max()) + 1, np.ones(len(t))), x)
            del x
    t.save(out)
    first_line, *more = _summary(t, units, few, seconds)
    return t, [first_line, *told, *more]


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """`spiked templates`; what was learned, for --json."""
    if not 0 < args.last_s < math.inf:
        raise ConfigError(f"--last-s {args.last_s:g} is not a number of seconds above 0")
    wish = Wish(
        args.recording, Choice(probe=args.probe, stream=args.stream, well=args.well), args.units, args.label, args.last_s,
        args.highpass_hz, args.reference,
    )  # fmt: skip
    last = ""

    def progress(_fraction: float, text: str) -> None:
        nonlocal last
        if text != last:
            say(text)
        last = text

    t, told = carry(args.source, args.out, wish, progress)
    say("\n".join([f"{args.out}: {told[0]}", *told[1:]]))
    return {"file": str(args.out), "units": t.unit_ids.tolist(), "expected": t.expected, "told": told}


def chosen(c: Curated, units: tuple[int, ...] | None, labels: tuple[str, ...] | None) -> np.ndarray:
    """Ids of the units to take: those named, or those so labelled; else the good ones where units have labels, else all."""
    if units is not None:
        unknown = sorted(set(units) - set(c.ids.tolist()))
        if unknown:
            raise ConfigError(
                f"there is no unit {', '.join(map(str, unknown))}; there are {_some(c.ids.tolist())}"
            )
        return np.unique(np.array(units, np.int64))
    if labels is None and not c.labels:
        return c.ids
    wanted = WANTED if labels is None else tuple(x.lower() for x in labels)
    kept = np.array([u for u in c.ids.tolist() if c.labels.get(u) in wanted], np.int64)
    if not len(kept):
        has = ", ".join(sorted(set(c.labels.values()))) or "none"
        raise ConfigError(
            f"no unit is labelled {' or '.join(wanted)}; labels are: {has}; give --label or --units"
        )
    return kept


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:20])) + (" ..." if len(ids) > 20 else "")


def _recording(source: Path, units: Curated, wish: Wish) -> Recording:
    if wish.recording is not None:
        return open_recording(wish.recording, **wish.choice._asdict())
    if units.open_own is None:
        raise ConfigError(
            f"{source} does not say which recording its units are from; give it with --recording"
        )
    try:
        return units.open_own(wish.choice)
    except SpikedError as e:
        raise type(e)(f"{e} (or name the recording with --recording)") from e


def _doubts(source: Path, units: Curated, recording: Recording, wish: Wish) -> list[str]:
    """What may be wrong; SpikedError where it certainly is."""
    info = recording.info
    if units.fs_hz is not None and abs(units.fs_hz - info.fs_hz) > 1e-3 * info.fs_hz:
        raise ConfigError(
            f"{source} has units of {units.fs_hz:g} Hz, {recording.path} is of {info.fs_hz:g} Hz; give their own recording"
        )
    beyond = (units.samples < 0) | (units.samples >= recording.n_samples)
    if beyond.mean() > OUTSIDE:
        raise ConfigError(
            f"{source} has spikes up to sample {int(units.samples.max())}, {recording.path} ends at {recording.n_samples}; "
            "give the recording that they were found in"
        )
    told = []
    if units.filtered and wish.recording is None:
        told.append(
            "note: that recording was filtered before; the units fit the live stream only if that is too, else give --recording"
        )
    if not info.geometry_known:
        told.append("note: the recording does not say where its electrodes are; give --probe")
    if units.names:
        told.append(
            "units are numbered: " + ", ".join(f"{n} is {k}" for k, n in list(units.names.items())[:20])
        )
    return told


def _settings(source: Path, recording: Path, wish: Wish) -> dict[str, Any]:
    """How the live path of the session cleaned: told, or from a session.toml with the source or the recording."""
    own: dict[str, Any] = {"highpass_hz": 0.0, "reference": "none"}
    for folder in dict.fromkeys((recording.parent, recording, source, source.parent)):
        if (folder / "session.toml").is_file():
            try:
                live = config.load(folder / "session.toml").live
            except ConfigError:
                continue  # of another version
            own = {"highpass_hz": live.highpass_hz, "reference": live.reference}
            break
    if wish.highpass_hz is not None:
        own["highpass_hz"] = wish.highpass_hz
    if wish.reference is not None:
        own["reference"] = wish.reference
    return own


def cleaned(
    recording: Recording, start: int, settings: dict[str, Any], folder: Path, progress: Progress
) -> np.ndarray:
    """(channels, n) float16 memory-mapped in `folder`: the recording's samples from `start` on as the live path sees them."""
    info, n = recording.info, recording.n_samples - start
    try:
        out = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float16, (info.n_channels, n))
        cleaner, step = Cleaner(info, **settings), info.samples(PIECE_S * 1000)
        for a in range(0, n, step):
            progress(a / n, f"cleaning {n / info.fs_hz:.0f} s of the recording")
            b = min(a + step, n)
            data = recording.read(start + a, start + b)
            x, _, _ = cleaner.process(
                recording.device_sample(start + a), data, _lost(recording, start + a, data)
            )
            out[:, a:b] = x
    except OSError as e:
        raise SpikedError(
            f"cannot write {2 * info.n_channels * n / 1e9:.1f} GB beside the result: {e.strerror}; free space or lower --last-s"
        ) from e
    return out


def _lost(recording: Recording, start: int, data: np.ndarray) -> np.ndarray | None:
    """(n, channels) bool of samples that never arrived, or None where all did."""
    inside = [(a - start, b - start) for a, b in recording.invalid if a < start + len(data) and b > start]
    if not inside:
        return None
    dead = np.zeros(data.shape, bool)
    for a, b in inside:
        dead[max(a, 0) : b] = True
    return dead


def judged(t: Templates, x: np.ndarray) -> Templates:
    """The templates with what to expect of them, and the thresholds that promise most."""
    e = expect(t, x)
    sure = (e.accuracy >= LEAST_ACCURACY) & np.isfinite(e.threshold)
    figures = {k: [round(float(v), 3) for v in getattr(e, k)] for k in ("accuracy", "recall", "precision")}
    return replace(t, threshold=np.where(sure, e.threshold, t.threshold), expected={"templates": figures})


def _summary(t: Templates, units: Curated, few: list[int], seconds: float) -> list[str]:
    told = [f"{len(t)} of {len(units.ids)} units, learned from the last {seconds:.0f} s"]
    if few:
        told.append(f"left out, fewer than {MIN_SPIKES} spikes there: {_some(few)}")
    accuracy = np.array(t.expected["templates"]["accuracy"])
    told.append(
        f"expected accuracy live: {np.median(accuracy):.2f} in the middle, {accuracy.min():.2f} at worst"
    )
    poor = [int(u) for u, a in zip(t.unit_ids, accuracy, strict=True) if a < 0.7]
    if poor:
        told.append(f"below 0.7: units {_some(poor)}")
    return told
