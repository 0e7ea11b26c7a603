"""Our live sorters over a recording: the pipeline of the live path, calibrated on a part of it, then run over all of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spiked.config import Live
from spiked.errors import ConfigError, SpikedError
from spiked.live.taken import Taken
from spiked.offline.session import StreamFiles
from spiked.offline.sorters import OUTPUT, Preset, Work, rows_of
from spiked.offline.sorters.annotations import parameter
from spiked.offline.sorters.parameters import FLOAT, LIST, TEXT, Parameter

CHUNK_MS, READ_S = 50.0, 2.0  # the spikes do not depend on the chunks
CALIBRATE_S = 300.0
MIN_CALIBRATE_S = 10.0

HELP = {
    "network": "Detection network: auto, the name of a shipped one (`spiked networks`), or a folder in RT-Sort's published format.",
    "precision": "Of the network's arithmetic; auto: the fastest here.",
    "gate": "Run the network only where a sentinel foresees detections.",
    "highpass_hz": "Causal first-order high-pass for broadband recordings; 0: none.",
    "reference": "Median of all channels is subtracted, or not.",
    "stringent_p": "Probability above which a detection starts a sequence; default: the network's own.",
    "loose_p": "Probability above which an electrode takes part in one; default: the network's own.",
    "templates_from": "Who finds the units whose templates are matched; auto: lupin where SpikeInterface is installed.",
}
FIELDS = ("network", "precision", "gate", "highpass_hz", "reference", "stringent_p", "loose_p")


def parameters(more: tuple[str, ...], units: str) -> tuple[Parameter, ...]:
    """Fields of [live] that shape sorting, and where units come from; `units` is the parameter for saved ones."""
    fields = [(name, Live.model_fields[name]) for name in (*FIELDS, *more)]
    return (
        Parameter("bad_channels", LIST, [], "Names of channels that are left out, besides those that preflight finds dead.", items=TEXT),
        Parameter("probe", TEXT, None, "Probe file (probeinterface JSON) with the electrodes' positions, instead of what the recording says."),
        Parameter("calibrate_s", FLOAT, CALIBRATE_S, "So much of the recording is used to find the units; less where it is shorter.", least=MIN_CALIBRATE_S),
        Parameter("calibrate_from_s", FLOAT, 0.0, "Where that part begins.", least=0.0),
        Parameter(units, TEXT, None, f"A saved .{units}.h5: its units are sorted, nothing is calibrated."),
        *(parameter(name, f.annotation, f.default, HELP[name], f.metadata) for name, f in fields),
    )  # fmt: skip


def choose(name: str, preset: str, device: str) -> Preset:
    if preset != "auto":
        raise ConfigError(f"{name} has no preset {preset!r}; known is auto")
    return Preset("auto", {}, "the network that fits the recording's rate and the computer")


def check(name: str, params: Mapping[str, Any], stream: StreamFiles, units: str) -> None:
    """ConfigError for what does not fit the recording."""
    rows_of(params.get("bad_channels") or [], stream)
    saved = params.get(units)
    if saved and not Path(saved).expanduser().is_file():
        raise ConfigError(f"{name} parameter {units} = {saved!r}: there is no such file")
    start = float(params.get("calibrate_from_s", 0.0))
    if not saved and stream.duration_s - start < MIN_CALIBRATE_S:
        left = max(stream.duration_s - start, 0.0)
        raise ConfigError(
            f"{name} parameter calibrate_from_s = {start:g}: {left:.0f} s are left to calibrate on, at least "
            f"{MIN_CALIBRATE_S:g} are needed"
        )


def tell(fraction: float, text: str) -> None:
    """Progress, as sort.py reads it."""
    sys.stderr.write(f"progress {fraction:.4f} {text}\n")
    sys.stderr.flush()


class Over:
    """A recording through a pipeline, piece by piece, as it would have arrived: gaps as gaps, dead channels as such."""

    def __init__(self, stream: StreamFiles, left_out: list[int]) -> None:
        self.stream = stream
        self._dead = np.zeros(stream.n_channels, bool)
        self._dead[left_out] = True

    def feed(
        self, pipeline: Any, start: int, stop: int, say: Callable[[float, str], None], what: str
    ) -> list[np.ndarray]:
        """Sorted spikes of [start, stop)."""
        from spiked.stream import Chunk, Flag

        s, out = self.stream, []
        if self._dead.any():
            pipeline.mark_missing(start, stop, self._dead)
        for a, b, channels in s.partial:
            if a < stop and b > start:
                pipeline.mark_missing(max(a, start), min(b, stop), channels)
        step, at_once = max(round(CHUNK_MS * s.fs_hz / 1000), 1), round(READ_S * s.fs_hz)
        with s.codes() as data:
            for first in range(start, stop, at_once):
                say((first - start) / (stop - start), f"{what}, {first / s.fs_hz:.0f} s")
                block = np.asarray(data[first : min(first + at_once, stop)])
                for a, b, gap in self._parts(first, first + len(block), step):
                    part = np.ascontiguousarray(block[a - first : b - first])
                    result = pipeline.process(Chunk(a, part, 0, Flag.GAP if gap else Flag.NONE))
                    if len(result.spikes):
                        out.append(result.spikes.copy())
        return out

    def _parts(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int, bool]]:
        """[a, b) of at most `step`, and whether that was lost; cut where gaps begin and end."""
        gaps = self.stream.gaps
        gaps = gaps[(gaps[:, 0] < stop) & (gaps[:, 1] > start)]
        cuts = sorted({start, stop, *np.clip(gaps, start, stop).ravel().tolist()})
        for a, b in pairwise(cuts):
            lost = bool(((gaps[:, 0] <= a) & (gaps[:, 1] >= b)).any())
            for first in range(a, b, step):
                yield first, min(first + step, b), lost


def run(work: Work, matching: bool) -> dict[str, Any]:
    """Calibrate, or take the saved units, then sort all of it. Templates are matched with `matching`, else RT-Sort runs."""
    import torch

    import spiked
    from spiked.live.pipeline import LivePipeline
    from spiked.live.process import load_network
    from spiked.offline import reading
    from spiked.offline.sorters import phy

    torch.set_num_threads(work.threads)
    stream, p = work.stream, work.params
    info = reading.stream_info(stream)
    live = Live(**{k: p[k] for k in FIELDS if k in p}, threads=work.threads, chunk_ms=CHUNK_MS)
    network = load_network(live.network, info.fs_hz, work.device, info.n_channels, work.threads)
    over = Over(stream, work.left_out)
    units, scaling, told = _units(work, info, live, network, over, matching)
    out = work.folder / OUTPUT
    found: list[np.ndarray] = []
    if units is not None and len(units):
        suffix = "templates" if matching else "sequences"
        units.save(work.folder / f"units.{suffix}.h5")
        pipeline = LivePipeline(info, network, live, units, work.device, scaling)
        found = over.feed(pipeline, 0, stream.n_samples, _part(0.45, 1.0), "sorting")
        found.append(pipeline.flush())
    from spiked_client.protocol import SPIKE

    spikes = np.concatenate([np.zeros(0, SPIKE), *found])
    with reading.opened(stream) as codes:
        labels = phy.write(
            out,
            spikes["sample"],
            spikes["unit"],
            codes,
            stream.positions_um,
            stream.fs_hz,
            spikes["amplitude_uv"],
        )
    phy.table(out, "source_unit", labels.tolist())
    return {
        "version": f"spiked {spiked.__version__}",
        "network": network.name,
        "network_sha256": network.sha256,
        **told,
    }


def _part(start: float, stop: float) -> Callable[[float, str], None]:
    return lambda fraction, text: tell(start + fraction * (stop - start), text)


def _units(
    work: Work, info: Any, live: Live, network: Any, over: Over, matching: bool
) -> tuple[Any, float | None, dict[str, Any]]:
    """(Sequences or Templates or None, the network's input scale, what the report says of them)."""
    from spiked.live.pipeline import LivePipeline
    from spiked.sort.sequences import Sequences
    from spiked.templates.library import Templates

    p = work.params
    saved = p.get("templates" if matching else "sequences")
    if saved:
        kind: Any = Templates if matching else Sequences
        units = kind.load(Path(saved).expanduser())
        units.check(info)
        return units, getattr(units, "inference_scaling", None), {"units_from": str(saved)}
    start = round(float(p.get("calibrate_from_s", 0.0)) * info.fs_hz)
    n = min(round(float(p.get("calibrate_s", CALIBRATE_S)) * info.fs_hz), work.stream.n_samples - start)
    taken = Taken(info.n_channels, n, work.folder)
    try:
        pipeline = LivePipeline(info, network, live, device=work.device, tap=taken.add)
        over.feed(pipeline, start, start + n, _part(0.0, 0.25), "calibrating")
        tell(0.25, "looking for units")
        units = _found(work, info, network, pipeline, taken, matching)
    finally:
        taken.close()
    return units, pipeline.scaling, {"calibrated_s": n / info.fs_hz}


def _found(work: Work, info: Any, network: Any, pipeline: Any, taken: Taken, matching: bool) -> Any:
    """Units in what was taken; None where there are none."""
    from spiked.live.choosing import find_templates
    from spiked.sort.calibrate import calibrate

    x, logits = taken.x[:, : taken.filled], taken.logits[:, : taken.filled]
    sequences = calibrate(
        x, logits, None, info.fs_hz, info.positions, None, pipeline.stringent, pipeline.loose, first_sample=taken.first,
        channel_ids=info.channel_ids, network={"name": network.name, "sha256": network.sha256},
        inference_scaling=pipeline.scaling, input_scale=pipeline.detector.scale if pipeline.config.gate else None,
    )  # fmt: skip
    if not matching:
        return sequences
    meta = {
        "templates_from": work.params.get("templates_from", "auto"), "first_sample": taken.first, "network": {"name": network.name},
        "network_from": pipeline.config.network, "scaling": pipeline.scaling,
    }  # fmt: skip
    try:
        return find_templates(x, logits, sequences, info, meta, work.folder, _part(0.3, 0.45))
    except SpikedError as e:
        if "no unit" in str(e):  # nobody fired: not a failure of the computer's
            return None
        raise
