"""`spiked report`: what became of every decision to stimulate, and how long each step of it took."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from spiked.act.ledger import read
from spiked.errors import ConfigError
from spiked_client.protocol import OUTCOMES, REASONS

PERCENTILES = {"least": 0, "p5": 5, "median": 50, "p95": 95, "p99": 99, "most": 100}
STEPS = {  # from, to: monotonic ns
    "trigger spike to decision": ("trigger_ns", "decided_ns"),
    "decision to command sent": ("decided_ns", "sent_ns"),
    "command sent to acknowledged": ("sent_ns", "ack_ns"),
    "trigger spike to acknowledged": ("trigger_ns", "ack_ns"),
    "artifact noticed after command": ("sent_ns", "artifact_ns"),
}
SAMPLE_STEPS = {  # from, to: sample numbers, what the tissue saw
    "command sent to artifact": ("sent_sample", "artifact_sample"),
    "trigger spike to artifact": ("sample", "artifact_sample"),
}


def distribution(ms: np.ndarray) -> dict[str, float]:
    """n, mean and percentiles, milliseconds; only n where there are none."""
    if not len(ms):
        return {"n": 0}
    figures = {name: round(float(np.percentile(ms, p)), 3) for name, p in PERCENTILES.items()}
    return {"n": len(ms), "mean": round(float(ms.mean()), 3), **figures}


def intervals(ledger: np.ndarray, fs_hz: float | None) -> dict[str, dict[str, float]]:
    """The distribution of every step over LEDGER records, as far as both of its ends happened; in sample numbers where the rate is known."""
    out = {}
    for name, (a, b) in STEPS.items():
        known = (ledger[a] > 0) & (ledger[b] > 0)
        out[name] = distribution((ledger[b] - ledger[a])[known] / 1e6)
    for name, (a, b) in SAMPLE_STEPS.items() if fs_hz else ():
        spike = ledger["n_triggers"] > 0 if a == "sample" else ledger[a] >= 0
        known = spike & (ledger[b] >= 0)
        out[name] = distribution((ledger[b] - ledger[a])[known] * 1000 / (fs_hz or 1))
    return out


def summary(ledger: np.ndarray, fs_hz: float | None) -> dict[str, Any]:
    """Per rule: outcomes, reasons of refusal, intervals."""
    rules = {}
    for rule in np.unique(ledger["rule"]):
        mine = ledger[ledger["rule"] == rule]
        why = Counter(_word(REASONS, r) for r in mine["reason"].tolist() if r)
        rules[rule.decode("utf-8", "replace") or "clients"] = {
            "outcomes": dict(Counter(_word(OUTCOMES, o) for o in mine["outcome"].tolist())), "reasons": dict(why),
            "seen": int((mine["artifact_sample"] >= 0).sum()), "intervals_ms": intervals(mine, fs_hz),
            **on_early(mine),
        }  # fmt: skip
    return {"decisions": len(ledger), "rules": rules}


def on_early(ledger: np.ndarray) -> dict[str, Any]:
    """What became of the early spikes behind these decisions, as far as they were not refused; nothing where there were none."""
    ledger = ledger[ledger["outcome"] != OUTCOMES.index("refused")]
    n = {
        word: int((ledger["reason"] == REASONS.index(word)).sum())
        for word in ("early", "confirmed", "withdrawn")
    }
    total, known = sum(n.values()), n["confirmed"] + n["withdrawn"]
    if not total:
        return {}
    share = round(n["withdrawn"] / known, 4) if known else None
    unknown = {"unknown": n["early"]} if n["early"] else {}
    told = {"decisions": total, "confirmed": n["confirmed"], "withdrawn": n["withdrawn"], **unknown}
    return {"on_early": {**told, "withdrawn_share": share}}


def _word(words: tuple[str, ...], index: int) -> str:
    """What a number in the ledger stands for; a damaged or a newer file may hold others."""
    return words[index] if 0 <= index < len(words) else f"unknown ({index})"


def of_session(folder: Path, required: bool = True) -> dict[str, Any]:
    """Stream -> summary of its ledger. ConfigError when the folder is no session, where one is `required`."""
    paths = sorted(folder.glob("*.ledger.bin"))
    if required and not paths and not (folder / "session.toml").exists():
        raise ConfigError(f"{folder} is not a session folder; give one")
    return {p.name.removesuffix(".ledger.bin"): summary(read(p), rate_of(folder, p)) for p in paths}


def rate_of(folder: Path, ledger: Path) -> float | None:
    """Sampling rate of the ledger's stream, from its session file, also while that is written; None where there is none."""
    import h5py

    path = folder / ledger.name.replace(".ledger.bin", ".nwb")
    for swmr in (False, True):
        try:
            with h5py.File(path, "r", swmr=swmr) as f:
                return float(f["acquisition/ElectricalSeries/starting_time"].attrs["rate"])
        except (OSError, KeyError):
            continue
    return None


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    out = []
    for stream, told in report.items():
        out.append(f"{stream}: {told['decisions']} decisions to stimulate")
        for rule, r in told["rules"].items():
            counts = ", ".join(f"{n} {what}" for what, n in sorted(r["outcomes"].items()))
            why = ", ".join(f"{n} {what}" for what, n in sorted(r["reasons"].items()))
            out.append(f"  {rule}: {counts}{f' ({why})' if why else ''}; seen in the samples: {r['seen']}")
            if e := r.get("on_early"):
                share = "" if e["withdrawn_share"] is None else f" ({100 * e['withdrawn_share']:.1f} %)"
                said = f"    {e['decisions']} on early spikes: {e['confirmed']} confirmed, {e['withdrawn']} withdrawn{share}"
                out.append(said + (f", {e['unknown']} not known" if "unknown" in e else ""))
            out.append(
                "    " + " ".join([f"{'ms':<31}", f"{'n':>6}", *(f"{p:>8}" for p in ("mean", *PERCENTILES))])
            )
            for name, d in r["intervals_ms"].items():
                if d["n"]:
                    figures = (f"{d[p]:8.2f}" for p in ("mean", *PERCENTILES))
                    out.append("    " + " ".join([f"{name:<31}", f"{d['n']:>6}", *figures]))
    return out or ["no decision to stimulate was taken in this session"]
