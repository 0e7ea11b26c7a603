"""`make test` runs four at a time: what only computes (real sorters on files, training), niced, in two parts, beside two that have streams to
keep up with."""

from __future__ import annotations

from pathlib import Path

import pytest

OFFLINE = ("test_offline_c", "test_offline_f", "test_offline_g", "test_offline_r")  # half of what takes long
PATIENT = (
    "test_offline_", "test_report_", "test_templates_find", "test_templates_carry", "test_templates_identity", "test_models_training",
    "test_models_synthesis", "test_sort_", "test_stim_", "test_docs_", "test_fuzz", "test_clocks", "test_record_", "test_recordings_", "test_import_rtsort",
    "test_rig_doctor", "test_rig_init", "test_rig_units", "test_security_files", "test_act_random", "test_compiled", "test_portable",
)  # fmt: skip
BESIDE = (
    "test_rig_",
    "test_security",
    "test_session",
    "test_showing",
    "test_simulate",
    "test_sources_",
    "test_web",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by file. What is niced may wait long for its turn: a test may take 15 minutes there before it is given up."""
    for item in items:
        name = Path(item.path).name
        if name.startswith((*OFFLINE, *PATIENT)):
            item.add_marker("offline" if name.startswith(OFFLINE) else "patient")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))
        elif name.startswith(BESIDE):
            item.add_marker("beside")
