"""The peer's own virtual environment: made once, then kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from spiked.errors import SpikedError

PEER = "spikelab==0.1.2"
NEEDS = ("spikeinterface>=0.104,<0.105", "diptest", "scikit-learn", "scipy", "h5py", "tqdm", "pandas", "natsort", "six", "psutil", "threadpoolctl")  # fmt: skip


def default_folder() -> Path:
    """Where the environment for our version of torch is kept."""
    return Path.home() / ".cache" / "spiked" / "peer" / f"spikelab-0.1.2-torch-{version('torch')}"


def _run(what: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise SpikedError(
            f"{what} failed: {last}; check the network, or give --env a folder that has the peer"
        )


def python(folder: Path | None, say: Callable[[str], None]) -> Path:
    """The peer's interpreter; the environment is made where there is none. An environment given by hand is left as it is."""
    given, folder = folder is not None, folder or default_folder()
    found = folder / "bin" / "python"
    if found.exists() and (given or (folder / ".ready").exists()):
        return found
    say(f"making the peer's environment in {folder}: {PEER} and torch {version('torch')}; some minutes, once")
    _run("making a virtual environment", [sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(found), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = f"torch=={version('torch')}"
    build = version("torch").partition("+")[2]
    try:
        _run("installing torch", [*pip, torch])
    except SpikedError:
        if not build:
            raise
        _run(
            "installing torch",
            [*pip, "--extra-index-url", f"https://download.pytorch.org/whl/{build}", torch],
        )
    _run(f"installing {PEER}", [*pip, torch, PEER, *NEEDS])
    (folder / ".ready").touch()
    return found
