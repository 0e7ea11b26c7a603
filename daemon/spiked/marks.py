"""Stimuli that somebody tells of: what is believed of them before they reach the recording."""

from __future__ import annotations

import math
from typing import Any

from spiked.errors import SpikedError
from spiked.stream import EventKind, StreamEvent

AHEAD_S = 60.0  # a stimulus may be told so long before it happens
MOST_LINE = (1 << 31) - 1


def checked(request: dict[str, Any]) -> dict[str, Any]:
    """The fields of a mark in a request. Raises SpikedError naming the one that is wrong."""
    sample, line, value, text = (request.get(k) for k in ("sample", "line", "value", "text"))
    out: dict[str, Any] = {}
    if sample is not None:
        if type(sample) is not int:
            raise SpikedError("sample is a whole number, or left out for now")
        out["sample"] = sample
    if line is not None:
        if type(line) is not int or not 0 <= line <= MOST_LINE:
            raise SpikedError(f"line is a whole number from 0 to {MOST_LINE}")
        out["line"] = line
    if value is not None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SpikedError("value is a number")
        out["value"] = float(value)
    if text is not None:
        if not isinstance(text, str):
            raise SpikedError("text is text, of which 96 bytes are kept")
        out["text"] = text[:96]
    return out


def event(fields: dict[str, Any], first: int, newest: int, fs_hz: float) -> StreamEvent:
    """The event for a stream whose recorded samples are [first, newest). Raises SpikedError for a sample outside."""
    fields = checked(fields)
    sample = fields.get("sample", newest)
    if not first <= sample <= newest + AHEAD_S * fs_hz:
        raise SpikedError(
            f"sample {sample} is not in this recording: it has {first} to {newest}, and marks at most {AHEAD_S:g} s ahead"
        )
    return StreamEvent(
        sample, EventKind.STIM, fields.get("line", 0), 1, fields.get("value", 0.0), fields.get("text", "")
    )
