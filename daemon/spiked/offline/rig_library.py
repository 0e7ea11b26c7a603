"""The rig's library: the curated units of its latest session, ready to sort the next one live.

One file per stream beside the sessions, library/<stream>.templates.h5, of what `spiked templates` learns. Cells that
the library knew before keep their ids, so a cell has one number from day to day; the report says which.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError, OfflineError, SpikedError
from spiked.offline.session import Session, StreamFiles
from spiked.templates.library import Templates, library_path

RECORDED = "recorded"  # in a library's source: when its session began


def keep_units(session: Session, stream: StreamFiles, say: Callable[[float, str], None]) -> dict[str, Any]:
    """Learn the session's curated units and make them the library of its stream.

    Returns {"file": "" where the library stays as it was, "why", "told": lines, "units": {unit of the report:
    unit of the library}, "known": those that it had before}. A library of a later session is not replaced, and units
    that cannot be learned are no failure of the job: `why` says what happened.
    """
    out = library_path(session.path, stream.name)
    result: dict[str, Any] = {"file": "", "why": "", "told": [], "units": {}, "known": []}
    try:
        previous, why = previous_library(out, stream)
        if previous is not None and _recorded(previous) > began(stream):
            return result | {"why": f"{out} holds a later session's units; they stay"}
        out.parent.mkdir(exist_ok=True)
        templates, told = _learn(session, stream, out, say)
        learned, known = templates.unit_ids.tolist(), np.zeros(0, np.int64)
        if previous is not None:
            from spiked.templates.identity import match_ids

            match = match_ids(previous, templates)
            templates, known = match.templates, match.previous_id[match.previous_id >= 0]
        about = {**templates.source, "session": session.path.name, RECORDED: began(stream).isoformat()}
        templates = replace(templates, source=about)
        templates.save(out)
    except (SpikedError, OSError) as e:
        return result | {"why": str(e)}
    ids = {str(a): int(b) for a, b in zip(learned, templates.unit_ids, strict=True)}
    return result | {"file": str(out), "why": why, "told": told, "units": ids, "known": known.tolist()}


def previous_library(path: Path, stream: StreamFiles) -> tuple[Templates | None, str]:
    """The library there is, or None and why it does not count."""
    if not path.exists():
        return None, ""
    try:
        old = Templates.load(path)
    except ConfigError as e:
        return None, f"the library before cannot be read and is replaced: {e}"
    if old.fs_hz != stream.fs_hz:
        return None, f"the library before was of {old.fs_hz:g} Hz and is replaced"
    return old, ""


def began(stream: StreamFiles) -> datetime:
    """When the session began, from its file. OfflineError where that does not say."""
    with stream.file() as f:
        try:
            text = f["session_start_time"][()]
            return datetime.fromisoformat(text.decode() if isinstance(text, bytes) else str(text))
        except (KeyError, ValueError) as e:
            raise OfflineError(f"{stream.nwb.name} does not say when it was recorded", stage="library") from e


def _recorded(t: Templates) -> datetime:
    return datetime.fromisoformat(t.source.get(RECORDED) or t.created)


def _learn(
    session: Session, stream: StreamFiles, out: Path, say: Callable[[float, str], None]
) -> tuple[Templates, list[str]]:
    from spiked.offline.carry import Wish, carry
    from spiked.sources.formats.recording import Choice

    beside = out.with_name(f".{stream.name}.{os.getpid()}.templates.h5")
    try:
        return carry(session.path, beside, Wish(choice=Choice(stream=stream.name)), say)
    finally:
        beside.unlink(missing_ok=True)
