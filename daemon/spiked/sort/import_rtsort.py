"""Sequences from a sorter that RT-Sort's own packages (SpikeLab, braindance) saved as a pickle.

The pickle is read by another process (`rtsort_pickle`) in which it can run nothing. What a pickle does not hold:
electrode positions, which the caller gives; the spread of latencies and amplitudes and the amplitude in microvolt,
which get the values named in NOT_STORED; and probabilities, which are stored only as shares of their sum.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError
from spiked.sort import rtsort_pickle
from spiked.sort.parameters import RTSortParameters
from spiked.sort.sequences import INNER, LOOSE, ROOT, Sequences
from spiked.sort.statistics import AMP_SD_FLOOR, AMP_SD_FRACTION, LAG_SD_FLOOR
from spiked.sources.probe import load_probe, positions_for
from spiked.sources.recordings import open_recording

LARGEST = 2 << 30  # bytes of a pickle
PATIENCE_S = 180.0
SAME_PLACE_UM = 1.0
ANY_SD = 1e6  # float16 overflowed where it was saved: the sorter lets every root amplitude pass
NOT_STORED = (
    f"latency SD ({LAG_SD_FLOOR:g} samples taken), amplitude SD of companions (the larger of {AMP_SD_FLOOR:g} noise SD and "
    f"{AMP_SD_FRACTION:.0%} taken), amplitude in microvolt (0), calibration span (first to last spike taken)"
)


@dataclass(frozen=True)
class Electrodes:
    """The array that the sequences will be used on."""

    channel_ids: tuple[str, ...]
    positions_um: np.ndarray  # (channels, 2)
    fs_hz: float | None = None


def electrodes(positions: Path | None, recording: Path | None) -> Electrodes:
    """From a recording that can be opened (its probe replaced by `positions` if given), or a probe file alone."""
    if recording is not None:
        with open_recording(recording, probe=positions) as rec:
            if not rec.info.geometry_known:
                raise ConfigError(f"{recording} has no electrode positions; give them with --positions")
            return Electrodes(rec.info.channel_ids, rec.info.positions, rec.info.fs_hz)
    if positions is None:
        raise ConfigError(
            "a sorter holds no electrode positions; give --positions FILE or --recording FOLDER"
        )
    wired = load_probe(positions).device_channel_indices
    n = int(wired.max()) + 1 if (wired >= 0).any() else len(wired)
    return Electrodes(tuple(str(c) for c in range(n)), np.array(positions_for(positions, n)))


def read_pickle(data: bytes, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tables, scalars) of a pickled sorter, read in a process of its own; ConfigError says why it was not."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", rtsort_pickle.__file__], input=data, capture_output=True, timeout=PATIENCE_S,
            env={"OPENBLAS_NUM_THREADS": "1"}, cwd="/", check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise ConfigError(f"{name} was not read within {PATIENCE_S:g} s; it is no sorter of RT-Sort") from e
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        own = done.returncode in (rtsort_pickle.REFUSED, rtsort_pickle.BROKEN) and lines
        why = lines[-1] if own else f"reading it ended with exit {done.returncode}: {lines[-1:] or 'no word'}"
        raise ConfigError(f"{name} cannot be imported: {why}")
    with np.load(io.BytesIO(done.stdout), allow_pickle=False) as found:
        tables = {k: found[k] for k in found.files}
    return tables, json.loads(str(tables.pop("scalars")))


def probabilities(
    share: np.ndarray, root: int, loose: np.ndarray, loose_p: float, stringent_p: float, least_p: float
) -> tuple[np.ndarray, float]:
    """Detection probabilities from their shares of the sum (electrodes,), and how far off they may be (a factor).

    Known of the sum: the root is the surest electrode and at least stringent, loose ones reach loose, all reach the
    least that was kept, none exceeds 1. The largest sum that fits is taken: sure roots are near 1.
    """
    seen = share > 0
    lowest = max(least_p / share[seen].min(), stringent_p / share[root])
    if loose.any():
        lowest = max(lowest, loose_p / share[loose & seen].min())
    highest = 1 / share.max()
    return share * highest, highest / min(lowest, highest)


def _parameters(s: dict[str, Any]) -> RTSortParameters:
    khz = s["samp_freq"]
    return RTSortParameters(
        coincidence_ms=s["seq_n_before"] / khz,
        array_noise_min=int(s["min_elecs_for_array_noise"]), array_noise_fraction=0.0,
        min_inner_loose=int(s["min_inner_loose_detections"]),
        max_latency_diff_ms=s["max_latency_diff_spikes"] / khz,
        max_amplitude_diff=s["max_amp_median_diff_spikes"], cleaned_amplitude_diff=s["max_amp_median_diff_spikes"],
        max_root_amplitude_sd=s["max_root_amp_median_std_spikes"], root_amplitude_sd_spike=s["max_root_amp_median_std_spikes"],
        clip_factor=s["clip_latency_diff"] / s["max_latency_diff_spikes"],
        overlap_ms=s["overlap"] / khz,
    )  # fmt: skip


def _placed(name: str, t: dict[str, np.ndarray], s: dict[str, Any], where: Electrodes) -> np.ndarray:
    """Channel of every electrode the sorter knows; ConfigError when the positions are of another array."""
    known, given = int(s["num_elecs"] or 0), len(where.channel_ids)
    ids = s["chan_ids"]
    channel = np.asarray(t["comp_elecs_flattened"], np.int64)
    if ids is not None and given != known and len(ids) == known and max(ids) < given:
        channel = np.asarray(ids, np.int64)[channel]
    elif given != known:
        raise ConfigError(
            f"{name} was made on {known} electrodes, the positions are of {given}; give those of its recording"
        )
    root = channel[t["seqs_root_elecs_rel_comp_elecs"]]
    if "seq_locs" in t:
        off = where.positions_um[root] - t["seq_locs"].reshape(-1, 2)
        off = np.hypot(*(off - np.median(off, axis=0)).T)
        if off.max(initial=0) > SAME_PLACE_UM:
            k = int(off.argmax())
            raise ConfigError(
                f"{name} has a root at {tuple(t['seq_locs'][k].round(1).tolist())} um where the positions say "
                f"{tuple(where.positions_um[root[k]].round(1).tolist())}; give the positions of its recording"
            )
    if where.fs_hz is not None and round(where.fs_hz / 1000) != s["samp_freq"]:
        raise ConfigError(
            f"{name} was made at {s['samp_freq']:g} kHz, the recording has {where.fs_hz:g} Hz; give its own"
        )
    return channel


def _check(name: str, t: dict[str, np.ndarray], s: dict[str, Any]) -> None:
    n, e = len(t["seqs_root_elecs_rel_comp_elecs"]), len(t["comp_elecs_flattened"])
    wide = ("seqs_latencies", "seqs_amps", "seqs_amp_weights", "seqs_inner_loose_elecs", "seqs_loose_elecs")
    per = ("seqs_min_loose_elecs", "seqs_root_amp_means", "seqs_root_amp_stds")
    wrong = [k for k in wide if t[k].shape != (n, e)] + [k for k in per if t[k].shape != (n,)]
    if t["comp_elecs_flattened"].min(initial=0) < 0 or t["comp_elecs_flattened"].max(initial=-1) >= (s["num_elecs"] or 0):  # fmt: skip
        wrong.append("comp_elecs")
    if t["seqs_root_elecs_rel_comp_elecs"].min(initial=0) < 0 or t["seqs_root_elecs_rel_comp_elecs"].max(initial=-1) >= e:  # fmt: skip
        wrong.append("root electrodes")
    if not s["samp_freq"] > 0 or not s["max_latency_diff_spikes"] > 0:
        wrong.append("rate or limits")
    if n == 0 or wrong:
        raise ConfigError(
            f"{name} cannot be imported: {', '.join(wrong) or 'no sequences'} do not fit the rest"
        )


def to_sequences(
    name: str, t: dict[str, np.ndarray], s: dict[str, Any], where: Electrodes, **header: Any
) -> tuple[Sequences, float]:
    """The units, in the order of the pickle, and by what factor probabilities may be too large.

    ConfigError when the tables contradict each other or the electrodes.
    """
    _check(name, t, s)
    channel, p = _placed(name, t, s, where), _parameters(s)
    stringent_p, loose_p = (1 / (1 + np.exp(-s[k])) for k in ("stringent_thresh_logit", "loose_thresh_logit"))
    parts, off = [], 1.0
    for u, root in enumerate(t["seqs_root_elecs_rel_comp_elecs"].tolist()):
        share = t["seqs_amp_weights"][u].astype(np.float64)
        own = np.flatnonzero((share > 0) & (np.arange(len(share)) != root))
        k = np.concatenate([[root], own])
        if not share[root] > 0 or not np.isfinite(share).all():
            raise ConfigError(f"{name} cannot be imported: sequence {u} has weights that make no sense")
        loose, inner = t["seqs_loose_elecs"][u][k], t["seqs_inner_loose_elecs"][u][k]
        prob, factor = probabilities(share[k], 0, loose.astype(bool), loose_p, stringent_p, p.min_prob)
        off = max(off, factor)
        latency = t["seqs_latencies"][u][k].astype(np.float64) - s["seq_n_before"]
        latency[0] = 0
        amp = t["seqs_amps"][u][k].astype(np.float64)
        flags = LOOSE * loose.astype(np.uint8) + INNER * inner.astype(np.uint8)
        flags[0] |= ROOT
        parts.append((channel[k], latency, amp, prob, flags))
    electrode, latency, amp, prob, flags = (np.concatenate(c) for c in zip(*parts, strict=True))
    mean, sd = (t[k].astype(np.float64) for k in ("seqs_root_amp_means", "seqs_root_amp_stds"))
    floor = np.hypot(AMP_SD_FLOOR, AMP_SD_FRACTION * mean)
    amp_sd = np.hypot(AMP_SD_FLOOR, AMP_SD_FRACTION * amp)
    ptr = np.cumsum([0, *(len(part[0]) for part in parts)])
    sd = np.where(np.isposinf(sd), ANY_SD, np.where(sd > 0, sd, floor))
    amp_sd[ptr[:-1]] = sd
    n, fs = len(parts), float(where.fs_hz or 1000 * s["samp_freq"])
    first, last = (round(v * fs / 1000) for v in (t["span_ms"] if len(t["span_ms"]) else (0.0, 0.0)))
    spikes = t["n_spikes"] if len(t["n_spikes"]) == n else np.zeros(n, np.int64)
    sequences = Sequences(
        fs_hz=fs, channel_ids=where.channel_ids, positions_um=where.positions_um, parameters=p,
        stringent_logit=s["stringent_thresh_logit"], loose_logit=s["loose_thresh_logit"], first_sample=first, stop_sample=last + 1,
        unit_ids=np.arange(n), roots=electrode[ptr[:-1]], root_amp_mean=mean, root_amp_sd=sd, root_amplitude_uv=np.zeros(n),
        min_loose=t["seqs_min_loose_elecs"], min_inner=np.full(n, p.min_inner_loose), n_spikes=spikes,
        rate_hz=spikes / max((last - first) / fs, 1.0), ptr=ptr, electrode=electrode, latency=latency,
        latency_sd=np.full(len(latency), LAG_SD_FLOOR), amp=amp, amp_sd=amp_sd, prob=prob, flags=flags, **header,
    )  # fmt: skip
    return sequences, off


def _network(name: str | None, s: dict[str, Any], fs_hz: float) -> dict[str, Any]:
    """Header entries of the network the sorter was made with; its input scale gives this array's own factor."""
    if name is None:
        return {}
    from spiked_models import networks

    try:
        net = networks.load(networks.default_for(fs_hz, False) if name == "auto" else name)
        net.check_rate(fs_hz)
    except networks.NetworkError as e:
        raise ConfigError(str(e)) from e
    scaling = None if s["input_scale"] is None else float(s["input_scale"]) / net.input_scale
    return {"network": {"name": net.name, "sha256": net.sha256}, "inference_scaling": scaling}


def import_rtsort(
    pickle: Path, positions: Path | None = None, recording: Path | None = None, network: str | None = None
) -> tuple[Sequences, list[str]]:
    """Sequences of a pickled sorter, and lines on what it did not hold. ConfigError when it cannot be used."""
    try:
        if pickle.stat().st_size > LARGEST:
            raise ConfigError(f"{pickle} has {pickle.stat().st_size / 1e9:.1f} GB; no sorter is that large")
        data = pickle.read_bytes()
    except OSError as e:
        raise ConfigError(
            f"cannot read {pickle}: {e.strerror}; give the rt_sort.pickle that was saved"
        ) from e
    where = electrodes(positions, recording)
    tables, scalars = read_pickle(data, str(pickle))
    sha256 = hashlib.sha256(data).hexdigest()
    origin = {"file": pickle.name, "sha256": sha256, "class": scalars["class"], "not stored": NOT_STORED}
    header = _network(network, scalars, float(where.fs_hz or 1000 * scalars["samp_freq"]))
    sequences, off = to_sequences(str(pickle), tables, scalars, where, imported_from=origin, **header)
    told = [
        f"not in the pickle: {NOT_STORED}",
        f"probabilities: shares are exact, sizes at most {off:.1f} times too large",
    ]
    if network is None:
        told.append("no network given: the input scale will be measured anew at the start of each session")
    return sequences, told
