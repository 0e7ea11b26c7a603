"""`spiked curate`: any number of sortings, each on its own; one that fails does not keep the others from being curated."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiked.errors import ConfigError, SpikedError
from spiked.offline.curation import history
from spiked.offline.curation.curate import DEFAULT, HISTORY, Curation, curate, replay
from spiked.offline.curation.steps import step_of
from spiked.sources.formats.recording import Choice

SUFFIX = ".curated"
INNER = (
    "sorter_output",
    "phy",
    "analyzer",
    "sorting",
    "kilosort4",
)  # folder names that do not tell one recording from another


def run(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
    """(exit status, {path: what came out}); results of PATH go to PATH.curated, or OUT/NAME."""
    places = _places(args.paths, args.out)
    for place in places.values():
        if (place / HISTORY).exists() and not args.force:
            raise ConfigError(
                f"{place} holds a curation; give --force to replace it, or --out for another folder"
            )
    past = history.load(args.replay) if args.replay else None
    texts = (
        [s["step"] for s in history.load(args.steps_of)["steps"]]
        if args.steps_of
        else args.step or list(DEFAULT)
    )
    steps = [step_of(t) for t in texts]
    choice = Choice(probe=args.probe, stream=args.stream, well=args.well)
    status = 0
    results: dict[str, Any] = {}
    for path, place in places.items():
        try:
            if past is not None:
                result = replay(past, path, choice)
            else:
                last: list[str] = []

                def progress(
                    _fraction: float, text: str, name: str = path.name, last: list[str] = last
                ) -> None:
                    if ":" in text and text not in last:
                        last.append(text)
                        say(f"{name}: {text}")

                result = curate(path, steps, args.recording, choice, progress)
            result.save(place, phy=not args.no_phy)
        except SpikedError as e:
            if len(places) == 1:
                raise
            status = e.exit_code
            say(f"{path}: {e}")
            results[str(path)] = {"error": str(e)}
            continue
        for line in result.told:
            say(f"{path.name}: {line}")
        verb = "replayed, the same spikes as then" if past is not None else "curated"
        say(f"{path.name}: {_summary(result)}; {verb}: {place}")
        results[str(path)] = {"folder": str(place), "kept": result.kept, "steps": result.history["steps"]}
    return status, results


def _summary(c: Curation) -> str:
    merged = f", {len(c.merged)} of them merged" if c.merged else ""
    return f"{len(c.kept)} of {len(c.units)} units stay{merged}"


def _places(paths: list[Path], out: Path | None) -> dict[Path, Path]:
    """{sorting: folder for its results}."""
    places: dict[Path, Path] = {}
    for given in paths:
        path = given.resolve()
        name = f"{path.parent.name}-{path.name}" if out is not None and path.name in INNER else path.name
        place = path.with_name(path.name + SUFFIX) if out is None else out / name
        if place in places.values():
            raise ConfigError(
                f"two sortings would both be saved in {place}; give them one after the other, with an --out each"
            )
        places[path] = place
    return places
