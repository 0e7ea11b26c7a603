"""`spiked report`: what is known of a session's units, in lines, and its page opened in a browser."""

from __future__ import annotations

import contextlib
import json
import webbrowser
from pathlib import Path
from typing import Any

from spiked.errors import ConfigError, SpikedError
from spiked.offline import failed
from spiked.offline.report import origin


def reports(folder: Path) -> list[dict[str, Any]]:
    """The mappings of a folder's report files, one per stream; [] before it was sorted offline."""
    found = []
    for path in sorted(folder.glob("report*.json")):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise ConfigError(f"{path} cannot be read ({e}); `spiked sort {folder}` writes it again") from e
        if "merged_units" in told:  # report.json of several streams only lists them
            found.append(told)
    return found


def pages(folder: Path) -> list[Path]:
    return sorted(folder.glob("report*.html"))


def lines(folder: Path) -> list[str]:
    """What to say of the offline units: their numbers, or why there are none."""
    out = [line for told in reports(folder) for line in _of_stream(told)]
    if out:
        return out + [f"page: {p}" for p in pages(folder)]
    told = failures(folder)
    return [f"offline units: {_why_none(folder)}", *(f"  {line}" for f in told for line in failed.lines(f))]


def failures(folder: Path) -> list[dict[str, Any]]:
    """Why streams were not sorted, where that is what their report says."""
    found = []
    for path in sorted(folder.glob("report*.json")):
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(path.read_text(encoding="utf-8"))
            found += [told["failed"]] if "failed" in told else []
    return found


def _of_stream(d: dict[str, Any]) -> list[str]:
    a = d["compare"]["agreement"]
    took = sum(d["seconds"].values())
    told = f"{d['stream']}: {d['merged_units']} units ({origin(d)}), {took:.0f} s on {d['device']}"
    out = [told]
    if a is not None:
        out.append(
            f"  live: {a['same']} of {d['live_units']} units agree with an offline one, {len(a['missed'])} offline units missed, "
            f"{len(a['invented'])} invented"
        )  # fmt: skip
    r = d["recording"]
    out.append(f"  {r['duration_s']:.1f} s recorded, {r['gaps']} gaps ({r['blind_s']:.2f} s)")
    return out


def _why_none(folder: Path) -> str:
    """From the queue, where the session is in one."""
    from spiked.offline.queue import NAME, Queue

    queue = folder.absolute().parent / NAME
    if queue.is_file():
        try:
            with Queue(queue.parent) as jobs:
                rows = [row for row in jobs.jobs() if row.task.folder.resolve() == folder.resolve()]
        except SpikedError:
            rows = []
        if rows:
            return f"the job is {rows[-1].state}: {rows[-1].text or rows[-1].stage}"
    return f"not sorted yet; `spiked sort {folder}` does it"


def open_pages(folder: Path) -> None:
    """Show them in the browser. ConfigError where there is no page, or no browser."""
    found = pages(folder)
    if not found:
        raise ConfigError(f"{folder} has no report.html; {_why_none(folder)}")
    for page in found:
        if not webbrowser.open(page.absolute().as_uri()):
            raise ConfigError(
                f"there is no browser here; open {page.absolute()} in one, it needs no other file"
            )
