"""LivePipeline: one plain object, no I/O. clean -> detect -> sort, chunk by chunk, any chunk length.

The live process, the benchmarks and offline RT-Sort all run this one object. The spikes do not depend on how
the stream was cut into chunks: every decision is tied to absolute sample numbers. Which sorter runs follows from the units that
it is given: Sequences are sorted by RT-Sort, behind the network; Templates by template matching, which reads the cleaned
samples itself, while the network only finds the unsorted spikes, after the result is out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spiked.clean.cleaner import Cleaner
from spiked.clean.noise import NoiseTracker
from spiked.clean.stim.cleaner import StimCleaner
from spiked.clean.stim.state import FOUND_DTYPE
from spiked.config import Live, Stim
from spiked.detect.detector import GUARD_MS, Detected, Detector, inference_scaling
from spiked.live.blind import BlindStretches
from spiked.live.handover import Handover
from spiked.sort.assign import ElectrodePeaks, RTSort, warm_up
from spiked.sort.sequences import Sequences
from spiked.stream import Chunk, Flag, StreamInfo
from spiked.templates.early import EarlySorter
from spiked.templates.library import Templates
from spiked.templates.sorter import TemplateSorter
from spiked.templates.sorter import warm_up as warm_up_templates
from spiked_client.protocol import SPIKE
from spiked_models.networks import DetectionNetwork

WARMUP_MS = 250.0  # noise is measured before the network's input scale is fixed
NO_SPIKES = np.zeros(0, SPIKE)

Units = Sequences | Templates


class LiveResult(NamedTuple):
    """What one chunk brought. Spikes and blindness are final up to `decided_until`."""

    first_sample: int
    decided_until: int
    spikes: np.ndarray  # SPIKE records, sorted units
    mua: np.ndarray  # SPIKE records, unit -1; of the chunk before where templates are matched
    blind: np.ndarray  # BLIND records
    stamps: dict[str, int]  # monotonic ns


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


class LivePipeline:
    """Everything between the ring and the publisher for one stream.

    `tap(detected)` is called with every stretch of final logits: calibration collects there. With `reuse` the records of a
    result are overwritten by the next call; what the tap is given always is. In a steady stream no arrays are made.
    """

    def __init__(
        self,
        info: StreamInfo,
        network: DetectionNetwork,
        config: Live,
        units: Units | None = None,
        device: str = "cpu",
        scaling: float | None = None,
        tap: Callable[[Detected], None] | None = None,
        reuse: bool = False,
        stim: Stim | None = None,
    ) -> None:
        self.info, self.network, self.config, self.tap, self._reuse = info, network, config, tap, reuse
        stringent, loose = network.sorting_p or (network.stringent_p, network.loose_p)
        self.stringent, self.loose = logit(config.stringent_p or stringent), logit(config.loose_p or loose)
        self.stim = StimCleaner(info, stim or Stim()) if stim is None or stim.enabled else None
        self.cleaner = Cleaner(info, config.highpass_hz, config.reference)
        self.noise = NoiseTracker(info.n_channels, info.fs_hz)
        self.detector = Detector(
            network, info.n_channels, info.fs_hz, device, config.precision, config.threads
        )
        self.peaks = ElectrodePeaks(
            info.positions, info.fs_hz, logit(config.stringent_p or network.stringent_p), reuse
        )
        self.sorter: RTSort | TemplateSorter | None = None
        self._handover: Handover | None = None
        self._early_from = -1
        self.units: Units | None = None
        self._undetected: tuple[int, np.ndarray, np.ndarray, bool] | None = None
        self._mua_waiting = NO_SPIKES
        self._until: int | None = None
        self._guard = info.samples(GUARD_MS)
        self._gated = False
        self.scaling = scaling
        if scaling is not None:
            self.detector.set_scaling(scaling)
        self._warm_at: int | None = None
        self._missing: list[tuple[int, int, np.ndarray]] = []
        self._blind = BlindStretches(info, reuse)
        if units is not None:
            self.swap(units)

    @property
    def lookahead(self) -> int:
        """Samples from a trough on, its own included, with which its spike is final if no rival is announced."""
        if isinstance(self.sorter, TemplateSorter):
            return self.sorter.lookahead_samples
        return self.detector.lookahead + (self.sorter.lookahead_samples if self.sorter else 0)

    def swap(self, units: Units) -> None:
        """Sort with these units from the next chunk on; no spike is lost or told twice on the way.

        Units of the other sorter begin at once, without what the former one has under way.
        """
        former = self.sorter if self._handover is None else self._handover.former
        self.units = units
        self._gated = False
        self.gate(True)
        self.sorter = None
        if isinstance(units, Templates):
            self.sorter = self._matcher(units) if len(units) else None
        elif len(units):
            self.sorter = RTSort(units, self.info.fs_hz, self.info.n_channels, reuse=self._reuse)
        self._handover = None
        if former is not None and self.sorter is not None and type(former) is type(self.sorter):
            self._handover = Handover(former, self.sorter)

    def _matcher(self, units: Templates) -> TemplateSorter:
        sorter = TemplateSorter(units, self._reuse, device=self.detector.device)
        if self.config.early:
            sorter.early = EarlySorter(sorter, self.detector.device)
        return sorter

    def gate(self, wanted: bool) -> None:
        """Let the units' sentinel, where they have one for this network, say where the network need not run, or stop that."""
        s = self.units if isinstance(self.units, Sequences) else None
        usable = s is not None and self.config.gate and s.network.get("sha256") == self.network.sha256
        if wanted != self._gated:
            self._gated = wanted
            self.detector.watch(s.sentinel if s is not None and usable and wanted else None)

    def mark_missing(self, start: int, stop: int, mask: np.ndarray) -> None:
        """Say that these channels (bool mask) never arrived in [start, stop); before that chunk is processed."""
        self._missing.append((start, stop, mask))

    def mark_stim(self, sample: int, pattern: int = 0) -> None:
        """Say that a stimulus happens at this sample; best before its chunk is processed. `pattern`: its kind."""
        if self.stim is not None:
            self.stim.mark(sample, pattern)

    def stims_found(self) -> np.ndarray:
        """Stimuli settled since the last call: records (sample, pattern, channels, peak_uv, clipped_until), see StimCleaner.found."""
        return np.zeros(0, FOUND_DTYPE) if self.stim is None else self.stim.found()

    def skip(self, start: int, stop: int) -> None:
        """The samples [start, stop) will not be processed: decide what is pending and forget the past."""
        self._blind.note(start, stop, "behind")
        self._undetected = None
        if self.stim is not None:
            self.stim.reset()
        self.cleaner.reset()  # the noise stays known: its tracker counts the hole as samples not seen
        self.detector.reset()
        self.peaks.reset(stop)
        if self.sorter is not None:
            self.sorter.reset(stop)
        if self._handover is not None:
            self._handover.former.reset(stop)

    def process(self, chunk: Chunk) -> LiveResult:
        """Run one chunk of device codes (samples, channels) through every stage."""
        if self._warm_at is None:
            self._warm_at = chunk.first_sample + self.info.samples(WARMUP_MS)
        if self.scaling is None and chunk.first_sample < self._warm_at < chunk.stop:
            k = self._warm_at - chunk.first_sample
            a = self._process(Chunk(chunk.first_sample, chunk.data[:k], chunk.arrival_ns, chunk.flags))
            before = a.spikes.copy(), a.mua.copy(), a.blind.copy()
            b = self._process(Chunk(self._warm_at, chunk.data[k:], chunk.arrival_ns, chunk.flags))
            both = zip(before, (b.spikes, b.mua, b.blind), strict=True)
            spikes, mua, blind = (np.concatenate(pair) for pair in both)
            return LiveResult(a.first_sample, b.decided_until, spikes, mua, blind, b.stamps)
        return self._process(chunk)

    def _process(self, chunk: Chunk) -> LiveResult:
        return self._clean_and_sort(*self._without_artifacts(chunk, self._dead(chunk)))

    def _clean_and_sort(self, first: int, codes: np.ndarray, dead: np.ndarray | None) -> LiveResult:
        mua = self._detect_rest()
        x, valid, all_valid = self.cleaner.process(first, codes, dead)
        self.noise.process(x, None if all_valid else valid, first)
        if isinstance(self.sorter, TemplateSorter) and self.scaling is not None:
            return self._match(first, x, valid, all_valid, mua)
        if self.scaling is None:
            if first >= (self._warm_at or 0):
                self.scaling = inference_scaling(self.network, self.noise.current)
                self.detector.set_scaling(self.scaling)
                self._blind.note(first - self.info.samples(WARMUP_MS), first, "warmup")
            else:
                x[:], valid[:], all_valid = 0.0, False, False
        cleaned = time.monotonic_ns()
        found = self.detector.process(first, x, valid, all_valid)
        detected = time.monotonic_ns()
        spikes, mua, until = self._sort(found)
        if self.tap is not None:
            self.tap(found)
        stamps = {"cleaned": cleaned, "detected": detected, "sorted": time.monotonic_ns()}
        return LiveResult(first, self._not_back(until), spikes, mua, self._blind.find(found), stamps)

    def _match(
        self, first: int, x: np.ndarray, valid: np.ndarray, all_valid: bool, mua: np.ndarray
    ) -> LiveResult:
        """Template matching on the samples as they came; the network has its turn in `prepare`, or with the next chunk."""
        cleaned = time.monotonic_ns()
        h = self._handover
        now = x, None if all_valid else valid, first
        assert isinstance(self.sorter, TemplateSorter)
        spikes, until = self.sorter.process(*now), self.sorter.decided_until
        if h is not None and isinstance(h.former, TemplateSorter):
            spikes, until = h.join(h.former.process(*now), spikes, first)
            self._handover, self._early_from = h if h.open else None, h.at or 0
        self._undetected = first, x, valid, all_valid
        sorted_ns = time.monotonic_ns()
        blind = self._blind.find(Detected(first, x, valid, x, all_valid))
        if len(blind):  # as far as spikes are not trusted
            blind["start"] -= self._guard
            blind["stop"] += self._guard
        stamps = {"cleaned": cleaned, "detected": cleaned, "sorted": sorted_ns}
        return LiveResult(first, self._not_back(until), spikes, mua, blind, stamps)

    def early(self) -> np.ndarray:
        """Early decisions on what was processed last, asked for when the final ones are out: SPIKE records, overwritten by the next chunk.

        Only template matching has them, with `live.early`: RT-Sort's decisions are taken as early as they can be.
        """
        s, h = self.sorter, self._handover
        if not isinstance(s, TemplateSorter) or s.early is None:
            return NO_SPIKES
        found = s.early.found()
        if self._early_from >= 0 and len(found):
            found = found[found["sample"] >= self._early_from]
        if h is not None and isinstance(h.former, TemplateSorter) and h.former.early is not None:
            former = h.former.early.found()
            found = np.concatenate([former[former["sample"] < self._early_from], found])
        return found

    def _not_back(self, until: int) -> int:
        """What was said to be final stays so when a sorter that waits longer takes over."""
        self._until = until if self._until is None else max(self._until, until)
        return self._until

    def _detect_rest(self) -> np.ndarray:
        """Unsorted spikes of the chunk that the network has not seen yet."""
        if self._undetected is None:
            return self._mua_kept()
        found = self.detector.process(*self._undetected)
        self._undetected = None
        if self.tap is not None:
            self.tap(found)
        if found.x.shape[1]:
            valid = None if found.all_valid else found.valid
            self._mua_waiting = self.peaks.process(found.x, found.logits, valid, found.first_sample)
        return self._mua_kept()

    def _mua_kept(self) -> np.ndarray:
        mua, self._mua_waiting = self._mua_waiting, NO_SPIKES
        return mua

    def _sort(self, found: Detected) -> tuple[np.ndarray, np.ndarray, int]:
        end = found.first_sample + found.x.shape[1]
        if found.x.shape[1] == 0:
            return NO_SPIKES, NO_SPIKES, end
        valid = None if found.all_valid else found.valid
        mua = self.peaks.process(found.x, found.logits, valid, found.first_sample)
        if not isinstance(self.sorter, RTSort):
            return NO_SPIKES, mua, end
        now = found.x, found.logits, valid, self.noise, found.first_sample
        spikes, until = self.sorter.process(*now), self.sorter.decided_until
        if (h := self._handover) is not None and isinstance(h.former, RTSort):
            spikes, until = h.join(h.former.process(*now), spikes, found.first_sample)
            self._handover = h if h.open else None
        return spikes, mua, until

    def _without_artifacts(
        self, chunk: Chunk, dead: np.ndarray | None
    ) -> tuple[int, np.ndarray, np.ndarray | None]:
        """What can be decided now: first sample, codes and what is blank. More or fewer samples than came, after a stimulus."""
        if self.stim is None:
            return chunk.first_sample, chunk.data, dead
        first, codes, blank = self.stim.process(chunk.first_sample, chunk.data, dead)
        self._note_cleaned(self.stim.cleaned)
        if blank is not None and blank is not dead:
            self._note_artifacts(first, blank)
        return first, codes, blank

    def _note_cleaned(self, stretches: list[tuple[int, int]]) -> None:
        former = None if self._handover is None else self._handover.former
        for sorter in (self.sorter, former) if stretches else ():
            if isinstance(sorter, RTSort):
                for start, stop in stretches:
                    sorter.note_cleaned(start, stop)

    def _note_artifacts(self, first: int, blank: np.ndarray) -> None:
        if len(at := np.flatnonzero(blank.any(1))):
            self._blind.note(first + int(at[0]), first + int(at[-1]) + 1, "artifact")

    def _dead(self, chunk: Chunk) -> np.ndarray | None:
        if chunk.flags and chunk.flags & Flag.GAP:
            self._blind.note(chunk.first_sample, chunk.stop, "gap")
            return np.ones(chunk.data.shape, bool)
        if self._missing:
            self._missing = [m for m in self._missing if m[1] > chunk.first_sample]
        if all(start >= chunk.stop for start, _, _ in self._missing):
            return None
        dead = np.zeros(chunk.data.shape, bool)
        for start, stop, mask in self._missing:
            a, b = max(start - chunk.first_sample, 0), min(stop - chunk.first_sample, len(dead))
            if b > a:
                dead[a:b] |= mask
                self._blind.note(chunk.first_sample + a, chunk.first_sample + b, "partial")
        return dead

    def warm_up(self) -> None:
        """Compile every kernel now, on a throw-away copy, so that no chunk of the stream pays for it."""
        warm_up()
        warm_up_templates()
        info, n = self.info, self.info.samples(4)
        rng = np.random.default_rng(0)
        stim = None if self.stim is None else self.stim.settings
        copy = LivePipeline(
            info, self.network, self.config, None, self.detector.device, scaling=1.0, stim=stim
        )
        data = (rng.normal(0, 3, (n, info.n_channels)) + info.zero_code).astype(info.dtype)
        pulse = data.copy()
        pulse[n // 2 :] = info.zero_code + 500 if info.code_max is None else info.code_max
        mask = np.zeros(info.n_channels, bool)
        mask[0] = True
        for i in range(20):  # 80 ms: more than a noise block
            flags = {8: Flag.GAP, 10: Flag.PARTIAL}.get(i, Flag.NONE)
            if flags & Flag.PARTIAL:
                copy.mark_missing(i * n, i * n + 5, mask)
            if i == 12:
                copy.mark_stim(i * n + n // 2)
            copy.process(Chunk(i * n, pulse if i == 12 else data, 0, flags))
        copy.flush()

    def prepare(self) -> None:
        """Between chunks, when nobody waits for a result: work ahead. Changes no result."""
        if self._undetected is not None:
            self._mua_waiting = self._detect_rest()
        self.detector.stream.prepare()

    def flush(self) -> np.ndarray:
        """Spikes still undecided at the end of the stream."""
        held = self._flush_held()
        rest = NO_SPIKES if self.sorter is None else self.sorter.flush()
        h = self._handover
        rest = rest if h is None else h.join(h.former.flush(), rest, h.former.decided_until)[0]
        return np.concatenate([held, rest]) if len(held) else rest

    def _flush_held(self) -> np.ndarray:
        """Spikes in what was still held back after a stimulus."""
        if self.stim is None or not self.stim.open:
            return NO_SPIKES
        first, codes, blank = self.stim.flush()
        self._note_cleaned(self.stim.cleaned)
        if blank is not None:
            self._note_artifacts(first, blank)
        found = self._clean_and_sort(first, codes, blank)
        return found.spikes.copy()
