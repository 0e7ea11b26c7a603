"""The report of a job that failed: report.md, .json and .html say why in place of units, failure.json beside the stages.

A report of an earlier run that did find units is left as it is; `spiked jobs show` and failure.json tell of the new failure.
"""

from __future__ import annotations

import contextlib
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from spiked.offline.html import escape
from spiked.offline.manifest import Manifest, write_json
from spiked.offline.session import Session, StreamFiles

NAME = "failure.json"


def lines(failure: dict[str, Any]) -> list[str]:
    """What `failures.told` says, for the terminal."""
    head = (
        f"{failure['class']} ({failure['policy']}): {failure['name']}, in stage {failure['stage'] or 'start'}"
    )
    out = [f"class: {head}", f"what: {failure['what']}"]
    out += [f"to do: {failure['remedy']}"] if failure["remedy"] else []
    return out + [f"evidence: {line}" for line in failure["evidence"]]


def write(session: Session, stream: StreamFiles, sorter: str, failure: dict[str, Any]) -> None:
    """All of it, as far as the disk allows: the failure may be that it does not."""
    folder = session.folder(stream, sorter)
    data = {
        "session": session.path.resolve().name,
        "stream": stream.name,
        "sorter": sorter,
        "failed": failure,
        "at": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "seconds": Manifest(folder).seconds(),
        "recording": {
            "file": stream.nwb.name,
            "channels": stream.n_channels,
            "duration_s": stream.duration_s,
        },
    }
    with contextlib.suppress(OSError):
        write_json(folder / NAME, data)
        md, js, page = (session.report(stream, suffix) for suffix in ("md", "json", "html"))
        if _has_units(js):
            return
        write_json(js, data)
        _whole(md, _markdown(data))
        _whole(page, _page(data))


def clear(session: Session, stream: StreamFiles, sorter: str) -> None:
    """It did not fail this time."""
    with contextlib.suppress(OSError):
        (session.folder(stream, sorter) / NAME).unlink(missing_ok=True)


def _has_units(report: Path) -> bool:
    try:
        return "merged_units" in json.loads(report.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _said(data: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    f, r = data["failed"], data["recording"]
    done = ", ".join(f"{k} ({v:.0f} s)" for k, v in data["seconds"].items()) or "none"
    rows = [
        ("what happened", f["what"]),
        ("what to do", f["remedy"]),
        ("class", f"{f['class']}: {f['policy']}"),
        ("stage", f["stage"]),
        ("failure", f["name"]),
        *(("evidence", line) for line in f["evidence"]),
        ("stages finished before", done),
        ("recording", f"{r['file']}, {r['channels']} channels, {r['duration_s']:.1f} s; it is untouched"),
        ("when", data["at"]),
    ]
    return f"{data['session']}, stream {data['stream']}: not sorted", [row for row in rows if row[1]]


def _markdown(data: dict[str, Any]) -> str:
    title, rows = _said(data)
    return f"# {title}\n\n" + "".join(f"- **{name}**: {text}\n" for name, text in rows)


def _page(data: dict[str, Any]) -> str:
    title, rows = _said(data)
    css = (files("spiked.offline.page") / "report.css").read_text(encoding="utf-8")
    body = "".join(
        f'<tr><td class="text">{escape(n)}</td><td class="text wide">{escape(t)}</td></tr>' for n, t in rows
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n'
        f"<main>\n<h1>{escape(title)}</h1>\n<table>{body}</table>\n</main>\n</body>\n</html>\n"
    )
