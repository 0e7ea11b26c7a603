"""Curate a sorting, save what came out, and have it again from its history."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import OfflineError
from spiked.offline import suggestions
from spiked.offline.curation import history, to_phy
from spiked.offline.curation.source import Source, opened
from spiked.offline.curation.steps import Step, StepResult, Unit, step_of
from spiked.offline.manifest import write_json
from spiked.offline.phy_curated import FOLDER
from spiked.sources.formats.recording import Choice

DEFAULT = (
    "num_spikes >= 30",
    "firing_rate >= 0.05",
    "isi_violations <= 1 %",
    "snr >= 5",
    "waveform_std <= 1",
)
HISTORY, UNITS, FORMAT, TABLE = "curation.json", "units.npz", "curation.spikeinterface.json", "units.tsv"
Say = Callable[[float, str], None]


@dataclass
class Curation:
    """What a curation gave. `sorting` is SpikeInterface's, with the units that stayed, merges done."""

    sorting: Any
    steps: list[StepResult]
    units: list[Unit]  # before the first step
    kept: list[Unit]
    history: dict[str, Any]
    told: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    @property
    def merged(self) -> dict[Unit, list[Unit]]:
        """Every merged unit that stayed, and which of the first units it is made of."""
        made = {u: parts for s in self.steps for u, parts in s.merged.items()}

        def first(u: Unit) -> list[Unit]:
            return [x for part in made[u] for x in first(part)] if u in made else [u]

        return {u: first(u) for u in self.kept if u in made}

    def save(self, folder: Path | str, phy: bool = True) -> Path:
        """History, spike trains, table, SpikeInterface's curation format of the same decisions, and of a Phy folder a curated one (`phy`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        trains = {
            u: np.asarray(self.sorting.get_unit_spike_train(u), np.int64) for u in self.sorting.unit_ids
        }
        samples = np.concatenate([*trains.values(), np.zeros(0, np.int64)])
        units = (
            np.repeat(np.array(list(trains)), [len(t) for t in trains.values()])
            if trains
            else np.zeros(0, np.int64)
        )
        order = np.argsort(samples, kind="stable")
        np.savez(
            folder / UNITS, samples=samples[order], units=units[order], fs_hz=self.sorting.sampling_frequency
        )
        stay = [x for u in self.kept for x in self.merged.get(u, [u])]
        removed = [u for u in self.units if u not in set(stay)]
        write_json(folder / FORMAT, suggestions.curation(self.units, [], list(self.merged.values()), removed))
        (folder / TABLE).write_text(
            "\n".join("\t".join(row) for row in self.table()) + "\n", encoding="utf-8"
        )
        source = to_phy.source_of(self) if phy else None
        if source is not None:
            told = to_phy.write(self, source, folder / FOLDER, f"../{HISTORY}")
            self.told += [
                f"{told['by_hand']} was saved in Phy and stays; the new one is {told['folder']}"
            ] * bool(told["by_hand"])
        write_json(folder / HISTORY, self.history)
        return folder

    def table(self) -> list[list[str]]:
        """Head and one row per unit: the figure of each step, and which step set it aside."""
        everyone = list(dict.fromkeys([*self.units, *(u for s in self.steps for u in s.merged)]))
        rows = [["unit", "name", "kept", "set_aside_by", *(s.step for s in self.steps)]]
        for u in everyone:
            into = next(
                (f"merged into {new}" for s in self.steps for new, of in s.merged.items() if u in of), ""
            )
            by = into or next((s.step for s in self.steps if u in s.removed), "")
            figures = ["" if (v := s.metric.get(u)) is None else f"{v:.6g}" for s in self.steps]
            rows.append([str(u), self.names.get(u, ""), str(u in self.kept).lower(), by, *figures])
        return rows


def curate(
    given: Any,
    steps: Iterable[str | Step] = DEFAULT,
    recording: Any = None,
    choice: Choice | None = None,
    say: Say = lambda _f, _t: None,
) -> Curation:
    """Run the steps, one after the other, on `given` (a path, a SortingAnalyzer, or a BaseSorting; see `source.opened`).

    Each step sees what the ones before left, and gives a figure for all units, also those set aside. Raises ConfigError for a step
    that is none, OfflineError where a figure cannot be had.
    """
    wanted = [step_of(s) if isinstance(s, str) else s for s in steps]
    with opened(given, recording, choice) as source:
        analyzer = source.analyzer
        before = analyzer.sorting
        units = [_plain(u) for u in analyzer.unit_ids]
        kept, results, duration_s = list(units), [], source.duration_s
        for k, step in enumerate(wanted):
            say(k / max(len(wanted), 1), f"{step}")
            result, analyzer = step.run(analyzer, kept, duration_s)
            kept = history.kept_after(kept, [result])
            results.append(result)
            say((k + 1) / len(wanted), f"{step}: {len(kept)} units stay")
        return _outcome(source, before, units, results)


def replay(past: dict[str, Any] | Path | str, given: Any, choice: Choice | None = None) -> Curation:
    """The same units again, from the decisions in a history; no recording is needed.

    OfflineError where `given` is not the sorting that was curated, or what comes out is not what came out then.
    """
    data = past if isinstance(past, dict) else history.load(past)
    steps = [history.step_from_json(s) for s in data["steps"]]
    with opened(given, None, choice, spikes_until=int(data["n_samples"])) as source:
        before, now = source.analyzer.sorting, history.fingerprint(source.analyzer.sorting)
        if now != {k: data["sorting"][k] for k in now}:
            then = data["sorting"]
            raise OfflineError(
                f"{source.where} is not the sorting of this history: {now['units']} units and {now['spikes']} spikes, then {then['units']} and "
                f"{then['spikes']}; run its steps anew with --steps-of"
            )
        result = _outcome(source, before, [_plain(u) for u in source.analyzer.unit_ids], steps)
    if result.history["result"] != data["result"]:
        raise OfflineError(
            f"the history's decisions give other spikes now ({result.history['result']['spikes']}, then {data['result']['spikes']}); it was "
            f"made with SpikeInterface {data['versions'].get('spikeinterface')}"
        )
    return result


def _outcome(source: Source, before: Any, units: list[Unit], steps: list[StepResult]) -> Curation:
    """The steps' decisions applied to the spike trains, and the history of it."""
    sorting = before
    for step in steps:
        sorting = history.after(sorting, step)
    kept = history.kept_after(units, steps)
    here = {_plain(u): u for u in sorting.unit_ids}
    sorting = sorting.select_units([here[u] for u in kept])
    versions = {name: importlib.metadata.version(name) for name in ("spiked", "spikeinterface", "numpy")}
    data = {
        "spiked_curation": history.VERSION,
        "sorting": {"kind": source.kind, "path": source.where, "fs_hz": float(before.sampling_frequency), **history.fingerprint(before)},
        "n_samples": int(source.analyzer.get_total_samples()),
        "versions": versions,
        "steps": [history.step_to_json(s) for s in steps],
        "kept": kept,
        "result": history.fingerprint(sorting),
    }  # fmt: skip
    return Curation(sorting, steps, units, kept, data, source.told, source.names)


def _plain(unit: Any) -> Unit:
    return int(unit) if isinstance(unit, int | np.integer) else str(unit)
