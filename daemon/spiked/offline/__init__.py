"""Offline: Kilosort4, SLAy and the report, after the session."""
