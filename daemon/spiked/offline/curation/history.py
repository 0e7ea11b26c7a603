"""What a curation was made of and what came out, as JSON: enough to have the same units again, and to know when one cannot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from spiked.errors import ConfigError
from spiked.offline.curation.steps import StepResult, Unit

VERSION = 1


def fingerprint(sorting: Any) -> dict[str, Any]:
    """{"units", "spikes", "sha256"} of a sorting's spike trains, whatever the order of its units."""
    seen = hashlib.sha256()
    ids = sorted(sorting.unit_ids, key=str)
    spikes = 0
    for unit in ids:
        train = np.sort(np.asarray(sorting.get_unit_spike_train(unit), np.int64))
        seen.update(f"{unit}:{len(train)};".encode() + train.astype("<i8").tobytes())
        spikes += len(train)
    return {"units": len(ids), "spikes": spikes, "sha256": seen.hexdigest()}


def step_to_json(r: StepResult) -> dict[str, Any]:
    """Units as list entries: JSON knows no other keys than texts, and a unit may be called 7 or "7"."""
    units = list(r.mask)
    return {
        "step": r.step,
        "units": units,
        "metric": [r.metric.get(u) for u in units],
        "mask": [r.mask[u] for u in units],
        "removed": r.removed,
        "unknown": r.unknown,
        "merged": [{"unit": u, "of": parts} for u, parts in r.merged.items()],
        "censor_ms": r.censor_ms,
    }


def step_from_json(d: dict[str, Any]) -> StepResult:
    return StepResult(
        d["step"], dict(zip(d["units"], d["metric"], strict=True)), dict(zip(d["units"], d["mask"], strict=True)), d["removed"],
        d["unknown"], {m["unit"]: m["of"] for m in d["merged"]}, float(d["censor_ms"]),
    )  # fmt: skip


def load(path: Path | str) -> dict[str, Any]:
    """A history, as `Curation.history` made it; ConfigError for anything else."""
    path = Path(path).expanduser()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["spiked_curation"] != VERSION:
            raise ConfigError(
                f"{path} is of version {data['spiked_curation']}, this is {VERSION}; use the spiked that wrote it"
            )
        for step in data["steps"]:
            step_from_json(step)
        data["sorting"]["sha256"], data["result"]["sha256"]
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}; give the curation.json of a curation") from e
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"{path} is no history of a curation ({type(e).__name__}); give its curation.json"
        ) from e
    return dict(data)


def after(sorting: Any, step: StepResult) -> Any:
    """The sorting with a step's merges; units that it set aside are still in it."""
    if not step.merged:
        return sorting
    from spikeinterface.core import apply_merges_to_sorting

    here = {str(u): u for u in sorting.unit_ids}
    groups = [[here[str(u)] for u in parts] for parts in step.merged.values()]
    return apply_merges_to_sorting(sorting, groups, new_unit_ids=list(step.merged), censor_ms=step.censor_ms)


def kept_after(units: list[Unit], steps: list[StepResult]) -> list[Unit]:
    """Which units are left after the steps' verdicts."""
    kept = list(units)
    for step in steps:
        kept = [u for u in kept if step.mask.get(u, True)] + list(step.merged)
    return kept
