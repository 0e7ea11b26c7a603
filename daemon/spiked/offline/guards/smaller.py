"""After running out of memory the sorter is run again in smaller pieces; after any other failure it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spiked.offline.failures import OutOfMemory


@dataclass(frozen=True)
class Piece:
    """The parameter that says how much of the recording is worked on at a time."""

    name: str
    default: int
    least: int
    multiple: int = 1

    def of(self, params: dict[str, Any]) -> int:
        return int(params.get(self.name) or self.default)


PIECES = {
    "kilosort4": Piece("batch_size", 60_000, 7_500),  # a quarter of a second at 30 kHz: less is no whitening
    "kilosort2": Piece("NT", 65_600, 8_192, 32),
    "dartsort": Piece("chunk_length_samples", 30_000, 3_750),
}
DOWNSAMPLING, SUBSET = 20, 25_000  # Kilosort4's own cluster_downsampling and max_cluster_subset


def until_it_fits(
    sorter: str,
    params: dict[str, Any],
    run: Callable[[dict[str, Any]], Any],
    retries: int,
    on_gpu: bool,
    say: Callable[[float, str], None],
) -> list[str]:
    """Call `run` with `params`, made smaller after every OutOfMemory; what was said of each try that failed.

    `params` is changed in place and is what fitted. Raises the last OutOfMemory when no retry is left, and every
    other failure at once.
    """
    tried: list[str] = []
    while True:
        try:
            run(params)
            return tried
        except OutOfMemory as e:
            what = _shrink(sorter, params, e, on_gpu) if len(tried) < retries else None
            if what is None:
                e.evidence = (*e.evidence, *(f"tried: {t}" for t in tried))
                raise
            was, now = what
            tried.append(f"{was}: {e}")
            say(0.0, f"out of memory; again with {now}")


def _shrink(sorter: str, params: dict[str, Any], error: OutOfMemory, on_gpu: bool) -> tuple[str, str] | None:
    """Make the next try smaller: (what it was, what it is), or None when it cannot be.

    Clustering takes memory per spike, not per batch: there fewer spikes at a time help (Kilosort took its default
    of cluster_downsampling = 1 back in 4.1.3 for this reason).
    """
    if on_gpu and sorter == "kilosort4":
        params["clear_cache"] = True
    if sorter == "kilosort4" and error.in_clustering:
        was = int(params.get("cluster_downsampling") or DOWNSAMPLING)
        params["cluster_downsampling"] = 2 * was
        params["max_cluster_subset"] = int(params.get("max_cluster_subset") or SUBSET) // 2
        return f"cluster_downsampling {was}", f"cluster_downsampling {2 * was}"
    piece = PIECES.get(sorter)
    if piece is None:
        return None
    size = piece.of(params)
    half = size // 2 // piece.multiple * piece.multiple
    if half < piece.least:
        return None
    params[piece.name] = half
    return f"{piece.name} {size}", f"batches of {half} samples"
