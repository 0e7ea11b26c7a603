"""Template matching: the live sorter `templates`, what it knows of every unit, and where that comes from."""
