"""The arguments of `spiked templates`; light, since every command's parser reads them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

LAST_S = 300.0


def options(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument(
        "source",
        type=_path,
        help="SortingAnalyzer, Phy or Kilosort folder, session folder, or NWB file with units",
    )
    p.add_argument("--out", type=_path, required=True, help="FILE.templates.h5, for live.templates")
    p.add_argument(
        "--recording", type=_path, help="the recording the units were found in; default: the source's own"
    )
    p.add_argument(
        "--probe", type=_path, help="probe file (probeinterface JSON), where the recording has no positions"
    )
    p.add_argument("--stream", help="which stream, where there are several")
    p.add_argument("--well", type=int, help="which well, where there are several")
    p.add_argument(
        "--units", type=_ids, help="only these, as 3,5,8; default: good ones where units have labels"
    )
    p.add_argument("--label", type=_words, help="only units so labelled, as good or good,mua")
    p.add_argument("--last-s", type=float, default=LAST_S, help="learn from this much of the recording's end")
    p.add_argument(
        "--highpass-hz", type=float, help="as live.highpass_hz; default: what the session used, else 0"
    )
    p.add_argument(
        "--reference",
        choices=("none", "median"),
        help="as live.reference; default: what the session used, else none",
    )
    p.add_argument("--json", type=_path, help="write what was learned here")


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(t) for t in text.replace(" ", "").split(",") if t)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} must look like 3,5,8") from e


def _words(text: str) -> tuple[str, ...]:
    return tuple(t.strip() for t in text.split(",") if t.strip())
