"""Figures as text: a few lines for the terminal, and the rows of docs/benchmarks.md. From a benchmark's JSON alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spiked.bench.figures import head, row

Result = dict[str, Any]


def table(result: Result) -> list[str]:
    """Head and rows of the table that docs/benchmarks.md has for this benchmark."""
    return TABLES[result["bench"]](result)


def summary(result: Result) -> list[str]:
    """What the operator reads at the end; sort and ingest have told theirs already."""
    return SUMMARIES.get(result["bench"], lambda _r: [])(result)


def _sort(r: Result) -> list[str]:
    chunk = r["chunk_compute_ms"]
    return [
        *head("recording", "network", "chunk", "units found", "mean accuracy", "recall", "precision", "at 0.8 or more", "calibration",
              "chunk compute p50 / p99", "real-time factor", "load before"),
        row(f"{r['channels']} el., {r['fs_hz'] / 1000:g} kHz", r["network"], f"{r['chunk_ms']:g} ms", r["units"], r.get("mean_accuracy"),
            r.get("mean_recall"), r.get("mean_precision"), f"{r.get('units_at_0.8')} of {r.get('true_units')}",
            f"{r['calibration_s']} s", f"{chunk['p50']} / {chunk['p99']} ms", r["real_time_factor"], r["machine"]["load_1min"]),
    ]  # fmt: skip


def _ingest(r: Result) -> list[str]:
    cpu = r["cpu_share_of_a_core"]
    return [
        *head("wire", "array", "sent", "recorded", "missing", "acquire", "record", "simulator", "load before"),
        row(r["wire"], f"{r['channels']} x {r['fs_hz'] / 1000:g} kHz", r["samples_sent"], r["samples_recorded"], r["missing"],
            *(f"{cpu.get(name, 0)} core" for name in ("acquire", "record", "simulate")), r["machine"]["load_1min"]),
    ]  # fmt: skip


def _live(r: Result) -> list[str]:
    ms, cpu = r["latency_ms"]["trough_to_receipt"], r["cpu_share_of_a_core"]
    return [
        *head("array", "network", "chunk", "spikes", "mean", "p50", "p95", "p99", "max", "samples skipped", "deadline missed",
              "live", "acquire", "sender late p99", "load before"),
        row(f"{r['channels']} x {r['fs_hz'] / 1000:g} kHz, {r['wire']}", r["network"], f"{r['chunk_ms']:g} ms", ms["n"],
            *(f"{ms[k]} ms" for k in ("mean", "p50", "p95", "p99", "max")), r["skipped_samples"], r["deadline_missed"],
            f"{cpu.get('live', 0)} core", f"{cpu.get('acquire', 0)} core", f"{r['sender']['burst_late_ms']['p99']} ms",
            r["machine"]["load_1min"]),
    ]  # fmt: skip


def _live_summary(r: Result) -> list[str]:
    ms = r["latency_ms"]
    of = ", ".join(
        f"{name.replace('_', ' ')} {ms[name]['mean']}" for name in ms if name != "trough_to_receipt"
    )
    whole = ms["trough_to_receipt"]
    return [
        f"{r['channels']} electrodes, {r['network']}, {r['chunk_ms']:g} ms chunks: {whole['n']} of {r['true_spikes']} true spikes received",
        "trough to receipt: " + ", ".join(f"{k} {whole[k]} ms" for k in ("mean", "p50", "p95", "p99", "max")),
        f"means in ms: {of}; lookahead of network and sorter {r['lookahead_ms']}",
        f"skipped {r['skipped_samples']} samples, {r['deadline_missed']} deadlines missed, sender late p99 {r['sender']['burst_late_ms']['p99']} ms",
        "cores: " + ", ".join(f"{name} {share}" for name, share in r["cpu_share_of_a_core"].items()),
    ]  # fmt: skip


SHARES = ("trough_to_decided", "decided_to_sent", "sent_to_received", "sent_to_acknowledged")
BOOK = (
    "decisions",
    "sent",
    "received",
    "received_but_not_in_it",
    "sent_but_not_received",
    "not_acknowledged",
    "artifact_seen",
)


def _loop(r: Result) -> list[str]:
    ms, cells = r["latency_ms"]["trough_to_received"], r["ledger"]
    return [
        *head("array", "wire, burst", "sorter", "network", "artifacts", "commands", "mean", "p50", "p95", "p99", "max", "without a true spike",
              "not in the ledger", "deadline of the device missed by", "load before"),
        row(f"{r['channels']} x {r['fs_hz'] / 1000:g} kHz", f"{r['wire']}, {r['burst_ms']:g} ms", r["sorter"], r["network"], "yes" if r["artifact"] else "no", ms["n"],
            *(f"{ms[k]} ms" for k in ("mean", "p50", "p95", "p99", "max")), r["without_a_true_spike"], cells["received_but_not_in_it"],
            f"{r['burst_late_ms']['p99']} ms (p99)", r["machine"]["load_1min"]),
    ]  # fmt: skip


def _loop_summary(r: Result) -> list[str]:
    ms, book, late = r["latency_ms"], r["ledger"], r["burst_late_ms"]
    whole, artifacts = ms["trough_to_received"], "on" if r["artifact"] else "off"
    parts = ", ".join(f"{k.replace('_', ' ')} {ms[k]['mean']}" for k in SHARES if k in ms)
    counts = ", ".join(f"{book[k]} {k.replace('_', ' ')}" for k in BOOK)
    return [
        f"{r['channels']} electrodes over {r['wire']}, {r['sorter']}, {r['network']}, artifacts {artifacts}: {r['commands']} commands",
        f"{r['without_a_true_spike']} of them without a true spike; {r['evoked_spikes']} spikes evoked",
        "trough to command received: " + ", ".join(f"{k} {whole[k]} ms" for k in ("mean", "p50", "p95", "p99", "max")),
        f"means in ms: {parts}; lookahead of network and sorter {r['lookahead_ms']}",
        f"ledger: {counts}; {book['outcomes']} {book['reasons']}",
        *_steps(r),
        f"skipped {r['skipped_samples']} samples; a burst was late by at most {late['max']} ms, p99 {late['p99']} ms",
        "cores: " + ", ".join(f"{name} {share}" for name, share in r["cpu_share_of_a_core"].items()),
    ]  # fmt: skip


def _steps(r: Result) -> list[str]:
    """What a client had of both steps of the decisions; nothing where there is one."""
    s = r.get("steps") or {}
    if not s.get("early_spikes"):
        return []
    ms = s["trough_to_client_ms"]
    times = "; ".join(
        f"{k} " + ", ".join(f"{p} {ms[k][p]}" for p in ("mean", "p50", "p99")) for k in ("early", "final")
    )
    told, lost = (
        f"{100 * s['told_early_share']:.1f} % of the final spikes",
        f"{100 * s['withdrawn_share']:.2f} %",
    )
    return [
        f"trough to client in ms: {times}; the early word came {s['lead_ms']['mean']} sooner",
        f"{s['early_spikes']} told early ({told}), {s['withdrawn']} withdrawn ({lost}), {s['withdrawn_near_a_true_spike']} of these near a true spike",
    ]  # fmt: skip


def _outputs(r: Result) -> list[str]:
    rows = [
        row(kind, t["n"], *(f"{t[k]} ms" for k in ("mean", "p50", "p95", "p99", "max")))
        for kind, t in r["round_trip_ms"].items()
    ]
    return [*head("output", "commands", "mean", "p50", "p95", "p99", "max"), *rows]


def _calibrate(r: Result) -> list[str]:
    return [
        *head("recording", "network", "calibrated on", "network pass", "calibration", "together", "per second of recording", "units",
              "most memory", "load before"),
        row(f"{r['channels']} el., {r['fs_hz'] / 1000:g} kHz", r["network"], f"{r['seconds']:g} s", f"{r['pass_s']} s", f"{r['calibration_s']} s",
            f"{r['total_s']} s", f"{r['seconds_per_second']:.3f} s", r["units"], f"{r['peak_rss_gb']} GB", r["machine"]["load_1min"]),
    ]  # fmt: skip


def _calibrate_summary(r: Result) -> list[str]:
    return [
        f"{r['channels']} electrodes, {r['network']}, {r['threads']} thread(s): {r['seconds']:g} s of recording calibrated in {r['total_s']} s",
        f"network pass {r['pass_s']} s ({r['pass_real_time_factor']} x real time), calibration {r['calibration_s']} s",
        f"CPU {r['pass_cpu_s']} s and {r['calibration_cpu_s']} s",
        f"{r['units']} units, most memory {r['peak_rss_gb']} GB",
    ]  # fmt: skip


def _network(r: Result) -> list[str]:
    return [
        *head("network", "MAC per sample and channel", "device", "precision", "channels", "chunk", "compute p50", "p99", "real-time factor", "GMAC/s",
              "load before"),
        *(row(r["network"], r["mac_per_sample_and_channel"], _where(r), x["precision"], x["channels"], f"{x['chunk_ms']:g} ms", f"{x['compute_ms']['p50']} ms",
              f"{x['compute_ms']['p99']} ms", x["real_time_factor"], x["gmac_per_s"], r["machine"]["load_1min"]) for x in r["rows"]),
    ]  # fmt: skip


def _where(r: Result) -> str:
    return r["device"] if r["device"] != "cpu" else f"{r['threads']} core{'s' * (r['threads'] > 1)}"


def _network_summary(r: Result) -> list[str]:
    cost = f"{r['mac_per_sample_and_channel']} MAC per sample and channel"
    return [f"{r['network']}: {cost}, lookahead {r['lookahead_ms']} ms, {_where(r)}, {r['input']}"]


def _sorters(r: Result) -> list[tuple[str, Result]]:
    return [*((f"SpikeLab, {name} limits", x) for name, x in r["peer"].items()), ("spiked", r["ours"])]


SCORES = "recording|sorter|units found|mean accuracy|recall|precision|at 0.8 or more|calibration, wall|CPU|load before"
SPEEDS = "recording|cores|chunk of|compute p50|p99|CPU|real-time factor"


def _peer(r: Result) -> list[str]:
    array = f"{r['channels']} el., {r['fs_hz'] / 1000:g} kHz"
    scores = [
        row(array, name, x["units"], x["mean_accuracy"], x["mean_recall"], x["mean_precision"], f"{x['units_at_0.8']} of {x['true_units']}",
            f"{x['calibration_wall_s']} s", f"{x['calibration_cpu_s']} s", r["machine"]["load_1min"])
        for name, x in _sorters(r)
    ]  # fmt: skip
    speeds = [
        row(array, s["threads"], f"{name}: {x['chunk_ms']:.3g} ms", f"{x['compute_ms']['p50']} ms", f"{x['compute_ms']['p99']} ms",
            f"{x['cpu_ms']} ms", x["real_time_factor"])
        for s in r["speed"] for name, x in s.items() if name.startswith(("peer", "ours"))
    ]  # fmt: skip
    return [*head(*SCORES.split("|")), *scores, "", *head(*SPEEDS.split("|")), *speeds]


def _peer_summary(r: Result) -> list[str]:
    found = [
        f"{name}: {x['units']} units, mean accuracy {x['mean_accuracy']:.3f}, {x['units_at_0.8']} of {x['true_units']} at 0.8 or more, "
        f"calibration {x['calibration_wall_s']} s wall, {x['calibration_cpu_s']} s CPU"
        for name, x in _sorters(r)
    ]
    speed = [
        f"{s['threads']} thread(s), the peer's chunk: ours {s['ours, the same chunk']['real_time_factor']} x real time, {s['ratio_same_chunk']} times "
        f"the peer (by p50 {s['ratio_same_chunk_p50']}, by CPU {s['ratio_same_chunk_cpu']}); 1 ms chunks: {s['ours, 1 ms']['real_time_factor']} x"
        for s in r["speed"]
    ]
    return [*found, *speed, f"the peer's network pass: {r['peer_network_pass']}"]


def _merges(r: Result) -> list[str]:
    what = f"{r['recording']}, {r['channels']} el., {r['fs_hz'] / 1000:g} kHz, {r['seconds']:g} s"
    return [
        *head("recording", "sorting", "method", "splits undone", "wrong pairs merged", "units", "mean accuracy", "at 0.8 or more", "wall", "CPU",
              "load before"),
        row(what, r["sorting"], "none", f"0 of {r['splits']}", 0, r["units"], r["before"]["accuracy"], f"{r['before']['well']} of {r['neurons']}",
            None, None, r["machine"]["load_1min"]),
        *(row(what, r["sorting"], x["method"], f"{x['undone']} of {r['splits']}", len(x["wrong"]), x["units"], x["accuracy"],
              f"{x['well']} of {r['neurons']}", f"{x['seconds']} s", f"{x['cpu_s']} s", r["machine"]["load_1min"]) for x in r["rows"]),
    ]  # fmt: skip


def _offline(r: Result) -> list[str]:
    one = r["turns"][0]
    cells = (
        f"{r['channels']} x {r['fs_hz'] / 1000:g} kHz, {r['seconds']:g} s",
        r["preset"],
        r["device"],
        r["threads"],
    )
    disk = {name: f"{b / 1e6:.0f} MB" for name, b in r["disk_bytes"].items()}
    return [
        *head("recording", "preset", "device", "threads", "way", "wall, median", "CPU, median", "units", "spikes", "disk at most", "load before"),
        row(*cells, "directly", f"{r['wall_s']['direct']} s", f"{r['cpu_s']['direct']} s", one["direct"]["units"], one["direct"]["spikes"], disk["direct"], one["load_before"]),
        row(*cells, "spiked", f"{r['wall_s']['spiked']} s", f"{r['cpu_s']['spiked']} s", one["spiked"]["units"], one["spiked"]["spikes"], disk["spiked"], one["load_before"]),
    ]  # fmt: skip


def _offline_summary(r: Result) -> list[str]:
    each = ", ".join(f"{o:+.1%}" for o in r["overhead_each"])
    return [
        f"overhead {r['overhead']:+.1%} of wall time, median of {len(r['turns'])} turns ({each}); {r['overhead_cpu']:+.1%} of CPU time",
        f"{'the same spikes' if r['same_spikes'] else 'NOT the same spikes'} in the same units, to the sample",
        (f"the recording is {r['raw_bytes'] / 1e6:.0f} MB as int16; no more than {r['disk_bytes']['spiked'] / 1e6:.0f} MB was written at any time, "
        f"{r['disk_bytes']['direct'] / 1e6:.0f} MB directly, beside the binary that it reads"),
    ]  # fmt: skip


def _subscribers(r: Result) -> list[str]:
    a, b, change = r["alone_ms"], r["crowd_ms"], r["p99_change_per_turn"]
    return [
        *head("array", "clients", "encrypted", "turns", "live p50 / p99 alone", "with the crowd", "p99 changes by, per turn", "of it after the newest sample: p99 alone / with",
              "received p99 alone / with", "killed", "healthy lost", "stalled: got back / told gone / not told", "device at most behind", "load before"),
        row(f"{r['electrodes']} el., {r['sorter']}, {r['units']} units", r["clients"], "CURVE" if r["curve"] else "no", f"{r['turns']} x {r['seconds']:g} s",
            f"{a['live']['p50']} / {a['live']['p99']} ms", f"{b['live']['p50']} / {b['live']['p99']} ms", ", ".join(f"{100 * c:+.1f} %" for c in change["live"]),
            f"{a['published']['p99']} / {b['published']['p99']} ms", f"{a['received']['p99']} / {b['received']['p99']} ms", r["killed"], r["healthy_lost"],
            f"{r['stalled_replayed']} / {r['stalled_missed']} / {r['stalled_untold']}", f"{r['device']['most_behind_ms']} ms", r["machine"]["load_1min"]),
    ]  # fmt: skip


def _subscribers_summary(r: Result) -> list[str]:
    told = {
        "live": "trough's arrival to publication",
        "published": "newest sample's arrival to publication",
        "received": "newest sample's arrival to a client",
    }
    lines = [
        f"{text}: p50 {r['alone_ms'][k]['p50']} ms, p99 {r['alone_ms'][k]['p99']} ms alone; p50 {r['crowd_ms'][k]['p50']} ms, p99 {r['crowd_ms'][k]['p99']} ms with "
        f"{r['clients']} clients; p99 per turn {', '.join(f'{100 * c:+.1f} %' for c in r['p99_change_per_turn'][k])}"
        for k, text in told.items()
    ]  # fmt: skip
    return [
        *lines,
        f"{r['killed']} clients killed; healthy ones lost {r['healthy_lost']} batches, {r['healthy_replayed']} came by replay",
        f"the stalled client got {r['stalled_replayed']} batches back, was told that {r['stalled_missed']} are gone, and {r['stalled_untold']} it was not told of",
    ]  # fmt: skip


def _fuzz(r: Result) -> list[str]:
    slowest = max(d["slowest_ms"] for d in r["decoders"].values())
    return [
        *head("decoders", "messages", "refused", "taken", "findings", "slowest message", "processes", "wall time", "memory of a process"),
        row(len(r["decoders"]), r["messages"], r["refused"], r["messages"] - r["refused"], r["findings"], f"{slowest} ms", r["processes"],
            f"{r['wall_s']} s", f"{r['peak_mb']} MB"),
    ]  # fmt: skip


def _fuzz_summary(r: Result) -> list[str]:
    return [
        *(f"{name}: {d['messages']} messages, {d['refused']} refused, {d['us_each']} us each, slowest {d['slowest_ms']} ms" for name, d in r["decoders"].items()),
        f"{r['messages']} messages over {len(r['decoders'])} decoders in {r['wall_s']} s: {r['findings']} findings",
        *r["found"],
    ]  # fmt: skip


def _web(r: Result) -> list[str]:
    rows = [
        row(f"{r['units']} units, {r['channels']} el., {r['rate_hz']:g} Hz each", f"by {mode}", r["pages"], f"{m['frames_per_s']:g}", f"{m['p50_ms']} / {m['p99_ms']} ms",
            f"{m['painted_per_s']:.0f}", m["dropped"], f"{m['server_core']} core, {m['server_mb']:.0f} MB", r["machine"]["load_1min"])
        for mode, m in r["rows"].items()
    ]  # fmt: skip
    return [
        *head(
            "array",
            "rows",
            "pages open",
            "frames/s",
            "work per frame p50 / p99",
            "spikes painted/s",
            "dropped",
            "page's server",
            "load before",
        ),
        *rows,
    ]


def _clocks(r: Result) -> list[str]:
    jumps = next(iter(r["jumps"].values()))
    offsets = [
        row(
            name, *(f[k] for k in ("median_ms", "p99_ms", "max_ms", "table_max_ms", "told_ms", "false_jumps"))
        )
        for name, f in r["offset"].items()
    ]
    told = [
        row(
            name, *(f"{j['longest_s']} s" if j["n"] == j["of"] else f"{j['n']} of {j['of']} told" for j in js)
        )
        for name, js in r["jumps"].items()
    ]
    return [
        *head("method", "median ms", "p99 ms", "max ms", "max ms in the file", "error told, ms", "false jumps"),
        *offsets, "",
        *head("a jump told after at most", *(f"{j['jump_ms']:g} ms" for j in jumps)),
        *told,
    ]  # fmt: skip


TABLES: dict[str, Callable[[Result], list[str]]] = {
    "sort": _sort, "ingest": _ingest, "live": _live, "calibrate": _calibrate, "network": _network, "peer": _peer,
    "loop": _loop, "outputs": _outputs, "merges": _merges, "offline": _offline, "fuzz": _fuzz, "subscribers": _subscribers,
    "clocks": _clocks, "web": _web,
}  # fmt: skip
SUMMARIES: dict[str, Callable[[Result], list[str]]] = {
    "live": _live_summary, "calibrate": _calibrate_summary, "network": _network_summary, "peer": _peer_summary,
    "loop": _loop_summary, "offline": _offline_summary, "fuzz": _fuzz_summary, "subscribers": _subscribers_summary,
}  # fmt: skip
