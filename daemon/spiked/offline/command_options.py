"""Options of `spiked sort` and `spiked jobs`; light, because the command line reads them at every start."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def sort_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("paths", type=_path, nargs="+", metavar="PATH", help="session folder, or a recording of any format; several: each on its own; a folder of recordings: as one")  # fmt: skip
    c.add_argument("--concatenate", action="store_true", help="sort all of them as one recording; units are split back per recording")  # fmt: skip
    c.add_argument("--out", type=_path, help="results go to OUT/NAME; default: NAME.spiked beside the recording, or into the session")  # fmt: skip
    c.add_argument("--stream", default="", help="one stream, where there are several")
    c.add_argument(
        "--recompute", metavar="STAGE", help="run this stage and all after it again, although finished"
    )
    c.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a job setting or a parameter of the sorter, such as device=cpu or nblocks=0")  # fmt: skip
    c.add_argument("--sorter", help="kilosort4, rt_sort, templates, dartsort or kilosort2; default: the session's own, or kilosort4")  # fmt: skip
    c.add_argument("--preset", help="named parameters of the sorter; `spiked sorters NAME` lists them")
    c.add_argument("--scheduler", help="run on a Dask cluster: tcp://HOST:PORT")
    c.add_argument("--later", action="store_true", help="only queue it; the daemon's next start or `spiked jobs run` does it")  # fmt: skip
    c.add_argument("--json", type=_path, help="write the reports' mapping here")
    about = c.add_argument_group("what the file does not say")
    about.add_argument("--well", type=int, help="one well of a Maxwell file; default: each")
    about.add_argument("--probe", type=_path, help="probe file (probeinterface JSON)")
    about.add_argument("--fs-hz", type=float)
    about.add_argument("--channels", type=int, dest="n_channels")
    about.add_argument("--dtype")
    about.add_argument("--gain-uv", type=float)
    about.add_argument("--zero-code", type=float)


def sorters_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("name", nargs="?", default="", help="one sorter: its presets and parameters")
    c.add_argument("--json", action="store_true", help="print JSON")


def jobs_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("action", nargs="?", default="list", choices=("list", "show", "run", "cancel", "retry"))
    c.add_argument("job", type=int, nargs="*", help="numbers, as `spiked jobs` lists them")
    c.add_argument("--folder", type=_path, default=Path(), help="sessions folder, a session, or a rig's TOML file; default: here")  # fmt: skip
    c.add_argument("--wait", action="store_true", help="run: stay, and sort every session that ends from now on")  # fmt: skip
    c.add_argument("--json", action="store_true", help="print JSON")
