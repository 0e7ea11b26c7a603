"""spiked: a daemon that records, sorts and publishes live electrophysiology."""

__version__ = "0.1.0"
