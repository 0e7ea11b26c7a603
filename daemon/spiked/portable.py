"""Small HDF5 files, whole or not there at all.

They are made in memory: where a disk fills up under it, the HDF5 library can neither write nor close a file, and takes the
process down later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spiked.errors import ConfigError


def save(path: Path, what: str, fill: Callable[[Any], None]) -> None:
    """Write what `fill` puts into an open h5py.File; what was at `path` stays until the new one is complete on disk.

    Raises ConfigError, which names `what`, where it cannot be written; nothing is left behind then.
    """
    import h5py

    with h5py.File(path.name, "w", driver="core", backing_store=False) as f:
        fill(f)
        f.flush()
        image = f.id.get_file_image()
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as out:
            out.write(image)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise ConfigError(
            f"cannot write {what} to {path}: {e.strerror}; check the folder and the space left"
        ) from e
