"""Sorting: sequences, calibration and online assignment (RT-Sort)."""
