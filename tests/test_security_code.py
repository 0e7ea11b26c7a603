"""What the code itself must not do: nothing that is read can run anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for room in ("daemon", "clients", "models") for p in (ROOT / room).rglob("*.py"))
RUNS_WHAT_IT_READS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "jsonpickle",
}
RUNNING = {
    "joblib.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "pd.read_pickle",
    "pandas.read_pickle",
}
# Why each of these may.
EXCEPTIONS = {
    (
        "daemon/spiked/sort/rtsort_pickle.py",
        "import pickle",
    ): "reads RT-Sort's own files in a process of its own, in which nothing can be run",
    ("daemon/spiked/offline/slay_network.py", "import pickle"): "names the exception that torch.load raises",
    ("models/spiked_models/networks.py", "import pickle"): "names the exception that torch.load raises",
    (
        "daemon/spiked/bench/peer_run.py",
        "import pickle",
    ): "runs the published RT-Sort, whose own files are pickles, in an environment of its own",
}
USES = {
    "daemon/spiked/offline/slay_network.py": {"UnpicklingError"},  # of pickle, and no more
    "models/spiked_models/networks.py": {"UnpicklingError"},
}


def _name(node: ast.AST) -> str:
    """torch.load of a call to it; "" where it is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _name(node.value)
        return f"{head}.{node.attr}" if head else node.attr
    return ""


def _keyword(call: ast.Call, name: str) -> object:
    for k in call.keywords:
        if k.arg == name:
            return k.value.value if isinstance(k.value, ast.Constant) else "computed"
    return None


def offences(text: str) -> Iterator[str]:
    """What in a source text could run what it reads, one word each."""
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (
            f"import {n.partition('.')[0]}" for n in names if n.partition(".")[0] in RUNS_WHAT_IT_READS
        )
        if not isinstance(node, ast.Call):
            continue
        name, last = _name(node.func), _name(node.func).rpartition(".")[2]
        if _keyword(node, "allow_pickle") not in (None, False):
            yield "allow_pickle"
        if name == "torch.load" and _keyword(node, "weights_only") is not True:
            yield "torch.load without weights_only"
        if name in RUNNING or last == "to_pickle":
            yield name
        if _keyword(node, "shell") not in (None, False):
            yield "shell"
        if name == "exec":
            yield "exec"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import cloudpickle.x as y", "def f():\n import dill", "import numpy as np\nnp.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=x)", "torch.load(p)", "torch.load(p, weights_only=False)", "pd.read_pickle(p)", "joblib.load(p)", "yaml.load(p)",
        "subprocess.run(a, shell=True)", "os.system('x')", "exec(text)",
    ],
)  # fmt: skip
def test_an_offence_is_seen(text: str) -> None:
    assert list(offences(text))


def test_what_is_fine_is_not_called_an_offence() -> None:
    assert not list(
        offences(
            "np.load(p)\nnp.load(p, allow_pickle=False)\ntorch.load(p, weights_only=True)\nimport json\nsubprocess.run(a)"
        )
    )


def test_nothing_that_is_read_can_run_anything() -> None:
    assert len(SOURCES) > 150
    found = {
        (str(p.relative_to(ROOT)), what) for p in SOURCES for what in offences(p.read_text(encoding="utf-8"))
    }
    assert found <= set(EXCEPTIONS), f"not excepted: {found - set(EXCEPTIONS)}"
    assert set(EXCEPTIONS) <= found, f"no longer needed: {set(EXCEPTIONS) - found}"


def test_the_excepted_use_no_more_than_they_say() -> None:
    for path, allowed in USES.items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _name(n.value) == "pickle"}
        assert used <= allowed
    # The one reader of pickles is started by its file, isolated; nobody imports what it could do.
    starter = (ROOT / "daemon/spiked/sort/import_rtsort.py").read_text(encoding="utf-8")
    assert '"-I", "-B", rtsort_pickle.__file__' in starter
