"""The sections of report.html, each a function of report.json's mapping; '' where there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spiked.act.report import PERCENTILES
from spiked.offline.guards import words
from spiked.offline.html import NARROW, Markup, count, duration, escape, p, percent, table, tiles
from spiked.offline.page.units import summary_of, units
from spiked.offline.report import PAIR, SCORES, followed, for_phy, kept, merge_rows, merges_made, origin

Report = dict[str, Any]


def overview(d: Report) -> str:
    r, c, blind = d["recording"], d["compare"], d["blind"]
    facts: list[tuple[Any, str]] = [
        (d["merged_units"], f"units: {origin(d)}"),
        (duration(r["duration_s"]), f"recorded, {r['channels']} channels at {r['fs_hz']:g} Hz"),
        (f"{r['blind_s']:.3g} s", f"lost in {count(r['gaps'], 'gap')} of all channels"),
    ]
    if c["agreement"]:
        facts.append(
            (c["agreement"]["same"], f"of {count(c['live_units'], 'live unit')} agree with an offline one")
        )
    if d["live_latency"] and d["live_latency"].get("latency_ms", {}).get("n"):
        late = d["live_latency"]["latency_ms"]
        facts.append(
            (f"{late['p50']:.2g} ms", f"live latency in the middle, {late['p99']:.2g} ms at 99{NARROW}%")
        )
    if blind["reasons"]:
        first = blind["reasons"].get("uncalibrated", {}).get("share", 0.0)
        before = f", {percent(first)} before its calibration" if first else ""
        facts.append((percent(blind["share"]), f"of the electrodes' time live was blind{before}"))
    if d.get("clock") and d["clock"]["error_ms"]:
        clock = d["clock"]
        facts.append(
            (
                f"{clock['ppm'] or 0:+.2f} ppm",
                f"against {clock['reference']}, known to {clock['error_ms']['median']:.2g} ms",
            )
        )
    if d.get("clock") and d["clock"]["steps"]:
        facts.append((len(d["clock"]["steps"]), "jumps of the clock"))
    if d["stimuli"]:
        facts.append((d["stimuli"]["decisions"], "decisions to stimulate"))
    facts.append((duration(sum(d["seconds"].values())), f"for all stages, on {d['device']}"))
    notes = "".join(p(f"{w}.", "note") for w in d["preflight"]["warnings"])
    return tiles(facts) + notes


def steps(d: Report) -> str:
    merge, library, nwb = d["merge"], d["library"], d["nwb"]
    kept_in = len(library["units"]) if library["file"] else None
    rows = [
        (d["sorter"], None, d["offline_units"], f"as the sorter left them; {d['echoes']} spikes found twice removed"),
        ("labels", d["offline_units"], d["kept_units"], kept(d)),
        ("merges", d["kept_units"], d["merged_units"], f"{merges_made(merge)} by {merge['method']} ({merge['why']})"),
        ("session file", d["merged_units"], None if nwb["why"] else nwb["units"], nwb["why"] or f"written to {nwb['table']}"),
        ("rig's library", d["merged_units"], kept_in, _library(library)),
    ]  # fmt: skip
    head = (("step", "text"), ("units before", "number"), ("after", "number"), ("what", "text wide"))
    told = "".join(p(Markup(f"{escape(said)}: <code>{escape(code)}</code>")) for said, code in for_phy(d))
    return table(head, rows) + told


def _library(library: Report) -> str:
    if not library["file"]:
        return f"not kept: {library['why']}"
    known = (
        f"{len(library['known'])} were known before and keep their ids" if library["known"] else "ids as here"
    )
    return "; ".join(
        [f'for live.templates = "library": {known}', *library["told"][1:], *filter(None, [library["why"]])]
    )


def merged(d: Report) -> str:
    """Every merge and the pairs that came close, with their cross-correlograms."""
    merge = d["merge"]
    if not d["drawn_pairs"] and not merge["pairs"]:
        return ""
    told = p(f"{merges_made(merge)} by {merge['method']}: {merge['why']}.")
    rows = merge_rows(merge)
    if rows:
        head = (
            ("new unit", "number"),
            ("made of", "text"),
            ("spikes found twice", "number"),
            *((name, "number") for _, name in PAIR),
        )
        told += table(head, rows, sortable=True, tall=True)
        told += p(SCORES, "soft")
    scores = {(q["a"], q["b"]): q for q in merge["pairs"]}
    together = [set(g) for g in merge["groups"]]
    boxes = []
    for k, (a, b) in enumerate(d["drawn_pairs"]):
        one = any({a, b} <= g for g in together)
        s = scores.get((a, b)) or scores.get((b, a)) or {}
        score = f", score {s['final_metric']:.2f} (similarity {s['similarity']:.2f})" if s else ""
        verdict = "not merged" if not one else "merged" if merge.get("applied", True) else "to be merged"
        what = f"{a} and {b}: {verdict}{score}"
        flag = ' data-merged="1"' if one else ""
        boxes.append(
            f'<figure data-draw="pair" data-pair="{k}"{flag}><figcaption>{escape(what)}</figcaption></figure>'
        )
    if boxes:
        told += p(
            "Cross-correlograms of merged units (green) and of the candidates with the best scores; the band is the refractory period.",
            "soft",
        )
        told += f'<div class="pairs">{"".join(boxes)}</div>'
    return told


def rasters(d: Report) -> str:
    shown = (
        ("bad", "gap", d["gap_spans"]),
        ("blind", "live blind", d["live_units"] and d["blind"]["spans"]),
        ("unsure", "stimulus", d["stim_marks_s"] or (d["stimuli"] or {}).get("times_s")),
    )
    key = "".join(
        f'<i style="background:var(--{colour})"></i>{what}' for colour, what, there in shown if there
    )
    key = f'<p class="key soft">{key}</p>' if key else ""
    span = f"; 0 to {duration(d['recording']['duration_s'])}"
    offline = _canvas(
        "raster",
        "offline",
        f"offline units by depth, lowest first; the darker, the more spikes for that unit{span}",
    )
    live = _canvas(
        "raster", "live", f"live units, in the same order where they agree with an offline unit{span}"
    )
    return key + offline + (live if d["live_units"] else "")


def _canvas(draw: str, which: str, caption: str) -> str:
    return f'<figure data-draw="{draw}" data-raster="{which}"><canvas role="img" aria-label="{escape(caption)}"></canvas><figcaption>{escape(caption)}</figcaption></figure>'


def live(d: Report) -> str:
    c = d["compare"]
    a = c["agreement"]
    if a is None and not c["live_unsorted"]:
        return ""
    if a is None:
        return p(f"No spikes were sorted live; {c['live_unsorted']} detections were left unsorted.")
    start, stop = c["span_s"]
    told = tiles((
        (a["same"], f"of {count(len(a['offline_ids']), 'offline unit')} followed by one of {count(c['live_units'], 'live unit')}, agreement 0.5 or more"),
        (len(a["partly"]), "offline units followed in part, or together with another"),
        (len(a["missed"]), "offline units that no live unit follows"),
        (len(a["invented"]) - len(c["set_aside"]), "live units that the sorter did not find"),
        (c["live_spikes"], f"spikes sorted live from {start:.1f} to {stop:.1f} s"),
    ))  # fmt: skip
    told += "".join(p(line) for line in followed(c))
    head = (("offline unit", "number"), ("live unit", "number"), ("agreement", "number"), ("lag (ms)", "number"), ("matched", "number"), ("offline spikes", "number"), ("live spikes", "number"))  # fmt: skip
    keys = ("offline", "live", "agreement", "lag_ms", "n_match", "n_offline", "n_live")
    rows = [[_link(q["offline"]) if k == "offline" else q[k] for k in keys] for q in a["pairs"]]
    told += table(head, rows, sortable=True, tall=True)
    told += p(
        f"Agreement: matched / (offline + live − matched), coincidence within {a['window_ms']} ms after the pair's lag. A positive lag: the live spike is later.",
        "soft",
    )
    return told + _canvas(
        "agreement", "", "agreement of every offline unit (rows) with every live unit (columns)"
    )


def _link(unit: int) -> Markup:
    return Markup(f'<a href="#unit-{unit}">{unit}</a>')


def truth(d: Report) -> str:
    t = d["compare"]["truth"]
    if t is None:
        return ""
    names = {"sorter": f"{d['sorter']}, whole recording", "offline": "curated, whole recording", "offline_in_span": "curated, while live units existed", "live": "live, while live units existed"}  # fmt: skip
    if not d["live_units"]:
        names = {k: names[k] for k in ("sorter", "offline")}
    keys = ("accuracy", "recall", "precision", "well", "half", "true_units")
    head = (("sorting", "text"), *((k, "number") for k in ("accuracy", "recall", "precision", "found (0.8)", "found (0.5)", "true units")))  # fmt: skip
    return table(head, [(name, *(t[k]["summary"][key] for key in keys)) for k, name in names.items()]) + p(
        "Means over all true units, unfound ones counting 0; coincidence within 0.4 ms after one lag per sorted unit.", "soft"
    )  # fmt: skip


def stimulation(d: Report) -> str:
    told = ""
    if d["events"]:
        told += p(
            "Events in the session file: " + ", ".join(f"{n} {k}" for k, n in d["events"].items()) + "."
        )
    if not d["stimuli"]:
        return told
    told = p(f"{d['stimuli']['decisions']} decisions to stimulate.") + told
    for rule, r in d["stimuli"]["rules"].items():
        counts = ", ".join(f"{n} {what}" for what, n in sorted(r["outcomes"].items()))
        why = ", ".join(f"{n} {what}" for what, n in sorted(r["reasons"].items()))
        told += f"<h3>{escape(rule)}</h3>" + p(
            f"{counts}{f' (refused: {why})' if why else ''}; seen in the samples: {r['seen']}."
        )
        names = ("n", "mean", *PERCENTILES)
        rows = [(step, *(v.get(k) for k in names)) for step, v in r["intervals_ms"].items() if v["n"]]
        if rows:
            told += table((("interval (ms)", "text"), *((k, "number") for k in names)), rows)
    return told


def losses(d: Report) -> str:
    r, blind = d["recording"], d["blind"]
    told = p(
        f"{count(r['gaps'], 'gap')} of all channels, {r['blind_s']:.3g} s; {r['partial_gaps']} of some channels only. Gaps are zero in the samples, and no unit can have spikes there."
    )
    if d["gap_spans"]:
        rows = [(k + 1, a, b, 1000 * (b - a)) for k, (a, b) in enumerate(d["gap_spans"][:200])]
        told += table(
            (("gap", "text"), ("from (s)", "number"), ("to (s)", "number"), ("long (ms)", "number")),
            rows,
            tall=True,
        )
        if len(d["gap_spans"]) > 200:
            told += p(f"The first 200 of {len(d['gap_spans'])}.", "soft")
    if blind["reasons"]:
        told += p(
            f"Live saw nothing on some channel for {blind['seconds']:.3g} s; over all channels that is {percent(blind['share'])} of the time."
        )
        head = (
            ("reason", "text"),
            ("intervals", "number"),
            ("seconds", "number"),
            ("share of all channels' time", "percent"),
        )
        told += table(
            head, [(k, v["intervals"], v["seconds"], v["share"]) for k, v in blind["reasons"].items()]
        )
    elif d["compare"]["agreement"] or d["compare"]["live_unsorted"]:
        told += p("The live path reported no blind time.", "soft")
    return told


def drift(d: Report) -> str:
    if d["drift"]["why"]:
        return p(f"Drift: {d['drift']['why']}. Each unit's amplitude over the session is in its card.")
    return (
        p(
            f"Kilosort's estimate, one line per block of the probe; at most {d['drift']['range_um']:.3g} µm between extremes."
        )
        + '<figure data-draw="drift"></figure>'
    )


def how(d: Report) -> str:
    changed = ", ".join(f"{k} = {v}" for k, v in d["sorter_params"].items()) or "none"
    told = p(
        f"{d['sorter']} on {d['device']}, preset {d['preset']['name']}: {d['preset']['why']}. Parameters set: {changed}."
    )
    told += "".join(p(said) for said in words.sentences(d))
    stages = table(
        (("stage", "text"), ("seconds", "number")), [(k, float(v)) for k, v in d["seconds"].items()]
    )
    versions = table((("package", "text"), ("version", "text")), list(d["versions"].items()))
    told += f'<div class="side">{stages}{versions}</div>'
    made = [
        ("curated units", d["files"]["units"]),
        ("SortingAnalyzer", d["files"]["analyzer"]),
    ]
    made += (
        [("merges, for SpikeInterface-GUI", d["files"]["merges"])]
        if d["merge"]["groups"] and "merges" in d["files"]
        else []
    )
    made += [("rig's library", d["library"]["file"])] if d["library"]["file"] else []
    return told + "".join(p(Markup(f"{what}: <code>{escape(where)}</code>")) for what, where in made)


SECTIONS: tuple[tuple[str, str, Callable[[Report], str]], ...] = (
    ("overview", "Overview", overview),
    ("steps", "Steps", steps),
    ("units", "Units", summary_of),
    ("cards", "Unit by unit", units),
    ("merges", "Merges", merged),
    ("raster", "Raster", rasters),
    ("live", "Live against offline", live),
    ("truth", "Against the truth", truth),
    ("stimuli", "Stimuli", stimulation),
    ("losses", "Gaps and blind time", losses),
    ("drift", "Drift", drift),
    ("how", "How it was made", how),
)
