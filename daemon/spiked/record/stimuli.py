"""The stimulus ledger as a table of the session file: stimulus/presentation/stimuli."""

from __future__ import annotations

from typing import Any

import numpy as np

from spiked.stream import StreamInfo
from spiked_client.protocol import OUTCOMES, REASONS

COLUMNS = {
    "sample": "Sample number of the spike that completed the rule, or at which a client asked",
    "sent_sample": "Sample number at which the command was sent; -1: it was not",
    "artifact_sample": "Sample number at which the stimulus was seen; -1: it was not",
    "trigger_ns": "When that spike's sample was taken, monotonic ns; 0: no spike",
    "decided_ns": "When it was decided, monotonic ns",
    "sent_ns": "When the command was sent, monotonic ns; 0: it was not",
    "ack_ns": "When the stimulator acknowledged it, monotonic ns; 0: it did not",
    "artifact_ns": "When the artifact was noticed, monotonic ns; 0: it was not",
    "amplitude_ua": "Microampere; nan: not known",
    "width_us": "Of one phase, microsecond; nan: not known",
}


def stimuli_table(ledger: np.ndarray, info: StreamInfo, first: int) -> Any:
    """One row per decision, sent or not, from the newest LEDGER records; `first` is the file's first sample number."""
    from hdmf.common import DynamicTable, ElementIdentifiers, VectorData, VectorIndex

    def column(name: str, text: str, data: Any) -> Any:
        return VectorData(name=name, description=text, data=data)

    def names(values: np.ndarray, known: tuple[str, ...]) -> list[str]:
        return [known[v] if 0 <= v < len(known) else "unknown" for v in values.tolist()]

    def words(values: np.ndarray) -> list[str]:
        return [v.decode("utf-8", "replace") for v in values.tolist()]

    columns = [
        column("timestamp", "When it was decided on: the time of `sample`, in seconds", (ledger["sample"] - first) / info.fs_hz),
        column("rule", "Name of the trigger; empty: a client asked", words(ledger["rule"])),
        column("pattern", "What was asked for", words(ledger["pattern"])),
        column("outcome", f"What became of it: {', '.join(OUTCOMES)}", names(ledger["outcome"], OUTCOMES)),
        column("reason", "Why it was refused, or failed", names(ledger["reason"], REASONS)),
        *(column(name, text, ledger[name]) for name, text in COLUMNS.items()),
    ]  # fmt: skip
    n = ledger["n_triggers"]
    taken = np.arange(ledger["trigger_unit"].shape[1]) < n[:, None]
    for name, text in (
        ("trigger_unit", "Live units whose spikes completed the rule, the newest ones"),
        ("trigger_sample", "Sample numbers of these spikes"),
    ):
        data = column(name, text, ledger[name][taken])
        columns += [data, VectorIndex(name=f"{name}_index", target=data, data=np.cumsum(n))]
    return DynamicTable(
        name="stimuli", description="The stimulus ledger: every decision to stimulate, sent or not", columns=columns,
        id=ElementIdentifiers(name="id", data=ledger["number"]),
    )  # fmt: skip
