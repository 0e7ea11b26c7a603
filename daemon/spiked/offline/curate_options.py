"""Options of `spiked curate`; light, because the command line reads them at every start."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

EPILOG = """steps, in the order given, are bounds on a metric ("num_spikes >= 30", "isi_violations <= 1 %", "snr >= 5", "waveform_std <= 1",
any quality metric of SpikeInterface) or "merge_duplicates max_distance_um=25 min_similarity=0.9"; without any: spikes, rate, intervals, SNR
and consistency as labs usually ask"""


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def options(c: argparse.ArgumentParser) -> None:
    c.epilog = EPILOG
    c.add_argument("paths", type=_path, nargs="+", metavar="PATH", help="Phy, SortingAnalyzer, SpikeInterface sorting, session, NWB file with units")  # fmt: skip
    how = c.add_mutually_exclusive_group()
    how.add_argument("--step", action="append", metavar="STEP", help="as often as wished; see below")
    how.add_argument(
        "--steps-of", type=_path, metavar="HISTORY", help="the steps of another curation.json, run anew"
    )
    how.add_argument(
        "--replay",
        type=_path,
        metavar="HISTORY",
        help="the very decisions of a curation.json, on the sorting it is of",
    )
    c.add_argument("--recording", type=_path, help="where the sorting does not say which it is")
    c.add_argument(
        "--probe", type=_path, help="probe file (probeinterface JSON), where the recording has no positions"
    )
    c.add_argument("--stream", help="one stream, where there are several")
    c.add_argument("--well", type=int, help="one well of a Maxwell file")
    c.add_argument("--out", type=_path, help="results go to OUT/NAME; default: PATH.curated")
    c.add_argument("--no-phy", action="store_true", help="of a Phy folder: do not write a curated one")
    c.add_argument("--force", action="store_true", help="replace a curation that is there")
    c.add_argument("--json", type=_path, help="write every step's figures here")
