"""spiked: a daemon that records, sorts and publishes live electrophysiology."""

from pathlib import Path

from spiked.compiled import keep

__version__ = "0.1.0"

keep(Path(__file__).parent)
