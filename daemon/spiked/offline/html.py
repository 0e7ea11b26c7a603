"""Words of HTML: escaped text, tables, tiles. Numbers are written as a person reads them, with their value to sort by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

NARROW = "\u202f"  # a space that does not break


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: Any) -> str:
    """Escaped; '' for None, nan and infinity; numbers with three digits."""
    if isinstance(value, Markup):
        return value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value}"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(text(v) for v in value)
    return escape(str(value))


def percent(share: float | None) -> str:
    """'1.2 %', or '' where it is not known."""
    return "" if share is None else f"{100 * share:.3g}{NARROW}%"


def count(n: int, what: str) -> str:
    """'1 gap', '3 gaps'."""
    return f"{n} {what}{'s' * (n != 1)}"


def _cell(value: Any, kind: str) -> str:
    value_of = f' data-v="{value!r}"' if isinstance(value, float) and math.isfinite(value) else ""
    share = kind == "percent" and isinstance(value, int | float)
    shown = percent(value) if share else text(value)
    css = f' class="{kind}"' if kind in ("text", "text wide") else ""
    return f"<td{css}{value_of}>{shown}</td>"


def table(
    head: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]], sortable: bool = False, tall: bool = False
) -> str:
    """`head` is (title, kind) per column; kinds: number, percent, text, text wide."""
    css = ' class="sortable"' if sortable else ""
    titles = "".join(
        f'<th scope="col"{" class=text" if kind.startswith("text") else ""}>{escape(title)}</th>'
        for title, kind in head
    )
    body = "".join(
        "<tr>" + "".join(_cell(v, kind) for v, (_, kind) in zip(row, head, strict=True)) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll{" tall" if tall else ""}"><table{css}><thead><tr>{titles}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def tiles(facts: Iterable[tuple[Any, str]]) -> str:
    """(figure, what it is) each in a box."""
    boxes = "".join(
        f'<div class="tile"><b>{text(value)}</b><span>{escape(what)}</span></div>' for value, what in facts
    )
    return f'<div class="tiles">{boxes}</div>'


def p(words: Any, css: str = "") -> str:
    return f'<p class="{css}">{text(words)}</p>' if css else f"<p>{text(words)}</p>"


def duration(seconds: float) -> str:
    """'41 s', '12 min 5 s' or '3 h 2 min'."""
    s = round(seconds)
    if s < 100:
        return f"{seconds:.3g} s"
    return f"{s // 60} min {s % 60} s" if s < 6000 else f"{s // 3600} h {s % 3600 // 60} min"
