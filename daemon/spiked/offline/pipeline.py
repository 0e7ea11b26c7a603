"""The stages of an offline job, one after the other, for one stream of a session.

Stages run in the order of progress.STAGES. Each leaves its files in offline/<sorter>/ and its result in
stages.json, so that a job that was stopped goes on after the last finished stage.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.config import Guards, Labels, Slay, Stim, checked
from spiked.criteria import bounds
from spiked.errors import OfflineError, SpikedError
from spiked.offline import (
    analyze,
    compare,
    export,
    facts,
    failures,
    figures,
    lab_labels,
    labels,
    merges,
    phy,
    phy_curated,
    phy_job,
    preflight,
    presets,
    reading,
    report,
    rig_library,
    slay_network,
    sort,
    sorters,
    suggestions,
)
from spiked.offline.curation import metrics
from spiked.offline.guards import canary, smaller
from spiked.offline.guards.watch import Watch
from spiked.offline.manifest import Manifest, digest, write_json
from spiked.offline.page import write_page
from spiked.offline.progress import STAGES, Progress
from spiked.offline.session import Session, StreamFiles

BINARY = "recording.dat"


class Job:
    """One stream of one session on its way through the stages. `run` returns the report's mapping."""

    def __init__(
        self, session: Session, stream: StreamFiles, settings: presets.JobSettings, progress: Progress
    ) -> None:
        stream = sorters.placed(stream, settings.sorter_params)
        self.session, self.stream, self.settings = session, stream, settings
        self.progress = progress
        self.folder = session.folder(stream, settings.sorter)
        self.device = presets.resolve_device(settings.device)
        self.sorter = sorters.of(settings.sorter)
        self.preset = self.sorter.choose(settings.preset, self.device, stream)
        self.params = {**self.preset.params, **settings.sorter_params}
        self.threads = settings.threads or presets.default_threads()
        self.stim = Stim() if session.config is None else session.config.stim
        self.guards = checked(Guards, settings.guards, "offline.guards")
        self.slay_wish = checked(Slay, settings.slay, "offline.slay")
        self.label_wish = checked(Labels, settings.labels, "offline.labels")
        self._analyzer: Any = None

    # the stages ------------------------------------------------------------------------------------------

    def preflight(self) -> tuple[list[str], dict[str, Any]]:
        sorters.require(self.sorter, self.device)
        plan = preflight.Plan(
            self._batch(self.params) if self.settings.sorter == "kilosort4" else 0,
            self.settings.sorter,
            self.device,
            self.settings.memory_gb,
            self.guards.disk_gb,
            export.copies(self.stream, self.stim, self.sorter.NEEDS_BINARY),
        )
        found = preflight.check(self.stream, self.folder, plan, self._say("preflight"))
        self.sorter.check(self.params, self.stream)
        return [], found

    def canary(self) -> tuple[list[str], dict[str, Any]]:
        n, why = canary.length(self.stream, self.guards, self._batch(self.params))
        if why:
            return [], {"ran": False, "why": why}
        stream, params = canary.first(self.stream, n), canary.params(self.params)
        before = dict(params)
        canary.clear(self.folder)
        try:
            binary = self.folder / canary.BINARY
            gain = export.write_binary(stream, binary, self._say("canary"))["gain_uv"]
            watch = self._watch()
            result = canary.sing(
                lambda: self._sort_smaller(stream, binary, gain, params, canary.FOLDER, watch),
                stream.duration_s,
            )
        finally:
            canary.clear(self.folder)
        self._say("canary")(1.0, f"the first {stream.duration_s:.0f} s: {result['text'] or 'can be sorted'}")
        fitted = {k: v for k, v in params.items() if before.get(k) != v}
        return [], {**result, "fitted": fitted, "guards": watch.seen}

    def export(self) -> tuple[list[str], dict[str, Any]]:
        needs, say = self.sorter.NEEDS_BINARY, self._say("export")
        return [], export.prepare(self.stream, self.folder / BINARY, say, self.stim, needs)

    def sort(self) -> tuple[list[str], dict[str, Any]]:
        params = {**self.params, **self.result("canary").get("fitted", {})}
        gain, watch = self.result("export")["gain_uv"], self._watch()
        tried = self._sort_smaller(self.stream, self._binary(), gain, params, "sorter", watch)
        found = sort.read(self.folder / "sorter")
        keep = (found["samples"] >= 0) & (found["samples"] < self.stream.n_samples)
        samples, units = found["samples"][keep], found["units"][keep]
        np.savez(self.folder / "sorted.npz", samples=samples, units=units)
        whole = labels.without_echoes(samples, units, self.stream.fs_hz)
        np.savez(self.folder / "without_echoes.npz", samples=samples[whole], units=units[whole])
        n = len(np.unique(units))
        if not n:
            raise OfflineError(f"{self.settings.sorter} found no units", "biology", "sort")
        self._say("sort")(1.0, f"{self.settings.sorter} found {n} units, {len(samples)} spikes")
        return ["sorted.npz", "without_echoes.npz", f"sorter/{sort.OUTCOME}"], {
            "units": n,
            "spikes": len(samples),
            "echoes": int(np.count_nonzero(~whole)),
            "ks_label": found["ks_label"],
            "contamination": found["contamination"],
            "batch_size": self._batch(params),
            "out_of_memory": tried,
            "guards": watch.seen,
        }

    def _left_out(self) -> list[int]:
        """Rows of the channels that the operator or the preflight found unusable."""
        named = sorters.rows_of(self.params.get("bad_channels") or [], self.stream)
        return sorted({*named, *self.result("preflight")["bad_channels"]})

    def _output(self) -> Path:
        """The folder for Phy that the sorter left."""
        return self.folder / "sorter" / sorters.OUTPUT

    def _binary(self) -> Path | None:
        """The copy of the recording, where there had to be one."""
        return self.folder / BINARY if self.result("export")["file"] else None

    def _batch(self, params: dict[str, Any]) -> int:
        """How many samples the sorter works on at a time."""
        return smaller.PIECES.get(self.settings.sorter, smaller.PIECES["kilosort4"]).of(params)

    def _watch(self) -> Watch:
        return Watch(self.guards, self.folder, self.device, self.settings.memory_gb)

    def _sort_smaller(
        self,
        stream: StreamFiles,
        binary: Path | None,
        gain_uv: list[float],
        params: dict[str, Any],
        folder: str,
        watch: Watch,
    ) -> list[str]:
        """Run the sorter into `folder`, in smaller pieces after every out-of-memory; what it said each time.

        `params` become those that fitted.
        """
        say = self._say("canary" if folder == canary.FOLDER else "sort")

        def once(params: dict[str, Any]) -> None:
            job = sort.sorter_job(
                stream, binary, gain_uv, self.settings.sorter, params, self.folder / folder, self.threads,
                self.settings.memory_gb, self._left_out(),
            )  # fmt: skip
            sort.run(job, self.device, self.settings.timeout_s, say, watch)

        on_gpu = self.device != "cpu"
        return smaller.until_it_fits(self.settings.sorter, params, once, self.settings.retries, on_gpu, say)

    def analyze(self) -> tuple[list[str], dict[str, Any]]:
        samples, units = self.cleaned()
        folder = self.folder / "analyzer"
        self._analyzer = analyze.build(self.recording(), samples, units, folder, self._say("analyze"))
        shapes = analyze.shapes(self._analyzer, self.stream.positions_um)
        return ["analyzer"], {"shapes": {str(k): v for k, v in shapes.items()}}

    def labels(self) -> tuple[list[str], dict[str, Any]]:
        samples, units = self.cleaned()
        shapes = {int(k): v for k, v in self.result("analyze")["shapes"].items()}
        rows = self._label(samples, units, shapes, self.analyzer())
        self._to_phy(rows)
        counts = {
            name: sum(r["label"] == name for r in rows) for name in ("good", "undetermined", "mua", "noise")
        }
        write_json(self.folder / "labels.json", rows)
        self._say("labels")(1.0, ", ".join(f"{n} {name}" for name, n in counts.items()))
        told = [str(b) for b in bounds(self.label_wish.criteria)]
        lab = {"criteria": told, "combine": self.label_wish.combine}
        return ["labels.json"], {"counts": counts, "units": rows, **lab}

    def slay(self) -> tuple[list[str], dict[str, Any]]:
        wish = (
            self.slay_wish
            if self.settings.curate
            else self.slay_wish.model_copy(update={"similarity": "none"})
        )
        kept = self.kept()
        if not kept:
            result: dict[str, Any] = {
                "groups": [],
                "method": "none",
                "why": "no unit left",
                "parameters": {},
                "pairs": [],
            }
        else:
            twins = [r["unit"] for r in self.result("labels")["units"] if r.get("duplicate_of") is not None]
            twins = [u for u in twins if u not in kept]
            subset, seconds, say = (
                analyze.only(self.analyzer(), kept + twins),
                self.stream.duration_s,
                self._say("slay"),
            )
            result = merges.propose(subset, wish, seconds, self._networks(), self.device, say, twins)
        suggestions.write(self.analyzer().unit_ids, self.result("labels")["units"], result, self.folder)
        result["applied"] = wish.apply == "merge"
        verb = "merges" if result["applied"] else "merges suggested"
        self._say("slay")(1.0, f"{len(result['groups'])} {verb} ({result['method']}: {result['why']})")
        return [suggestions.FILE], result

    def _networks(self) -> slay_network.Store:
        """A known animal's networks are kept beside the sessions, others with the session."""
        animal = "" if self.session.config is None else self.session.config.subject.id
        known = animal not in ("", "unknown") and self.session.owns(self.stream)
        beside = self.session.path.absolute().parent / "library" / "slay"
        name = self.session.path.resolve().name
        return (
            slay_network.Store(beside, animal, name)
            if known
            else slay_network.Store(self.folder, session=name)
        )

    def merge(self) -> tuple[list[str], dict[str, Any]]:
        kept, proposed = self.kept(), self.result("slay")
        groups = proposed["groups"] if proposed.get("applied", True) else []
        mapping: dict[int, list[int]] = {}
        twice: dict[int, int] = {}
        rows: list[dict[str, Any]] = []
        samples = units = np.zeros(0, np.int64)
        if kept:
            folder = self.folder / "analyzer_curated"
            subset = analyze.only(self.analyzer(), kept)
            known = [int(self.sorted()[1].max()), *phy.clusters(self._output())]
            curated, mapping, twice = merges.merged_analyzer(
                subset, groups, folder, self.slay_wish.censor_ms, max(known) + 1
            )
            trains = merges.trains(curated)
            samples, units = trains.samples, trains.ids[trains.index]
            rows = self._label(samples, units, analyze.shapes(curated, self.stream.positions_um), curated)
        np.savez(
            self.folder / "units.npz",
            samples=samples + self.stream.first_sample,
            units=units,
            first_sample=self.stream.first_sample,
            fs_hz=self.stream.fs_hz,
        )
        self._say("merge")(1.0, f"{len(rows)} units after {len(groups)} merges")
        return ["units.npz"], {
            "mapping": {str(k): v for k, v in mapping.items()},
            "twice": {str(k): v for k, v in twice.items()},
            "units": rows,
        }

    def nwb(self) -> tuple[list[str], dict[str, Any]]:
        if not self.session.owns(self.stream):
            return [], {
                "units": 0,
                "table": "",
                "why": "the recording is not a session's; it is left as it is",
            }
        from spiked.offline import nwb_units  # needs h5py

        samples, units = self.curated()
        rows = self.result("merge")["units"]
        result = nwb_units.write_units(self.stream, samples, units, rows, self.settings.sorter)
        self._say("nwb")(1.0, f"{result['units']} units in the session file. {result['why']}".rstrip(" ."))
        return [], result

    def library(self) -> tuple[list[str], dict[str, Any]]:
        if not self.settings.library or not self.session.owns(self.stream):
            why = (
                "switched off" if not self.settings.library else "the recording is not a session of this rig"
            )
            return [], {"file": "", "why": why, "told": [], "units": {}, "known": []}
        result = rig_library.keep_units(self.session, self.stream, self._say("library"))
        self._say("library")(
            1.0, f"{len(result['units'])} units kept for live sorting. {result['why']}".rstrip(" .")
        )
        return [], result

    def phy(self) -> tuple[list[str], dict[str, Any]]:
        why = "" if (self._output() / "params.py").is_file() else "the sorter left no folder for Phy"
        why = why if self.settings.curate else "there was no curation"
        why = why if self.settings.phy else "switched off"
        if why:
            return [], {"folder": "", "clusters": 0, "by_hand": "", "why": why}
        merged = self.result("merge")
        rows = {r["unit"]: r for r in [*self.result("labels")["units"], *merged["units"]]}
        mapping = {int(k): v for k, v in merged["mapping"].items()}
        spikes, proposed = (self.sorted(), self.cleaned(), self.curated()), self.result("slay")
        together = phy.merges(proposed["groups"], proposed["pairs"])
        found = phy_job.found(self._output(), *spikes, mapping, rows, together)
        made_by = {"labels": self.label_wish.model_dump(), "slay": self.slay_wish.model_dump()}
        result = phy_curated.write(self._output(), self.folder / phy_curated.FOLDER, found, made_by)
        stays = f"; {result['by_hand']} was saved in Phy and stays as it is" if result["by_hand"] else ""
        self._say("phy")(1.0, f"for Phy: {result['folder']}{stays}")
        return [f"{Path(result['folder']).name}/{phy_curated.CARD}"], {**result, "why": ""}

    def _here(self, result: dict[str, Any], *folders: str) -> dict[str, Any]:
        """A stage's result with its folders where the session is now: a session may have been moved since."""
        return {**result, **{k: str(self.folder / Path(result[k]).name) for k in folders if result[k]}}

    def compare(self) -> tuple[list[str], dict[str, Any]]:
        self._say("compare")(0.0, "comparing live with offline")
        live = self.stream.live_spikes()
        live_samples = live["sample"].astype(np.int64) - self.stream.first_sample
        result = compare.compare(
            self.curated(),
            (live_samples, live["unit"].astype(np.int64)),
            self.stream.true_spikes(),
            self.sorted(),
            self.stream.n_samples,
            self.stream.fs_hz,
        )
        return [], result

    def report(self) -> tuple[list[str], dict[str, Any]]:
        self._say("report")(0.1, "quality metrics and figures")
        analyzer = analyze.load(self.folder / "analyzer_curated") if self.result("merge")["units"] else None
        told = facts.collect(self.stream, analyzer, self._output())
        pairs = figures.pairs_of(self.result("slay")["groups"], self.result("slay")["pairs"])
        live = self.stream.live_spikes()
        self._arrays = figures.collect(
            analyzer,
            self.analyzer() if pairs else None,
            pairs,
            self.result("merge")["units"],
            self.result("compare")["agreement"],
            self.curated(),
            (live["sample"] - self.stream.first_sample, live["unit"]),
            self.stream.n_samples,
        )
        told["by_hand"] = phy_curated.by_hand(self.folder)
        told["drawn_pairs"] = [(c["a"], c["b"]) for c in self._arrays["ccg"]]
        return [], told

    # what stages share -----------------------------------------------------------------------------------

    def result(self, stage: str) -> dict[str, Any]:
        return dict(self.manifest.stages[stage]["result"])

    def recording(self) -> Any:
        from spiked.offline.si_recording import recording_of

        return recording_of(
            {
                "binary": str(self._binary() or ""),
                "source": reading.source_of(self.stream),
                "fs_hz": self.stream.fs_hz,
                "gain_uv": self.result("export")["gain_uv"],
                "positions_um": self.stream.positions_um.tolist(),
            }
        )

    def analyzer(self) -> Any:
        if self._analyzer is None:
            self._analyzer = analyze.load(self.folder / "analyzer")
        return self._analyzer

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples, units) as the sorter left them, indices into the recording."""
        with np.load(self.folder / "sorted.npz") as z:
            return z["samples"], z["units"]

    def cleaned(self) -> tuple[np.ndarray, np.ndarray]:
        """`sorted` without spikes that a unit was given twice."""
        with np.load(self.folder / "without_echoes.npz") as z:
            return z["samples"], z["units"]

    def curated(self) -> tuple[np.ndarray, np.ndarray]:
        """(samples, units) after labels and merges, indices into the recording."""
        with np.load(self.folder / "units.npz") as z:
            return z["samples"] - self.stream.first_sample, z["units"]

    def kept(self) -> list[int]:
        rows = self.result("labels")["units"]
        return [r["unit"] for r in rows if r["label"] in labels.KEPT or not self.settings.curate]

    def _label(
        self, samples: np.ndarray, units: np.ndarray, shapes: dict[int, dict[str, float]], analyzer: Any
    ) -> list[dict[str, Any]]:
        """Our labels, or the lab's where it has criteria."""
        sorter, wished = self.result("sort"), bounds(self.label_wish.criteria)
        theirs = {int(k): v for k, v in sorter["contamination"].items()}
        rows = labels.label_units(
            samples, units, shapes, {int(k): v for k, v in sorter["ks_label"].items()}, theirs,
            self.stream.n_samples, self.stream.fs_hz, self.stream.n_channels, lab_labels.relaxed(wished),
        )  # fmt: skip
        if wished:
            values = metrics.compute(analyzer, [b.metric for b in wished], self.stream.duration_s)
            rows = lab_labels.relabel(
                rows, {**values, "kilosort_contamination": theirs}, wished, self.label_wish.combine
            )
        return [r.as_dict() for r in rows]

    def _to_phy(self, rows: list[dict[str, Any]]) -> None:
        """The lab's labels into the sorter's Phy folder, or the sorter's own again where there are no criteria."""
        if self.label_wish.criteria:
            phy.save_labels(self._output(), {int(r["unit"]): r["label"] for r in rows})
        else:
            phy.restore_labels(self._output())

    def _say(self, stage: str) -> Callable[[float, str], None]:
        return lambda fraction, text: self.progress.say(stage, fraction, text)

    # the run ---------------------------------------------------------------------------------------------

    def inputs(self, stage: str) -> str:
        """Fingerprint of what a stage's result depends on: a changed file or parameter runs it again."""
        on = [
            *self.stream.fingerprint(),
            self.settings.sorter,
            self.params,
            report.versions(),
            self.stim.model_dump(),
        ]
        if stage in ("labels", "slay", "merge"):
            on += [self.label_wish.model_dump()]
        if stage in ("slay", "merge"):
            on += [self.settings.curate, self.slay_wish.model_dump()]
        if stage in ("library", "phy"):
            on += [getattr(self.settings, stage)]
        return digest(*on)

    def run(self) -> dict[str, Any]:
        """Every stage that is not finished, in order. Raises OfflineError with `kind` and `stage`."""
        name = STAGES[0]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manifest = Manifest(self.folder)
            todo = self._todo()
            for name in STAGES:
                if name not in todo:
                    self.progress.say(name, 1.0, f"{name} was finished before")
                    continue
                self.progress.say(name, 0.0, name)
                started = time.time()
                files, result = getattr(self, name)()
                plain = json.loads(json.dumps(result, default=float))
                self.manifest.finish(name, started, files, plain, self.inputs(name))
        except SpikedError as e:
            if isinstance(e, OfflineError):
                failures.of_exception(e, name)
            raise
        except Exception as e:
            traceback.print_exc(file=sys.stderr)
            raise failures.of_exception(e, name, str(self.folder)) from e
        finally:
            tidy(self.folder, STAGES.index(name) > STAGES.index("sort"))
        return self._written()

    def _written(self) -> dict[str, Any]:
        """The three reports, from what all stages said."""
        data = self.summary()
        md, js, page = (self.session.report(self.stream, suffix) for suffix in ("md", "json", "html"))
        report.write(data, md, js)
        write_page(data, self._arrays, page)
        self._say("report")(1.0, f"report written: {page}")
        return data

    def _todo(self) -> list[str]:
        """The first unfinished stage and all after it, and the export if any of them reads a binary.

        Comparing and reporting take no time and always run: live spikes or a truth may have come since.
        """
        always = STAGES.index("compare")
        done = [self.manifest.finished(s, self.inputs(s)) for s in STAGES[:always]]
        todo = list(STAGES[done.index(False) if False in done else always :])
        self.manifest.forget(tuple(todo))
        if {"sort", "analyze", "slay", "merge"} & set(todo) and "export" not in todo and self._binary():
            todo.append("export")
        return todo

    def summary(self) -> dict[str, Any]:
        """The mapping that becomes report.json; also what `run_offline` returns."""
        s, result = self.stream, self.result
        compared = result("compare")
        truth = compared["truth"]
        merge = {**result("slay"), **result("merge")}
        md, js, page = (self.session.report(s, suffix) for suffix in ("md", "json", "html"))
        for_phy = self._here(result("phy"), "folder", "by_hand")
        return {
            **result("report"),
            "session": self.session.path.resolve().name,
            "stream": s.name,
            "sorter": self.settings.sorter,
            "offline_units": result("sort")["units"],
            "echoes": result("sort")["echoes"],
            "kept_units": len(self.kept()),
            "merged_units": len(merge["units"]),
            "live_units": compared["live_units"],
            "accuracy_offline": _accuracies(truth, "offline"),
            "accuracy_live": _accuracies(truth, "live"),
            "agreement": compared["agreement"],
            "report": str(md),
            "report_json": str(js),
            "report_html": str(page),
            "seconds": self.manifest.seconds(),
            "recording": {
                "file": s.nwb.name,
                "channels": s.n_channels,
                "channel_names": list(s.channel_ids),
                "fs_hz": s.fs_hz,
                "samples": s.n_samples,
                "first_sample": s.first_sample,
                "duration_s": s.duration_s,
                "gaps": len(s.gaps),
                "partial_gaps": len(s.partial),
                "blind_s": s.blind_s,
                "stimuli": result("export").get("stimuli", 0),
                "copied_bytes": result("export")["bytes"],
                "copied_why": result("export")["why"],
            },
            "preflight": result("preflight"),
            "canary": result("canary"),
            "guards": {k: result("sort")[k] for k in ("guards", "batch_size", "out_of_memory")},
            "device": self.device,
            "threads": self.threads,
            "preset": {"name": self.preset.name, "why": self.preset.why},
            "sorter_params": self.params,
            "labels": result("labels"),
            "merge": merge,
            "nwb": result("nwb"),
            "library": result("library"),
            "phy": for_phy,
            "compare": compared,
            "versions": report.versions(),
            "files": {
                "phy": str(self._output()),
                "phy_curated": for_phy["folder"],
                "units": str(self.folder / "units.npz"),
                "analyzer": str(self.folder / "analyzer_curated"),
                "merges": str(self.folder / suggestions.FILE),
            },
        }


def tidy(folder: Path, sorted_: bool = False) -> None:
    """Remove copies of the recording that only the sorter at work needs; of a failed one also what it left half done."""
    canary.clear(folder)
    left = [folder / BINARY, folder / f"{BINARY}.part"]
    if not sorted_:
        left += [folder / "sorter" / "sorter_output" / name for name in ("recording.dat", "temp_wh.dat")]
    for path in left:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _accuracies(truth: dict[str, Any] | None, which: str) -> dict[int, float] | None:
    if truth is None:
        return None
    return {int(unit): row["accuracy"] for unit, row in truth[which]["units"].items()}
