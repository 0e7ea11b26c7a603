"""Stimulation artifacts: removed from a stream as it comes, or from traces that are all there."""

from spiked.clean.stim.cleaner import StimCleaner
from spiked.clean.stim.offline import remove_stim_artifacts
from spiked.clean.stim.recenter import recenter_stim_times

__all__ = ["StimCleaner", "recenter_stim_times", "remove_stim_artifacts"]
