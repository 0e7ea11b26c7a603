"""Cleaning: baseline, filter and artifact removal as streaming objects."""
