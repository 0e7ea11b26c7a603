"""What a client gets when decisions come in two steps: when each step of a true spike was received, and how many early ones were withdrawn."""

from __future__ import annotations

from typing import Any

import numpy as np

from spiked.bench.figures import spread
from spiked.bench.latency import RECEIPT, Played
from spiked.bench.live import Receiver
from spiked.priority import raise_priority
from spiked_client.errors import ClientError
from spiked_client.order import Batch
from spiked_client.protocol import FATES, RESOLVED
from spiked_client.subscribe import SyncClient

NUMBERED = np.dtype([*RECEIPT.descr, ("number", "<i8")])


class BothSteps(Receiver):
    """Also notes early spikes, and what became of them."""

    def __init__(self, control_port: int, priority: str) -> None:
        super().__init__(control_port, priority)
        self._early, self._resolved = [np.zeros(0, NUMBERED)], [np.zeros(0, RESOLVED)]

    def run(self) -> None:
        self.priority = raise_priority("client", self.priority)
        try:
            with SyncClient(control_port=self._port, wait_s=60.0) as client:
                subscription = client.messages(("spikes", "early"))
                while not self.done.is_set():
                    batch = subscription.get(0.5)
                    if batch is not None and batch.message.kind == "spikes":
                        self._note(batch.received_ns, batch.header, batch.spikes)
                    elif batch is not None:
                        self._note_early(batch)
                self.counters = dict(subscription.counters)
        except ClientError as e:
            self.error = str(e)

    def _note_early(self, batch: Batch) -> None:
        part = np.zeros(len(batch.early), NUMBERED)
        for name in ("sample", "unit", "number"):
            part[name] = batch.early[name]
        part["received"] = batch.received_ns
        part["arrival"], part["published"] = batch.stamps.get("arrival", 0), batch.stamps.get("published", 0)
        self._early.append(part)
        self._resolved.append(batch.resolved)

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """NUMBERED receipts of early spikes, and RESOLVED records, so far."""
        return np.concatenate(self._early), np.concatenate(self._resolved)


def figures(played: Played, receiver: BothSteps, start: int, stop: int, near: Any) -> dict[str, Any]:
    """Of the samples [start, stop): ms from trough to receipt, of final spikes and of early ones that are true, and what became of these.

    `near(samples)` gives the true trough of each, -1 where there is none.
    """
    early, resolved = receiver.steps()
    final = receiver.receipts()
    early, final = (a[(a["sample"] >= start) & (a["sample"] < stop)] for a in (early, final))
    fate = dict(zip(resolved["number"].tolist(), resolved["fate"].tolist(), strict=True))
    fates = [FATES[fate[n]] if n in fate else "open" for n in early["number"].tolist()]
    n = {word: fates.count(word) for word in ("confirmed", "withdrawn", "open")}
    known = n["confirmed"] + n["withdrawn"]
    ms = {name: _ms(played, a, near) for name, a in (("final", final), ("early", early))}
    return {
        "trough_to_client_ms": ms, "lead_ms": spread(_lead(early, final, resolved) / 1e6), "final_spikes": len(final), "early_spikes": len(early), **n,
        "told_early_share": round(n["confirmed"] / max(len(final), 1), 4), "withdrawn_share": round(n["withdrawn"] / max(known, 1), 4),
        "withdrawn_near_a_true_spike": int((near(early["sample"][[f == "withdrawn" for f in fates]]) >= 0).sum()),
    }  # fmt: skip


def _ms(played: Played, receipts: np.ndarray, near: Any) -> dict[str, Any]:
    trough = near(receipts["sample"])
    true = trough >= 0
    return spread((receipts["received"][true] - played.existed_ns(trough[true])) / 1e6)


def _lead(early: np.ndarray, final: np.ndarray, resolved: np.ndarray) -> np.ndarray:
    """How much sooner a client had the early word than the final one, ns, per spike that was told in both steps."""
    came = {(int(f["sample"]), int(f["unit"])): int(f["received"]) for f in final}
    of = {int(e["number"]): int(e["received"]) for e in early}
    rows = ((int(r["number"]), (int(r["sample"]), int(r["unit"]))) for r in resolved)
    return np.array([came[key] - of[n] for n, key in rows if n in of and key in came], np.float64)
