"""Compiled kernels of an installation that its user may not write, with and without a home."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spiked.compiled import remember

KERNEL = """
from numba import njit

@njit(cache=True)
def twice(x):
    return 2 * x
"""


def installed(folder: Path, home: Path, temporary: Path) -> str:
    """What a kernel of a read-only installation gives, or the last line of why not."""
    import spiked

    package = folder / "spiked"
    package.mkdir()
    for name in ("__init__.py", "compiled.py"):
        shutil.copy(Path(str(spiked.__file__)).parent / name, package)
    (package / "kernel.py").write_text(KERNEL)
    package.chmod(0o555)
    # root may write everywhere, unless it gives that up
    plain = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*plain, sys.executable, "-B", "-c", "import spiked.kernel; print(spiked.kernel.twice(4))"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "HOME": str(home), "TMPDIR": str(temporary)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    package.chmod(0o755)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root, and no setpriv to give that up"
)
@pytest.mark.parametrize("home", ["none", "own"])
def test_a_read_only_installation_starts(tmp_path: Path, home: str) -> None:
    temporary, own = tmp_path / "tmp", tmp_path / "home"
    temporary.mkdir()
    own.mkdir()
    assert installed(tmp_path, own if home == "own" else Path("/proc/none"), temporary) == "8"
    cached = {"none": temporary / f"spiked-numba-{os.getuid()}", "own": own / ".cache/numba"}
    assert list(cached[home].rglob("*.nbi")) and ([*temporary.iterdir()] == []) == (home == "own")


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spiked import compiled

    monkeypatch.setattr(compiled.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(compiled.os, "access", lambda path, mode: False)
    for mode, told in (
        (0o777, {}),
        (0o700, {compiled.VARIABLE: str(tmp_path / f"spiked-numba-{os.getuid()}")}),
    ):
        ours = tmp_path / f"spiked-numba-{os.getuid()}"
        ours.mkdir(exist_ok=True)
        ours.chmod(mode)
        environment: dict[str, str] = {}
        compiled.keep(tmp_path, environment)
        assert environment == told


def test_what_another_package_compiles_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys.py").write_text(
        "import numba\n\n@numba.njit\ndef twice(x):\n    return 2 * x\n\n\ndef plain(x):\n    return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    remember("somebodys", "twice", "plain", "absent")
    somebodys = importlib.import_module("somebodys")
    assert somebodys.twice(21) == 42
    assert [p.name.split("-")[0] for p in tmp_path.rglob("*.nbi")] == ["somebodys.twice"]
    folder = tmp_path / "__pycache__"
    for stored in folder.glob("*.nb*"):
        stored.unlink()
    monkeypatch.setattr("numba.core.caching.FunctionCache.__init__", refuses)
    remember("somebodys", "twice")
    assert somebodys.twice(1.5) == 3.0


def refuses(*_args: object) -> None:
    raise RuntimeError("cannot cache function: no locator available")
