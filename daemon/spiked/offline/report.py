"""report.md and report.json: what ran, what was found, what was set aside and why, how live agrees.

The same with figures is report.html (`spiked.offline.page`).
"""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from spiked.act import report as stimulation
from spiked.offline.guards import words
from spiked.offline.manifest import write_json
from spiked.record.sync import sentence

PACKAGES = ("spiked", "kilosort", "spikeinterface", "slay", "torch", "numpy")


def versions() -> dict[str, str]:
    """Versions of what took part; packages that are not installed are left out."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    return lines + ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return str(value).replace("|", "/")


def write(data: dict[str, Any], md: Path, js: Path) -> None:
    """Both files, each whole or not at all."""
    write_json(js, data)
    temporary = md.with_name(md.name + ".part")
    temporary.write_text(markdown(data), encoding="utf-8")
    temporary.replace(md)


def markdown(d: dict[str, Any]) -> str:
    """The report as Markdown, from the same mapping that becomes report.json."""
    parts = [
        _head(d),
        _funnel(d),
        _truth(d),
        _agreement(d),
        _units(d),
        _merges(d),
        _losses(d),
        _clock(d),
        _stimuli(d),
        _how(d),
    ]
    return "\n\n".join("\n".join(p) for p in parts if p) + "\n"


def _head(d: dict[str, Any]) -> list[str]:
    r = d["recording"]
    what = (
        f"{r['channels']} channels, {r['fs_hz']:g} Hz, {r['duration_s']:.1f} s, "
        f"noise {d['preflight']['noise_uv']:.1f} µV. "
        f"Gaps: {r['gaps']} ({r['blind_s']:.2f} s silenced), on some channels only: {r['partial_gaps']}."
    )
    if r["stimuli"]:
        what += f" The artifacts of {r['stimuli']} stimuli were taken out before sorting."
    lines = [f"# Offline report: {d['session']}, stream {d['stream']}", "", what]
    for warning in d["preflight"]["warnings"]:
        lines += ["", f"**Note:** {warning}."]
    return lines


def _funnel(d: dict[str, Any]) -> list[str]:
    m = d["merge"]
    head = ("step", "units", "what")
    rows = (
        (d["sorter"], d["offline_units"], "as the sorter left them"),
        ("labels", d["kept_units"], f"{d['echoes']} spikes found twice removed; {kept(d)}"),
        ("merges", d["merged_units"], f"{merges_made(m)} by {m['method']} ({m['why']})"),
        (
            "session file",
            None if d["nwb"]["why"] else d["nwb"]["units"],
            d["nwb"]["why"] or f"written to {d['nwb']['table']}",
        ),
        (
            "library",
            len(d["library"]["units"]) if d["library"]["file"] else None,
            d["library"]["why"] or f"kept in `{d['library']['file']}`",
        ),
    )
    told = [line for said, code in for_phy(d) for line in ("", f"{said}: `{code}`.")]
    return ["## Units", "", *table(head, rows), *told]


def for_phy(d: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, the command or the folder) about the folders that Phy opens."""
    told = []
    if d["phy"]["folder"]:
        told.append(
            ("The curated units in Phy", f"phy template-gui {shlex.quote(d['phy']['folder'] + '/params.py')}")
        )
    sorters_own = "The sorter's own clusters" if told else "In Phy"
    told.append((sorters_own, f"phy template-gui {shlex.quote(d['files']['phy'] + '/params.py')}"))
    return told + [("Saved by hand in Phy, and left as it is", folder) for folder in d["by_hand"]]


def kept(d: dict[str, Any]) -> str:
    """What the labels were, and whether they counted."""
    n = d["labels"]["counts"]
    told = f"{n['good']} good, {n['undetermined']} undetermined"
    aside = f"{n['mua']} multi-unit, {n['noise']} noise"
    if n["mua"] + n["noise"] and d["kept_units"] == d["offline_units"]:
        return f"{told}, {aside}; curation is off, and all stay"
    return f"{told} kept; {aside} set aside" if n["mua"] + n["noise"] else f"{told}, all kept"


def origin(d: dict[str, Any]) -> str:
    """Where the units of the report come from: '5 good, 2 undetermined; kilosort4 found 9: 1 set aside, 1 merge'."""
    labels = [u["label"] for u in d["merge"]["units"]]
    told = ", ".join(
        f"{labels.count(k)} {k}" for k in ("good", "undetermined", "mua", "noise") if k in labels
    )
    aside = d["offline_units"] - d.get("kept_units", d["offline_units"])
    what = ([f"{aside} set aside"] if aside else []) + (
        [merges_made(d["merge"]).strip(",")] if d["merge"]["groups"] else []
    )
    found = f"{d['sorter']} found {d['offline_units']}" + (f": {', '.join(what)}" if what else "")
    return f"{told}; {found}" if told else found


def _truth(d: dict[str, Any]) -> list[str]:
    truth = d["compare"]["truth"]
    if truth is None:
        return []
    names = {
        "sorter": f"{d['sorter']}, whole recording",
        "offline": "after curation, whole recording",
        "offline_in_span": "after curation, while live units existed",
        "live": "live, while live units existed",
    }
    if not d["live_units"]:
        names = {k: names[k] for k in ("sorter", "offline")}
    keys = ("accuracy", "recall", "precision", "well", "half", "true_units")
    rows = [(names[k], *(truth[k]["summary"][key] for key in keys)) for k in names]
    lines = ["## Against the simulated truth", ""]
    lines += table(
        ("sorting", "accuracy", "recall", "precision", "found (0.8)", "found (0.5)", "true units"), rows
    )
    lines += [
        "",
        "Means over all true units, unfound ones counting 0. Coincidence within 0.4 ms after one constant",
    ]
    lines += ["lag per sorted unit of at most 0.5 ms; true and sorted units paired one to one.", ""]
    per = [
        (unit, o["n_true"], o["accuracy"], o["recall"], o["precision"], o["unit"], *_live_row(truth, unit))
        for unit, o in truth["offline"]["units"].items()
    ]
    head: tuple[str, ...] = (
        "true unit",
        "spikes",
        "offline accuracy",
        "recall",
        "precision",
        "offline unit",
        "live accuracy",
        "live unit",
    )
    if not d["live_units"]:
        return lines + table(head[:-2], [row[:-2] for row in per])
    return lines + table(head, per)


def _live_row(truth: dict[str, Any], unit: str) -> tuple[Any, Any]:
    row = truth["live"]["units"].get(unit)
    return (row["accuracy"], row["unit"]) if row else (None, None)


def _agreement(d: dict[str, Any]) -> list[str]:
    c = d["compare"]
    a = c["agreement"]
    lines = ["## Live against offline", ""]
    if a is None and not c["live_unsorted"]:
        return []
    if a is None:
        return [*lines, f"No spikes were sorted live; {c['live_unsorted']} detections were left unsorted."]
    start, stop = c["span_s"]
    lines += [f"{c['live_units']} live units, {c['live_spikes']} spikes from {start:.1f} to {stop:.1f} s."]
    lines += [x for line in followed(c) for x in ("", line)] + [""]
    head = ("offline", "live", "agreement", "lag (ms)", "matched", "offline spikes", "live spikes")
    keys = ("offline", "live", "agreement", "lag_ms", "n_match", "n_offline", "n_live")
    lines += table(head, [[p[k] for k in keys] for p in a["pairs"]])
    note = (
        f"Coincidence within {a['window_ms']} ms after the pair's lag; positive lag: the live spike is later."
    )
    return [*lines, "", note]


def followed(c: dict[str, Any]) -> list[str]:
    """Which offline units live followed, which in part, which not at all; and which live units are nobody's."""
    a = c["agreement"]
    told = [
        f"{a['same']} of {len(a['offline_ids'])} offline units are followed by a live unit: agreement 0.5 or more."
    ]
    if a["partly"]:
        told.append(f"In part, or together with another unit: {_cell(a['partly'])}.")
    told.append(f"Missed live: {_cell(a['missed']) or 'none'}.")
    told.append(f"Invented live: {_cell(a['invented']) or 'none'}.")
    if c["set_aside"]:
        which = ", ".join(f"{live} is the sorter's {unit}" for live, unit in c["set_aside"].items())
        told.append(f"Not invented, but not kept by curation: {which}.")
    return told


def merges_made(m: dict[str, Any]) -> str:
    n = len(m["groups"])
    return f"{n} merge{'s' * (n != 1)}" + ("" if m.get("applied", True) else " suggested, none made,")


def criteria(d: dict[str, Any]) -> str:
    """What good means, where the lab says so; ''."""
    told = d["labels"].get("criteria") or []
    if not told:
        return ""
    how = {"replace": "whatever Kilosort says", "and": "and Kilosort agrees", "or": "or Kilosort says so"}
    return f"Good by the lab's criteria: {', '.join(told)}; {how[d['labels']['combine']]}. Kilosort's own labels are kept beside them as .tsv.orig."


def _units(d: dict[str, Any]) -> list[str]:
    head = ("unit", "label", "spikes", "Hz", "µV", "SNR", "channel", "contamination", "at most", "reason")
    keys = (
        "unit",
        "label",
        "n_spikes",
        "rate_hz",
        "peak_uv",
        "snr",
        "channel",
        "contamination",
        "contamination_most",
        "reason",
    )
    lines = ["## Every unit of the sorter", "", *filter(None, [criteria(d)]), *([""] * bool(criteria(d)))]
    lines += table(head, [[u[k] for k in keys] for u in d["labels"]["units"]])
    if d["merge"]["mapping"]:
        lines += ["", "### After the merges", ""]
        lines += table(
            ("unit", "from", *head[1:]), [_merged_row(u, d, keys[1:]) for u in d["merge"]["units"]]
        )
    return lines


def _merged_row(u: dict[str, Any], d: dict[str, Any], keys: tuple[str, ...]) -> list[Any]:
    return [u["unit"], d["merge"]["mapping"].get(str(u["unit"]), ""), *(u[k] for k in keys)]


PAIR = (
    ("a", "unit"), ("b", "unit"), ("similarity", "similarity"), ("ccg_metric", "correlogram"),
    ("refractory_penalty", "refractory penalty"), ("final_metric", "score"), ("distance_um", "distance (µm)"),
)  # fmt: skip


SCORES = (
    "Correlogram: -4 means too few coincidences to tell. Refractory penalty: 1 means as many spikes within the refractory period as two cells "
    "would have, or too few to tell for units that do not look the same."
)


def merge_rows(m: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(new unit, its parts, spikes found twice) and the figures of PAIR, a row for every pair of every merge."""
    new = {tuple(parts): int(u) for u, parts in m["mapping"].items()}
    scores = {frozenset((p["a"], p["b"])): p for p in m["pairs"]}
    rows = []
    for group in m["groups"]:
        unit = new.get(tuple(sorted(group)))
        twice = m.get("twice", {}).get(str(unit))
        for a, b in itertools.combinations(sorted(group), 2):
            p = scores.get(frozenset((a, b)), {})
            rows.append((unit, sorted(group), twice, a, b, *(p.get(key) for key, _ in PAIR[2:])))
    return rows


def _merges(d: dict[str, Any]) -> list[str]:
    m = d["merge"]
    rows = merge_rows(m)
    lines = []
    if rows:
        lines = ["## Merges" if m.get("applied", True) else "## Suggested merges", ""]
        lines += table(("new unit", "of", "spikes found twice", *(name for _, name in PAIR)), rows)
        lines += ["", f"To look at in SpikeInterface-GUI, or to take back: `{d['files'].get('merges', '')}`."]
    others = [p for p in m["pairs"] if not p.get("merged")]
    if not others:
        return lines
    lines += [""] * bool(lines) + ["## Merge candidates", ""]
    lines += table([name for _, name in PAIR], [[p.get(key) for key, _ in PAIR] for p in others[:12]])
    threshold = m["parameters"].get("merge_threshold")
    note = f"Merged above {threshold}. {SCORES}"
    return [*lines, "", note]


def _losses(d: dict[str, Any]) -> list[str]:
    blind = d["blind"]
    if not d["gap_spans"] and not blind["reasons"]:
        return []
    lines = ["## Gaps and blind time", ""]
    for start, stop in d["gap_spans"][:50]:
        lines.append(f"- lost: {start:.3f} to {stop:.3f} s")
    if len(d["gap_spans"]) > 50:
        lines.append(f"- and {len(d['gap_spans']) - 50} more")
    if blind["reasons"]:
        rows = [(k, v["intervals"], v["seconds"], v["share"]) for k, v in blind["reasons"].items()]
        lines += ["", *table(("live blind", "intervals", "seconds", "share of all channels' time"), rows)]
    return lines


def _clock(d: dict[str, Any]) -> list[str]:
    return ["## Clock", "", sentence(d["stream"], d["clock"]).capitalize() + "."] if d.get("clock") else []


def _stimuli(d: dict[str, Any]) -> list[str]:
    if not d["stimuli"]:
        return []
    text = "\n".join(stimulation.lines({d["stream"]: d["stimuli"]}))
    return ["## Stimuli", "", "```", text, "```"]


def _how(d: dict[str, Any]) -> list[str]:
    p = d["preset"]
    changed = ", ".join(f"{k} = {v}" for k, v in d["sorter_params"].items()) or "none"
    lines = [
        "## How it was made",
        "",
        f"{d['sorter']} on {d['device']}, preset {p['name']}: {p['why']}. Parameters set: {changed}.",
        "",
        *(line for said in words.sentences(d) for line in (said, "")),
        ", ".join(f"{k} {v}" for k, v in d["versions"].items()) + ".",
        "",
    ]
    lines += table(("stage", "seconds"), [(k, float(np.round(v, 1))) for k, v in d["seconds"].items()])
    return [
        *lines,
        "",
        f"Curated units: `{d['files']['units']}`. SortingAnalyzer: `{d['files']['analyzer']}`.",
    ]
