"""Clocks: what a sample number of one stream is in another, with its error, while both go on."""
