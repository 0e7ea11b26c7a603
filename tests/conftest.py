"""Tests that only compute (real sorters on files, training) run niced beside those that have a stream to keep up with."""

from __future__ import annotations

from pathlib import Path

import pytest

PATIENT = (
    "test_offline_", "test_report_", "test_templates_find", "test_templates_carry", "test_templates_identity", "test_models_training",
    "test_models_synthesis", "test_sort_", "test_stim_", "test_docs_", "test_fuzz", "test_clocks", "test_record_", "test_recordings_", "test_import_rtsort",
    "test_rig_doctor", "test_rig_init", "test_rig_units", "test_security_files",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by file."""
    for item in items:
        if Path(item.path).name.startswith(PATIENT):
            item.add_marker("patient")
