"""Curation of any sorting, step by step: which units stay, by which figure, and a history that gives the same result again.

from spiked.offline.curation import curate, replay

result = curate("yesterday/phy", ["num_spikes >= 30", "isi_violations <= 1 %", "snr >= 5", "merge_duplicates"])
result.kept, result.steps[1].metric, result.steps[1].mask
result.save("yesterday.curated")
replay("yesterday.curated/curation.json", "yesterday/phy")
"""

from spiked.offline.curation.curate import DEFAULT, Curation, curate, replay
from spiked.offline.curation.steps import Keep, MergeDuplicates, StepResult, step_of

__all__ = ["DEFAULT", "Curation", "Keep", "MergeDuplicates", "StepResult", "curate", "replay", "step_of"]
