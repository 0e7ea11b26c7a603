"""Where compiled kernels are kept when neither the program's folder nor the user's cache can be written.

numba refuses to import a cached kernel then: an installation of root's, used by somebody without a home, would not start.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"


def keep(package: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Name a folder of our own in the system's temporary one to numba, where it has no other for `package`."""
    if environment.get(VARIABLE) or os.access(package, os.W_OK):
        return
    cache = Path(environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "numba"
    if os.access(next(p for p in (cache, *cache.parents) if p.exists()), os.W_OK):
        return
    ours = Path(tempfile.gettempdir()) / f"spiked-numba-{os.getuid()}"
    try:
        ours.mkdir(mode=0o700, exist_ok=True)
        there = ours.lstat()
    except OSError:
        return
    if there.st_uid == os.getuid() and not there.st_mode & 0o077:  # what is loaded from it is run
        environment[VARIABLE] = str(ours)


def remember(module: str, *functions: str) -> None:
    """Have numba keep what it compiles of another package's functions, which that compiles anew in every process.

    A name that the installed version does not have, or a folder that cannot be written, changes nothing.
    """
    there = importlib.import_module(module)
    for name in functions:
        with contextlib.suppress(AttributeError, RuntimeError, OSError):
            getattr(there, name).enable_caching()
