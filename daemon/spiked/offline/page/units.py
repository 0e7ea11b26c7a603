"""The units: one table to sort by any figure, and a card each with footprint and correlogram."""

from __future__ import annotations

from typing import Any

from spiked.offline.html import Markup, escape, p, percent, table
from spiked.offline.report import criteria

HEAD = (
    ("unit", "number"), ("label", "text"), ("spikes", "number"), ("Hz", "number"), ("SNR", "number"), ("peak (µV)", "number"),
    ("ISI < 1.5 ms", "number"), ("contamination", "percent"), ("at most", "percent"), ("presence", "percent"),
    ("cutoff", "percent"), ("live", "number"), ("agreement", "number"), ("library", "number"), ("electrode", "text"),
)  # fmt: skip
EXPLAINED = (
    "Tap a title to sort. Intervals below 1.5 ms, presence and cutoff (the share of spikes too small to be found; it needs 500 spikes) are "
    "SpikeInterface's. Contamination is by refractory violations, echoes of a spike left out; at most so much, with 95 % "
    "confidence, or empty where a unit has too few spikes to tell."
)
UNDETERMINED = (
    " Undetermined units are kept: they have too few spikes for a verdict, or Kilosort doubts them."
)
LIVE = " Live: the unit that followed this one, and their agreement."
LIBRARY = " Library: the id it has in the next session."


def summary_of(d: dict[str, Any]) -> str:
    """The kept units, and those set aside with the reason."""
    live = {q["offline"]: q for q in (d["compare"]["agreement"] or {"pairs": []})["pairs"]}
    rows = [_row(u, d, live.get(u["unit"], {})) for u in d["merge"]["units"]]
    told = p(criteria(d)) if criteria(d) else ""
    unknown = ([] if live else ["live", "agreement"]) + ([] if d["library"]["units"] else ["library"])
    unsure = any(u["label"] == "undetermined" for u in d["merge"]["units"])
    told += p(
        EXPLAINED + UNDETERMINED * unsure + LIVE * bool(live) + LIBRARY * bool(d["library"]["units"]), "soft"
    )
    shown = [k for k, (title, _) in enumerate(HEAD) if title not in unknown]
    cells = [tuple(row[k] for k in shown) for row in rows]
    told += (
        table([HEAD[k] for k in shown], cells, sortable=True, tall=True) if rows else p("No unit was kept.")
    )
    kept = {u["unit"] for u in d["merge"]["units"]} | {o for g in d["merge"]["mapping"].values() for o in g}
    aside = [u for u in d["labels"]["units"] if u["unit"] not in kept]
    if aside:
        head = (
            ("unit", "number"),
            ("label", "text"),
            ("spikes", "number"),
            ("Hz", "number"),
            ("SNR", "number"),
            ("reason", "text wide"),
        )
        told += f"<h3>Set aside ({len(aside)})</h3>"
        told += table(head, [(u["unit"], _label(u["label"]), u["n_spikes"], float(u["rate_hz"]), float(u["snr"]), u["reason"]) for u in aside], sortable=True, tall=True)  # fmt: skip
    return told


def _row(u: dict[str, Any], d: dict[str, Any], pair: dict[str, Any]) -> tuple[Any, ...]:
    q = d["quality"].get(str(u["unit"]), {})
    return (
        Markup(f'<a href="#unit-{u["unit"]}">{u["unit"]}</a>'), _label(u["label"]), u["n_spikes"], float(u["rate_hz"]), float(u["snr"]),
        float(u["peak_uv"]), q.get("isi_violations_count"), float(u["contamination"]), u.get("contamination_most"), q.get("presence_ratio"),
        q.get("amplitude_cutoff"), pair.get("live"), pair.get("agreement"), d["library"]["units"].get(str(u["unit"])), electrode(u, d),
    )  # fmt: skip


def electrode(u: dict[str, Any], d: dict[str, Any]) -> str:
    """The name of a unit's largest electrode, or its number."""
    names = d["recording"].get("channel_names") or []
    return str(names[u["channel"]]) if names else str(u["channel"])


def _label(label: str) -> Markup:
    return Markup(f'<span class="{escape(label)}">{escape(label)}</span>')


def units(d: dict[str, Any]) -> str:
    """A card per kept unit; the browser draws it when it comes into view."""
    rows = d["merge"]["units"]
    if not rows:
        return ""
    names = sorted({u["label"] for u in rows})
    options = "".join(f'<option value="{escape(n)}">{escape(n)}</option>' for n in names)
    choose = (
        f'<p><label>Show <select id="which"><option value="">all</option>{options}</select></label></p>'
        if len(names) > 1
        else ""
    )
    return choose + '<div class="cards">' + "\n".join(_card(u, d) for u in rows) + "</div>"


def _card(u: dict[str, Any], d: dict[str, Any]) -> str:
    made = d["merge"]["mapping"].get(str(u["unit"]))
    share = percent(u["contamination"]) if u["contamination"] < 0.5 else "half or more"
    known = u.get("contamination_most")
    most = f" (at most {percent(known)})" if known is not None else " (too few spikes to be sure)"
    facts = f"{u['n_spikes']} spikes, {u['rate_hz']:.3g} Hz, SNR {u['snr']:.3g}, contamination {share}{most}, electrode {electrode(u, d)} at ({u['x_um']:.0f}, {u['y_um']:.0f}) µm"
    return (
        f'<article class="card" id="unit-{u["unit"]}" data-unit="{u["unit"]}" data-label="{escape(u["label"])}" data-draw="card">'
        f"<h3>Unit {u['unit']} {_label(u['label'])}</h3><p>{escape(facts)}</p>"
        f"<p>{escape(u['reason'])}{escape('; merged from ' + ', '.join(map(str, made))) if made else ''}</p>"
        '<div class="plots"></div></article>'
    )
